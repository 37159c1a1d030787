"""ShortGPT: drop the blocks that turn the residual stream least, one by one or as a run of neighbours.

    BI_i = 1 - E[cos(x_i, x_{i+1})]        one by one: the lowest go
    1 - E[cos(x_s, x_{s+k})]               as a window: the k neighbours that together turn the stream least

Influences of single blocks do not add up (each of several blocks may turn the stream the same way), so the window is
often the better choice at equal size; both take one forward pass over the calibration data.

    before   x0 ─ block 0 ─ x1 ─ block 1 ─ x2 ─ block 2 ─ x3          after   x0 ─ block 0 ─ x1 ─ block 2' ─ x3

Source: ShortGPT (Men et al. 2024, arXiv 2403.03853), eq. 1; the window: Gromov et al. 2024 (arXiv 2403.17887).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from ...ir.errors import PipelineError, PostconditionError, PreconditionError
from ...ir.program import Program
from ...ir.rewrite import Rewriter
from ..base import Case, Context, Effect, Pass, Prop, Stats, option, same_outputs
from ..search.apply import drop
from ..search.correct import correct
from ..search.left_behind import branches_of, left_for_outputs
from ..search.plan import Decision, Plan
from ..search.scores.block_influence import block_influence
from ..search.scores.window import best_window
from ..search.units import Unit, removable_units
from .planted import identity_block_case


@dataclass(frozen=True, kw_only=True)
class ShortGpt(Pass):
    """Drop the blocks that turn the residual stream least (ShortGPT, arXiv 2403.03853).

    Raises:
        PipelineError: none or both of ``ratio`` and ``blocks`` are given.
        PreconditionError: no residual stream, more blocks than can be dropped, or no calibration data.
    """

    name: ClassVar[str] = "shortgpt"
    effect: ClassVar[Effect] = Effect.APPROXIMATE
    needs: ClassVar[frozenset[Prop]] = frozenset({Prop.SITES, Prop.CALIBRATION})
    paper: ClassVar[str] = "ShortGPT, arXiv 2403.03853"

    ratio: float | None = option(None, ge=0, lt=1, help="share of the blocks to drop, rounded to the nearest number")
    blocks: int | None = option(None, ge=0, help="how many blocks to drop")
    window: bool = option(False, help="drop neighbours, scored as one")
    rank: int = option(0, ge=0, help="rank of a map, fitted in closed form, in the place of what is dropped; 0: none")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.ratio is None) == (self.blocks is None):
            raise PipelineError(
                f"'{self.name}' needs one way to say how much to drop",
                expected="one of ratio, blocks",
                remedy="for example shortgpt{ratio=0.2}",
            )

    def check(self, program: Program, ctx: Context) -> None:
        """Refuse more blocks than can be dropped."""
        units = removable_units(ctx.structure(program), "block")
        free = sum(not unit.blocked for unit in units)
        if self._wanted(units) > free:
            reasons = sorted({unit.blocked for unit in units if unit.blocked})
            raise PreconditionError(
                f"{self._wanted(units)} of {len(units)} blocks are to go, but only {free} can be dropped",
                pass_name=self.name,
                expected=f"at most {free}" + (f"; blocked: {'; '.join(reasons[:3])}" if reasons else ""),
            )

    def run(self, program: Program, ctx: Context) -> Stats:
        """Score the blocks or windows, and drop."""
        units = removable_units(ctx.structure(program), "block")
        stats = Stats(attempts=len(units))
        for unit in units:
            if unit.blocked:
                stats.miss(unit.blocked)
        chosen, scores = self._choose(program, units, ctx)
        before = program.parameter_count
        fingerprint = program.fingerprint()
        rewriter = Rewriter(program, self.name)
        dropped = [units[index] for index in chosen]
        branches = branches_of(ctx.structure(program)) if dropped else {}
        if self.rank and dropped:
            made, notes = correct(program, dropped, self.rank, ctx, rewriter)
            stats.notes += [*notes, f"{made} maps of rank {self.rank} in the place of {len(dropped)} dropped blocks"]
        else:
            drop(rewriter, dropped)
        stats.notes += left_for_outputs(program, dropped, branches)
        if not dropped and self.ratio:
            stats.notes.append(
                f"nothing to remove: ratio={self.ratio:g} of {len(units)} blocks is less than half of one"
            )
        stats.hits = len(chosen)
        why = "one window" if self.window else "lowest block influence"
        decisions = tuple(
            Decision("drop-block", u.index, u.label, u.index, 1, (0,) if u.index in chosen else (), "", why,
                     (scores[u.index],) if u.index in scores else None)
            for u in units if not u.blocked
        )  # fmt: skip
        budget = {"unit": "params", "before": before, "after": program.parameter_count}
        plan = Plan(decisions, self.to_text(), rank=self.rank, program=fingerprint, budget=budget, blocked=stats.misses)
        stats.plan = plan.to_json()
        return stats

    def _wanted(self, units: Sequence[Unit]) -> int:
        return self.blocks if self.blocks is not None else round((self.ratio or 0.0) * len(units))

    def _choose(self, program: Program, units: Sequence[Unit], ctx: Context) -> tuple[set[int], dict[int, float]]:
        wanted = self._wanted(units)
        if not wanted:
            return set(), {}
        if self.window:
            chosen, scores = best_window(program, units, wanted, ctx)
            self._check_numbers(scores)
            return set(chosen), scores
        free = [unit for unit in units if not unit.blocked]
        scores = block_influence(program, free, (), ctx)
        self._check_numbers(scores)
        return set(sorted((unit.index for unit in free), key=lambda i: (scores[i], i))[:wanted]), scores

    def _check_numbers(self, scores: Mapping[int, float]) -> None:
        wrong = next((index for index, score in scores.items() if not math.isfinite(score)), None)
        if wrong is not None:
            raise PreconditionError(
                f"how much block {wrong} turns the stream is not a number",
                pass_name=self.name,
                remedy="look for NaN or infinity in the calibration data and the weights",
            )

    def ensure(self, before: Program, program: Program, stats: Stats) -> None:
        """The interface must be untouched, and no weight be new but those of maps."""
        same_outputs(before, program, self.name)
        if not self.rank and not program.used_weights() <= before.used_weights():
            raise PostconditionError("new weights appeared", pass_name=self.name)

    @classmethod
    def neutral(cls) -> Self:
        """Dropping nothing is the baseline."""
        return cls(blocks=0)

    @classmethod
    def planted(cls) -> Case:
        """One of four blocks adds exactly zero to the stream; it must be the one that goes."""
        return identity_block_case(cls(blocks=1))
