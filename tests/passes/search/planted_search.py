"""A small search to run in a process of its own: ``python planted_search.py MODE FOLDER``, with its journal in FOLDER.

Modes: ``plain``; ``interrupted`` (an evaluation in the middle waits for Ctrl-C); ``processes`` (two worker processes,
one of which kills itself in the middle of an evaluation); ``dask`` (two Dask workers, likewise) and ``dask-strict``
(and Dask itself gives up on what a dying worker had). Prints the outcome as JSON.
"""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from graphlathe.passes.search.allocators.evolution import Outcome, Settings, Stage, evolve
from graphlathe.passes.search.allocators.table import LevelTable
from graphlathe.passes.search.dask_workers import DaskWorkers
from graphlathe.passes.search.executors import Evaluations
from graphlathe.passes.search.journal import Journal

TABLE = LevelTable(costs=((4, 2, 0),) * 4 + ((3, 0),) * 4, kinds=("mlp",) * 4 + ("attention",) * 4, fixed=5)
LIMIT = 22
SETTINGS = Settings(generations=6, offspring=6, stages=(Stage(3, 1), Stage(1, 3)), seed=7, confidence=0.5)
MIDDLE = 40


@dataclass(frozen=True)
class Planted:
    """Scores with interactions and noise; every finished evaluation adds a line to ``FOLDER/calls``.

    ``at_middle`` happens once, during an evaluation after `MIDDLE` others.
    """

    folder: str
    at_middle: str = ""

    def __call__(self, state: tuple[int, ...], batch: int) -> float:
        calls = Path(self.folder, "calls")
        if self.at_middle and calls.exists() and len(calls.read_text().splitlines()) >= MIDDLE and self._first():
            if self.at_middle == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        with calls.open("a") as file:
            file.write("x\n")
        return score(state, batch)

    def _first(self) -> bool:
        try:
            os.close(os.open(Path(self.folder, "middle"), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True


def score(state: tuple[int, ...], batch: int) -> float:
    harm = sum((3 * site % 5 + 1) * level for site, level in enumerate(state))
    pairs = sum(a * b * (site % 3) for site, (a, b) in enumerate(itertools.pairwise(state)))
    return harm + pairs + random.Random(f"{state} {batch}").random()


def search(evaluations: Evaluations) -> Outcome:
    return evolve(TABLE, LIMIT, evaluations, [(2, 2, 2, 2, 1, 0, 0, 0)], SETTINGS)


def dask_workers(folder: str, allowed_failures: int, stack: ExitStack) -> Executor:
    import dask
    import distributed

    stack.enter_context(dask.config.set({"distributed.scheduler.allowed-failures": allowed_failures}))
    cluster = distributed.LocalCluster(
        n_workers=2,
        processes=True,
        threads_per_worker=1,
        host="127.0.0.1",
        dashboard_address=None,
        worker_dashboard_address=None,
        local_directory=folder,
    )
    client = distributed.Client(stack.enter_context(cluster))
    return DaskWorkers(stack.enter_context(client))


def main(mode: str, folder: str) -> None:
    # A process started in the background of a shell ignores Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with ExitStack() as stack:
        executor = None
        if mode.startswith("dask"):
            executor = dask_workers(folder, 0 if mode == "dask-strict" else 3, stack)
        elif mode == "processes":
            context = multiprocessing.get_context("spawn")
            executor = functools.partial(ProcessPoolExecutor, 2, mp_context=context)
        at_middle = {"plain": "", "interrupted": "wait"}.get(mode, "kill")
        journal = stack.enter_context(Journal.open(Path(folder, "journal.jsonl"), "planted"))
        evaluations = Evaluations(Planted(folder, at_middle), executor=executor, journal=journal)
        outcome = search(stack.enter_context(evaluations))
    json.dump({"outcome": outcome.to_json(), "evaluated": evaluations.evaluated, "lost": evaluations.lost}, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
