"""The measuring instrument: suites, their rows and goals, and the record of a run.

A suite is one file with one registered `Suite`. It checks that what it compares is correct before it times anything,
times it in turn within one process (`measure.interleave`), and returns rows and goals. This file adds the machine,
the commit and the versions, prints the tables and writes the JSON.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ...ir.errors import GraphlatheError, suggest
from ...ir.files import write_atomically
from .machine import commit, describe_machine, versions

Row = dict[str, Any]

MODULES: dict[str, str] = {
    "compiler": ".compiler",
    "compress-combined": ".compress_combined",
    "compress-depth": ".compress_depth",
    "compress-heads": ".compress_heads",
    "compress-vision": ".compress_vision",
    "compress-width": ".compress_width",
    "onnx-coverage": ".onnx_coverage",
    "page": ".page",
    "peers-import": ".peers_import",
    "scale": ".scale",
}
"""Suites by name; each module has a `SUITE`. Loaded when listed or run."""

_registered: dict[str, Suite] = {}


@dataclass(frozen=True)
class Goal:
    """One measured value against its target.

    Attributes:
        name: what is measured, with its unit.
        value: what was measured.
        target: the bound, itself acceptable.
        at_least: the value must be at least the target; otherwise at most.
    """

    name: str
    value: float
    target: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the value is on the right side of the target (a value that is not a number never is)."""
        return self.value >= self.target if self.at_least else self.value <= self.target

    @property
    def margin(self) -> str:
        """By how much it was met or missed, in words."""
        if math.isnan(self.value):
            return "not measured"
        word = "met" if self.met else "missed"
        if self.target == 0:
            return f"{word} by {abs(self.value):.3g}"
        return f"{word} by {abs(self.value - self.target) / abs(self.target):.0%}"

    def to_json(self) -> Row:
        """The goal as JSON data."""
        return {**asdict(self), "met": self.met, "margin": self.margin}


@dataclass
class Result:
    """What a suite measured.

    Attributes:
        rows: one dict per measurement; the keys are the table's columns. Keys that end in ``seconds`` or ``bytes``
            are printed with units.
        goals: the suite's goals at these measurements.
        notes: what the reader must know (what was skipped, and why).
        hidden: columns that only the JSON has.
    """

    rows: list[Row] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    hidden: frozenset[str] = frozenset()


@dataclass
class Run:
    """How a suite is to be run.

    Attributes:
        quick: smaller sizes, fewer repeats, or a sample.
        only: of a suite that consists of cases, those whose name contains this.
        peers: of a suite that compares with other tools, the folder that holds their packages; None: its own choice.
        say: called with a line about what is going on now.
        known: rows of an earlier, perhaps unfinished, record of the suite; one that says how it was made need not be
            made again.
        save: called with what there is so far, by suites of hours.
    """

    quick: bool = False
    only: str | None = None
    peers: Path | None = None
    say: Callable[[str], None] = lambda line: None
    known: Sequence[Row] = ()
    save: Callable[[Result], None] = lambda result: None


@dataclass(frozen=True)
class Suite:
    """A named benchmark.

    Attributes:
        name: as in ``graphlathe bench NAME``.
        summary: one line.
        goals: the goals in words, for ``bench --list``.
        run: measures.
        paired: every row has the time of what it is compared with from the same minute, so that rows of several
            machines may stand in one record; each says its processor (``cpu``).
    """

    name: str
    summary: str
    goals: tuple[str, ...]
    run: Callable[[Run], Result]
    paired: bool = False


@dataclass(frozen=True)
class Record:
    """A result with everything needed to judge it."""

    suite: str
    quick: bool
    machine: Row
    commit: str
    versions: dict[str, str]
    result: Result

    @property
    def missed(self) -> list[Goal]:
        """The goals that were not reached."""
        return [goal for goal in self.result.goals if not goal.met]

    def to_json(self) -> Row:
        """JSON data: suite, machine, commit, versions, rows, goals, notes, columns that tables leave out."""
        return {
            "suite": self.suite,
            "quick": self.quick,
            "machine": self.machine,
            "commit": self.commit,
            "versions": self.versions,
            "rows": self.result.rows,
            "goals": [goal.to_json() for goal in self.result.goals],
            "notes": self.result.notes,
            "hidden": sorted(self.result.hidden),
        }

    def write(self, path: Path) -> None:
        """Write the JSON; the file appears complete or not at all."""
        write_atomically(path, json.dumps(_finite(self.to_json()), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity; a value that could not be measured is null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def registered(suite: Suite) -> Generator[None]:
    """Add a suite for the length of a ``with`` block (for tests and notebooks)."""
    _registered[suite.name] = suite
    try:
        yield
    finally:
        del _registered[suite.name]


def names() -> list[str]:
    """All suite names, sorted."""
    return sorted({*MODULES, *_registered})


def get(name: str) -> Suite:
    """The suite of that name.

    Raises:
        GraphlatheError: there is none.
    """
    if name in _registered:
        return _registered[name]
    if name not in MODULES:
        raise GraphlatheError(
            f"unknown suite '{name}'{suggest(name, names())}",
            expected=f"one of: {', '.join(names())}",
        )
    suite: Suite = importlib.import_module(MODULES[name], __package__).SUITE
    return suite


def run_suite(suite: Suite, run: Run, keep: Callable[[Record], None] = lambda record: None) -> Record:
    """Run a suite and add the machine, the commit and the versions.

    Args:
        suite: which.
        run: how.
        keep: called with the unfinished record whenever the suite has something new.
    """
    machine, at, of = describe_machine(), commit(), versions()

    def record(result: Result) -> Record:
        return Record(suite.name, run.quick, machine, at, of, result)

    return record(suite.run(replace(run, save=lambda result: keep(record(result)))))


def known_rows(path: Path, suite: Suite, quick: bool) -> list[Row]:
    """The rows of a record on this machine (of a paired suite, on any: they say on which); empty without a file.

    Raises:
        GraphlatheError: the file is no record, or one of another suite, size, processor or of other versions.
    """
    if not path.exists():
        return []
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        found = {key: data[key] for key in ("suite", "quick", "versions")} | {"cpu": data["machine"]["cpu"]}
        rows: list[Row] = data["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GraphlatheError(f"'{path}' is no record of a benchmark", remedy="name another file") from error
    here = {"suite": suite.name, "quick": quick, "versions": versions()}
    if suite.paired:
        rows = [{"cpu": found["cpu"], **row} for row in rows]
    else:
        here["cpu"] = describe_machine()["cpu"]
    for key, value in here.items():
        if found[key] != value:
            raise GraphlatheError(
                f"'{path}' cannot be continued: its {key} is {found[key]}",
                expected=str(value),
                remedy="name a new file",
            )
    return rows


def columns(rows: Iterable[Row]) -> list[str]:
    """The union of the rows' keys, in order of first appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))
