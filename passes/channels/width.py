"""What all passes that cut channels under a budget check: one way to say how much, data, an untouched interface."""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.errors import PipelineError, PostconditionError, PreconditionError
from ...ir.program import Program
from ..base import Context, Pass, Stats, same_outputs
from ..search.recipe import Recipe
from ..search.scores import CHANNEL_SCORES


@dataclass(frozen=True, kw_only=True)
class WidthPass(Pass):
    """Base of passes that follow a `Recipe`; their options ``ratio`` and ``target`` say how much goes.

    Raises:
        PipelineError: none or both of ``ratio`` and ``target`` are given.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        recipe = self.recipe()
        given = [name for name in ("ratio", "target") if getattr(recipe, name) is not None]
        if len(given) != 1:
            raise PipelineError(
                f"'{self.name}' needs one way to say how much to remove, got {' and '.join(given) or 'none'}",
                expected="one of ratio, target",
                remedy=f"for example {self.name}{{ratio=0.25}}",
            )

    def recipe(self) -> Recipe:
        """The options as a recipe."""
        raise NotImplementedError

    def check(self, program: Program, ctx: Context) -> None:
        """Refuse to start without the data that the score or the compensation needs."""
        recipe = self.recipe()
        needs = [f"the score '{recipe.score}'"] if CHANNEL_SCORES[recipe.score].calibration else []
        needs += [f"the compensation '{recipe.compensation}'"] if recipe.compensation != "none" else []
        if needs and not ctx.calibration and recipe.ratio != 0:
            limit = f"ratio={recipe.ratio:g}" if recipe.target is None else f"target={recipe.target:.12g}"
            limit += f" budget={recipe.unit}" if recipe.unit != "params" else ""
            raise PreconditionError(
                f"{' and '.join(needs)} need{'s' if len(needs) == 1 else ''} calibration data",
                pass_name=self.name,
                remedy="pass calibration= (or --calibration FILE), or use "
                f"compress{{{limit} score=magnitude compensation=none}}",
            )

    def ensure(self, before: Program, program: Program, stats: Stats) -> None:
        """The interface must be untouched, and nothing have become larger."""
        same_outputs(before, program, self.name)
        if stats.hits and program.parameter_count > before.parameter_count:
            raise PostconditionError("the program has more parameters than before", pass_name=self.name)
