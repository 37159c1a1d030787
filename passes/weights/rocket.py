"""ROCKET: linear layers as two factors, as small as each layer bears, chosen together by a knapsack.

With X the layer's inputs on calibration data and S such that S^T S = X^T X, the errors of the layer's outputs are those
of Y = S W^T in plain squares. Its r leading left singular vectors U and the coefficients V = U^T Y give

    W^T ~ (S^-1 U) V        r inputs + (r / kappa) outputs numbers

where each output keeps r / kappa of its r coefficients (by importance in both spaces), and U is fitted again to those.

    before   y = W x + b            after   y = L (R x) + b

For every layer and every share c that may be removed from it the error is known at once; the multiple-choice knapsack
takes one c for each layer so that the sum of relative errors is least under the budget. A layer may also stay as it is,
which the reference implementation does not allow.

Runtimes multiply by zeros, too. With kappa = 1 both factors are dense: files and compute shrink alike (and the method
is a whitened truncated SVD). With the paper's kappa = 2 more rank fits into the same count of numbers, but the program
that runs holds r (inputs + outputs) of them: at c = 0.2 that is *more* than a square layer had. Both figures are in the
plan, and in the report.

Source: ROCKET (2026), sections on whitening, sparse factors and budget allocation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from ...ir.errors import PipelineError, PostconditionError, PreconditionError
from ...ir.program import Program
from ..base import Case, Context, Effect, Pass, Stats, option, same_outputs
from ..search.allocators.knapsack import knapsack
from ..search.budget import Meter, sizes_of
from ..search.levels import Level, Place
from ..search.linear_apply import apply_linear
from ..search.linear_levels import LinearSettings, linear_places
from ..search.linear_sites import LinearSite, linear_sites
from ..search.linear_solve import counted_bytes
from ..search.linear_texts import parse
from ..search.place_table import Table
from ..search.plan import LINEAR, Decision, Plan
from ..search.recipe import out_of_reach
from .planted import low_rank_case


@dataclass(frozen=True, kw_only=True)
class Rocket(Pass):
    """Replace linear layers by two factors each, of ranks chosen together by a knapsack (ROCKET).

    Raises:
        PipelineError: none or both of ``ratio`` and ``target`` are given.
        PreconditionError: the model has no linear layers in blocks, the budget is out of reach, or calibration data is
            missing or bad.
    """

    name: ClassVar[str] = "rocket"
    effect: ClassVar[Effect] = Effect.APPROXIMATE
    paper: ClassVar[str] = "ROCKET, 2026"

    ratio: float | None = option(None, ge=0, lt=1, help="share of the numbers in the blocks' linear layers that goes")
    target: float | None = option(None, gt=0, help="how many parameters the whole model may count")
    kappa: float = option(
        1.0, ge=1, help="coefficients over those that stay; above 1 (paper: 2) runs slower than it counts"
    )
    step: float = option(0.05, gt=0, lt=1, help="share of a layer that each level removes more than the one before")
    most: float = option(0.7, gt=0, lt=1, help="share that may be removed from one layer")
    alpha: float | None = option(None, gt=0, help="leave out levels whose error is above the mean error times this")

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("ratio", "target") if getattr(self, name) is not None]
        if len(given) != 1:
            raise PipelineError(
                f"'{self.name}' needs one way to say how much to remove, got {' and '.join(given) or 'none'}",
                expected="one of ratio, target",
                remedy=f"for example {self.name}{{ratio=0.2}}",
            )

    def check(self, program: Program, ctx: Context) -> None:
        """Refuse programs without linear layers, and to start without data."""
        sites, blocked = linear_sites(program, ctx.structure(program))
        if not sites:
            reasons = ", ".join(f"{reason} ({count})" for reason, count in list(blocked.items())[:3])
            raise PreconditionError(
                "the model has no linear layers that can be factorised" + (f"; left out: {reasons}" if reasons else ""),
                pass_name=self.name,
                expected="linear layers in the blocks of a residual stream",
            )
        if not ctx.calibration and self.ratio != 0:
            raise PreconditionError(
                "whitening needs calibration data",
                pass_name=self.name,
                remedy="pass calibration= (or --calibration FILE)",
            )

    def run(self, program: Program, ctx: Context) -> Stats:
        """Solve all levels, choose, solve the chosen ones again, and write them into the program."""
        sites, blocked = linear_sites(program, ctx.structure(program))
        places = self._places(program, sites, ctx)
        whole, total = sum(place.levels[0].cost for place in places), program.parameter_count
        meter = Meter(program, "params", sizes_of(program, ctx))
        table = Table(places, meter, blocked, whole=whole, total=total, added_up=True)
        state, limit, notes = self._choose(table)
        decisions = [_decision(place, number) for place, number in zip(places, state, strict=True)]
        plan = Plan(tuple(decisions), self.to_text(), program=program.fingerprint(), blocked=blocked)
        counted = program.parameter_count - sum(
            place.levels[0].cost - place.levels[number].cost for place, number in zip(places, state, strict=True)
        )
        figures: dict[str, Any] = {
            "unit": "params",
            "limit": limit,
            "before": program.parameter_count,
            "after": int(counted),
            "disk_bytes_before": program.weight_nbytes,
            "disk_bytes_after": program.weight_nbytes - _saved_bytes(program, sites, decisions),
            "macs_before": int(program.cost(sizes_of(program, ctx)).macs),
        }
        notes += apply_linear(program, decisions, ctx, self.name)
        figures["macs_after"] = int(program.cost(sizes_of(program, ctx)).macs)
        stats = Stats(hits=len(plan.changes), attempts=len(places) + sum(blocked.values()), misses=dict(blocked))
        stats.plan = plan.with_budget(**figures).to_json()
        stats.notes += notes
        if plan.changes:
            stats.notes.append(
                f"counted parameters {figures['before']:,} -> {figures['after']:,}, held by the program "
                f"{program.parameter_count:,}; multiply-adds {figures['macs_before']:,} -> {figures['macs_after']:,}"
            )
        else:
            stats.notes.append("nothing to remove: the model fits the budget")
        return stats

    def _places(self, program: Program, sites: Sequence[LinearSite], ctx: Context) -> list[Place]:
        if self.ratio == 0:  # no level is needed, and neither is data
            whole = [(Level("untouched", site.size, 0.0),) for site in sites]
            return [
                Place(LINEAR, site.label, site.block, levels, site.first, site.index)
                for site, levels in zip(sites, whole, strict=True)
            ]
        settings = LinearSettings(kappa=self.kappa, share=self.step, most=self.most)
        places, _ = linear_places(program, ctx, "rank", settings, weights=False)
        return places if self.alpha is None else without_worst(places, self.alpha)

    def _choose(self, table: Table) -> tuple[Sequence[int], float, list[str]]:
        """A level for each place, the limit, and notes."""
        levels, limit = table.levels(), table.limit(self.ratio, self.target)
        smallest = levels.cost(levels.smallest())
        if smallest > limit:
            remedy = "most=" if self.alpha is None else "most= or alpha="
            raise out_of_reach(table, limit, smallest, "params", remedy)
        found = knapsack(levels, limit)
        return found.state, limit, list(found.notes)

    def ensure(self, before: Program, program: Program, stats: Stats) -> None:
        """The interface must be untouched; with dense factors nothing may have become larger."""
        same_outputs(before, program, self.name)
        if self.kappa == 1 and program.parameter_count > before.parameter_count:
            raise PostconditionError("the program has more parameters than before", pass_name=self.name)

    @classmethod
    def neutral(cls) -> Self:
        """Removing nothing is the baseline."""
        return cls(ratio=0.0)

    @classmethod
    def planted(cls) -> Case:
        """One of four layers has exactly rank 2: it must be the one that is factorised, at no loss."""
        return low_rank_case(cls(ratio=0.17))


def without_worst(places: Sequence[Place], alpha: float) -> list[Place]:
    """The places without levels whose error is above the mean error of all levels times ``alpha``."""
    errors = [level.error for place in places for level in place.levels[1:] if level.error is not None]
    finite = [error for error in errors if math.isfinite(error)]
    most = alpha * math.fsum(finite) / max(len(finite), 1)
    return [
        replace(place, levels=tuple(level for level in place.levels if level.error is not None and level.error <= most))
        for place in places
    ]


def _decision(place: Place, number: int) -> Decision:
    level = place.levels[number]
    text, reason = (
        ("", "knapsack: stays as it is") if not number else (level.label, f"relative error {level.error:.3g}")
    )
    return Decision(LINEAR, place.index, place.label, place.block, 1, level=text, reason=reason)


def _saved_bytes(program: Program, sites: Sequence[LinearSite], decisions: Sequence[Decision]) -> int:
    """What the decisions save in a file that leaves zeros out."""
    saved = 0
    for site, decision in zip(sites, decisions, strict=True):
        if decision.level:
            stored = program.weights[site.weight]
            level = parse(decision.level, site.outputs, site.inputs)
            saved += stored.nbytes - counted_bytes(level, site, stored.dtype)
    return saved
