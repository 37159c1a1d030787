"""Uniform shares: the mildest share that fits, found by trying all; what is left over is given back."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given

from graphlathe.passes.search.allocators.table import LevelTable
from graphlathe.passes.search.allocators.uniform import uniform

from .tables import problems


def at_share(table: LevelTable, share: Fraction) -> list[int]:
    """By the definition, for one share: the most expensive level that is cheap enough."""
    state = []
    for row in table.costs:
        costs = [Fraction(cost) for cost in row]
        allowed = costs[0] - share * (costs[0] - min(costs))
        state.append(max((n for n, cost in enumerate(costs) if cost <= allowed), key=lambda n, c=costs: (c[n], -n)))
    return state


@given(problems())
def test_it_is_the_smallest_share_that_fits_with_the_rest_given_back(problem: tuple[LevelTable, float]) -> None:
    table, limit = problem
    shares = {Fraction(0)}
    for row in table.costs:
        first, least = Fraction(row[0]), Fraction(min(row))
        shares |= {
            (first - Fraction(cost)) / (first - least) for cost in row if least <= cost <= first and least < first
        }
    fitting = [share for share in sorted(shares) if table.cost(at_share(table, share)) <= limit]
    base = at_share(table, fitting[0])
    found = uniform(table, limit)
    assert found.cost == table.cost(found.state) <= limit
    for site, (row, got, given_up) in enumerate(zip(table.costs, found.state, base, strict=True)):
        assert row[got] >= row[given_up], "only ever milder than the share asks for"
        for level, cost in enumerate(row):  # nothing is left over that would allow a milder level
            milder = (*found.state[:site], level, *found.state[site + 1 :])
            assert not row[got] < cost <= row[0] or table.cost(milder) > limit


def test_a_generous_limit_changes_nothing() -> None:
    table = LevelTable(costs=((4, 2, 0), (9, 3)))
    assert uniform(table, 13).state == (0, 0)
    assert uniform(table, 1e9).state == (0, 0)


def test_all_sites_give_the_same_share_of_their_own_range() -> None:
    table = LevelTable(costs=((100, 75, 50, 25, 0), (40, 30, 20, 10, 0), (8, 7, 6, 5, 4)), fixed=3)
    assert uniform(table, 3 + 50 + 20 + 6).state == (2, 2, 2)


def test_what_is_kept_of_equal_sites_is_spread_over_them() -> None:
    """Eight blocks that are kept or dropped: a share is all or nothing, so which stay is a matter of the order."""
    table = LevelTable(costs=((1, 0),) * 8)
    kept = [[site for site, level in enumerate(uniform(table, k).state) if level == 0] for k in range(9)]
    assert kept[1:5] == [[0], [0, 4], [0, 2, 4], [0, 2, 4, 6]]
    assert [len(each) for each in kept] == list(range(9))


def test_what_is_left_over_goes_to_the_site_that_gives_the_largest_share() -> None:
    """At a share of 1/2 the costs are 3 and 0; of the 2 that are left, the second site, which gives all, gets both."""
    table = LevelTable(costs=((6, 5, 4, 3, 2, 1, 0), (3, 2, 0)))
    assert uniform(table, 5).state == (3, 1)
