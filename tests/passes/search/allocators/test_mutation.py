"""Mutations: what every neighbour obeys, the paper's distribution of flips, and that all single flips are found."""

from __future__ import annotations

import collections
import itertools
import math
import random

from hypothesis import given
from hypothesis import strategies as st

from graphlathe.passes.search.allocators.mutation import Mutator
from graphlathe.passes.search.allocators.table import LevelTable, State

from .tables import problems

DEPTH = LevelTable(costs=((1, 0),) * 20, kinds=("attention",) * 10 + ("mlp",) * 10)
"""Ten layers whose attention and MLP are kept or dropped, at equal costs."""


def mutator(table: LevelTable, limit: float, *, max_flips: int = 3, same_kind: bool = False, seed: int = 0) -> Mutator:
    return Mutator(table, table.budget(limit), max_flips, same_kind, random.Random(seed))


@given(problems(), st.booleans(), st.integers(1, 3), st.integers(0, 1000))
def test_what_every_neighbour_obeys(
    problem: tuple[LevelTable, float], same_kind: bool, max_flips: int, seed: int
) -> None:
    table, limit = problem
    mutate = mutator(table, limit, max_flips=max_flips, same_kind=same_kind, seed=seed)
    parent = mutate.filled(table.smallest())
    drawn = [mutate.neighbour(parent) for _ in range(10)]
    for state in [s for s in drawn if s is not None] + list(mutate.singles(parent)):
        assert table.cost(state) <= limit
        steps, before = ([row.index(n) for n, row in zip(s, table.ladders, strict=True)] for s in (state, parent))
        assert any(now < was for now, was in zip(steps, before, strict=True)), "what became milder stays so"
        changed = {table.kinds[site] for site in range(len(table)) if steps[site] != before[site]}
        for site, ladder in enumerate(table.ladders):  # nothing could still become milder for free
            if same_kind and table.kinds[site] not in changed:
                continue
            for level in ladder[: steps[site]]:
                assert table.units[site][level] == table.units[site][state[site]] or (
                    table.cost((*state[:site], level, *state[site + 1 :])) > limit
                )


@given(problems(), st.integers(0, 1000))
def test_filling_up_leaves_no_room_for_a_milder_level(problem: tuple[LevelTable, float], seed: int) -> None:
    table, limit = problem
    state = mutator(table, limit, seed=seed).filled(table.smallest())
    assert table.cost(state) <= limit
    for site, ladder in enumerate(table.ladders):
        for level in ladder[: ladder.index(state[site])]:
            assert table.units[site][level] == table.units[site][state[site]] or (
                table.cost((*state[:site], level, *state[site + 1 :])) > limit
            )


def test_the_papers_distribution_at_equal_costs() -> None:
    """EvoPress: min of two U{1..3} swaps, each inside attention or inside MLP, chosen evenly; costs never change."""
    mutate = mutator(DEPTH, 13, same_kind=True)
    parent: State = (1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0)
    count = 9000
    flips: collections.Counter[int] = collections.Counter()
    kinds: collections.Counter[str] = collections.Counter()
    for _ in range(count):
        state = mutate.neighbour(parent)
        assert state is not None
        assert sum(state[:10]) == 3 and sum(state[10:]) == 4
        changed = [site for site in range(20) if state[site] != parent[site]]
        flips[len(changed) // 2] += 1
        if len(changed) == 2:
            kinds[DEPTH.kinds[changed[0]]] += 1
    for number, share in {1: 5 / 9, 2: 3 / 9, 3: 1 / 9}.items():
        assert abs(flips[number] - count * share) < 4 * math.sqrt(count * share * (1 - share))
    assert set(flips) == {1, 2, 3}
    assert abs(kinds["mlp"] - flips[1] / 2) < 4 * math.sqrt(flips[1] / 4)


def test_all_swaps_are_equally_likely() -> None:
    table = LevelTable(costs=((1, 0),) * 6)
    mutate = mutator(table, 4, max_flips=1)
    seen = collections.Counter(mutate.neighbour((1, 1, 0, 0, 0, 0)) for _ in range(4000))
    assert len(seen) == 8
    assert all(abs(n - 500) < 4 * math.sqrt(500 * 7 / 8) for n in seen.values()), seen


def test_singles_are_all_states_one_swap_away() -> None:
    parent: State = (1, 1, 0, 0, 0)
    table = LevelTable(costs=((1, 0),) * 5, kinds=("a", "b", "a", "b", "b"))
    near = {s for s in itertools.product((0, 1), repeat=5) if sum(s) == 2 and _distance(s, parent) == 2}
    found = list(mutator(table, 3).singles(parent))
    assert len(found) == len(near) == 6 and set(found) == near
    same = list(mutator(table, 3, same_kind=True).singles(parent))
    assert set(same) == {(0, 1, 1, 0, 0), (1, 0, 0, 1, 0), (1, 0, 0, 0, 1)} and len(same) == 3


def test_sites_of_different_costs_trade() -> None:
    """Dropping one MLP of cost 6 pays for three attentions of cost 2, and the other way round."""
    table = LevelTable(costs=((2, 0),) * 3 + ((6, 0),) * 2, kinds=("attention",) * 3 + ("mlp",) * 2)
    mutate = mutator(table, 12, max_flips=1)
    there = {mutate.neighbour((1, 1, 1, 0, 0)) for _ in range(200)}
    assert there == {(0, 0, 0, 1, 0), (0, 0, 0, 0, 1)}
    back = {mutate.neighbour((0, 0, 0, 1, 0)) for _ in range(500)}
    assert (1, 1, 1, 0, 0) in back, "repair drops two more"
    assert (0, 0, 0, 0, 1) in back, "a swap of two MLPs"
    assert back == {(1, 1, 1, 0, 0), (0, 0, 0, 0, 1)}


def test_nothing_to_swap() -> None:
    table = LevelTable(costs=((1, 0),) * 3)
    for limit, state in ((3, (0, 0, 0)), (0, (1, 1, 1))):
        mutate = mutator(table, limit)
        assert mutate.neighbour(state) is None and list(mutate.singles(state)) == []
        assert mutate.walk(state) == state
    one = LevelTable(costs=((2, 1, 0),))
    assert mutator(one, 1).neighbour((1,)) is None, "a site cannot trade with itself"
    # The only site that can become cheaper is the only one that can become milder, or one of two that can.
    two = LevelTable(costs=((2, 1, 0), (1, 0)))
    assert {mutator(two, 1, seed=n).neighbour((1, 1)) for n in range(20)} == {(2, 0)}


def test_a_level_that_costs_more_than_the_untouched_site_is_left_and_never_entered() -> None:
    table = LevelTable(costs=((4, 9, 2), (4, 2), (4, 2)))
    mutate = mutator(table, 13)
    for _ in range(50):
        state = mutate.neighbour((1, 1, 1))
        assert state is not None and state[0] in (0, 2)


def _distance(a: State, b: State) -> int:
    return sum(x != y for x, y in zip(a, b, strict=True))
