"""FLAP: remove the channels and heads whose values fluctuate least, and put their means into biases.

A channel that is nearly constant can be replaced by a bias. The score of input channel j of a layer with weight W is

    WIFV_j = Var(x_j) · ||W[:, j]||²

standardised within each layer, so that one threshold over all layers gives each the share that suits it; what goes
adds W[:, j] · E[x_j] to the bias.

    before   y = W x                 after   y = W[:, kept] x[kept] + (b + W[:, removed] E[x[removed]])

Heads are scored by the mean over their channels, whose scores are squared before they are standardised, as in the
paper's code (AL-AM). Grouped heads go as a unit: a key and value head with the query heads that share it, which the
reference implementation does not handle. Statistics are those of the uncut model, as in the paper.

Source: FLAP (An et al. 2024, arXiv 2312.11983), sections 3.2 to 3.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from ...ir.program import Program
from ..base import Case, Context, Effect, Stats, option
from ..search.budget import UNITS
from ..search.choose import compress
from ..search.recipe import Recipe
from .planted import constant_channels_case
from .width import WidthPass

_SITES = ("heads", "mlp", "query-heads", "channels")


@dataclass(frozen=True, kw_only=True)
class Flap(WidthPass):
    """Cut the channels and heads that fluctuate least, and put their means into biases (FLAP, arXiv 2312.11983).

    Raises:
        PipelineError: none or several of ``ratio`` and ``target`` are given.
        PreconditionError: the model has no such sites, the budget is out of reach, or calibration data is missing or
            bad.
    """

    name: ClassVar[str] = "flap"
    effect: ClassVar[Effect] = Effect.APPROXIMATE
    paper: ClassVar[str] = "FLAP, arXiv 2312.11983"

    sites: tuple[str, ...] = option(("heads", "mlp", "channels"), choices=_SITES, help="what may be removed")
    ratio: float | None = option(None, ge=0, lt=1, help="share of what the sites cost that goes")
    target: float | None = option(None, gt=0, help="what the whole model may cost, in the unit of the budget")
    budget: str = option("params", choices=UNITS, help="what is bounded")
    floor: float = option(0.0, ge=0, lt=1, help="share of every site that stays at least")
    multiple: int = option(1, ge=1, help="channels that stay of a cut site are a multiple of this")

    def recipe(self) -> Recipe:
        """The paper's four choices."""
        return Recipe(
            kinds=self.sites,
            score="standard-fluctuation",
            allocator="global-threshold",
            compensation="bias",
            unit=self.budget,
            ratio=self.ratio,
            target=self.target,
            floor=self.floor,
            multiple=self.multiple,
            per_saving=True,
        )

    def run(self, program: Program, ctx: Context) -> Stats:
        """Measure fluctuations, find the threshold, cut, add biases."""
        return compress(program, self.recipe(), ctx, self.to_text(), name=self.name, sequential=False)

    @classmethod
    def neutral(cls) -> Self:
        """Removing nothing is the baseline."""
        return cls(ratio=0.0)

    @classmethod
    def planted(cls) -> Case:
        """Half of the hidden channels of two MLPs are constant: these go, and the outputs stay."""
        return constant_channels_case(cls(sites=("mlp",), ratio=0.5, floor=0.5))
