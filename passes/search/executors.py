"""Evaluations of states on batches: each at most once, on any `concurrent.futures.Executor`.

`Evaluations` answers from its memo (and a journal) what it can and sends the rest to an executor: this process, a pool
of threads or processes, or the workers of a cluster (`dask_workers`). Answers come in the order of the questions,
whichever worker is done first, so a search does not depend on where it is run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Executor, Future, wait
from typing import Any, ParamSpec, Self, TypeVar

from ...ir.errors import GraphlatheError
from .allocators.table import State
from .journal import Journal, Key

Evaluate = Callable[[State, int], float]
"""The score of a state on a batch; lower is better. To leave the process it must be picklable, and light: it is sent
with every question, so what is large belongs into a file that it reads once per worker."""

RETRIES = 3
"""How often an evaluation is sent again after its worker died."""

_P = ParamSpec("_P")
_T = TypeVar("_T")


class InProcess(Executor):
    """An executor that runs everything in the calling thread, when it is submitted.

    What the call raises is kept in the future; KeyboardInterrupt and SystemExit, which are meant for the caller, are
    not.
    """

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Call now; the future is done when this returns."""
        future: Future[_T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class Evaluations:
    """Scores of states on batches, each evaluated at most once.

    Args:
        evaluate: the score of a state on a batch; lower is better. A score that is not a number counts as infinite.
        executor: where it runs; in this process if left out. A function that makes an executor, instead of one, is
            called again when a pool broke: a `ProcessPoolExecutor` is of no use once a worker died. What the function
            made is shut down by `close`; an executor that was given is its owner's.
        journal: takes every new score, and knows those of earlier runs.
        retries: how often an evaluation is sent again after its worker died.

    Attributes:
        scores: all scores known, by state and batch.
        evaluated: how many were evaluated here, neither known before nor from the journal.
        lost: how many were lost with their worker, and sent again.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        *,
        executor: Executor | Callable[[], Executor] | None = None,
        journal: Journal | None = None,
        retries: int = RETRIES,
    ) -> None:
        self.evaluate = evaluate
        self.journal = journal
        self.retries = retries
        self.scores: dict[Key, float] = dict(journal.scores) if journal is not None else {}
        self.evaluated = 0
        self.lost = 0
        self._given = executor if isinstance(executor, Executor) else None
        self._make = InProcess if executor is None else executor if not isinstance(executor, Executor) else None
        self._made: Executor | None = None

    def __call__(self, keys: Iterable[Key]) -> list[float]:
        """The scores of these states and batches, in this order.

        What was evaluated when an error or an interrupt ends this early is kept, and written to the journal; what was
        not begun is cancelled.

        Raises:
            GraphlatheError: the worker of an evaluation died again and again.
            Exception: whatever the evaluation itself raised.
        """
        keys = list(keys)
        missing = [key for key in dict.fromkeys(keys) if key not in self.scores]
        deaths = dict.fromkeys(missing, 0)
        while missing:
            missing = self._round(missing)
            for key in missing:
                deaths[key] += 1
                self.lost += 1
                if deaths[key] > self.retries:
                    raise GraphlatheError(
                        f"the worker died {deaths[key]} times over state {list(key[0])} on batch {key[1]}",
                        remedy="look for what ends the workers (memory is the usual reason); give a function that "
                        "makes the pool of processes, since a broken pool cannot be used again",
                    )
        return [self.scores[key] for key in keys]

    def means(self, states: Sequence[State], batches: int) -> list[float]:
        """The mean score of each state over batches 0 to ``batches`` - 1."""
        scores = self([(state, batch) for state in states for batch in range(batches)])
        return [math.fsum(scores[n * batches : (n + 1) * batches]) / batches for n in range(len(states))]

    def close(self) -> None:
        """Shut down what was made here. The evaluations may be used again: a new executor is made then."""
        if self._made is not None:
            self._made.shutdown()
            self._made = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def _round(self, keys: Sequence[Key]) -> list[Key]:
        """Send these, take what comes back, and return those that were lost with their worker."""
        lost: list[Key] = []
        pending: dict[Future[float], Key] = {}
        try:
            for place, key in enumerate(keys):
                try:
                    future = self._executor().submit(self.evaluate, *key)
                except BrokenExecutor:  # the pool broke between two of these
                    lost += keys[place:]
                    break
                pending[future] = key
                if future.done():  # at once, so that an interrupt during the next one cannot lose it
                    self._take(future, pending, lost)
            while pending:
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                # The order in which they are noted in the journal must not depend on a set's.
                for future in [f for f in pending if f in done]:
                    self._take(future, pending, lost)
        except BaseException:
            for future in pending:
                future.cancel()
            for future, key in pending.items():
                if future.done() and not future.cancelled() and future.exception() is None:
                    self._note(key, future.result())
            raise
        if lost:
            self.close()
        order = {key: place for place, key in enumerate(keys)}
        return sorted(lost, key=order.__getitem__)

    def _take(self, future: Future[float], pending: dict[Future[float], Key], lost: list[Key]) -> None:
        key = pending[future]
        try:
            score = future.result()
        except (BrokenExecutor, CancelledError):
            lost.append(key)
        else:
            self._note(key, score)
        del pending[future]

    def _note(self, key: Key, score: Any) -> None:
        number = float(score)
        number = math.inf if math.isnan(number) else number
        # The file first: what is known here but not there would never be written.
        if self.journal is not None:
            self.journal.record(*key, number)
        self.scores[key] = number
        self.evaluated += 1

    def _executor(self) -> Executor:
        if self._given is not None:
            return self._given
        if self._made is None:
            assert self._make is not None
            self._made = self._make()
        return self._made
