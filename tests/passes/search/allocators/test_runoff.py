"""The runoff: of the states that led a search, the one that is best on all the data wins."""

from __future__ import annotations

import pytest

from graphlathe.passes.search.allocators.evolution import Outcome, Settings, Stage, evolve
from graphlathe.passes.search.allocators.runoff import finalists_of, runoff
from graphlathe.passes.search.allocators.table import LevelTable, State
from graphlathe.passes.search.executors import Evaluations

TABLE = LevelTable(costs=((1, 0),) * 6, fixed=0)
ALL = 8


def lucky(state: State, batch: int) -> float:
    """Dropping the first sites looks better and better on batch 0, and is worse and worse on all others."""
    early = sum(state[:3])
    return 10.0 - early if batch == 0 else 10.0 + early


def searched(evaluations: Evaluations) -> Outcome:
    settings = Settings(generations=30, offspring=4, stages=(Stage(1, 1),))
    return evolve(TABLE, 3, evaluations, [(0, 0, 0, 1, 1, 1)], settings)


def test_what_only_suits_the_data_of_the_search_loses() -> None:
    evaluations = Evaluations(lucky)
    outcome = searched(evaluations)
    assert outcome.state == (1, 1, 1, 0, 0, 0) and outcome.parents[0] == (0, 0, 0, 1, 1, 1)
    assert outcome.parents[-1] == outcome.state and len(outcome.parents) > 2
    found, points = runoff(outcome, TABLE, evaluations, ALL, 2)
    assert found.state == (0, 0, 0, 1, 1, 1) and found.score == 10.0 and found.cost == 3
    assert [point.state for point in points] == [outcome.parents[-1], outcome.parents[0]]
    assert [point.score for point in points] == [sum(lucky(p.state, b) for b in range(ALL)) / ALL for p in points]
    assert found.points == outcome.points and found.history == outcome.history


def test_what_is_better_everywhere_stays() -> None:
    evaluations = Evaluations(lambda state, batch: batch - float(sum(state[:3])))
    outcome = searched(evaluations)
    found, points = runoff(outcome, TABLE, evaluations, ALL, 3)
    assert found == outcome and len(points) == 3


@pytest.mark.parametrize(("count", "wanted"), [(1, [4]), (2, [4, 0]), (3, [4, 0, 3]), (9, [4, 0, 3, 2, 1])])
def test_who_takes_part(count: int, wanted: list[int]) -> None:
    parents: list[State] = [(n,) for n in range(5)]
    assert finalists_of(parents, count) == [(n,) for n in wanted]
    assert finalists_of(parents[:1], count) == [(0,)]


def test_one_finalist_costs_nothing() -> None:
    calls: list[int] = []

    def score(state: State, batch: int) -> float:
        calls.append(batch)
        return lucky(state, batch)

    evaluations = Evaluations(score)
    outcome = searched(evaluations)
    assert runoff(outcome, TABLE, evaluations, ALL, 1) == (outcome, []) and set(calls) == {0}
