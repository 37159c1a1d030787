"""A journal of evaluations, so that a search that is stopped loses nothing that it has measured.

A file of JSON lines: a header that says what was measured (program, data, objective), then one line per evaluation,
written at once and never changed:

    {"graphlathe": "evaluations", "version": 1, "of": {"fingerprint": "9c1f.."}}
    {"state": [0, 1, 2], "batch": 0, "score": 0.25}

A process that dies while it writes leaves a last line without an end; it is cut off when the journal is opened again.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from ...ir.errors import ExportError, InputError
from .allocators.table import State

Key = tuple[State, int]
"""What is evaluated: a state, and the number of the batch."""

_KIND, _VERSION = "evaluations", 1


class Journal:
    """An open journal; use `Journal.open`. One process at a time may write to it.

    Attributes:
        path: the file.
        scores: what it holds, by state and batch. Of two lines about the same, the first counts.
    """

    def __init__(self, path: Path, scores: dict[Key, float]) -> None:
        self.path = path
        self.scores = scores
        # Unbuffered: each line is one system call, so that neither an interrupt nor a crash leaves half of it behind.
        self._file = path.open("ab", buffering=0)

    @classmethod
    def open(cls, path: str | Path, fingerprint: str | Mapping[str, str]) -> Self:
        """Open the journal of a search, or start one where there is no file.

        Args:
            path: the file.
            fingerprint: what is evaluated; two searches with equal ones must give equal scores. With several named
                ones (of the program, the data, the objective) a refusal says which of them differs.

        Raises:
            InputError: the file is no journal, is damaged, or is of another search.
            ExportError: it cannot be written.
        """
        path = Path(path)
        of = {"fingerprint": fingerprint} if isinstance(fingerprint, str) else dict(fingerprint)
        try:
            if not path.exists():
                _start(path, of)
            content = path.read_bytes()
            scores, end = _read(path, content, of)
            if end < len(content):
                os.truncate(path, end)
            return cls(path, scores)
        except OSError as error:
            raise ExportError(
                f"cannot write the journal '{path}': {error.strerror or error}",
                remedy="check that the folder exists, its permissions, and free space",
            ) from error

    def record(self, state: State, batch: int, score: float) -> None:
        """Add an evaluation; when this returns, it is in the file.

        Raises:
            ExportError: it cannot be written.
        """
        number = score if math.isfinite(score) else str(score)  # JSON has no infinity
        line = json.dumps({"state": list(state), "batch": batch, "score": number}) + "\n"
        try:
            self._file.write(line.encode())
        except OSError as error:
            raise ExportError(
                f"cannot write the journal '{self.path}': {error.strerror or error}", remedy="check free space"
            ) from error
        self.scores.setdefault((state, batch), score)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()


def _start(path: Path, of: Mapping[str, str]) -> None:
    """Write the header beside, then move it into place: there is never a file with half a header."""
    header = json.dumps({"graphlathe": _KIND, "version": _VERSION, "of": of}) + "\n"
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        partial.write_bytes(header.encode())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path, content: bytes, of: Mapping[str, str]) -> tuple[dict[Key, float], int]:
    """The evaluations, and where the last whole line ends."""
    end = content.rfind(b"\n") + 1
    lines = content[:end].splitlines()
    try:
        header: Any = json.loads(lines[0]) if lines else None
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("graphlathe") != _KIND or not isinstance(header.get("of"), dict):
        raise InputError(f"'{path}' is no journal of evaluations", remedy="choose another path, or move the file away")
    if header.get("version") != _VERSION:
        raise InputError(f"the journal '{path}' has version {header.get('version')}", expected=f"version {_VERSION}")
    there: dict[str, Any] = header["of"]
    differs = [name for name in dict.fromkeys((*of, *there)) if of.get(name) != there.get(name)]
    if differs:
        raise InputError(
            f"the journal '{path}' is of something else: "
            + ", ".join(f"{name} is {there.get(name)!r} there and {of.get(name)!r} here" for name in differs),
            remedy="choose another path, or go on with what the journal was made with",
        )
    scores: dict[Key, float] = {}
    for number, line in enumerate(lines[1:], 2):
        try:
            entry: Any = json.loads(line)
            key = tuple(int(level) for level in entry["state"]), int(entry["batch"])
            scores.setdefault(key, float(entry["score"]))
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"line {number} of the journal '{path}' is damaged: {line[:80]!r}",
                remedy="delete that line, or move the file away to measure everything again",
            ) from error
    return scores, end
