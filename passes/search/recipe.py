"""A recipe: sites x score x allocator x compensation, under a budget. Each paper is one choice of the four.

`choose` turns a recipe into a plan; `apply.apply_plan` carries it out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...ir.errors import PreconditionError
from ...ir.program import Program
from ..base import Context
from .allocators.global_threshold import global_threshold
from .allocators.greedy import greedy
from .allocators.knapsack import knapsack
from .allocators.table import Allocation
from .allocators.uniform import uniform
from .apply import DROPS
from .budget import Meter, sizes_of
from .levels import TOO_NARROW, Place
from .place_table import Table
from .plan import LINEAR, Decision, Plan
from .scores import CHANNEL_SCORES
from .sites import KINDS, ChannelSite, channel_sites
from .timed import TIMED_LEVELS, timed
from .widths import about_widths, branch_of, drop_places, outside_of_blocks, width_place

ALLOCATORS = ("uniform", "global-threshold", "greedy", "knapsack", "evolution")


@dataclass(frozen=True)
class Recipe:
    """What to choose and how.

    Attributes:
        kinds: kinds of channels (`sites.KINDS`) and of units (``drop-block``, ``drop-attention``, ``drop-mlp``).
        score: a name out of `scores.CHANNEL_SCORES`.
        allocator: a name out of `ALLOCATORS`.
        compensation: a name out of `apply.COMPENSATIONS`.
        unit: what the budget counts, see `budget`.
        ratio: the share of what the sites cost that goes; or
        target: what the whole program may cost.
        steps: levels per channel site; None: every number of atoms, or as many as can be timed.
        floor: the share of the atoms of a site that stays at least.
        multiple: the channels that stay of a cut site are a multiple of this.
        standardize: whether scores are standardised per site before sites are compared.
        per_saving: whether the harm of an atom is its score (False), or its score times what it saves, so that an
            allocator that compares harm per saving compares scores.
        rank: of maps in the place of dropped units, see `correct`; 0 for none.
    """

    kinds: tuple[str, ...]
    score: str
    allocator: str
    compensation: str
    unit: str
    ratio: float | None = None
    target: float | None = None
    steps: int | None = None
    floor: float = 0.0
    multiple: int = 1
    standardize: bool = False
    per_saving: bool = False
    rank: int = 0


def table_of(program: Program, recipe: Recipe, ctx: Context) -> Table:
    """Find the places of a recipe, score them, and count what their levels cost.

    Raises:
        PreconditionError: there is no such place, or a score cannot be had.
    """
    found = ctx.structure(program)
    meter = Meter(program, "params" if recipe.unit == "ms" else recipe.unit, sizes_of(program, ctx))
    kinds = [kind for kind in recipe.kinds if kind in KINDS]
    sites, blocked = channel_sites(program, found, kinds) if kinds else ([], {})
    sites, unscored = _readable(sites, recipe)
    blocked = {**unscored, **blocked}  # what is nearest to being cut first
    scores = CHANNEL_SCORES[recipe.score](program, sites, ctx) if sites else {}
    checked = {site.index: _checked(site, scores.get(site.index), recipe) for site in sites}
    # An allocator would remove what has a negative harm even where nothing has to go.
    least = min((float(values.min()) for values in checked.values()), default=0.0)
    places: list[Place] = []
    held: set[tuple[str, int]] = set()
    narrow: list[ChannelSite] = []
    for site in sites:
        granularity = {"heads": "attention", "mlp": "mlp"}.get(site.kind)
        unit = branch_of(site, found, granularity) if granularity and f"drop-{granularity}" in recipe.kinds else None
        if unit is not None and granularity is not None:
            held.add((granularity, unit.index))
        place = width_place(
            program,
            site,
            checked[site.index],
            meter,
            steps=recipe.steps or (TIMED_LEVELS if recipe.unit == "ms" else None),
            floor=recipe.floor,
            multiple=recipe.multiple,
            weighted=recipe.per_saving,
            least_score=min(least, 0.0),
            drop=unit,
            rank=recipe.rank,
        )
        if len(place.levels) > 1:
            places.append(place)
        else:
            narrow.append(site)
    if narrow:
        sites = [site for site in sites if site not in narrow]
        blocked = {TOO_NARROW: len(narrow), **blocked}
    for kind in recipe.kinds:
        if kind in DROPS:
            more, why = drop_places(program, found, DROPS[kind], meter, recipe.rank)
            places += [place for place in more if (DROPS[kind], place.index) not in held]
            blocked = {**blocked, **why}
    if not places:
        raise nothing_to_remove(recipe.kinds, blocked)
    places.sort(key=lambda place: place.first)
    units = [place.levels[-1].drop for place in places]
    whole = meter.whole(sites, [unit for unit in units if unit is not None])
    notes = about_widths(program, sites, recipe.multiple)
    outside = outside_of_blocks(program, found) if all(kind in DROPS for kind in recipe.kinds) else ()
    table = Table(places, meter, blocked, notes, outside, whole=whole, total=meter.total)
    return timed(program, table, ctx) if recipe.unit == "ms" else table


def nothing_to_remove(kinds: Sequence[str], blocked: Mapping[str, int]) -> PreconditionError:
    """The error for a model without any of the places that are asked for."""
    reasons = "; ".join(f"{reason} ({count}x)" for reason, count in list(blocked.items())[:3])
    look = "`graphlathe dump --format sites MODEL` shows what was recognised; the pass 'raise' may find more"
    if set(kinds) <= {"drop-attention", "drop-mlp"}:
        look += "; blocks of other kinds can be dropped whole (evopress{tied}, drop-block)"
    return PreconditionError(
        f"the model has nothing of the kinds {', '.join(kinds)} that can be removed"
        + (f": blocked by {reasons}" if reasons else ""),
        remedy=look,
    )


def _readable(sites: Sequence[ChannelSite], recipe: Recipe) -> tuple[list[ChannelSite], dict[str, int]]:
    """The sites that the score can look into, and why not the others, with counts."""
    if not CHANNEL_SCORES[recipe.score].consumers:
        return list(sites), {}
    readable, blocked = [], dict[str, int]()
    for site in sites:
        if site.consumers and not site.unread:
            readable.append(site)
            continue
        why = site.unread[0] if site.unread else "no operator sums over its channels"
        reason = f"the score '{recipe.score}' cannot look into it: {why}"
        blocked[reason] = blocked.get(reason, 0) + 1
    return readable, blocked


def _checked(site: ChannelSite, scores: np.ndarray | None, recipe: Recipe) -> np.ndarray:
    """Scores that are numbers, standardised where the recipe says so."""
    if scores is None or not np.isfinite(scores).all():
        raise PreconditionError(
            f"the score '{recipe.score}' of {site.label} is not a number",
            remedy="look for NaN or infinity in the calibration data and the weights",
        )
    if recipe.standardize:
        deviation = float(scores.std())
        return (scores - scores.mean()) / deviation if deviation else scores - scores.mean()
    return scores


def allocate(table: Table, recipe: Recipe, limit: float) -> Allocation:
    """Choose a level for every place by the recipe's allocator.

    Raises:
        PreconditionError: the limit is out of reach; the message names the smallest that is, and what blocks more.
    """
    levels = table.levels()
    call = {"uniform": uniform, "global-threshold": global_threshold, "greedy": greedy, "knapsack": knapsack}
    smallest = levels.cost(levels.smallest())
    if not smallest <= limit:
        raise out_of_reach(table, limit, smallest, recipe.unit)
    return call[recipe.allocator](levels, limit)


def out_of_reach(
    table: Table, limit: float, smallest: float, unit: str, remedy: str = "allow more kinds of sites"
) -> PreconditionError:
    """The error for a budget that cannot be met; ``remedy`` is what else to do than raise it."""
    blocked = "; ".join(f"{reason} ({count}x)" for reason, count in list(table.blocked.items())[:3])
    asked, least = (f"{x:.3g}" if unit == "ms" else f"{math.ceil(x):,}" for x in (limit, smallest))
    return PreconditionError(
        f"the budget of {asked} {unit} is out of reach: {least} is the smallest"
        + (f"; blocked elsewhere by: {blocked}" if blocked else "")
        + (f"; outside of every block, and so never dropped: {', '.join(table.outside)}" if table.outside else ""),
        expected=f"at least {least}",
        remedy=f"raise the budget, or {remedy}",
    )


def plan_of(program: Program, table: Table, recipe: Recipe, state: Sequence[int], made_by: str, why: str) -> Plan:
    """A state as a plan."""
    decisions: list[Decision] = []
    for place, number in zip(table.places, state, strict=True):
        level = place.levels[number]
        scores = None if place.scores is None else tuple(place.scores)
        if place.kind == LINEAR:
            text = level.label if number else ""
            decisions.append(Decision(LINEAR, place.index, place.label, place.block, 1, (), text, why))
            continue
        dropped = level.drop is not None
        if place.kind in KINDS and not dropped:
            units = next((each.site.size for each in place.levels if each.site is not None), 0)
            reason = f"{why}, lowest {recipe.score}" if level.count else why
            decisions.append(
                Decision(
                    place.kind, place.index, place.label, place.block, units or len(scores or ()), level.removed, "",
                    reason, scores,
                )
            )  # fmt: skip
            continue
        unit = level.drop or next(each.drop for each in place.levels if each.drop is not None)
        kind = place.kind if place.kind in DROPS else {"heads": "drop-attention", "mlp": "drop-mlp"}[place.kind]
        decisions.append(Decision(kind, unit.index, unit.label, place.block, 1, (0,) if dropped else (), "", why))
    return Plan(
        decisions=tuple(decisions),
        made_by=made_by,
        compensation=recipe.compensation,
        rank=recipe.rank,
        program=program.fingerprint(),
        budget={"unit": recipe.unit, "before": table.total, **({"runs": table.runs} if recipe.unit == "ms" else {})},
        blocked=table.blocked,
    )
