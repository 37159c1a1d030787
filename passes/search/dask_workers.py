"""The workers of a Dask cluster as an executor that survives the death of some of them.

Dask has such an executor itself (``Client.get_executor()``). That of distributed 2026.8 looks at a future's state after
it fetched the result. Where the worker that held the result died in between, the future fails with a TypeError, or is
never done at all, and whoever waits for it waits for ever. Here the result, or why there is none, is taken from one
call, which waits while Dask computes what was lost again.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from functools import partial
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


class DaskWorkers(Executor):
    """Runs calls on the workers of a cluster.

    What died with its worker more often than Dask runs it again (its setting
    ``distributed.scheduler.allowed-failures``), or was lost with the scheduler, fails with
    `concurrent.futures.BrokenExecutor`. Functions, arguments and results are pickled.

    Args:
        client: a ``distributed.Client``; it stays open, whatever happens here.
    """

    def __init__(self, client: Any) -> None:
        self.client = client

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Send a call to the cluster. Cancelling the future cancels it there."""
        answer: Future[_T] = Future()
        # Not pure: Dask would take a second try for the first one, whose result is that its worker died.
        remote = self.client.submit(fn, *args, pure=False, **kwargs)
        answer.add_done_callback(lambda future: remote.cancel() if future.cancelled() else None)
        remote.add_done_callback(partial(_deliver, answer))
        return answer


def _deliver(answer: Future[Any], remote: Any) -> None:
    """In a thread of Dask's, once there is a result, an error or a cancellation."""
    if not answer.set_running_or_notify_cancel():
        return
    try:
        value = remote.result()
    except BaseException as error:
        answer.set_exception(_translated(error))
    else:
        answer.set_result(value)


def _translated(error: BaseException) -> BaseException:
    killed = importlib.import_module("distributed").KilledWorker
    if isinstance(error, killed | CancelledError):
        broken = BrokenExecutor(f"Dask lost the worker: {type(error).__name__}")
        broken.__cause__ = error
        return broken
    return error
