"""How the bench measures: interleaved times, peak memory in a process of its own, growth exponents.

Times of two things are comparable only when they were taken in turn, in one process, on one machine: whatever else the
machine does then hits both. Memory is comparable only when nothing else lives in the process.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...ir.errors import GraphlatheError

_CHILD = "graphlathe.tools.bench.child"


@dataclass
class Timing:
    """Repeated wall and process-CPU times of one thing, in seconds."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median wall time."""
        return statistics.median(self.wall)

    @property
    def best(self) -> float:
        """Smallest wall time: the one that was disturbed least."""
        return min(self.wall)

    @property
    def best_cpu(self) -> float:
        """Smallest process-CPU time."""
        return min(self.cpu)

    def add(self, call: Callable[[], Any]) -> Any:
        """Time one call and return its result."""
        gc.collect()
        wall, cpu = time.perf_counter(), time.process_time()
        result = call()
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)
        return result

    def row(self) -> dict[str, Any]:
        """The columns of a result row."""
        return {
            "seconds": self.median,
            "best_seconds": self.best,
            "cpu_seconds": self.best_cpu,
            "repeats": len(self.wall),
        }


def interleave(
    calls: Mapping[str, Callable[..., Any]],
    repeats: int = 3,
    warmup: int = 1,
    *,
    prepare: Mapping[str, Callable[[], Any]] | None = None,
) -> dict[str, Timing]:
    """Time several calls in turn: A B C, B C A, C A B... so that none is always first.

    Args:
        calls: what to time, by name.
        repeats: timed rounds.
        warmup: rounds that are not timed.
        prepare: for some names, what makes the call's one argument, untimed (a fresh copy of what the call changes).
    """
    names, prepare = list(calls), prepare or {}
    timings = {name: Timing() for name in names}
    for turn in range(-warmup, repeats):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            arguments = (prepare[name](),) if name in prepare else ()
            timing = timings[name] if turn >= 0 else Timing()
            timing.add(lambda call=calls[name], given=arguments: call(*given))
    return timings


def fit_exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The ``k`` of ``seconds ~ size**k``: the least-squares slope of log time over log size.

    Raises:
        ValueError: fewer than two different sizes, or a time that is not positive.
    """
    if len(set(sizes)) < 2 or min(seconds) <= 0:
        raise ValueError("an exponent needs two sizes and positive times")
    xs, ys = [math.log(s) for s in sizes], [math.log(s) for s in seconds]
    mx, my = statistics.fmean(xs), statistics.fmean(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sum((x - mx) ** 2 for x in xs)


def rss_bytes() -> int:
    """This process's resident memory now."""
    found = _kernel_bytes("VmRSS")
    if found is not None:
        return found
    import psutil

    return int(psutil.Process().memory_info().rss)


def _kernel_bytes(field_name: str) -> int | None:
    """A field of the process's status; unlike ``getrusage``, a child's peak does not start at its parent's."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = [line.split()[1] for line in text.splitlines() if line.startswith(field_name)]
    return int(found[0]) * 1024 if found else None


def _return_free_memory() -> None:
    """Give freed heap back to the system: a phase that reuses it would look as if it needed none."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@dataclass
class Peak:
    """Resident memory over a phase, in bytes.

    Attributes:
        before: at the start.
        peak: the highest.
        exact: whether the kernel kept the peak; otherwise it was sampled every 2 ms.
    """

    before: int
    peak: int
    exact: bool


@contextmanager
def peak_memory() -> Generator[Peak]:
    """Record the highest resident memory of the phase in the ``with`` block."""
    _return_free_memory()
    before = rss_bytes()
    exact = _reset_high_water() and _kernel_bytes("VmHWM") is not None
    result = Peak(before, before, exact)
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(0.002):
            result.peak = max(result.peak, rss_bytes())

    sampler = threading.Thread(target=sample, daemon=True)
    if not exact:
        sampler.start()
    try:
        yield result
    finally:
        stop.set()
        if not exact:
            sampler.join()
        result.peak = max(result.peak, (_kernel_bytes("VmHWM") or 0) if exact else 0, rss_bytes())


@dataclass(frozen=True)
class Measured:
    """What a function did in a process of its own.

    Attributes:
        seconds: wall time of the call (without the start of the process).
        peak_rss_bytes: the process's highest resident memory.
        result: what the function returned.
    """

    seconds: float
    peak_rss_bytes: int
    result: Any


def measure_in_subprocess(
    function: str, arguments: Mapping[str, Any] | None = None, *, timeout: float = 600
) -> Measured:
    """Run ``module:function`` in a fresh process and measure it there.

    Args:
        function: ``package.module:name`` of a function that takes and returns JSON data.
        arguments: its keyword arguments.
        timeout: seconds after which it is ended.

    Raises:
        GraphlatheError: the function failed, or took too long; the message holds its reason.
    """
    with tempfile.TemporaryDirectory(prefix="graphlathe-measure-") as folder:
        answer = Path(folder) / "answer.json"
        request = json.dumps({"function": function, "arguments": dict(arguments or {}), "answer": str(answer)})
        try:
            done = subprocess.run(
                [sys.executable, "-m", _CHILD],
                input=request,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                timeout=timeout,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        except subprocess.TimeoutExpired as error:
            raise GraphlatheError(f"{function} took more than {timeout:g} s", remedy="raise the limit") from error
        if not answer.is_file():
            last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
            raise GraphlatheError(f"{function} ended its process with status {done.returncode}: {''.join(last)}")
        said = json.loads(answer.read_text())
    if "error" in said:
        raise GraphlatheError(f"{function} failed in a process of its own: {said['error']}")
    return Measured(**said)
