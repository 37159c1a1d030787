"""EvoPress: search for the levels that the whole model bears best, instead of adding up errors of single layers.

Errors of layers do not add up: dropping two blocks may hurt less than dropping the better one of them. So candidates
are compared by what they do to the outputs, on real data, by evolution under a fixed budget:

    parent ─┬─ offspring: lower the level here, raise it there ─┐
            │                                                   ├─ few tokens ─ best few ─ many tokens ─ next parent
            └───────────────────────────────────────────────────┘

What a level is depends on ``mode``: ``depth`` keeps or drops attention and MLP branches (or whole blocks, ``tied``);
``sparsity`` gives every linear layer a number of nonzero weights, from a database of SparseGPT solutions; ``bits``
gives every linear layer a number of bits, from one of GPTQ or round-to-nearest solutions. With ``rank`` there are maps
of low rank in the place of what is dropped (`search.correct`), or beside a weight that changes
(`search.linear_correction`).

Attention and MLP branches may trade under one budget, the search starts from what every cheap heuristic says, and
candidates are compared on common data and start from their parent's stream (`search.candidates`).

Source: EvoPress (Sieberling et al. 2024, arXiv 2410.14649).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ...ir.errors import PipelineError, PostconditionError
from ...ir.program import Program
from ..base import Case, Context, Effect, Pass, Prop, Stats, option, same_outputs
from ..search.allocators.evolution import Settings
from ..search.budget import UNITS, Meter, sizes_of
from ..search.choose import compress
from ..search.depth import depth_seeds
from ..search.linear_levels import LinearSettings, linear_places
from ..search.linear_sites import linear_sites
from ..search.linear_texts import BITS_METHODS, SPARSE_METHODS
from ..search.place_table import Table
from ..search.recipe import Recipe, nothing_to_remove, table_of
from ..search.searching import cheap_states, search, two_stages
from .planted import identity_block_case

MODES = ("depth", "sparsity", "bits")
METHODS = (*SPARSE_METHODS, *BITS_METHODS)
_ROUNDING = 1e-9
_UNITS = {"sparsity": "nonzeros", "bits": "bytes"}


@dataclass(frozen=True, kw_only=True)
class EvoPress(Pass):
    """Search for what the model does best without: blocks and branches, weights, bits (EvoPress, arXiv 2410.14649).

    Raises:
        PipelineError: none or both of ``ratio`` and ``target`` are given.
        PreconditionError: nothing can be dropped, the budget is out of reach, or calibration data is missing or less
            than the search needs.
    """

    name: ClassVar[str] = "evopress"
    effect: ClassVar[Effect] = Effect.APPROXIMATE
    needs: ClassVar[frozenset[Prop]] = frozenset({Prop.SITES, Prop.CALIBRATION})
    paper: ClassVar[str] = "EvoPress, arXiv 2410.14649"

    ratio: float | None = option(None, ge=0, lt=1, help="share of what can be dropped that goes")
    target: float | None = option(None, gt=0, help="what the whole model may cost, in the unit of the budget")
    budget: str = option("params", choices=UNITS, help="what is bounded")
    mode: str = option("depth", choices=MODES, help="what a level is: kept or dropped, nonzero weights, bits")
    tied: bool = option(False, help="depth: drop whole blocks instead of branches")
    levels: int = option(
        16, ge=1, help="sparsity: levels of the largest layer, besides the one at which all lose the same share"
    )
    bits: tuple[int, ...] = option((8, 4, 3, 2), ge=2, le=8, help="bits: the levels")
    group: int = option(64, ge=1, help="bits: input channels that share a scale and a zero point")
    method: str | None = option(None, choices=METHODS, help="how a level is solved; none: the best one of the mode")
    rank: int = option(
        0,
        ge=0,
        help="rank of maps, fitted in closed form, in the place of what is dropped or beside a changed weight; 0: none",
    )
    generations: int = option(100, ge=0, help="generations at most")
    offspring: int = option(16, ge=1, help="new candidates per generation")
    survivors: int = option(3, ge=1, help="candidates that are judged on all the data")
    small: int = option(1, ge=1, help="calibration batches that candidates are first judged on")
    large: int | None = option(None, ge=1, help="calibration batches that survivors are judged on; none: all")
    patience: int | None = option(None, ge=1, help="stop after so many generations without a better candidate")
    confidence: float = option(1.0, ge=0, help="standard errors by which a candidate must be better; the paper's is 0")
    finalists: int = option(3, ge=1, help="states that led the search, the best of which on all the data is taken")
    seed: int = option(0, ge=0, help="equal seeds give equal searches")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.ratio is None) == (self.target is None):
            raise PipelineError(
                f"'{self.name}' needs one way to say how much to remove",
                expected="one of ratio, target",
                remedy="for example evopress{ratio=0.2}",
            )

        if self.mode != "depth" and self.budget != "params":
            raise PipelineError(
                f"the budget of the mode '{self.mode}' is its own (nonzero weights, or bytes)",
                expected="no option budget",
            )

    def recipe(self) -> Recipe:
        """What may be dropped, under which budget."""
        kinds = ("drop-block",) if self.tied else ("drop-attention", "drop-mlp")
        return Recipe(
            kinds=kinds,
            score="magnitude",
            allocator="uniform",
            compensation="none",
            unit=_UNITS.get(self.mode, self.budget),
            ratio=self.ratio,
            target=self.target,
            rank=self.rank if self.mode == "depth" else 0,  # elsewhere levels say it
        )

    def settings(self, batches: int) -> Settings:
        """How to search, with so many calibration batches."""
        return Settings(
            generations=self.generations,
            offspring=self.offspring,
            stages=two_stages(batches, survivors=self.survivors, small=self.small, large=self.large),
            patience=self.patience,
            confidence=self.confidence,
            seed=self.seed,
        )

    def run(self, program: Program, ctx: Context) -> Stats:
        """Find what can be dropped, search, drop."""
        recipe = self.recipe()
        table = table_of(program, recipe, ctx) if self.mode == "depth" else self._stored(program, ctx)
        batches = ctx.calibration or ()

        def choose(table: Table, limit: float) -> tuple[Sequence[int], dict[str, Any] | None]:
            levels = table.levels()
            if limit >= table.total:
                return levels.untouched, None
            if self.mode == "depth":
                seeds = depth_seeds(program, table.places, levels, limit, ctx)
            else:
                seeds = {"equal share": _equal_share(table, limit), **cheap_states(levels, limit)}
            settings = self.settings(len(batches))
            outcome, history = search(
                program, table.places, levels, limit, batches, ctx, settings, seeds, self.finalists
            )
            return outcome.state, history

        return compress(program, recipe, ctx, self.to_text(), name=self.name, table=table, allocator=choose)

    def _stored(self, program: Program, ctx: Context) -> Table:
        """Linear layers with a database of levels, which is empty where nothing is to go."""
        sites, _ = linear_sites(program, ctx.structure(program))
        meter = Meter(program, "bytes" if self.mode == "bits" else "params", sizes_of(program, ctx))
        whole = sum(site.size if self.mode == "sparsity" else program.weights[site.weight].nbytes for site in sites)
        goal = meter.total - self.target if self.target is not None else (self.ratio or 0.0) * whole
        settings = LinearSettings(
            method=self.method,
            goal=goal,
            steps=self.levels,
            bits=self.bits,
            group=self.group,
            correction=self.rank,
        )
        folder = None if ctx.workspace is None else ctx.workspace / "levels"
        places, blocked = linear_places(program, ctx, self.mode, settings, folder=folder)
        if not places:
            raise nothing_to_remove(("linear layers of blocks",), blocked)
        whole = sum(place.levels[0].cost for place in places)
        return Table(places, meter, blocked, whole=whole, total=meter.total, added_up=True)

    def ensure(self, before: Program, program: Program, stats: Stats) -> None:
        """The interface must be untouched, and no weight be new."""
        same_outputs(before, program, self.name)
        if self.mode == "depth" and not self.rank and not program.used_weights() <= before.used_weights():
            raise PostconditionError("new weights appeared", pass_name=self.name)

    @classmethod
    def neutral(cls) -> Self:
        """Dropping nothing is the baseline."""
        return cls(ratio=0.0)

    @classmethod
    def planted(cls) -> Case:
        """One of four blocks adds exactly zero to the stream; it must be the one that goes."""
        return identity_block_case(cls(ratio=0.25, tied=True, generations=3, offspring=4))


def _equal_share(table: Table, limit: float) -> tuple[int, ...]:
    """Of each place the mildest level that leaves no larger a share of it than the limit leaves of all."""
    share = 1 - (table.total - limit) / table.whole + _ROUNDING

    def mildest(costs: Sequence[float]) -> int:
        fitting = [number for number, cost in enumerate(costs) if cost <= share * costs[0]]
        return max(fitting or [len(costs) - 1], key=costs.__getitem__)

    return tuple(mildest([level.cost for level in place.levels]) for place in table.places)
