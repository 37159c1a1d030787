"""Apply a plan that was saved, or written by hand.

    graphlathe optimize model.onnx -p "flap{ratio=0.3}" --calibration text.txt --plan plan.json -o small.onnx
    graphlathe optimize model.onnx -p "apply-plan{path=plan.json}" --calibration text.txt -o small.onnx

A plan says for every place what is removed, what is kept, and why; see docs/compression.md. After editing ``removed``
it is still a plan. Weights are not in it: compensation is fitted anew on the calibration data.

Source: none; it carries out what other passes chose.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from ...ir.program import Program
from ..base import Context, Effect, Pass, Stats, option, same_outputs
from .apply import apply_plan
from .plan import Plan


@dataclass(frozen=True, kw_only=True)
class ApplyPlan(Pass):
    """Remove what a saved plan says.

    Raises:
        InputError: the file is no plan.
        PreconditionError: the plan does not fit the model, or its compensation lacks calibration data.
    """

    name: ClassVar[str] = "apply-plan"
    effect: ClassVar[Effect] = Effect.APPROXIMATE
    paper: ClassVar[str] = "plans of other passes"

    path: str | None = option(None, help="the plan's file; none: an empty plan")
    sequential: bool = option(True, help="whether compensation of later layers sees what was done to earlier ones")

    def run(self, program: Program, ctx: Context) -> Stats:
        """Read the plan, find its places, cut, compensate, drop."""
        plan = Plan(()) if self.path is None else Plan.load(Path(self.path))
        before = program.parameter_count
        applied = apply_plan(program, plan, ctx, self.name, sequential=self.sequential)
        stats = Stats(hits=applied.done, attempts=len(plan.decisions), plan=plan.to_json())
        stats.notes += ["no path was given, so the plan is empty"] if self.path is None else []
        stats.notes += applied.notes
        stats.notes += [f"not compensated: {reason} ({count}x)" for reason, count in applied.skipped.items()]
        stats.notes.append(f"{before:,} parameters before, {program.parameter_count:,} after")
        return stats

    def ensure(self, before: Program, program: Program, stats: Stats) -> None:
        """The interface must be untouched."""
        same_outputs(before, program, self.name)

    @classmethod
    def neutral(cls) -> Self:
        """An empty plan changes nothing."""
        return cls()
