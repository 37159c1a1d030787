"""Step by step: the change that does the least harm per unit of cost that it saves, until the limit is met.

Harm is the rise of the estimated error, or of what a measure says about the whole state. With a measure every step is
judged with all earlier ones in place, so that interactions count, at the price of one measurement per site and step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from .table import Allocation, LevelTable, State

Measure = Callable[[Sequence[State]], Sequence[float]]
"""Scores of several states, lower is better; they may be measured at the same time."""


def greedy(table: LevelTable, limit: float, measure: Measure | None = None) -> Allocation:
    """Repeat the step with the least harm per saved cost; of equal ones that of the first site, to the mildest level.

    With estimates a step may skip levels, so that a level that is worse than a cheaper one is never stopped at. With a
    measure it goes to the next cheaper level, which keeps the number of measurements at one per site and step.

    Args:
        table: the levels, each with an estimated error unless there is a measure.
        limit: what the state may cost, with the fixed cost.
        measure: scores of states. A score that is not a number counts as infinite.

    Raises:
        PreconditionError: not even the cheapest state fits, or a level has no estimate and nothing measures it.
    """
    budget = table.budget(limit)
    errors = table.estimated("greedy without a measure") if measure is None else None
    state, cost, score = table.untouched, table.weigh(table.untouched), 0.0
    if measure is not None and cost > budget:
        (score,) = _scores([state], measure)
    while cost > budget:
        steps = [
            (site, level)
            for site, now in enumerate(state)
            for level in _cheaper(table, site, now, every=measure is None)
        ]
        saved = [table.units[site][state[site]] - table.units[site][level] for site, level in steps]
        if measure is not None:
            scores = _scores([_after(state, step) for step in steps], measure)
            harms = [_rise(score, after) for after in scores]
        else:
            assert errors is not None
            scores = []
            harms = [_rise(errors[site][state[site]], errors[site][level]) for site, level in steps]
        best = min(range(len(steps)), key=lambda n: (harms[n] / table.amount(saved[n]), steps[n]))
        state, cost = _after(state, steps[best]), cost - saved[best]
        score = scores[best] if scores else score
    return Allocation.of("greedy" if measure is None else "greedy-measured", table, state)


def _cheaper(table: LevelTable, site: int, level: int, *, every: bool) -> list[int]:
    """Levels of a site that cost less than this one: all, or only the next."""
    row = table.units[site]
    cheaper = [n for n in table.ladders[site] if row[n] < row[level]]
    return cheaper if every else cheaper[:1]


def _after(state: State, step: tuple[int, int]) -> State:
    site, level = step
    return (*state[:site], level, *state[site + 1 :])


def _scores(states: Sequence[State], measure: Measure) -> list[float]:
    return [math.inf if math.isnan(score) else score for score in measure(states)]


def _rise(before: float, after: float) -> float:
    # Once something is broken there is nothing to compare any more: every step from there counts alike.
    return 0.0 if before == math.inf else after - before
