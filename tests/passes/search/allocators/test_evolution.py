"""Evolution: it finds planted and brute-force optima, compares in pairs, repeats nothing and knows when to stop."""

from __future__ import annotations

import collections
import json
import math
import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphlathe.ir.errors import InputError, PreconditionError
from graphlathe.passes.search.allocators.evolution import Outcome, Point, Settings, Stage, evolve
from graphlathe.passes.search.allocators.greedy import greedy
from graphlathe.passes.search.allocators.table import LevelTable, State
from graphlathe.passes.search.executors import Evaluations

from .tables import all_states, problems

ONE = (Stage(survivors=1, batches=1),)


class Counted:
    """A score that notes what it was asked for."""

    def __init__(self, score: Callable[[State, int], float]) -> None:
        self.score = score
        self.calls: list[tuple[State, int]] = []

    def __call__(self, state: State, batch: int) -> float:
        self.calls.append((state, batch))
        return self.score(state, batch)


def rugged(seed: int, noise: float = 0.0) -> Callable[[State, int], float]:
    """Harm per site and pair of sites, never less at a harsher level. Noise depends on state and batch."""
    source = random.Random(seed)
    alone = [source.random() for _ in range(20)]
    pairs = [[source.uniform(0, 1.5) for _ in range(20)] for _ in range(20)]

    def score(state: State, batch: int) -> float:
        total = sum(level * alone[site] for site, level in enumerate(state))
        total += sum(a * b * pairs[i][j] for i, a in enumerate(state) for j, b in enumerate(state[:i]))
        return total + noise * random.Random(f"{seed} {state} {batch}").gauss(0, 1)

    return score


def test_it_finds_the_brute_force_optimum_where_greedy_does_not() -> None:
    """Attention and MLP of different costs and three levels: the best of all states that fit."""
    table = LevelTable(costs=((3, 2, 0),) * 4 + ((5, 0),) * 4, kinds=("attention",) * 4 + ("mlp",) * 4, fixed=7)
    limit = 25.0
    missed = 0
    for seed in range(5):
        score = rugged(seed)
        best = min(score(s, 0) for s in all_states(table) if table.cost(s) <= limit)
        start = greedy(table, limit, lambda states, score=score: [score(state, 0) for state in states])
        found = evolve(table, limit, score, [start.state], Settings(60, 16, stages=ONE, seed=seed, confidence=0))
        assert found.cost <= limit
        assert found.score == pytest.approx(best, rel=1e-12)
        missed += score(start.state, 0) > best
    assert missed, "a test that greedy passes shows nothing"


def test_kinds_trade_unless_forbidden() -> None:
    """The planted optimum drops MLPs only, the start attention only."""
    table = LevelTable(costs=((1, 0),) * 8, kinds=("attention",) * 4 + ("mlp",) * 4)
    planted = (0, 0, 0, 0, 1, 1, 0, 1)
    start = (1, 1, 1, 0, 0, 0, 0, 0)

    def score(state: State, batch: int) -> float:
        return float(sum(a != b for a, b in zip(state, planted, strict=True)))

    assert evolve(table, 5, score, [start], Settings(30, 8, stages=ONE)).state == planted
    forbidden = evolve(table, 5, score, [start], Settings(30, 8, stages=ONE, same_kind=True))
    assert {sum(point.state[:4]) for point in forbidden.points} == {3}
    assert forbidden.exhausted and len(forbidden.points) == 4


@settings(max_examples=50)
@given(problems(), st.booleans(), st.integers(0, 5), st.integers(0, 3))
def test_whatever_the_table(problem: tuple[LevelTable, float], same_kind: bool, seed: int, random_starts: int) -> None:
    """Everything that is scored fits, nothing is scored twice, later is never worse, and books balance."""
    table, limit = problem
    evaluate = Counted(rugged(seed, noise=1.0))
    chosen = Settings(
        generations=6,
        offspring=4,
        stages=(Stage(3, 1), Stage(2, 2), Stage(1, 4)),
        same_kind=same_kind,
        random_starts=random_starts,
        confidence=0,
        seed=seed,
    )
    found = evolve(table, limit, evaluate, settings=chosen)
    assert max(collections.Counter(evaluate.calls).values()) == 1
    assert all(table.cost(state) <= limit for state, _ in evaluate.calls)
    assert found.evaluations == len(evaluate.calls) == found.history[-1].evaluations
    assert found.reused == 0
    scores = [row.score for row in found.history]
    assert scores == sorted(scores, reverse=True) and scores[-1] == found.score
    assert found.score == min(point.score for point in found.points)
    assert found == evolve(table, limit, evaluate.score, settings=chosen), "equal seeds, equal searches"


def test_a_small_space_is_searched_to_the_end() -> None:
    """Ten states, each one swap from six others; those that lose an early stage get their turn when nothing is new."""
    table = LevelTable(costs=((1, 0),) * 5)
    evaluate = Counted(rugged(3, noise=0.5))
    chosen = Settings(generations=1000, offspring=3, stages=(Stage(1, 1), Stage(1, 4)), confidence=0)
    found = evolve(table, 3, evaluate, [(1, 1, 0, 0, 0)], chosen)
    assert found.exhausted and found.stopped == "exhausted" and len(found.history) < 20
    assert len(found.points) == math.comb(5, 2) and len(evaluate.calls) == 4 * math.comb(5, 2)
    means = {s: sum(evaluate.score(s, b) for b in range(4)) / 4 for s in all_states(table) if sum(s) == 2}
    assert found.score == pytest.approx(min(means.values()), rel=1e-12)
    assert found.state == min(means, key=means.__getitem__)


@pytest.mark.parametrize("seed", range(5))
def test_chance_does_not_leave_a_neighbour_out(seed: int) -> None:
    """Offspring are drawn one by one, so the last of twelve neighbours is hard to draw; it is tried all the same."""
    table = LevelTable(costs=((1, 0),) * 8)
    start = (1, 1, 0, 0, 0, 0, 0, 0)
    found = evolve(table, 6, lambda s, b: 1.0, [start], Settings(1000, 1, max_flips=1, stages=ONE, seed=seed))
    near = {s for s in all_states(table) if sum(s) == 2 and s[0] + s[1] == 1}
    assert found.exhausted and {point.state for point in found.points} == near | {start} and len(near) == 12


@pytest.mark.parametrize(("limit", "state"), [(4, (0, 0, 0)), (1, (1, 1, 1))])
def test_nothing_or_everything_dropped_ends_at_once(limit: float, state: State) -> None:
    evaluate = Counted(lambda state, batch: float(batch))
    found = evolve(LevelTable(costs=((1, 0),) * 3, fixed=1), limit, evaluate)
    assert (found.state, found.stopped, len(found.history)) == (state, "exhausted", 1)
    assert evaluate.calls == [(state, batch) for batch in range(8)] and found.score == 3.5


def test_an_empty_table() -> None:
    found = evolve(LevelTable(costs=(), fixed=2), 2, lambda state, batch: 1.0)
    assert found.state == () and found.exhausted and found.cost == 2


@given(
    st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10)), min_size=1, max_size=6),
    st.sampled_from([0.0, 1.0, 2.0]),
)
def test_a_state_wins_by_its_paired_differences(pairs: list[tuple[float, float]], confidence: float) -> None:
    """Two states, one swap apart. The t statistic as numpy has it says which should win."""
    table = LevelTable(costs=((1, 0), (1, 0)))
    chosen = Settings(1, 1, stages=(Stage(1, len(pairs)),), confidence=confidence)
    start, other = (0, 1), (1, 0)
    found = evolve(table, 1, lambda s, b: pairs[b][s == other], [start], chosen)
    paired = np.array([after - before for before, after in pairs])
    error = paired.std(ddof=1) / math.sqrt(len(pairs)) if len(pairs) > 1 else 0.0
    margin = paired.mean() + confidence * error
    if abs(margin) > 1e-9 and abs(paired.mean()) > 1e-9:
        assert (found.state == other) == (margin < 0 and paired.mean() < 0)
    assert {point.state for point in found.points} == {start, other}


def test_luck_on_common_noise_is_not_mistaken_for_progress() -> None:
    """Batches differ much more than states do; unpaired, their spread would hide the difference."""
    table = LevelTable(costs=((1, 0), (1, 0)))

    def score(state: State, batch: int) -> float:
        return 100.0 * batch + 0.001 * state[0] + 1e-6 * random.Random(f"{state} {batch}").random()

    chosen = Settings(1, 1, stages=(Stage(1, 8),), confidence=3)
    assert evolve(table, 1, score, [(1, 0)], chosen).state == (0, 1)


def test_a_worse_mean_yields_to_one_that_is_surely_better() -> None:
    """Of two candidates the one with the best mean is not sure to be better than the parent, the other is."""
    table = LevelTable(costs=((1, 0),) * 3)
    by_state = {(1, 0, 0): [0.0] * 4, (0, 1, 0): [-9.0, 1.0, 1.0, 1.0], (0, 0, 1): [-1.0] * 4}
    chosen = Settings(1, 2, stages=(Stage(1, 4),), confidence=1.0)
    assert evolve(table, 2, lambda s, b: by_state[s][b], [(1, 0, 0)], chosen).state == (0, 0, 1)


def test_stages_cost_what_they_say() -> None:
    table = LevelTable(costs=((1, 0),) * 16)
    evaluate = Counted(rugged(0, noise=0.1))
    chosen = Settings(5, 10, stages=(Stage(4, 1), Stage(2, 3), Stage(1, 8)))
    found = evolve(table, 10, evaluate, [(1,) * 6 + (0,) * 10], chosen)
    steps = [b.evaluations - a.evaluations for a, b in zip(found.history, found.history[1:], strict=False)]
    assert steps == [10 * 1 + 4 * 2 + 2 * 5] * 5
    assert found.history[0].evaluations == 8
    assert [row.offspring for row in found.history] == [1] + [10] * 5
    # The parent takes part in the last stage only: it was scored once, at the start.
    assert {batch for _, batch in evaluate.calls} == set(range(8))


def test_the_best_seed_is_the_first_parent() -> None:
    table = LevelTable(costs=((1, 0),) * 6)
    score = rugged(1)
    seeds = [(1, 1, 0, 0, 0, 0), (0, 0, 0, 0, 1, 1), (0, 1, 0, 1, 0, 0), (0, 1, 0, 1, 0, 0)]
    found = evolve(table, 4, score, seeds, Settings(generations=0, stages=ONE))
    assert found.state == min(seeds, key=lambda s: score(s, 0))
    assert found.stopped == "generations" and len(found.points) == 3


def test_a_seed_that_leaves_room_is_also_tried_filled_up() -> None:
    table = LevelTable(costs=((1, 0),) * 4)
    found = evolve(table, 2, lambda s, b: float(sum(s)), [(1, 1, 1, 1)], Settings(generations=0, stages=ONE))
    assert sum(found.state) == 2
    assert {sum(point.state) for point in found.points} == {2, 4}


def test_random_starts_go_through_the_stages() -> None:
    table = LevelTable(costs=((1, 0),) * 12)
    evaluate = Counted(rugged(5))
    chosen = Settings(generations=0, stages=(Stage(1, 1), Stage(1, 4)), random_starts=30)
    found = evolve(table, 8, evaluate, [(1,) * 4 + (0,) * 8], chosen)
    first = {state for state, batch in evaluate.calls if batch == 0}
    assert len(first) > 25 and all(sum(state) == 4 for state in first)
    assert len(found.points) == 2, "the seed, and the best of the random ones"
    assert found.score == min(evaluate.score(state, 0) for state in first)


def test_patience() -> None:
    table = LevelTable(costs=((1, 0),) * 16)
    chosen = Settings(50, 2, stages=ONE, patience=3)
    found = evolve(table, 8, lambda state, batch: 1.0, settings=chosen)
    assert found.stopped == "patience" and not found.exhausted
    assert [row.accepted for row in found.history] == [True, False, False, False]


def test_broken_candidates_lose_and_a_broken_parent_yields() -> None:
    table = LevelTable(costs=((1, 0),) * 3)

    def score(state: State, batch: int) -> float:
        return {(1, 0, 0): math.nan, (0, 1, 0): 1.0, (0, 0, 1): math.inf if batch == 2 else -50.0}[state]

    chosen = Settings(5, 2, stages=(Stage(1, 4),))
    found = evolve(table, 2, score, [(1, 0, 0)], chosen)
    assert found.state == (0, 1, 0) and found.score == 1.0
    text = json.dumps(found.to_json(), allow_nan=False)
    assert [row["score"] for row in json.loads(text)["history"]][:2] == [None, 1.0]


def test_nothing_known_is_evaluated_again() -> None:
    table = LevelTable(costs=((1, 0),) * 8)
    evaluate = Counted(rugged(2, noise=0.1))
    evaluations = Evaluations(evaluate)
    first = evolve(table, 5, evaluations, settings=Settings(4, 6))
    calls = len(evaluate.calls)
    again = evolve(table, 5, evaluations, settings=Settings(4, 6))
    assert again == first and len(evaluate.calls) == calls
    assert (first.reused, again.reused) == (0, again.evaluations) and again.evaluations == calls


def test_the_outcome_as_json_and_its_pareto_points() -> None:
    points = tuple(Point((n,), cost, score) for n, (cost, score) in enumerate([(3, 1.0), (2, 2.0), (2, 3.0), (1, 2.0)]))
    found = Outcome((0,), 1.0, 3, 3, (), ((0,),), points, 4, "patience", 0)
    assert [point.state for point in found.pareto()] == [(3,), (0,)]
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert plain["points"][1] == {"state": [1], "cost": 2, "score": 2.0}
    assert [point["state"] for point in plain["pareto"]] == [[3], [0]]
    assert (plain["state"], plain["exhausted"], plain["stopped"], plain["history"]) == ([0], False, "patience", [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"offspring": 0}, "offspring of the evolution is 0"),
        ({"max_flips": 0}, "max_flips"),
        ({"generations": -1}, "generations"),
        ({"patience": 0}, "patience"),
        ({"confidence": math.nan}, "confidence"),
        ({"stages": ()}, "stages of the evolution are missing"),
        ({"stages": (Stage(2, 1),)}, "one survivor of the last"),
        ({"stages": (Stage(1, 4), Stage(1, 2))}, "more batches"),
        ({"stages": (Stage(1, 1), Stage(2, 2), Stage(1, 3))}, "fewer survivors"),
        ({"stages": (Stage(1, 0),)}, "more batches"),
    ],
)
def test_settings_that_make_no_sense(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Settings(**arguments)


def test_refusals() -> None:
    table = LevelTable(costs=((2, 1),) * 2)
    with pytest.raises(PreconditionError, match=r"(?s)1 is out of reach: 2 is left"):
        evolve(table, 1, lambda state, batch: 0.0)
    with pytest.raises(PreconditionError, match=r"(?s)seed 1 costs 4.*at most the limit of 3"):
        evolve(table, 3, lambda state, batch: 0.0, [(1, 1), (0, 0)])
    with pytest.raises(InputError, match="1 levels for 2 sites"):
        evolve(table, 3, lambda state, batch: 0.0, [(1,)])
