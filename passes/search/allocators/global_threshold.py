"""One threshold, over all sites, on the harm of the next saving per unit of cost that it saves.

A site's levels are points (saved cost, error). On the lower convex hull from the untouched level on, each edge is a
step whose harm per saved unit is its slope, and slopes grow along the hull, so "take every step whose slope is at most
t" means one level per site. The smallest t that fits the limit is taken; of steps with equal slopes, only as many as
are needed, from the first site on. Levels above the hull are never chosen, and what the last step saves too much is
not given back: that is what `knapsack` is for.

    harm
      |          o      hull of one site: steps a, b, c
      |        c/       slope(a) < slope(b) < slope(c)
      |    b_o'
      | a_o'
      o'________________ saved

Source: the adaptive search of FLAP (An et al. 2024, arXiv 2312.11983), which compares all units' scores, standardised
per layer, with one threshold. Here units become levels, and a score becomes an error per cost.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from ....ir.errors import InputError
from .table import Allocation, LevelTable

SCOPES = ("none", "site", "kind")
"""Over what the slopes may be standardised."""


@dataclass(frozen=True)
class _Step:
    """From one corner of a site's hull to the next; ``saves`` is in units of the table."""

    slope: float
    site: int
    level: int
    saves: int


def global_threshold(table: LevelTable, limit: float, standardize: str = "none") -> Allocation:
    """The steps below one threshold of estimated error per saved cost.

    Args:
        table: the levels, each with an estimated error.
        limit: what the state may cost, with the fixed cost.
        standardize: over what slopes are standardised (mean 0, deviation 1) before they are compared: ``none`` where
            errors of all sites are on one scale; ``site`` or ``kind`` where only those of one site, or of sites of one
            kind, are comparable (FLAP standardises per layer).

    Raises:
        PreconditionError: not even the cheapest state fits, or a level has no estimate.
        InputError: an unknown scope.
    """
    if standardize not in SCOPES:
        raise InputError(f"cannot standardise over '{standardize}'", expected=f"one of {', '.join(SCOPES)}")
    budget = table.budget(limit)
    errors = table.estimated("a global threshold")
    steps = [_hull(table, site, row) for site, row in enumerate(errors)]
    if standardize == "kind":
        kinds = dict.fromkeys(table.kinds)
        merged = [[s for site in steps for s in site if table.kinds[s.site] == kind] for kind in kinds]
        steps = [_standardized(each) for each in merged]
    elif standardize == "site":
        steps = [_standardized(each) for each in steps]
    state, cost = [0] * len(table), table.weigh(table.untouched)
    # Stable: the steps of one site stay in the order of its hull where slopes are equal.
    for step in sorted((s for each in steps for s in each), key=lambda s: (s.slope, s.site)):
        if cost <= budget:
            break
        state[step.site] = step.level
        cost -= step.saves
    return Allocation.of("global-threshold", table, tuple(state))


def _hull(table: LevelTable, site: int, errors: Sequence[float]) -> list[_Step]:
    """The steps along the lower convex hull, by rising slope; the last one ends at the cheapest level."""
    costs = table.units[site]
    slope_of = partial(_slope, table, site, errors)
    corners: list[int] = []
    # The ladder goes from dear to cheap; of equal costs only the least error can lie on the hull.
    for level in table.ladders[site]:
        if math.isinf(errors[level]):
            continue
        if corners and costs[corners[-1]] == costs[level]:
            if errors[corners[-1]] <= errors[level]:
                continue
            corners.pop()
        while len(corners) > 1 and slope_of(*corners[-2:]) > slope_of(corners[-1], level):
            corners.pop()
        corners.append(level)
    # An infinite error is beyond every other: from the last finite level on there is one more step, to the cheapest.
    last = table.ladders[site][-1]
    if costs[last] < costs[corners[-1]]:
        corners.append(last)
    steps: list[_Step] = []
    for here, level in itertools.pairwise(corners):
        slope = slope_of(here, level)
        slope = max(slope, steps[-1].slope) if steps else slope  # rounding must not turn the order
        steps.append(_Step(slope, site, level, costs[here] - costs[level]))
    return steps


def _slope(table: LevelTable, site: int, errors: Sequence[float], here: int, level: int) -> float:
    costs = table.units[site]
    return _rise(errors[here], errors[level]) / table.amount(costs[here] - costs[level])


def _rise(before: float, after: float) -> float:
    return after if before == float("inf") else after - before


def _standardized(steps: Sequence[_Step]) -> list[_Step]:
    finite = [s.slope for s in steps if s.slope < float("inf")]
    if not finite:
        return list(steps)
    mean, deviation = statistics.fmean(finite), statistics.pstdev(finite)
    return [replace(s, slope=(s.slope - mean) / deviation if deviation else s.slope - mean) for s in steps]
