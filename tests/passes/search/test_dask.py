"""A search on a real Dask cluster: two worker processes on this machine, one of which is killed in the middle."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, CancelledError
from pathlib import Path
from typing import Any

import pytest

from graphlathe.passes.search.dask_workers import DaskWorkers
from graphlathe.passes.search.executors import Evaluations
from graphlathe.passes.search.journal import Journal
from tests.passes.search import dask_candidates, planted_search
from tests.passes.search.small_models import context

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("distributed") is None, reason="needs Dask: pip install distributed"
)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", ["dask", "dask-strict"])
def test_a_worker_that_is_killed_changes_nothing(mode: str, tmp_path: Path) -> None:
    """In a process of its own: what Dask leaves to the end of a process (sockets, threads) would warn here.

    With ``dask`` Dask itself runs the lost work again; with ``dask-strict`` it gives it up, and we send it again.
    """
    command = [sys.executable, planted_search.__file__, mode, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (tmp_path / "middle").exists(), "no worker died"
    assert (result["lost"] > 0) == (mode == "dask-strict")
    evaluations = Evaluations(planted_search.score)
    undisturbed = planted_search.search(evaluations)
    assert result["outcome"] == json.loads(json.dumps(undisturbed.to_json()))
    assert result["evaluated"] == evaluations.evaluated
    with Journal.open(tmp_path / "journal.jsonl", "planted") as journal:
        assert journal.scores == evaluations.scores


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_real_candidates_are_judged_there_as_here(tmp_path: Path) -> None:
    """Two workers that read the program, the levels and the data from a folder; one is killed in the middle."""
    module = dask_candidates.__name__
    command = [sys.executable, "-m", module, str(tmp_path)]
    root = Path(dask_candidates.__file__).parents[3]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, cwd=root)
    assert done.returncode == 0, done.stderr
    there, here = json.loads(done.stdout), dask_candidates.found(context(dask_candidates.MODEL, 3))
    assert there.pop("killed") > 0
    assert there.pop("tokens") is None and here.pop("tokens") > 0, "what workers run is not run here"
    assert there["scores"] == pytest.approx(here.pop("scores"), rel=1e-5)
    assert {name: there[name] for name in here} == here


class Client:
    """A client, and its only future, that does what it is told."""

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome
        self.cancelled = False
        self.finish: Callable[[Client], None]

    def submit(self, fn: Callable[..., Any], *args: Any, pure: bool) -> Client:
        assert not pure
        return self

    def add_done_callback(self, callback: Callable[[Client], None]) -> None:
        self.finish = callback

    def result(self) -> Any:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def cancel(self) -> None:
        self.cancelled = True


def test_results_errors_and_losses_come_through() -> None:
    from distributed import KilledWorker

    for outcome, expected in [
        (2.5, None),
        (ValueError("bad state"), ValueError),
        (CancelledError("lost"), BrokenExecutor),
        (KilledWorker("task", None, 3), BrokenExecutor),
    ]:
        client = Client(outcome)
        future = DaskWorkers(client).submit(planted_search.score, (0,), 0)
        assert not future.done()
        client.finish(client)
        if expected is None:
            assert future.result() == outcome
        else:
            assert type(future.exception()) is expected
        assert not client.cancelled


def test_cancelling_reaches_the_cluster() -> None:
    client = Client(1.0)
    future = DaskWorkers(client).submit(planted_search.score, (0,), 0)
    assert future.cancel() and client.cancelled
    client.finish(client)  # Dask calls this for what is cancelled as well
    assert future.cancelled()
