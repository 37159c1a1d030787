"""A search of real candidates on two Dask workers, one of which is killed in the middle:
``python -m tests.passes.search.dask_candidates FOLDER``.

Prints what was found as JSON. In a process of its own, see `test_dask`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from concurrent.futures import Executor, Future
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from graphlathe.passes.base import Context
from graphlathe.passes.search.allocators.evolution import Settings, Stage
from graphlathe.passes.search.place_table import Table
from graphlathe.passes.search.searching import cheap_states, search
from tests.passes.search.planted_search import dask_workers
from tests.passes.search.small_models import context, meter_of, unit_places, width_places
from tests.zoo_programs import traced

MODEL = "llama"
MIDDLE = 9
SETTINGS = Settings(generations=2, offspring=4, stages=(Stage(2, 1), Stage(1, 2)), seed=1)


def found(ctx: Context) -> dict[str, Any]:
    """What a search over widths and dropped branches finds with a context."""
    places = [*width_places(MODEL, ("mlp", "heads")), *unit_places(MODEL, "attention")]
    places.sort(key=lambda place: place.first)
    meter = meter_of(traced(MODEL))
    units = [place.levels[-1].drop for place in places]
    sites = [place.levels[1].site for place in places]
    whole = meter.whole([site for site in sites if site is not None], [unit for unit in units if unit is not None])
    table = Table(places, meter, whole=whole, total=meter.total)
    levels, limit = table.levels(), table.limit(0.3, None)
    outcome, history = search(
        traced(MODEL), places, levels, limit, ctx.calibration or (), ctx, SETTINGS, cheap_states(levels, limit)
    )
    scores = [point["score"] for point in history["evaluated"]]
    return {
        "state": list(outcome.state),
        "evaluations": outcome.evaluations,
        "tokens": history["tokens"],
        "scores": scores,
    }


class Killing(Executor):
    """Workers one of which dies when so many evaluations have been asked for."""

    def __init__(self, workers: Executor, after: int) -> None:
        self._workers, self._left = workers, after
        self.killed = 0

    def submit(self, fn: Any, /, *args: Any, **named: Any) -> Future[Any]:
        future = self._workers.submit(fn, *args, **named)
        self._left -= 1
        if not self._left:
            import distributed

            pids = distributed.default_client().run(os.getpid)
            self.killed = min(pids.values())
            os.kill(self.killed, signal.SIGKILL)
        return future


def main(folder: str) -> None:
    """Search on the workers."""
    with ExitStack() as stack:
        workers = Killing(dask_workers(folder, 3, stack), after=MIDDLE)
        ctx = replace(context(MODEL, 3), executor=workers, workspace=Path(folder))
        json.dump(found(ctx) | {"killed": workers.killed}, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
