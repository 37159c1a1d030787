"""Every site gives the same share of what it can give.

A share s between 0 and 1 asks of every site the mildest level that saves at least s of what its cheapest level saves:

    cost(level) <= cost(untouched) - s (cost(untouched) - cost(cheapest))

The cost falls as s rises, so the smallest share that fits is found by bisection over the shares at which some site
changes its level. Levels are coarse, so that share usually saves too much. What is left over is given back: the site
that gives the largest share of its range goes one level milder, while one fits. Among equals (all sites, when a level
is only kept or dropped) the order is spread evenly over the sites instead of favouring one end of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from .table import Allocation, LevelTable, State


def uniform(table: LevelTable, limit: float) -> Allocation:
    """The same share of every site's own range of costs; estimates of harm are not read.

    Args:
        table: the levels.
        limit: what the state may cost, with the fixed cost.

    Raises:
        PreconditionError: not even the cheapest state fits.
    """
    budget = table.budget(limit)
    shares = sorted({_share(table, site, level) for site in range(len(table)) for level in table.ladders[site]} | {0})
    low, high = 0, len(shares) - 1  # the largest share is the cheapest state, which fits
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if table.weigh(_at(table, shares[middle])) <= budget else (middle + 1, high)
    state = _give_back(table, list(_at(table, shares[low])), budget)
    return Allocation.of("uniform", table, state)


def _share(table: LevelTable, site: int, level: int) -> Fraction:
    row = table.units[site]
    span = row[0] - min(row)
    return Fraction(row[0] - row[level], span) if span else Fraction(0)


def _at(table: LevelTable, share: Fraction | int) -> State:
    """The mildest level of every site that gives at least this share of its range."""
    return tuple(
        next((n for n in ladder if _share(table, site, n) >= share), ladder[-1])
        for site, ladder in enumerate(table.ladders)
    )


def _give_back(table: LevelTable, state: list[int], budget: int) -> State:
    left = budget - table.weigh(state)
    spread = _spread(len(table))
    while True:
        steps: list[tuple[Fraction, int, int, int]] = []
        for site, (ladder, row) in enumerate(zip(table.ladders, table.units, strict=True)):
            milder = [n for n in ladder if row[state[site]] < row[n] <= row[state[site]] + left]
            if milder:
                steps.append((-_share(table, site, state[site]), spread[site], site, min(milder, key=row.__getitem__)))
        if not steps:
            return tuple(state)
        *_, site, level = min(steps)
        left -= table.units[site][level] - table.units[site][state[site]]
        state[site] = level


def _spread(count: int) -> Sequence[int]:
    """A rank of every index such that each beginning of the order is spread evenly: by reversed binary digits."""
    digits = max(count - 1, 0).bit_length()
    return [int(f"{index:0{digits}b}"[::-1], 2) if digits else 0 for index in range(count)]
