"""Tyr: prune every layer to several levels, and search for the levels that the whole model bears best.

1. Every site (heads of an attention, hidden channels of an MLP) is pruned to a few levels around the wanted share by
   the optimal brain surgeon, layer after layer, each fitted to what the layers before it are expected to pass on: the
   mean of their levels, by the share that each keeps, or the level in the middle (``expectation=middle``).
2. Evolution chooses a level per site under the budget, by the divergence of the model's outputs.
3. Around what was chosen, finer levels are made and searched again.
4. The choice is cut for real, and what stays is fitted once more in the model as it now is.

    levels of one site    12 %  19 %  25 %  31 %  38 %      search     19 %      finer     16 %  17 %  19 %  20 %  22 %

The reference implementation leaves zeros in dense matrices and keys and values whole; here matrices get smaller, and a
key and value head goes with its query heads.

Source: Tyr-the-Pruner (2025, arXiv 2503.09657), with the search of EvoPress (Sieberling et al. 2024, arXiv 2410.14649).
``expectation=weighted`` is the paper's; ``middle`` is the median version of its reference implementation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ...ir.program import Program
from ..base import Case, Context, Effect, Stats, option
from ..search.allocators.evolution import Settings
from ..search.allocators.table import State
from ..search.budget import Meter, sizes_of
from ..search.choose import compress
from ..search.levels import Level, Place
from ..search.obs_places import obs_places
from ..search.place_table import Table
from ..search.recipe import Recipe, nothing_to_remove
from ..search.searching import cheap_states, search, two_stages
from ..search.sites import ChannelSite, channel_sites
from ..search.widths import about_widths, at_multiples, in_atoms
from .planted import proportional_channels_case
from .width import WidthPass

_SITES = ("heads", "mlp", "query-heads", "value-channels", "channels")
_AROUND = 4
_ROUNDS = {"mlp": 16, "channels": 16, "value-channels": 16}


@dataclass(frozen=True, kw_only=True)
class Tyr(WidthPass):
    """Prune layers to levels that the optimal brain surgeon refits, and search for the best levels (Tyr, 2025).

    Raises:
        PipelineError: none or several of ``ratio`` and ``target`` are given.
        PreconditionError: the model has no such sites, the budget is out of reach, or calibration data is missing, bad
            or less than the search needs.
    """

    name: ClassVar[str] = "tyr"
    effect: ClassVar[Effect] = Effect.APPROXIMATE
    paper: ClassVar[str] = "Tyr-the-Pruner, arXiv 2503.09657"

    sites: tuple[str, ...] = option(("heads", "mlp", "channels"), choices=_SITES, help="what may be removed")
    ratio: float | None = option(None, ge=0, lt=1, help="share of what the sites cost that goes")
    target: float | None = option(None, gt=0, help="what the whole model may cost, in the unit of the budget")
    budget: str = option("params", choices=("params", "bytes", "macs"), help="what is bounded")
    multiple: int = option(1, ge=1, help="channels that stay of a cut site are a multiple of this")
    step: float = option(0.125, gt=0, le=0.5, help="distance of the first levels, as a share of a site")
    expectation: str = option(
        "weighted",
        choices=("weighted", "middle"),
        help="what later layers expect of one: the mean of its levels, by the share that each keeps, or the middle one",
    )
    iterations: int = option(4, ge=1, help="how often levels are made and searched; each halves the step")
    generations: int = option(50, ge=0, help="generations of each search")
    offspring: int = option(32, ge=1, help="new candidates per generation")
    small: int = option(1, ge=1, help="calibration batches that candidates are first judged on")
    damping: float | None = option(None, ge=0, help="of the layers' fits; none: what does best on data not fitted to")
    large: int | None = option(None, ge=1, help="calibration batches that survivors are judged on; none: all")
    finalists: int = option(3, ge=1, help="states that led a search, the best of which on all the data is taken")
    seed: int = option(0, ge=0, help="equal seeds give equal searches")

    def recipe(self) -> Recipe:
        """What is bounded, and what makes up for it; the levels are made here."""
        return Recipe(
            kinds=self.sites,
            score="magnitude",
            allocator="uniform",
            compensation="least-squares",
            unit=self.budget,
            ratio=self.ratio,
            target=self.target,
        )

    def run(self, program: Program, ctx: Context) -> Stats:
        """Make levels, search, make finer ones, search again; cut what was chosen."""
        recipe = self.recipe()
        sites, blocked = channel_sites(program, ctx.structure(program), self.sites)
        if not sites:
            raise nothing_to_remove(self.sites, blocked)
        meter = Meter(program, self.budget, sizes_of(program, ctx))
        notes = about_widths(program, sites, self.multiple)
        table = Table([], meter, blocked, notes, whole=meter.whole(sites, []), total=meter.total)
        if table.limit(recipe.ratio, recipe.target) >= meter.total:
            return compress(program, recipe, ctx, self.to_text(), name=self.name, table=self._idle(table, sites, meter))
        share = (meter.total - table.limit(recipe.ratio, recipe.target)) / max(table.whole, 1)
        table.places, skipped = self._levels(
            program, sites, meter, ctx, dict.fromkeys(_indices(sites), share), self.step
        )
        table.blocked = {**skipped, **blocked}
        known = {place.index for place in table.places}
        sites = [site for site in sites if site.index in known]
        table.whole = meter.whole(sites, [])
        if not table.places:
            raise nothing_to_remove(self.sites, table.blocked)

        def choose(table: Table, limit: float) -> tuple[Sequence[int], dict[str, Any]]:
            return self._search(program, sites, table, meter, ctx, limit)

        return compress(program, recipe, ctx, self.to_text(), name=self.name, table=table, allocator=choose)

    def _idle(self, table: Table, sites: Sequence[ChannelSite], meter: Meter) -> Table:
        """Places without anything to choose, for a model that fits its budget as it is."""
        for site in sites:
            cost = round(meter.cut(site, range(site.size)))
            level = Level("untouched", cost, 0.0, site=site)
            table.places.append(Place(site.kind, site.label, site.block, (level,), site.first, site.index))
        return table

    def _levels(
        self,
        program: Program,
        sites: Sequence[ChannelSite],
        meter: Meter,
        ctx: Context,
        around: Mapping[int, float],
        step: float,
    ) -> tuple[list[Place], dict[str, int]]:
        """Places with levels around a share for each site."""
        counts: dict[int, list[int]] = {}
        middle: dict[int, int] = {}
        grid: dict[int, set[int]] = {}
        for site in sites:
            shares = [around[site.index] + step * offset for offset in range(-_AROUND, _AROUND + 1)]
            numbers = {min(max(round(share * site.size), 0), site.size - 1) for share in shares}
            multiple = in_atoms(site, self.multiple)
            grid[site.index] = numbers & {0} | {*at_multiples(numbers, site.size, site.size - 1, multiple)}
            # The harshest level must be there: without it a budget that is within reach might not be.
            extra = site.size - 1 if step == self.step else 1
            counts[site.index] = at_multiples({*numbers, extra}, site.size, site.size - 1, multiple)
            share = around[site.index]
            middle[site.index] = min(grid[site.index], key=lambda n, at=share * site.size: (abs(n - at), n), default=0)
        expected = grid if self.expectation == "weighted" else None
        return obs_places(
            program, sites, meter, ctx, counts, middle=middle, expected=expected, rounds=_ROUNDS, damping=self.damping
        )

    def _search(
        self,
        program: Program,
        sites: Sequence[ChannelSite],
        table: Table,
        meter: Meter,
        ctx: Context,
        limit: float,
    ) -> tuple[Sequence[int], dict[str, Any]]:
        batches = ctx.calibration or ()
        stages = two_stages(len(batches), survivors=4, small=self.small, large=self.large)
        settings = Settings(
            generations=self.generations, offspring=self.offspring, max_flips=4, stages=stages, seed=self.seed
        )
        state: State = ()
        history: dict[str, Any] = {}
        for iteration in range(self.iterations):
            if iteration:
                around = {
                    place.index: place.levels[level].count / max(_size(place), 1)
                    for place, level in zip(table.places, state, strict=True)
                }
                step = self.step / 2**iteration
                old = [place.levels[level] for place, level in zip(table.places, state, strict=True)]
                known = [site for site in sites if site.index in around]
                table.places, _ = self._levels(program, known, meter, ctx, around, step)
                state = tuple(_like(place, level.count) for place, level in zip(table.places, old, strict=True))
            levels = table.levels()
            seeds = cheap_states(levels, limit) | ({"last round": state} if iteration else {})
            outcome, found = search(program, table.places, levels, limit, batches, ctx, settings, seeds, self.finalists)
            state = outcome.state
            history = _joined(history, found)
        return state, history

    @classmethod
    def neutral(cls) -> Self:
        """Removing nothing is the baseline."""
        return cls(ratio=0.0)

    @classmethod
    def planted(cls) -> Case:
        """In each of two MLPs one hidden channel is a multiple of another: one of the two goes."""
        settings = cls(sites=("mlp",), ratio=1 / 16, iterations=1, generations=4, offspring=4, step=1 / 16)
        return proportional_channels_case(settings)


def _indices(sites: Sequence[ChannelSite]) -> list[int]:
    return [site.index for site in sites]


def _size(place: Place) -> int:
    return max((level.site.size for level in place.levels if level.site is not None), default=1)


def _like(place: Place, count: int) -> int:
    """The level that removes as many atoms, or the nearest that removes more."""
    return min(
        range(len(place.levels)), key=lambda n: (place.levels[n].count < count, abs(place.levels[n].count - count))
    )


def _joined(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The histories of two searches, one after the other."""
    if not before:
        return after
    done = before["evaluations"]
    generation = before["history"][-1]["generation"] + 1
    rows = [
        {**row, "evaluations": row["evaluations"] + done, "generation": row["generation"] + generation}
        for row in after["history"]
    ]
    tokens = None if before["tokens"] is None or after["tokens"] is None else before["tokens"] + after["tokens"]
    return {
        **after,
        "history": [*before["history"], *rows],
        "evaluated": [*before["evaluated"], *after["evaluated"]],
        "evaluations": done + after["evaluations"],
        "tokens": tokens,
    }
