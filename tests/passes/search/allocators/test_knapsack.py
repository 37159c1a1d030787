"""The knapsack: brute force on small tables, whole and real costs, huge numbers, and what rounding may cost."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphlathe.ir.errors import InputError, PreconditionError
from graphlathe.passes.search.allocators.greedy import greedy
from graphlathe.passes.search.allocators.knapsack import knapsack
from graphlathe.passes.search.allocators.table import LevelTable

from .tables import all_states, problems


def brute_force(table: LevelTable, limit: float) -> float:
    return min(table.error(state) for state in all_states(table) if table.cost(state) <= limit)


@given(problems())
def test_equal_to_brute_force(problem: tuple[LevelTable, float]) -> None:
    table, limit = problem
    found = knapsack(table, limit)
    assert found.exact and not found.notes
    assert found.cost == table.cost(found.state) <= limit
    assert found.error == brute_force(table, limit)  # errors are whole, so sums are exact


@given(problems(), st.integers(0, 1000))
def test_equal_to_brute_force_with_real_errors(problem: tuple[LevelTable, float], seed: int) -> None:
    """Errors that differ by little as well as by much."""
    whole, limit = problem
    draw = random.Random(seed)
    errors = tuple(tuple(draw.uniform(-1, 1) * 10.0 ** draw.randint(-6, 0) for _ in row) for row in whole.costs)
    table = LevelTable(whole.costs, errors, fixed=whole.fixed)
    found = knapsack(table, limit)
    assert found.exact and found.cost <= limit
    assert found.error == pytest.approx(brute_force(table, limit), rel=1e-12, abs=1e-15)


@given(problems(), st.integers(2, 6))
def test_rounded_costs_fit_and_stay_within_what_the_note_promises(
    problem: tuple[LevelTable, float], points: int
) -> None:
    table, limit = problem
    found = knapsack(table, limit, max_points=points)
    assert found.cost <= limit
    best = brute_force(table, limit)
    if found.exact:
        assert found.error == best
    else:
        (note,) = found.notes
        promised = float(note.rpartition("up to ")[2].partition(" ")[0])
        assert best <= found.error <= best + promised * 1.01 + 1e-9  # the note has three digits


def test_rounding_happens_and_is_told() -> None:
    """What a level saves is its harm, so that every cost has its own error and no partial state beats another."""
    source = random.Random(1)
    saved = [source.random() for _ in range(14)]
    table = LevelTable(costs=tuple((s, 0.0) for s in saved), errors=tuple((0.0, s) for s in saved))
    limit = 0.43 * sum(saved)
    exact, rounded = knapsack(table, limit), knapsack(table, limit, max_points=40)
    assert exact.exact and not rounded.exact
    assert "more than 40 partial states" in rounded.notes[0]
    assert rounded.cost <= limit
    assert exact.error == pytest.approx(brute_force(table, limit), rel=1e-12)
    assert exact.error < rounded.error < exact.error + 14 * limit / 40


def test_costs_beyond_64_bits() -> None:
    table = LevelTable(costs=((2**70 + 1, 2**69, 1), (2**70, 2**68 + 1, 0)), errors=((0.0, 1.0, 5.0), (0.0, 2.0, 3.0)))
    limit = 2**70 + 2**68 + 1
    found = knapsack(table, limit)
    assert found.exact and found.error == brute_force(table, limit)
    assert knapsack(table, 2**69 + 2**68 + 1).state == (1, 1)
    assert knapsack(table, 2**69 + 2**68).state == (1, 2)


def test_costs_of_very_different_sizes() -> None:
    table = LevelTable(costs=((1e300, 1e-300), (1e-300, 0.0), (5e-324, 0.0)), errors=((0.0, 1.0),) * 3)
    found = knapsack(table, 1e-300)
    assert found.exact and found.error == brute_force(table, 1e-300)


def test_a_level_that_breaks_the_model_is_taken_only_where_nothing_else_fits() -> None:
    table = LevelTable(costs=((4, 2, 0), (4, 0)), errors=((0.0, 1.0, math.inf), (0.0, 1e6)))
    assert knapsack(table, 4).state == (0, 1)
    assert knapsack(table, 3).state == (1, 1)
    assert knapsack(table, 1).state == (2, 1)
    assert knapsack(table, 1).error == math.inf


def test_a_level_above_the_untouched_cost_may_be_the_best() -> None:
    table = LevelTable(costs=((4, 5, 2),), errors=((1.0, 0.0, 3.0),))
    assert [knapsack(table, limit).state for limit in (5, 4, 2)] == [(1,), (0,), (2,)]


def test_many_sites_are_exact() -> None:
    """Sizes of real models; a convex error per site, as from singular values. The relaxed problem bounds the best."""
    source = random.Random(0)
    sizes = [source.choice([589_824, 1_769_472, 663_552]) for _ in range(210)]
    weights = [source.random() for _ in sizes]
    table = LevelTable(
        costs=tuple(tuple(size * (8 - n) // 8 for n in range(8)) for size in sizes),
        errors=tuple(tuple(w * (n / 8) ** 2 for n in range(8)) for w in weights),
    )
    limit = 0.6 * sum(sizes)
    found = knapsack(table, limit)
    assert found.exact and found.cost <= limit
    assert found.error <= greedy(table, limit).error
    assert found.cost > limit - min(sizes) / 8  # whatever is left over is too little for any milder level


def test_refusals() -> None:
    with pytest.raises(PreconditionError, match="the knapsack needs an estimated error"):
        knapsack(LevelTable(costs=((1, 0),)), 1)
    with pytest.raises(PreconditionError, match="out of reach"):
        knapsack(LevelTable(costs=((3, 2),), errors=((0.0, 1.0),)), 1)
    with pytest.raises(InputError, match="max_points is 1"):
        knapsack(LevelTable(costs=((1,),), errors=((0.0,),)), 1, max_points=1)


def test_an_empty_table() -> None:
    assert knapsack(LevelTable(costs=(), fixed=2), 2).state == ()
