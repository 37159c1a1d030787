"""Instruments: watch a pipeline run, or steer it, without touching the passes.

An instrument has four hooks, all optional: `before_pass` (returning False skips the pass), `after_pass` (returning
False stops the pipeline), `on_rewrite` and `on_error`.
"""

from __future__ import annotations

import difflib
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file
from torch import fx

from ..ir.errors import ExportError, GraphlatheError
from ..ir.program import Program
from ..ir.text import print_program
from .base import Pass
from .report import Row

if TYPE_CHECKING:
    from .manager import PassManager


@dataclass
class Event:
    """One run of one pass.

    Attributes:
        index: its number in the run, from 1.
        pass_: the pass.
        program: the program, before or after the pass.
        rest: the pipeline from this pass on, as text.
        row: what is known for the report so far.
        before: a copy of the program before the pass; None in `Instrument.before_pass`.
        manager: what runs the pipeline, with its data and settings.
    """

    index: int
    pass_: Pass
    program: Program
    rest: str
    row: Row
    before: Program | None = None
    manager: PassManager | None = None


class Instrument:
    """Base of all instruments: every hook does nothing."""

    def before_pass(self, event: Event) -> bool:
        """Called before a pass; False skips it."""
        return True

    def after_pass(self, event: Event) -> bool:
        """Called after a pass that succeeded and was verified; False stops the pipeline here."""
        return True

    def on_rewrite(self, pass_name: str, kind: str, node: fx.Node) -> None:
        """Called for every change: ``create``, ``replace``, ``change`` (of arguments), ``erase``, ``weight``."""

    def on_error(self, event: Event, error: GraphlatheError) -> None:
        """Called when a pass, or a check of it, failed; the error is raised afterwards."""


@dataclass
class Timing(Instrument):
    """Adds up seconds by pass name, over any number of runs."""

    seconds: dict[str, float] = field(default_factory=dict)
    runs: Counter[str] = field(default_factory=Counter)

    def after_pass(self, event: Event) -> bool:
        """Add one run."""
        name = event.pass_.name
        self.seconds[name] = self.seconds.get(name, 0.0) + event.row.seconds
        self.runs[name] += 1
        return True

    def __str__(self) -> str:
        slowest = sorted(self.seconds.items(), key=lambda item: -item[1])
        return "\n".join(f"{seconds:9.3f} s  {self.runs[name]:4} x  {name}" for name, seconds in slowest)


@dataclass
class Dump(Instrument):
    """Writes the program as text before the first pass (``000_input.txt``) and after every one (``007_cse.txt``)."""

    folder: Path
    origins: bool = False

    def before_pass(self, event: Event) -> bool:
        """Write the input once."""
        if event.index == 1:
            self._write(0, "input", event.program)
        return True

    def after_pass(self, event: Event) -> bool:
        """Write the result of the pass."""
        self._write(event.index, event.pass_.name, event.program)
        return True

    def _write(self, index: int, name: str, program: Program) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"{index:03}_{name}.txt").write_text(program.to_text(origins=self.origins), encoding="utf-8")
        except OSError as error:
            raise ExportError(f"cannot write the dump to '{self.folder}': {error}") from error


@dataclass
class Diff(Instrument):
    """Prints what changed in the text form after every pass that changed something, as a unified diff."""

    write: Callable[[str], object] = sys.stderr.write
    context: int = 2
    _last: str | None = field(default=None, repr=False)

    def before_pass(self, event: Event) -> bool:
        """Remember the text."""
        if self._last is None or event.index == 1:
            self._last = print_program(event.program, history=False)
        return True

    def after_pass(self, event: Event) -> bool:
        """Print the difference."""
        before, self._last = self._last or "", print_program(event.program, history=False)
        lines = difflib.unified_diff(
            before.splitlines(keepends=True),
            self._last.splitlines(keepends=True),
            f"before {event.row.text}",
            f"after {event.row.text}",
            n=self.context,
        )
        for line in lines:
            self.write(line)
        return True


@dataclass
class StopAfter(Instrument):
    """Ends the pipeline after the first run of the pass ``name``."""

    name: str

    def after_pass(self, event: Event) -> bool:
        """Whether to go on."""
        return event.pass_.name != self.name


@dataclass
class Disable(Instrument):
    """Skips every pass whose name is in ``names``."""

    names: Collection[str]

    def before_pass(self, event: Event) -> bool:
        """Whether to run the pass."""
        return event.pass_.name not in self.names


@dataclass
class Reproducer(Instrument):
    """On failure, writes a folder from which the failing step runs again.

    ``program/`` is the program before the failing pass (its weights included), ``calibration/`` the data,
    ``pipeline.txt`` that pass and what was to follow, ``error.txt`` the message, ``command.txt`` the command that runs
    it again. The example inputs of that run have the sizes of the first one's, and random numbers.
    """

    folder: Path

    def on_error(self, event: Event, error: GraphlatheError) -> None:
        """Write the folder, and say so in a note on the error."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            saved = (event.before or event.program).save(self.folder / "program")
            words = ["graphlathe", "optimize", str(saved), "-p", event.rest, *self._settings(event), "--debug"]
            command = shlex.join(words)
            (self.folder / "pipeline.txt").write_text(event.rest + "\n", encoding="utf-8")
            (self.folder / "error.txt").write_text(f"{type(error).__name__}: {error}\n", encoding="utf-8")
            (self.folder / "command.txt").write_text(command + "\n", encoding="utf-8")
        except (OSError, GraphlatheError) as failed:
            # The pass's own error matters more; that there is no reproducer is said with it.
            error.add_note(f"no reproducer was written to '{self.folder}': {failed}")
        else:
            error.add_note(f"reproducer: '{self.folder}'; run again with: {command}")

    def _settings(self, event: Event) -> list[str]:
        """The run's data and settings as arguments of the command line; writes the data."""
        manager = event.manager
        if manager is None:
            return []
        words = ["--verify", str(manager.verify)]
        if manager.feeds is None:
            words += ["--example", "none"]
        elif sizes := (event.before or event.program).check_feeds(manager.feeds):
            words += ["--example", ",".join(f"{name}={size}" for name, size in sizes.items())]
        for name, limit in (manager.budget or {}).items():
            words += ["--budget", f"{name}={limit!r}"]
        for index, batch in enumerate(manager.calibration or ()):
            path = self.folder / "calibration" / f"{index:04}.safetensors"
            path.parent.mkdir(exist_ok=True)
            save_file({name: value.contiguous().clone() for name, value in batch.items()}, path)
            words += ["--calibration", str(path)]
        return words


@dataclass
class Snapshots(Instrument):
    """Keeps a copy of the program before the first pass and after every one; weights are shared, so this is cheap."""

    programs: list[tuple[str, Program]] = field(default_factory=list)

    def before_pass(self, event: Event) -> bool:
        """Keep the input once."""
        if not self.programs:
            self.programs.append(("", event.program.clone()))
        return True

    def after_pass(self, event: Event) -> bool:
        """Keep the result."""
        self.programs.append((event.row.text, event.program.clone()))
        return True
