"""Evaluations: once each, in order, on any executor; interrupts, errors and workers that die."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from graphlathe.ir.errors import GraphlatheError
from graphlathe.passes.search import executors
from graphlathe.passes.search.executors import Evaluations, InProcess
from graphlathe.passes.search.journal import Journal
from tests.passes.search import planted_search

KEYS = [((n,), n % 2) for n in range(6)]


def score(state: tuple[int, ...], batch: int) -> float:
    return 10.0 * state[0] + batch


class Scripted(Executor):
    """An executor whose n-th submission does what the script says; ``run`` runs it in place."""

    def __init__(self, *script: str) -> None:
        self.script = list(script)
        self.futures: list[Future[Any]] = []
        self.shut = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        what = self.script.pop(0) if self.script else "run"
        future: Future[Any] = Future()
        self.futures.append(future)
        if what == "broken":
            raise BrokenExecutor("the pool is broken")
        if what == "dies":
            future.set_exception(BrokenExecutor("a worker died"))
        elif what == "cancelled":
            future.cancel()
            future.set_running_or_notify_cancel()
        elif what == "run":
            future.set_result(fn(*args, **kwargs))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.shut += 1


def test_in_process_runs_at_submit() -> None:
    ran: list[int] = []
    with InProcess() as executor:
        future = executor.submit(ran.append, 1)
        assert ran == [1] and future.done() and future.result() is None
        failed = executor.submit(int, "x")
        assert isinstance(failed.exception(), ValueError)
        assert list(executor.map(abs, [-1, 2])) == [1, 2]

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        InProcess().submit(interrupted)


def test_each_question_is_asked_once_and_answered_in_order() -> None:
    calls: list[Any] = []

    def counted(state: tuple[int, ...], batch: int) -> float:
        calls.append((state, batch))
        return score(state, batch)

    evaluations = Evaluations(counted)
    asked = [((3,), 0), ((1,), 1), ((3,), 0)]
    assert evaluations(asked) == [30.0, 11.0, 30.0]
    assert evaluations([((1,), 1), ((2,), 0)]) == [11.0, 20.0]
    assert calls == [((3,), 0), ((1,), 1), ((2,), 0)] and evaluations.evaluated == 3
    assert evaluations([]) == []
    assert evaluations.means([(1,), (2,)], 3) == [11.0, 21.0]


def test_the_order_in_which_threads_finish_does_not_matter() -> None:
    """Each evaluation waits until the one after it is done, so that they finish backwards."""
    done = [threading.Event() for _ in range(len(KEYS) + 1)]
    done[-1].set()
    finished: list[int] = []

    def backwards(state: tuple[int, ...], batch: int) -> float:
        assert done[state[0] + 1].wait(60)
        finished.append(state[0])
        done[state[0]].set()
        return score(state, batch)

    with ThreadPoolExecutor(len(KEYS)) as pool, Evaluations(backwards, executor=pool) as evaluations:
        assert evaluations(KEYS) == [score(*key) for key in KEYS]
    assert finished == list(reversed(range(len(KEYS))))


def test_a_score_that_is_no_number_is_infinite(tmp_path: Path) -> None:
    with Journal.open(tmp_path / "journal", "x") as journal:
        assert Evaluations(lambda state, batch: math.nan, journal=journal)([((0,), 0)]) == [math.inf]
    with Journal.open(tmp_path / "journal", "x") as journal:
        assert journal.scores == {((0,), 0): math.inf}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_was_evaluated_before_an_interrupt_or_error_is_kept(tmp_path: Path, error: type[BaseException]) -> None:
    calls: list[int] = []

    def fails_once(state: tuple[int, ...], batch: int) -> float:
        calls.append(state[0])
        if len(calls) == 4:
            raise error("stop")
        return score(state, batch)

    path = tmp_path / "journal"
    with Journal.open(path, "x") as journal:
        evaluations = Evaluations(fails_once, journal=journal)
        with pytest.raises(error, match="stop"):
            evaluations(KEYS)
        assert journal.scores == {key: score(*key) for key in KEYS[:3]} == evaluations.scores
    with Journal.open(path, "x") as journal:
        resumed = Evaluations(fails_once, journal=journal)
        assert resumed(KEYS) == [score(*key) for key in KEYS] and resumed.evaluated == 3
    assert calls == [0, 1, 2, 3, 3, 4, 5]


def test_an_interrupt_while_waiting_cancels_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more is done when Ctrl-C comes: it is kept. What was not begun is cancelled."""
    pool = Scripted("run", "wait", "wait", "wait")

    def interrupted(*args: Any, **kwargs: Any) -> None:
        pool.futures[2].set_running_or_notify_cancel()
        pool.futures[2].set_result(7.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(executors, "wait", interrupted)
    with Journal.open(tmp_path / "journal", "x") as journal:
        with pytest.raises(KeyboardInterrupt):
            Evaluations(score, executor=pool, journal=journal)(KEYS[:4])
        assert journal.scores == {KEYS[0]: score(*KEYS[0]), KEYS[2]: 7.0}
    assert [future.cancelled() for future in pool.futures] == [False, True, False, True]
    assert pool.shut == 0, "an executor that was given is its owner's"


@pytest.mark.parametrize("loss", ["dies", "cancelled", "broken"])
def test_what_is_lost_with_its_worker_is_sent_again(loss: str) -> None:
    made: list[Scripted] = []

    def make() -> Scripted:
        made.append(Scripted(*([["run", loss, "run"], [loss]][len(made)] if len(made) < 2 else [])))
        return made[-1]

    with Evaluations(score, executor=make) as evaluations:
        assert evaluations(KEYS) == [score(*key) for key in KEYS]
        assert evaluations.evaluated == len(KEYS)
        assert evaluations.lost > 1 and len(made) == 3, "a new pool after each loss"
        assert [each.shut for each in made] == [1, 1, 0]
    assert [each.shut for each in made] == [1, 1, 1]


def test_losses_are_bounded_and_named() -> None:
    pool = Scripted(*["dies"] * 100)
    evaluations = Evaluations(score, executor=pool, retries=2)
    with pytest.raises(GraphlatheError, match=r"died 3 times over state \[4\] on batch 1"):
        evaluations([((4,), 1)])
    assert len(pool.futures) == 3
    with pytest.raises(GraphlatheError, match="died 1 times"):
        Evaluations(score, executor=Scripted("broken"), retries=0)([((4,), 1)])


def test_the_search_is_the_same_on_threads() -> None:
    with ThreadPoolExecutor(4) as pool, Evaluations(planted_search.score, executor=pool) as evaluations:
        assert planted_search.search(evaluations) == planted_search.search(Evaluations(planted_search.score))


def test_a_process_that_is_killed_in_the_middle_of_a_search_changes_nothing(tmp_path: Path) -> None:
    """A real pool of two processes, one of which ends itself by SIGKILL; the pool is made again."""
    command = [sys.executable, planted_search.__file__, "processes", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (tmp_path / "middle").exists() and result["lost"] >= 1
    undisturbed = planted_search.search(Evaluations(planted_search.score))
    assert result["outcome"] == json.loads(json.dumps(undisturbed.to_json()))
