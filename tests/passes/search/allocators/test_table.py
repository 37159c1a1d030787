"""The table of levels: exact sums of costs, the smallest state, and what it refuses."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given

from graphlathe.ir.errors import InputError, PreconditionError
from graphlathe.passes.search.allocators.table import Allocation, LevelTable

from .tables import all_states, problems, tables


@given(tables())
def test_costs_are_exact_sums(table: LevelTable) -> None:
    whole = all(isinstance(cost, int) for row in table.costs for cost in row)
    for state in all_states(table)[:50]:
        exact = sum(Fraction(row[n]) for row, n in zip(table.costs, state, strict=True)) + Fraction(table.fixed)
        assert Fraction(table.weigh(state)) * table.unit + Fraction(table.fixed) == exact
        assert table.cost(state) == (int(exact) if whole else float(exact))
    assert table.cost(table.smallest()) == min(map(table.cost, all_states(table)))


@given(problems())
def test_the_budget_admits_exactly_what_costs_at_most_the_limit(problem: tuple[LevelTable, float]) -> None:
    table, limit = problem
    budget = table.budget(limit)
    for state in all_states(table)[:200]:
        assert (table.weigh(state) <= budget) == (table.cost(state) <= limit), state


def test_a_state_fits_the_limit_that_is_its_own_cost() -> None:
    """0.1 + 0.2 rounds up, so the sum of the exact numbers is below the printed one, and 0.7 + 0.1 is above it."""
    for costs in ((0.1, 0.2), (0.7, 0.1), (1e16, 1.0)):
        table = LevelTable(costs=tuple((cost, 0.0) for cost in costs))
        assert table.weigh(table.untouched) <= table.budget(table.cost(table.untouched))


def test_ladders_leave_out_what_costs_no_less_than_the_untouched_site() -> None:
    table = LevelTable(costs=((5, 7, 3, 5, 0, 3),))
    assert table.ladders == ((0, 2, 5, 4),)


def test_integers_stay_integers_whatever_their_type() -> None:
    table = LevelTable(costs=((np.int64(2**62), np.int64(6)),), fixed=np.int64(2**62))
    assert table.cost((0,)) == 2**63 and isinstance(table.cost((0,)), int)
    assert isinstance(LevelTable(costs=((np.float32(0.5),),)).cost((0,)), float)


def test_an_empty_table() -> None:
    table = LevelTable(costs=(), fixed=3)
    assert table.cost(()) == 3 and table.smallest() == () and table.budget(3) == 0


def test_a_limit_out_of_reach_names_the_smallest_cost() -> None:
    table = LevelTable(costs=((1000, 400), (1000, 300)), fixed=500)
    with pytest.raises(PreconditionError, match=r"(?s)1,199 is out of reach: 1,200 is left .*expected: at least 1,200"):
        table.budget(1199)
    with pytest.raises(PreconditionError, match="out of reach"):
        table.budget(math.nan)
    assert table.budget(1200) * table.unit == 700
    assert table.budget(math.inf) * table.unit >= 2000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"costs": ((1, math.nan),)}, "site 0 at level 1 is nan"),
        ({"costs": ((1,), (-1,)), "labels": ("a", "b")}, "cost of b at level 0 is -1"),
        ({"costs": ((1,),), "fixed": math.inf}, "the fixed cost is inf"),
        ({"costs": ((1,), ())}, "site 1 has 0 costs"),
        ({"costs": ((1, 0),), "errors": ((1.0,),)}, "2 costs and 1 errors"),
        ({"costs": ((1, 0),), "errors": ((0.0, math.nan),)}, "error of site 0 at level 1 is nan"),
        ({"costs": ((1,),), "errors": ((0.0,), (0.0,))}, "1 rows of costs, but 2 errors"),
        ({"costs": ((1,),), "kinds": ("a", "b")}, "1 rows of costs, but 2 kinds"),
        ({"costs": ((1,),), "labels": ("a", "b")}, "1 rows of costs, but 2 labels"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        LevelTable(**arguments)


def test_what_is_no_state_is_refused() -> None:
    table = LevelTable(costs=((1, 0), (1,)), labels=("a", "b"))
    table.check((1, 0))
    with pytest.raises(InputError, match="3 levels for 2 sites"):
        table.check((0, 0, 0))
    with pytest.raises(InputError, match=r"(?s)b has no level 1.*0 to 0"):
        table.check((0, 1))
    with pytest.raises(InputError, match="a has no level -1"):
        table.check((-1, 0))


def test_a_missing_estimate_is_named() -> None:
    table = LevelTable(costs=((1, 0), (1, 0)), errors=((0.0, 1.0), (0.0, None)), labels=("a", "b"))
    assert table.error((1, 0)) == 1.0
    assert table.error((0, 1)) is None
    with pytest.raises(PreconditionError, match=r"an oracle needs .* b has none at level 1"):
        table.estimated("an oracle")


def test_allocations_become_json() -> None:
    table = LevelTable(costs=((3, 1),), errors=((0.0, math.inf),), fixed=1)
    found = Allocation.of("test", table, (1,), exact=True, notes=["why"])
    assert found.error == math.inf
    assert json.loads(json.dumps(found.to_json(), allow_nan=False)) == {
        "method": "test",
        "state": [1],
        "cost": 2,
        "error": None,
        "exact": True,
        "notes": ["why"],
    }
