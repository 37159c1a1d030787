"""The global threshold: the relaxed optimum on convex errors, the hull on others, standardised scores."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphlathe.ir.errors import InputError, PreconditionError
from graphlathe.passes.search.allocators.global_threshold import global_threshold
from graphlathe.passes.search.allocators.table import LevelTable

from .tables import all_states, problems


@given(problems())
def test_nothing_that_costs_no_more_is_better(problem: tuple[LevelTable, float]) -> None:
    """A threshold is a Lagrange multiplier, so its state has the lowest error of all that cost at most as much: a
    theorem that does not say how it is found. Levels that cost more than the untouched site are left out.
    """
    table, limit = problem
    found = global_threshold(table, limit)
    assert found.cost <= limit
    if table.cost(table.untouched) <= limit:
        assert found.state == table.untouched
    slopes = [rise for rise in _slopes(table, found.state) if rise is not None]
    if not slopes or max(slopes) < 0:
        return  # steps that improve were not all needed: no multiplier above zero
    rivals = [s for s in all_states(table) if all(n in t for n, t in zip(s, table.ladders, strict=True))]
    best = min(table.error(s) for s in rivals if table.cost(s) <= found.cost)
    assert found.error == pytest.approx(best, rel=1e-12, abs=1e-9)


def _slopes(table: LevelTable, state: tuple[int, ...]) -> list[float | None]:
    """Per changed site, error per cost from the most expensive corner of its hull; only its sign is used."""
    found: list[float | None] = []
    for row, errors, level in zip(table.costs, table.errors, state, strict=True):
        saved = row[0] - row[level]
        found.append((errors[level] - errors[0]) / saved if saved else None)
    return found


@given(st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=6), min_size=1, max_size=5), st.data())
def test_equal_costs_and_convex_errors_take_the_least_increments_of_all(
    increments: list[list[int]], data: st.DataObject
) -> None:
    """FLAP's case: units of one cost, scores that add up. The smallest of the whole model go, whatever their site."""
    rows = [sorted(row) for row in increments]
    table = LevelTable(
        costs=tuple(tuple(range(len(row), -1, -1)) for row in rows),
        errors=tuple(tuple(float(sum(row[:n])) for n in range(len(row) + 1)) for row in rows),
    )
    gone = data.draw(st.integers(0, sum(map(len, rows))))
    found = global_threshold(table, sum(map(len, rows)) - gone)
    assert sum(found.state) == gone
    assert found.error == sum(sorted(score for row in rows for score in row)[:gone])


def test_a_level_above_the_hull_is_passed_over() -> None:
    table = LevelTable(costs=((4, 3, 2, 0),), errors=((0.0, 5.0, 1.0, 9.0),))
    assert global_threshold(table, 3).state == (2,)


def test_a_level_that_breaks_the_model_comes_last() -> None:
    table = LevelTable(costs=((4, 2), (4, 2), (4, 2)), errors=((0.0, math.inf), (0.0, 1.0), (0.0, 9.0)))
    assert [global_threshold(table, limit).state for limit in (10, 8, 6)] == [(0, 1, 0), (0, 1, 1), (1, 1, 1)]


def test_standardised_scores_do_not_depend_on_a_sites_scale() -> None:
    errors = (0.0, 1.0, 3.0, 6.0, 10.0)
    table = LevelTable(
        costs=((4, 3, 2, 1, 0),) * 4,
        errors=(errors, errors, tuple(1000 * e for e in errors), tuple(1000 * e for e in errors)),
        kinds=("a", "a", "b", "b"),
    )
    assert global_threshold(table, 8).state == (4, 4, 0, 0)
    assert global_threshold(table, 8, standardize="site").state == (2, 2, 2, 2)
    assert global_threshold(table, 8, standardize="kind").state == (2, 2, 2, 2)
    # Inside a kind the scale counts.
    mixed = LevelTable(table.costs, table.errors, kinds=("a", "b", "a", "b"))
    assert global_threshold(mixed, 8, standardize="kind").state == (4, 4, 0, 0)


def test_a_kind_with_one_step_has_no_deviation() -> None:
    table = LevelTable(costs=((1, 0), (1, 0)), errors=((0.0, 2.0), (0.0, 1.0)), kinds=("a", "b"))
    assert global_threshold(table, 1, standardize="kind").state == (1, 0)


def test_refusals() -> None:
    table = LevelTable(costs=((1, 0),))
    with pytest.raises(PreconditionError, match="global threshold needs an estimated error"):
        global_threshold(table, 1)
    with pytest.raises(InputError, match=r"(?s)over 'layer'.*none, site, kind"):
        global_threshold(table, 1, standardize="layer")
    with pytest.raises(PreconditionError, match="out of reach"):
        global_threshold(LevelTable(costs=((3, 2),), errors=((0.0, 1.0),)), 1)
