"""Progress bars for loops that turn out to be slow, on a terminal, and nowhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

SLOW_SECONDS = 2.0
"""A loop that is done within this time shows no bar."""

Progress = Callable[[Iterable[Any], int | None, str], Iterable[Any]]


def silent(items: Iterable[Any], total: int | None, label: str) -> Iterable[Any]:
    """No bar."""
    return items


def progress_for(wanted: bool) -> Progress:
    """Bars if ``wanted`` and standard error is a terminal, else `silent`."""
    return Bars() if wanted and sys.stderr.isatty() else silent


class Bars:
    """Called as ``bars(items, total, label)`` around a loop; nested loops stack."""

    def __init__(self, console: Any = None) -> None:
        self._console = console
        self._display: Any = None
        self._tasks = 0

    def __call__(self, items: Iterable[Any], total: int | None, label: str) -> Iterator[Any]:
        """Yield the items; a bar appears when the loop turns out to be slow."""
        start, done, task = time.perf_counter(), 0, None
        try:
            for item in items:
                yield item
                done += 1
                if task is None and time.perf_counter() - start > SLOW_SECONDS:
                    task = self._open().add_task(label, total=total, completed=done)
                    self._tasks += 1
                elif task is not None:
                    self._display.update(task, completed=done)
        finally:
            if task is not None:
                self._close(task)

    def _open(self) -> Any:
        if self._display is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._display = Progress(*columns, console=self._console or Console(stderr=True), transient=True)
            self._display.start()
        return self._display

    def _close(self, task: Any) -> None:
        self._display.remove_task(task)
        self._tasks -= 1
        if not self._tasks:
            self._display.stop()
            self._display = None
