"""COMP: drop the blocks that matter least, then cut the neurons that the others can do the work of, then tune a mask.

    1. blocks      the lowest block influence goes, ``depth`` of them
    2. neurons     hidden channels of the MLPs that are left: the output error that remains when channel j is removed
                   and the others are refitted as well as they can, ||W[:, j]||² / [H⁻¹]_jj  with  H = XᵀX + λI
    3. mask        a real factor for every neuron that stays, by damped least squares against the old output, folded
                   into its column

Nothing is trained. **The paper's own importance for dense layers (its "matrix condition") was not available to us**;
the score of step 2 is a substitute of ours with the same purpose, and figures of the paper must not be expected of it.

Source: COMP (arXiv 2501.15255), for the three steps; the score is the saliency of Optimal Brain Surgeon (Hassibi and
Stork 1993), the mask that of Kwon et al. 2022 (arXiv 2204.09656).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from ...ir.program import Program
from ..base import Case, Context, Effect, Stats, option
from ..layers.shortgpt import ShortGpt
from ..search.budget import UNITS
from ..search.choose import carry_out, compress, make_plan
from ..search.plan import Decision, Plan
from ..search.recipe import Recipe, table_of
from ..search.same_site import Uncut
from ..search.sites import channel_sites
from ..search.units import removable_units
from .planted import proportional_channels_case
from .width import WidthPass


@dataclass(frozen=True, kw_only=True)
class Comp(WidthPass):
    """Drop blocks, cut neurons, tune a mask; nothing is trained (after COMP, arXiv 2501.15255, with our own score).

    Raises:
        PipelineError: none or several of ``ratio`` and ``target`` are given.
        PreconditionError: the model has no MLPs, the budget is out of reach, or calibration data is missing or bad.
    """

    name: ClassVar[str] = "comp"
    effect: ClassVar[Effect] = Effect.APPROXIMATE
    paper: ClassVar[str] = "COMP, arXiv 2501.15255 (the importance of neurons is our substitute)"

    depth: float = option(0.0, ge=0, lt=1, help="share of the blocks that is dropped first")
    ratio: float | None = option(None, ge=0, lt=1, help="share of what the MLPs cost that goes, blocks included")
    target: float | None = option(None, gt=0, help="what the whole model may cost, in the unit of the budget")
    budget: str = option("params", choices=UNITS, help="what is bounded")
    score: str = option("optimal-compensation", choices=("optimal-compensation", "condition"), help="of neurons")
    multiple: int = option(1, ge=1, help="channels that stay of a cut MLP are a multiple of this")

    def recipe(self) -> Recipe:
        """Step 2 and 3."""
        return Recipe(
            kinds=("mlp",),
            score=self.score,
            allocator="global-threshold",
            compensation="mask-tuning",
            unit=self.budget,
            ratio=self.ratio,
            target=self.target,
            multiple=self.multiple,
            standardize=True,
            per_saving=True,
        )

    def run(self, program: Program, ctx: Context) -> Stats:
        """Drop, score, cut, tune."""
        recipe = self.recipe()
        table = table_of(program, recipe, ctx)
        blocks = removable_units(ctx.structure(program), "block")
        wanted = 0 if recipe.ratio == 0 else round(self.depth * len(blocks))
        if not wanted:
            return compress(program, recipe, ctx, self.to_text(), name=self.name, table=table)
        # Neurons are scored in the model without the blocks, and found again in the whole one: one plan holds all.
        shorter = program.clone()
        data = replace(ctx, _structure=None)
        first = ShortGpt(blocks=wanted)
        first.check(shorter, data)
        dropped = Plan.from_json(first.run(shorter, data).plan)
        rest = replace(recipe, ratio=None, target=table.limit(recipe.ratio, recipe.target))
        smaller = table_of(shorter, rest, data)
        plan = make_plan(shorter, rest, data, self.to_text(), name=self.name, table=smaller)
        neurons = _found_again(plan.decisions, shorter, program, data, ctx)
        whole = replace(plan, decisions=(*dropped.decisions, *neurons), program=program.fingerprint())
        whole = whole.with_budget(before=table.total)
        if recipe.unit == "ms":
            whole = whole.with_budget(runs=table.runs + smaller.runs)
        return carry_out(program, whole, ctx, self.name, table=table)

    @classmethod
    def neutral(cls) -> Self:
        """Removing nothing is the baseline."""
        return cls(ratio=0.0)

    @classmethod
    def planted(cls) -> Case:
        """In each of two MLPs one hidden channel is a multiple of another: one of the two goes."""
        return proportional_channels_case(cls(ratio=1 / 16))


def _found_again(
    decisions: tuple[Decision, ...], there: Program, here: Program, there_ctx: Context, here_ctx: Context
) -> list[Decision]:
    """Decisions about sites of one program as decisions about those of another that has the same weights."""
    kinds = ("mlp",)
    old = {site.index: site for site in channel_sites(there, there_ctx.structure(there), kinds)[0]}
    uncut = Uncut(there)
    new = {uncut.now(site): site for site in channel_sites(here, here_ctx.structure(here), kinds)[0]}
    found: list[Decision] = []
    for decision in decisions:
        site = new[uncut.before(old[decision.index])]
        found.append(replace(decision, index=site.index, label=site.label, block=site.block))
    return found
