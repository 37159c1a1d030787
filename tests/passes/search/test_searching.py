"""Searches: resumed from a journal, run elsewhere, and what the plan keeps of them."""

from __future__ import annotations

import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from graphlathe.ir.errors import PreconditionError
from graphlathe.passes.base import Context
from graphlathe.passes.search import searching
from graphlathe.passes.search.allocators.evolution import Settings, Stage
from graphlathe.passes.search.allocators.table import LevelTable
from graphlathe.passes.search.candidates import Candidates
from graphlathe.passes.search.place_table import Table
from graphlathe.passes.search.searching import cheap_states, search
from tests.passes.search.small_models import context, meter_of, width_places
from tests.zoo_programs import traced

SETTINGS = Settings(generations=3, offspring=4, stages=(Stage(2, 1), Stage(1, 2)), seed=1)


def table() -> tuple[Table, LevelTable, float]:
    places, meter = width_places("bert", ("mlp", "heads")), meter_of(traced("bert"))
    whole = meter.whole([p.levels[1].site for p in places if p.levels[1].site is not None], [])
    known = Table(places, meter, whole=whole, total=meter.total)
    return known, known.levels(), known.limit(0.3, None)


def run(ctx: Context, settings: Settings = SETTINGS, finalists: int = 1) -> tuple[Any, dict[str, Any]]:
    known, levels, limit = table()
    batches = ctx.calibration or ()
    seeds = cheap_states(levels, limit)
    return search(traced("bert"), known.places, levels, limit, batches, ctx, settings, seeds, finalists)


def test_the_best_fits_and_the_history_is_json() -> None:
    outcome, history = run(context("bert", 2))
    assert outcome.cost <= outcome.limit and 0 < outcome.score < math.inf
    assert set(cheap_states(*table()[1:])) == {"uniform", "global-threshold", "greedy", "knapsack"}
    assert json.loads(json.dumps(history, allow_nan=False)) == history
    assert any(row["origin"].startswith("seed: ") for row in history["evaluated"])
    assert outcome.score == min(point.score for point in outcome.points)
    assert history["tokens"] > 0 and history["chosen"]["score"] == outcome.score


def test_an_interrupted_search_goes_on_without_evaluating_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(context("bert", 2))[0]
    asked: list[Any] = []
    plain = Candidates.__call__

    def interrupted(self: Candidates, state: Any, number: int) -> float:
        if len(asked) == 7:
            raise KeyboardInterrupt
        asked.append((tuple(state), number))
        return plain(self, state, number)

    ctx = replace(context("bert", 2), journal=tmp_path / "new" / "journal")
    monkeypatch.setattr(Candidates, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(ctx)
    first = list(asked)
    asked.clear()

    def counted(self: Candidates, state: Any, number: int) -> float:
        asked.append((tuple(state), number))
        return plain(self, state, number)

    monkeypatch.setattr(Candidates, "__call__", counted)
    assert run(ctx)[0] == whole
    assert len(first) == 7 and not set(first) & set(asked) and len(asked) == len(set(asked)) == whole.evaluations - 7
    asked.clear()
    assert run(ctx)[0] == whole and not asked
    # A longer search goes on from there; other data is another search.
    longer = run(ctx, replace(SETTINGS, generations=4))[0]
    assert len(asked) == longer.evaluations - whole.evaluations
    run(replace(ctx, calibration=[*(ctx.calibration or ())][::-1]))
    assert len(list((tmp_path / "new" / "journal").iterdir())) == 2


def test_the_seed_draws_which_batches_a_stage_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every small stage would judge on the first window of the calibration text."""
    ctx = context("bert", 5)
    given, judged = list(ctx.calibration or ()), set[tuple[int, int]]()

    def score(candidates: Candidates, state: Any, number: int) -> float:
        judged.add((number, next(i for i, batch in enumerate(given) if batch is candidates.batches[number])))
        return float(sum(state)) + number

    def order(seed: int) -> list[int]:
        judged.clear()
        run(
            replace(ctx, journal=tmp_path / "journal"),
            replace(SETTINGS, seed=seed, stages=(Stage(2, 1), Stage(1, 3)), generations=1),
        )
        return [batch for _, batch in sorted(judged)]

    monkeypatch.setattr(Candidates, "__call__", score)
    orders = [order(seed) for seed in range(8)]
    assert all(len(found) == 3 == len(set(found)) for found in orders), "one batch by each number"
    assert {found[0] for found in orders} == set(range(5)) and {b for found in orders for b in found} == set(range(5))
    # What is in a journal is known by its number: searches with other orders must not share one.
    assert len(list((tmp_path / "journal").iterdir())) == len({tuple(found) for found in orders})
    assert order(3) == [], "all of it is in the journal"
    shutil.rmtree(tmp_path / "journal")
    assert order(3) == orders[3]


def test_finalists_are_judged_on_all_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that only the stages' batches speak against is what is taken, and the plan says how it went."""
    ctx = context("bert", 6)
    judged: list[int] = []

    def late(state: Any) -> int:
        return sum(place * level for place, level in enumerate(state))

    def score(candidates: Candidates, state: Any, number: int) -> float:
        judged.append(number)
        return 100.0 + late(state) * (-1 if number < 2 else 1)

    monkeypatch.setattr(Candidates, "__call__", score)
    settings = replace(SETTINGS, stages=(Stage(1, 2),), generations=20)
    outcome, history = run(ctx, settings)
    first, last = outcome.parents[0], outcome.parents[-1]
    assert outcome.state == last != first and set(judged) == {0, 1} and history["finalists"] == []
    outcome, history = run(ctx, settings, 2)
    assert outcome.state == first and set(judged) == set(range(6))
    wanted = [100 + late(state) / 3 for state in (last, first)]
    assert [point["score"] for point in history["finalists"]] == pytest.approx(wanted)
    assert history["chosen"] == {"cost": outcome.cost, "score": 100.0 - late(first)}


def test_an_executor_gives_what_this_process_gives(tmp_path: Path) -> None:
    here, history = run(context("bert", 2))
    home = tmp_path / "not" / "yet"
    with ThreadPoolExecutor(2) as pool:
        ctx = replace(context("bert", 2), executor=pool, workspace=home)
        there, other = run(ctx)
        assert run(replace(ctx, workspace=None))[0].state == there.state
    assert there.state == here.state and there.score == pytest.approx(here.score, rel=1e-5)
    assert history["tokens"] and other["tokens"] is None
    assert [p["score"] for p in other["evaluated"]] == pytest.approx(
        [p["score"] for p in history["evaluated"]], rel=1e-5
    )
    assert list(home.iterdir()) == []


def test_a_second_search_in_one_workspace_is_not_answered_from_the_first(tmp_path: Path) -> None:
    """Other levels for the same workers."""
    known, levels, limit = table()
    with ThreadPoolExecutor(1) as pool:
        ctx = replace(context("bert", 2), executor=pool, workspace=tmp_path)
        run(ctx)
        mild = [replace(p, levels=(p.levels[0], p.levels[1], p.levels[1], p.levels[1])) for p in known.places]
        arguments = (traced("bert"), mild, levels, limit, ctx.calibration or ())
        there = search(*arguments, ctx, SETTINGS, cheap_states(levels, limit))[0]
    here = search(*arguments, context("bert", 2), SETTINGS, cheap_states(levels, limit))[0]
    assert there.score == pytest.approx(here.score, rel=1e-5) and there.state == here.state


def test_too_little_data() -> None:
    with pytest.raises(PreconditionError, match="judges on 2 batches, but there are 1"):
        run(context("bert", 1))


def test_scores_that_are_infinite_are_no_json_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    sound: list[Any] = []

    def score(self: Any, state: Any, number: int) -> float:
        sound.append(state)
        return 1.0 if state == sound[0] else math.inf

    monkeypatch.setattr(searching.Candidates, "__call__", score)
    _, history = run(context("bert", 2), replace(SETTINGS, generations=1))
    assert json.dumps(history, allow_nan=False) and history["chosen"]["score"] == 1.0
    assert any(point["score"] is None for point in history["evaluated"])


def test_a_search_in_which_nothing_is_a_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching.Candidates, "__call__", lambda self, state, number: math.inf)
    with pytest.raises(PreconditionError, match="not numbers"):
        run(context("bert", 2), replace(SETTINGS, generations=1))
