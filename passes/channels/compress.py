"""Compress by any choice of sites, score, allocator and compensation.

    what can be removed   ×   how much it matters   ×   how much goes where   ×   how the rest makes up for it
    sites                     score                     allocator                 compensation

    before   x ── W1 [4 channels] ── f ── W2 ── y        after   x ── W1' [2 channels] ── f ── W2' ── y

Weights are cut for real: the program gets smaller matrices, not zeros. Published methods are one choice each: see
``flap``, ``comp`` and ``tyr``, whose defaults these options spell out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ...ir.errors import PipelineError
from ...ir.program import Program
from ..base import Case, Context, Effect, Stats, option
from ..search.allocators.evolution import Settings
from ..search.apply import COMPENSATIONS, DROPS
from ..search.budget import UNITS
from ..search.choose import Allocator, compress
from ..search.measured import measured
from ..search.place_table import Table
from ..search.recipe import ALLOCATORS, Recipe, table_of
from ..search.scores import CHANNEL_SCORES
from ..search.searching import cheap_states, search, two_stages
from ..search.sites import KINDS
from ..search.window_seeds import window_seeds
from .planted import constant_channels_case
from .width import WidthPass

SITES = (*KINDS, *DROPS)
_MEASURED_STEPS = 8


@dataclass(frozen=True, kw_only=True)
class Compress(WidthPass):
    """Cut channels, heads and branches by any choice of score, allocator and compensation.

    Raises:
        PipelineError: none or several of ``ratio`` and ``target`` are given, or a ``rank`` where nothing is dropped.
        PreconditionError: the model has no such sites, the budget is out of reach (the message names the smallest that
            is, and what blocks more), or calibration data is missing or bad.
    """

    name: ClassVar[str] = "compress"
    effect: ClassVar[Effect] = Effect.APPROXIMATE
    paper: ClassVar[str] = "the four choices of docs/compression.md"

    sites: tuple[str, ...] = option(("heads", "mlp", "channels"), choices=SITES, help="what may be removed")
    ratio: float | None = option(None, ge=0, lt=1, help="share of what the sites cost that goes")
    target: float | None = option(None, gt=0, help="what the whole model may cost, in the unit of the budget")
    budget: str = option("params", choices=UNITS, help="what is bounded")
    score: str = option("fluctuation", choices=tuple(CHANNEL_SCORES), help="how much a channel or head matters")
    allocator: str = option("global-threshold", choices=ALLOCATORS, help="how much goes where")
    compensation: str = option("least-squares", choices=COMPENSATIONS, help="how the rest makes up for it")
    standardize: bool = option(True, help="compare scores of different sites by how they stand out within their site")
    rank: int = option(0, ge=0, help="rank of a map, fitted in closed form, in the place of what is dropped; 0: none")
    floor: float = option(0.0, ge=0, lt=1, help="share of every site that stays at least")
    multiple: int = option(1, ge=1, help="channels that stay of a cut site are a multiple of this")
    steps: int | None = option(None, ge=1, help="levels per site; none: every number of channels, or 16 in ms")
    measure: bool = option(False, help="judge levels by what each alone does to the outputs, not by scores")
    generations: int = option(50, ge=0, help="evolution: generations at most")
    offspring: int = option(16, ge=1, help="evolution: new candidates per generation")
    small: int = option(1, ge=1, help="evolution: calibration batches that candidates are first judged on")
    large: int | None = option(
        None, ge=1, help="evolution: calibration batches that survivors are judged on; none: all"
    )
    finalists: int = option(
        3, ge=1, help="evolution: states that led the search, the best of which on all the data is taken"
    )
    seed: int = option(0, ge=0, help="evolution: equal seeds give equal searches")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank and not set(self.sites) & set(DROPS):
            raise PipelineError(
                f"rank={self.rank} is for maps in the place of what is dropped whole, and "
                f"sites={','.join(self.sites)} only cuts",
                expected=f"one of {', '.join(DROPS)} among the sites",
                remedy="leave out rank, or add what may be dropped",
            )

    def recipe(self) -> Recipe:
        """The options as a recipe."""
        return Recipe(
            kinds=self.sites,
            score=self.score,
            allocator=self.allocator,
            compensation=self.compensation,
            unit=self.budget,
            ratio=self.ratio,
            target=self.target,
            steps=_MEASURED_STEPS if self.measure and self.steps is None else self.steps,
            floor=self.floor,
            multiple=self.multiple,
            standardize=self.standardize,
            per_saving=self.standardize,
            rank=self.rank,
        )

    def run(self, program: Program, ctx: Context) -> Stats:
        """Find and score the sites, choose, cut and compensate."""
        recipe = self.recipe()
        table = table_of(program, recipe, ctx)
        if self.allocator != "uniform" and self.ratio != 0:
            table = measured(program, table, ctx, every=self.measure)
        search = self._search(program, ctx) if self.allocator == "evolution" else None
        return compress(program, recipe, ctx, self.to_text(), name=self.name, table=table, allocator=search)

    def _search(self, program: Program, ctx: Context) -> Allocator:
        batches = ctx.calibration or ()

        def choose(table: Table, limit: float) -> tuple[Sequence[int], dict[str, Any] | None]:
            levels = table.levels()
            if limit >= table.total:
                return levels.untouched, None
            stages = two_stages(len(batches), survivors=3, small=self.small, large=self.large)
            settings = Settings(generations=self.generations, offspring=self.offspring, stages=stages, seed=self.seed)
            seeds = cheap_states(levels, limit) | window_seeds(program, table.places, levels, limit, ctx)
            outcome, history = search(
                program, table.places, levels, limit, batches, ctx, settings, seeds, self.finalists
            )
            return outcome.state, history

        return choose

    @classmethod
    def neutral(cls) -> Self:
        """Removing nothing is the baseline."""
        return cls(ratio=0.0)

    @classmethod
    def planted(cls) -> Case:
        """Half of the hidden channels of two MLPs are constant: these go, and the outputs stay."""
        return constant_channels_case(cls(sites=("mlp",), ratio=0.5, floor=0.5))
