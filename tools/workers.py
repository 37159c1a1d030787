"""Where a search evaluates its candidates: processes of this machine, or the workers of a Dask cluster."""

from __future__ import annotations

import importlib
import signal
from collections.abc import Callable, Generator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, ParamSpec, TypeVar

from ..ir.errors import GraphlatheError, InputError

_P = ParamSpec("_P")
_T = TypeVar("_T")

_PATIENCE = "10s"
"""How long a scheduler may take to answer."""


@contextmanager
def executor_for(workers: int | None, scheduler: str | None) -> Generator[Executor | None]:
    """What evaluates the candidates of searches, shut down at the end.

    Args:
        workers: so many processes of this machine, with one thread each; or
        scheduler: the address of a Dask scheduler. Without either it is None: this process evaluates.

    Raises:
        GraphlatheError: the package distributed is not installed.
        InputError: no scheduler answers at the address.
    """
    if scheduler is not None:
        with _client(scheduler) as client:
            from ..passes.search.dask_workers import DaskWorkers

            yield DaskWorkers(client)
    elif workers is not None:
        pool = Processes(workers)
        try:
            yield pool
        finally:
            pool.stop()
    else:
        yield None


class Processes(Executor):
    """A pool of processes that makes up for those that die, and that ends at once.

    A `ProcessPoolExecutor` is of no use any more when one of its processes died (memory is the usual reason): the calls
    that it ran fail, and here the next call gets a new pool.

    Args:
        count: how many processes; each has one thread.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._context = _Context()
        self._pool: ProcessPoolExecutor | None = None

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Run a call in one of the processes. Cancelling the future leaves its answer to nobody."""
        try:
            inner = self._running().submit(fn, *args, **kwargs)
        except BrokenExecutor:
            self.stop()
            inner = self._running().submit(fn, *args, **kwargs)
        # Not the pool's own: where a process dies, the pool's thread fails with a traceback over cancelled futures.
        answer: Future[_T] = Future()
        inner.add_done_callback(partial(_deliver, answer))
        return answer

    def stop(self) -> None:
        """End the processes, whatever they are doing; a later call starts new ones."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
        for process in self._context.started:
            process.terminate()
        for process in self._context.started:
            process.join()
        self._context.started.clear()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; ``wait`` for those that run."""
        if self._pool is not None:
            self._pool.shutdown(wait, cancel_futures=cancel_futures)
            self._pool = None

    def _running(self) -> ProcessPoolExecutor:
        if self._pool is None:
            resource_tracker.ensure_running()  # else it starts, and lets signals through, while they are held back
            self._pool = ProcessPoolExecutor(self.count, mp_context=self._context, initializer=_begin)
        return self._pool


def _deliver(answer: Future[Any], inner: Future[Any]) -> None:
    if inner.cancelled():
        answer.cancel()
    if not answer.set_running_or_notify_cancel():
        return
    error = inner.exception()
    if error is None:
        answer.set_result(inner.result())
    else:
        answer.set_exception(error)


class _Process(SpawnProcess):
    """A process that an interrupt ends without a word, from its first moment on.

    Ctrl-C reaches every process of a terminal. A new one holds it back (`_begin` lets it through), since Python would
    show a traceback while it is importing.
    """

    def start(self) -> None:
        """Start; an interrupt meanwhile is delivered to this process afterwards."""
        if not hasattr(signal, "pthread_sigmask"):
            super().start()
            return
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Context(SpawnContext):
    """Makes such processes, and knows them."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[_Process] = []

    def Process(self, *args: Any, **kwargs: Any) -> _Process:  # type: ignore[override]
        """A new process."""
        process = _Process(*args, **kwargs)
        self.started.append(process)
        return process


def _begin() -> None:
    """First thing in a process of the pool."""
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextmanager
def _client(address: str) -> Generator[Any]:
    """A client of a Dask scheduler."""
    try:
        distributed = importlib.import_module("distributed")
    except ImportError as error:
        raise GraphlatheError(
            "--scheduler needs the package distributed", remedy="pip install graphlathe[distributed]"
        ) from error
    try:
        client = distributed.Client(address, timeout=_PATIENCE)
    except (OSError, ValueError, TypeError) as error:  # a time-out is an OSError
        raise InputError(
            f"no Dask scheduler answers at '{address}'",
            expected="an address such as tcp://10.0.0.1:8786",
            remedy="start one with `dask scheduler`, and workers with `dask worker ADDRESS`",
        ) from error
    try:
        yield client
    finally:
        client.close()
