"""The best choice of one level per site under a limit: the multiple-choice knapsack problem.

    minimise  sum_i error(i, level_i)    so that  sum_i cost(i, level_i) <= limit

Sites are added one after the other. After each, the list of partial states holds only those that none other beats in
both cost and error (Nemhauser and Ullmann 1969, Discrete dynamic programming and capital allocation), and of these only
those that can still become better than the best state known. The bound is Lagrange's: for every m >= 0 no completion
of a partial state (cost c, error e) has an error below

    e + sum_{i left} min_level (error + m cost) - m (limit - c)

with m from the relaxed problem, which also gives the first state known. Costs are exact (whole units), so that the
result is optimal up to the rounding of errors. Where the list would outgrow ``max_points`` the problem is solved again
with coarser costs: what each level costs above its site's cheapest one is rounded up to bins. What is found then still
fits, but need not be the best; the result says so, and how far from the best it can be.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ....ir.errors import InputError
from .table import Allocation, LevelTable, State

MAX_POINTS = 100_000
"""Partial states that are kept before costs are rounded."""

_SMALL = 1 << 62  # sums below are exact in 64 bits; larger ones are computed in Python's own integers
_ROUNDING = 1e-9  # share of the largest error: a partial state as good as the best known up to rounding is kept
_HALVINGS = 200  # of the interval that holds the multiplier: beyond the digits of a floating-point number


def knapsack(table: LevelTable, limit: float, max_points: int = MAX_POINTS) -> Allocation:
    """The state with the lowest sum of estimated errors that fits.

    A level with an infinite error is only chosen where nothing else fits, and then as few of them as possible.

    Args:
        table: the levels, each with an estimated error.
        limit: what the state may cost, with the fixed cost.
        max_points: how many partial states are kept before costs are rounded to as many bins, at least 2.

    Returns:
        An allocation that is ``exact``, or says in ``notes`` that costs were rounded.

    Raises:
        PreconditionError: not even the cheapest state fits, or a level has no estimate.
        InputError: ``max_points`` is below 2.
    """
    if max_points < 2:
        raise InputError(f"max_points is {max_points}", expected="at least 2")
    problem = _Problem(table, _finite(table.estimated("the knapsack")), table.budget(limit))
    best = problem.solve(problem.weights, problem.room, max_points)
    if best is not None:
        return Allocation.of("knapsack", table, best, exact=True)
    size = -(-problem.room // max_points)
    binned = [[-(-weight // size) for weight in row] for row in problem.weights]
    # The rounded problem has at most one partial state per bin, so this list cannot be too long.
    rounded = problem.solve(binned, problem.room // size, max_points + 1)
    assert rounded is not None
    gap = max(problem.error(rounded) - problem.bound, 0.0)
    note = (
        f"more than {max_points:,} partial states: costs were rounded up to bins of {table.amount(size):.6g}, "
        f"so the error can be up to {gap:.3g} above the best"
    )
    return Allocation.of("knapsack", table, rounded, notes=[note])


class _Problem:
    """The problem with costs above every site's cheapest level, and what its relaxation says.

    Attributes:
        room: what is left above the cheapest state, in units of the table.
        weights: [site][level]: cost above the site's cheapest level.
        multiplier: what the whole room is worth in error, in the relaxed problem.
        known: a good state that fits.
        bound: no state that fits has a lower error.
    """

    def __init__(self, table: LevelTable, errors: list[list[float]], budget: int) -> None:
        self.errors = errors
        self.room = budget - table.weigh(table.smallest())
        # What does not fit on its own never fits, however much too large it is.
        self.weights = [[min(weight - min(row), self.room + 1) for weight in row] for row in table.units]
        self.scale = sum(max(abs(e) for e in row) for row in errors)
        self.known = table.smallest()
        self.multiplier = self._relax()
        self.bound = math.fsum(self._reduced(self.weights, self.room)) - self.multiplier

    def error(self, state: State) -> float:
        """The error of a state, with large numbers in place of infinite errors."""
        return math.fsum(row[level] for row, level in zip(self.errors, state, strict=True))

    def _reduced(self, weights: list[list[int]], room: int) -> list[float]:
        """[site]: the least error that a level has, with its cost paid for."""
        price = self.multiplier
        return [
            min(e + price * (w / (room or 1)) for e, w in zip(errors, row, strict=True))
            for errors, row in zip(self.errors, weights, strict=True)
        ]

    def _relax(self) -> float:
        """The smallest multiplier (to the last digits) at which the best levels fit; they become the known state."""

        def fits(price: float) -> bool:
            state = tuple(
                min(range(len(row)), key=lambda n, e=errors, w=row: (e[n] + price * (w[n] / (self.room or 1)), w[n]))
                for errors, row in zip(self.errors, self.weights, strict=True)
            )
            if sum(row[level] for row, level in zip(self.weights, state, strict=True)) > self.room:
                return False
            self.known = min(self.known, state, key=self.error)
            return True

        low, high = 0.0, 1.0
        if fits(low):
            return low
        while not fits(high) and high < 1e300:
            low, high = high, 4 * high
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if not low < middle < high:
                break
            low, high = (low, middle) if fits(middle) else (middle, high)
        return high

    def solve(self, weights: list[list[int]], room: int, max_points: int) -> State | None:
        """The best state for these weights (those of the problem, or coarser ones), or the known one if that is better;
        None where the list is too long.
        """
        kind = np.int64 if sum(map(max, weights)) + room < _SMALL else object
        left = np.concatenate([np.cumsum(self._reduced(weights, room)[::-1])[::-1], [0.0]])
        most = self.error(self.known) + _ROUNDING * self.scale
        cost: NDArray[Any] = np.zeros(1, dtype=kind)
        error = np.zeros(1)
        trail: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        for site, (row, errors) in enumerate(zip(weights, self.errors, strict=True)):
            cost = (cost[:, None] + np.array(row, dtype=kind)[None, :]).ravel()
            error = (error[:, None] + np.array(errors)[None, :]).ravel()
            free = 1.0 - (cost / (room or 1)).astype(np.float64)
            kept = np.flatnonzero((cost <= room) & (error + left[site + 1] - self.multiplier * free <= most))
            kept = kept[np.argsort(error[kept], kind="stable")]
            kept = kept[np.argsort(cost[kept], kind="stable")]
            # Among equal costs the lowest error comes first, so what is not below all before it is beaten.
            lowest = np.minimum.accumulate(np.concatenate([[np.inf], error[kept]]))[:-1]
            kept = kept[error[kept] < lowest]
            if len(kept) > max_points:
                return None
            cost, error = cost[kept], error[kept]
            trail.append((kept // len(row), kept % len(row)))
        if not len(cost):  # rounding up may leave nothing that is as good as the known state
            return self.known
        state: list[int] = []
        at = int(np.argmin(error))
        for before, level in reversed(trail):
            state.append(int(level[at]))
            at = int(before[at])
        return min(tuple(reversed(state)), self.known, key=self.error)


def _finite(errors: list[list[float]]) -> list[list[float]]:
    """The same errors with a number in place of infinity that outweighs all others together."""
    worst = 1.0 + 2.0 * sum(abs(e) for row in errors for e in row if e < math.inf)
    return [[e if e < math.inf else worst for e in row] for row in errors]
