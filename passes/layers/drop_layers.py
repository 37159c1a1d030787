"""Remove whole residual blocks, or their attention or MLP branches.

A residual block computes ``y = x + f(x)``. Neighbouring blocks of a deep network change their stream so little that
some can go entirely: every reader of ``y`` reads ``x`` instead, and ``f`` with its weights becomes dead.

    before   x ──┬─ f ─ + ── y ── g          after   x ── g
                 └──────┘

Source: ShortGPT (Men et al. 2024, arXiv 2403.03853), which scores a block by its influence ``1 - E[cos(x, y)]``; the
``loss`` score and the greedy loop with re-scoring follow the observation that influences do not add up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ...ir.errors import PipelineError, PostconditionError, PreconditionError
from ...ir.program import Program
from ...ir.rewrite import Rewriter
from ..base import Case, Context, Effect, Pass, Prop, Stats, option, same_outputs
from ..search.apply import drop
from ..search.left_behind import branches_of, left_for_outputs
from ..search.plan import Decision, Plan
from ..search.scores import SCORES, Scores
from ..search.units import GRANULARITIES, Unit, remaining_weights, removable_units, replacements
from .planted import identity_block_case


@dataclass(frozen=True, kw_only=True)
class DropLayers(Pass):
    """Remove the residual blocks (or branches) that matter least (ShortGPT, arXiv 2403.03853).

    What is removed is given by ``indices``, or chosen by ``score`` on calibration data until ``ratio`` of the units
    are gone or the weights fit ``target_params`` or ``target_bytes``.

    Raises:
        PipelineError: two ways to choose are given at once.
        PreconditionError: no residual stream, an index that does not exist or cannot be dropped, a target that
            cannot be reached, or no calibration data where a score needs it.
    """

    name: ClassVar[str] = "drop-layers"
    effect: ClassVar[Effect] = Effect.APPROXIMATE
    needs: ClassVar[frozenset[Prop]] = frozenset({Prop.SITES})
    paper: ClassVar[str] = "ShortGPT, arXiv 2403.03853"

    indices: tuple[int, ...] | None = option(None, ge=0, help="the units to remove, counted over all streams in order")
    ratio: float | None = option(None, ge=0, lt=1, help="share of the units to remove, rounded to the nearest number")
    target_params: int | None = option(None, gt=0, help="remove units until at most this many parameters are left")
    target_bytes: int | None = option(None, gt=0, help="remove units until the weights take at most this many bytes")
    granularity: str = option("block", choices=GRANULARITIES, help="what a unit is")
    score: str = option("block-influence", choices=tuple(SCORES), help="how units are ranked")
    greedy: bool = option(False, help="score again after every removal instead of once")

    def __post_init__(self) -> None:
        super().__post_init__()
        ways = [n for n in ("indices", "ratio", "target_params", "target_bytes") if getattr(self, n) is not None]
        if len(ways) != 1:
            raise PipelineError(
                f"'{self.name}' needs one way to say how much to remove, got {', '.join(ways) or 'none'}",
                expected="one of indices, ratio, target_params, target_bytes",
                remedy="for example drop-layers{ratio=0.2}",
            )

    def check(self, program: Program, ctx: Context) -> None:
        """Refuse programs without units, and indices that cannot be dropped."""
        units = removable_units(ctx.structure(program), self.granularity)
        if not units:
            raise PreconditionError(
                f"no {self.granularity} of a residual stream was found",
                pass_name=self.name,
                remedy="`graphlathe dump --format tree MODEL` shows what was recognised",
            )
        for index in self.indices or ():
            if index >= len(units):
                raise PreconditionError(
                    f"there is no {self.granularity} {index}", pass_name=self.name, expected=f"0 to {len(units) - 1}"
                )
            if units[index].blocked:
                raise PreconditionError(
                    f"{units[index].label} cannot be dropped: {units[index].blocked}",
                    pass_name=self.name,
                    node=units[index].replaced.name,
                )

    def run(self, program: Program, ctx: Context) -> Stats:
        """Choose the units, replace each by the value before it, and erase what nothing reads any more."""
        units = removable_units(ctx.structure(program), self.granularity)
        stats = Stats(attempts=len(units))
        for unit in units:
            if unit.blocked:
                stats.miss(unit.blocked)
        chosen, scores = self._choose(program, units, ctx)
        fingerprint = program.fingerprint()
        branches = branches_of(ctx.structure(program)) if chosen else {}
        drop(Rewriter(program, self.name), chosen)
        stats.notes += left_for_outputs(program, chosen, branches)
        stats.hits = len(chosen)
        stats.plan = self._plan(units, chosen, scores, fingerprint)
        if not chosen and self.indices != ():
            why = "they fit the target" if self.ratio is None else f"ratio {self.ratio}"
            stats.notes.append(f"nothing to remove: {len(units)} units of kind '{self.granularity}', {why}")
        return stats

    def _choose(self, program: Program, units: Sequence[Unit], ctx: Context) -> tuple[list[Unit], Scores]:
        if self.indices is not None:
            return [units[index] for index in dict.fromkeys(self.indices)], {}
        free = [unit for unit in units if not unit.blocked]
        wanted = round(self.ratio * len(units)) if self.ratio is not None else len(free)
        if wanted > len(free):
            raise PreconditionError(
                f"ratio {self.ratio} of {len(units)} is {wanted}, but only {len(free)} can be dropped",
                pass_name=self.name,
            )
        scores: Scores = {}
        chosen: list[Unit] = []
        while len(chosen) < wanted and not self._fits(program, chosen):
            left = [unit for unit in free if unit not in chosen]
            if not left:
                break
            if self.greedy or not scores:
                scores |= self._scored(program, left, chosen, ctx)
            chosen.append(min(left, key=lambda unit: scores[unit.index]))
        if self.ratio is None and not self._fits(program, chosen):
            raise PreconditionError(
                f"the target is out of reach: {self._size(program, chosen):,} are left without all {len(chosen)} units",
                pass_name=self.name,
                expected=f"at most {self.target_params or self.target_bytes:,}",
            )
        return chosen, scores

    def _scored(self, program: Program, left: Sequence[Unit], chosen: Sequence[Unit], ctx: Context) -> Scores:
        if not ctx.calibration:
            raise PreconditionError(
                f"the score '{self.score}' needs calibration data",
                pass_name=self.name,
                remedy="pass calibration= (or --calibration), or name the blocks with indices=",
            )
        scores = SCORES[self.score](program, left, chosen, ctx)
        for unit in left:
            if math.isnan(scores[unit.index]):
                raise PreconditionError(
                    f"the score '{self.score}' of {unit.label} is not a number",
                    pass_name=self.name,
                    node=unit.replaced.name,
                    remedy="look for NaN or infinity in the calibration data and the weights",
                )
        return scores

    def _fits(self, program: Program, chosen: Sequence[Unit]) -> bool:
        target = self.target_params or self.target_bytes
        return target is not None and self._size(program, chosen) <= target

    def _size(self, program: Program, chosen: Sequence[Unit]) -> int:
        left = [program.weights[name] for name in remaining_weights(program, replacements(chosen))]
        return sum(w.numel if self.target_params else w.nbytes for w in left)

    def _plan(self, units: Sequence[Unit], chosen: Sequence[Unit], scores: Scores, fingerprint: str) -> dict[str, Any]:
        gone = {unit.index for unit in chosen}
        why = f"lowest {self.score}" if scores else "given"
        decisions = tuple(
            Decision(f"drop-{self.granularity}", u.index, u.label, None, 1, (0,) if u.index in gone else (), "", why)
            for u in units
            if not u.blocked
        )
        return Plan(decisions, self.to_text(), program=fingerprint).to_json() | {
            "granularity": self.granularity,
            "removed": [unit.index for unit in chosen],
            "kept": [unit.index for unit in units if unit.index not in gone],
            "score": self.score if scores else None,
            "scores": {str(index): scores[index] for index in sorted(scores)},
            "blocked": {str(unit.index): unit.blocked for unit in units if unit.blocked},
        }

    def ensure(self, before: Program, program: Program, stats: Stats) -> None:
        """The interface must be untouched, and fewer weights be read when anything was removed."""
        same_outputs(before, program, self.name)
        if not program.used_weights() <= before.used_weights():
            raise PostconditionError("new weights appeared", pass_name=self.name)

    @classmethod
    def neutral(cls) -> Self:
        """Removing nothing is the baseline."""
        return cls(ratio=0.0)

    @classmethod
    def planted(cls) -> Case:
        """One of four blocks adds exactly zero to the stream; it must be the one that goes."""
        return identity_block_case(cls(ratio=0.25))
