"""Reading a file in a child process with a limit of time and memory.

A server process imports everything once; each file is read in a fork of it, so that a crash, an endless loop or a
greedy allocation ends that fork only. Start it as ``python -m tests.fuzz.sandbox``; it reads requests and writes
answers, a line of JSON each.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

SECONDS = 10
MEMORY = 2 << 30


@dataclass(frozen=True)
class Outcome:
    """What became of a file.

    Attributes:
        kind: ``read``, ``refused`` (an error of ours), ``error`` (another one), ``memory`` (whoever reports it),
            ``crash``, ``hang``.
        detail: the error, or the signal.
    """

    kind: str
    detail: str = ""

    @property
    def fine(self) -> bool:
        """Whether this is what a user may see."""
        return self.kind in ("read", "refused")


class Sandbox:
    """The server, from the outside."""

    def __init__(self, warm: Path) -> None:
        """Start it; it reads the valid file ``warm`` first, so that nothing is imported in the forks."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.sandbox", str(warm)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self._answer() == Outcome("read"), "the valid file cannot be read"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def read(self, path: Path, fault: str = "") -> Outcome:
        """Read a file in a fork, which executes the code ``fault`` first (to see what becomes of it)."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([str(path), fault]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Outcome:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the server ended"
        return Outcome(*json.loads(line))


def _serve(warm: Path) -> None:
    import warnings

    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints must not end up between the answers
    outcomes = [_read(warm)]
    print(json.dumps(outcomes[0]), file=answers, flush=True)
    for line in sys.stdin:
        path, fault = json.loads(line)
        print(json.dumps(_in_fork(Path(path), fault)), file=answers, flush=True)


def _read(path: Path, fault: str = "") -> tuple[str, str]:
    from graphlathe.ir.errors import GraphlatheError
    from graphlathe.ir.load import load
    from graphlathe.ir.verify import verify
    from graphlathe.passes import registry
    from graphlathe.passes.base import Context

    try:
        exec(fault)
        program = load(path)
        verify(program, 1)
        program.to_text()
        registry.get("canonicalize")().run(program, Context())
    except GraphlatheError as error:
        return "memory" if _out_of_memory(error) else "refused", str(error)
    except BaseException as error:
        import traceback

        where = traceback.extract_tb(error.__traceback__)[-1]
        return "error", f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"[:1000]
    return "read", ""


def _out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that memory ran out."""
    if error is None:
        return False
    words = ("bad_alloc", "allocate memory")
    known = isinstance(error, MemoryError) or any(word in str(error) for word in words)
    return known or _out_of_memory(error.__cause__ or error.__context__)


def _in_fork(path: Path, fault: str) -> tuple[str, str]:
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.write(writer, json.dumps(_read(path, fault)).encode())
        os._exit(0)
    os.close(writer)
    end, pieces = time.monotonic() + SECONDS, []
    while select.select([reader], [], [], max(0.0, end - time.monotonic()))[0]:
        piece = os.read(reader, 1 << 16)
        if not piece:
            break
        pieces.append(piece)
    else:
        os.kill(child, signal.SIGKILL)
    os.close(reader)
    status = os.waitpid(child, 0)[1]
    if time.monotonic() >= end:
        return "hang", f"more than {SECONDS} s"
    if os.WIFSIGNALED(status):
        return "crash", signal.Signals(os.WTERMSIG(status)).name
    return tuple(json.loads(b"".join(pieces)))


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
