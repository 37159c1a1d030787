"""Greedy: against a plain copy of its definition, with interactions that only a measure sees, and its refusals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import given

from graphlathe.ir.errors import PreconditionError
from graphlathe.passes.search.allocators.greedy import greedy
from graphlathe.passes.search.allocators.table import LevelTable, State

from .tables import WHOLE, problems


@given(problems(WHOLE))
def test_every_step_is_the_least_harmful_per_saved_cost(problem: tuple[LevelTable, float]) -> None:
    """Whole numbers, so that the plain copy can compare exact fractions."""
    table, limit = problem
    state = list(table.untouched)
    while table.cost(state) > limit:
        steps = []
        for site, row in enumerate(table.costs):
            for level, cost in enumerate(row):
                if cost < row[state[site]]:
                    rise = Fraction(table.errors[site][level]) - Fraction(table.errors[site][state[site]])
                    steps.append((rise / (row[state[site]] - cost), site, level))
        best = min(ratio for ratio, _, _ in steps)
        # Equal ratios: the first site, its lowest level, as the table lists them.
        _, site, level = min((ratio, site, level) for ratio, site, level in steps if ratio == best)
        state[site] = level
    found = greedy(table, limit)
    assert found.cost <= limit
    assert found.cost == table.cost(state) and found.error == pytest.approx(table.error(state), rel=1e-12)


def test_a_measure_sees_what_estimates_do_not() -> None:
    """Each of sites 0 and 1 alone is harmless, both together are not."""
    table = LevelTable(costs=((1, 0),) * 3, errors=((0.0, 1.0), (0.0, 1.1), (0.0, 3.0)))
    asked: list[State] = []

    def measure(states: Sequence[State]) -> list[float]:
        asked.extend(states)
        return [s[0] + 1.1 * s[1] + 3 * s[2] + 10 * s[0] * s[1] for s in states]

    assert greedy(table, 1).state == (1, 1, 0)
    found = greedy(table, 1, measure)
    assert found.state == (1, 0, 1)
    assert found.method == "greedy-measured"
    assert asked == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1)]


def test_a_measure_is_asked_for_the_next_cheaper_level_only() -> None:
    table = LevelTable(costs=((9, 6, 3, 0),))
    asked: list[State] = []

    def measure(states: Sequence[State]) -> list[float]:
        asked.extend(states)
        return [float(sum(state)) for state in states]

    assert greedy(table, 3, measure).state == (2,)
    assert asked == [(0,), (1,), (2,)]


def test_nothing_is_measured_where_the_untouched_model_fits() -> None:
    def measure(states: Sequence[State]) -> list[float]:
        raise AssertionError

    assert greedy(LevelTable(costs=((2, 1),)), 2, measure).state == (0,)


def test_scores_that_are_no_numbers_are_the_worst() -> None:
    table = LevelTable(costs=((1, 0),) * 3)
    assert greedy(table, 2, lambda states: [math.nan if s[0] else float(s[1]) for s in states]).state == (0, 0, 1)
    assert greedy(table, 0, lambda states: [math.nan] * len(states)).state == (1, 1, 1)


def test_refusals() -> None:
    with pytest.raises(PreconditionError, match="greedy without a measure needs an estimated error"):
        greedy(LevelTable(costs=((1, 0),)), 0)
    with pytest.raises(PreconditionError, match="out of reach"):
        greedy(LevelTable(costs=((3, 2),)), 1, lambda states: [0.0] * len(states))
