"""What a pass is: a frozen dataclass with an effect, typed options, and three steps: check, run, ensure."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self, get_args, get_origin, get_type_hints

import numpy as np

from ..ir.errors import PipelineError, PostconditionError, suggest
from ..ir.program import Program

if TYPE_CHECKING:
    from concurrent.futures import Executor
    from pathlib import Path

    from torch import fx

    from ..ir.structure import Structure

Batch = Mapping[str, Any]


class Effect(enum.Enum):
    """What a pass promises about the outputs."""

    ANALYSIS = "analysis"
    """The graph is unchanged."""
    EXACT = "exact"
    """Same outputs for every input, up to float reassociation."""
    EXTENDS = "extends"
    """Old inputs and outputs behave exactly as before; new ones are added."""
    REFORMS = "reforms"
    """The interface changes; equal through the pass's own adapter."""
    APPROXIMATE = "approximate"
    """Outputs drift; the drift is measured and reported."""


class Prop(enum.Enum):
    """What a pass may need, and what it may break."""

    CANONICAL = "canonical"
    """`canonicalize` has run since the last change."""
    SITES = "sites"
    """The program has a structure (residual streams and their blocks) that can be found."""
    CALIBRATION = "calibration"
    """The caller gave calibration data."""


def option(
    default: Any,
    *,
    help: str,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Sequence[str] | None = None,
) -> Any:
    """Declare a pass option: its default, range or choices, and the text that documents it.

    Args:
        default: the default value; a tuple for lists, None for 'not given'.
        help: one line for the catalogue, the command line and the docs.
        ge, gt, le, lt: numeric bounds.
        choices: the allowed strings.
    """
    bounds = {key: value for key, value in {"ge": ge, "gt": gt, "le": le, "lt": lt}.items() if value is not None}
    metadata = {
        "help": help,
        "bounds": bounds,
        "choices": tuple(choices) if choices else None,
    }
    return field(default=default, metadata=metadata)


@dataclass
class Stats:
    """What one run of a pass did, besides what the manager measures.

    Attributes:
        hits: how many places were rewritten.
        attempts: how many places were considered.
        misses: reasons why places were not rewritten, with counts.
        plan: what was decided, as JSON-serialisable data (for passes that choose).
        notes: lines for the report.
        missed: the reason for each place that was not rewritten, by its node's name.
    """

    hits: int = 0
    attempts: int = 0
    misses: dict[str, int] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    missed: dict[str, str] = field(default_factory=dict)

    def miss(self, reason: str, node: fx.Node | None = None) -> None:
        """Count one place that was not rewritten; ``node`` is where it is, for who asks about that node."""
        self.misses[reason] = self.misses.get(reason, 0) + 1
        if node is not None:
            self.missed[node.name] = reason


@dataclass
class Context:
    """What a pass may use besides the program.

    Attributes:
        calibration: batches of named inputs; may be iterated more than once.
        progress: called as ``progress(iterable, total, label)`` around slow loops; shows a bar where wanted.
        original: what a distillation learns from: the program that the pipeline started from, or a given teacher.
        executor: where searches evaluate candidates; None: in this process.
        journal: the folder that keeps what searches evaluated, so that one that was stopped goes on.
        workspace: a folder that workers of the executor can read; None: a temporary one, for workers on this machine.
    """

    calibration: Sequence[Batch] | None = None
    progress: Callable[[Iterable[Any], int | None, str], Iterable[Any]] = lambda items, total, label: items
    original: Program | None = None
    executor: Executor | None = None
    journal: Path | None = None
    workspace: Path | None = None
    _structure: tuple[Program, int, Structure] | None = field(default=None, repr=False)

    def structure(self, program: Program) -> Structure:
        """The program's sites, found once for as long as its graphs stay as they are."""
        from ..ir.structure import structure

        known = self._structure
        if known is None or known[0] is not program or known[1] != program.mutations:
            known = self._structure = (program, program.mutations, structure(program))
        return known[2]


@dataclass(frozen=True)
class Case:
    """A program in which the right answer is planted, and the check that a pass found it.

    Attributes:
        settings: the pass, with the options that must find it.
        program: the program.
        calibration: what the pass may look at.
        found: whether the result of the run is the planted answer.
        original: what a distillation learns from.
    """

    settings: Pass
    program: Program
    calibration: Sequence[Batch]
    found: Callable[[Program, Stats], bool]
    original: Program | None = None


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Base of all passes. Subclasses are frozen dataclasses; their fields are their options.

    A pass is stateless and hashable. `check` raises `PreconditionError` when the pass makes no sense for the program,
    `run` changes the program through a `Rewriter`, `ensure` checks the pass's own law.

    Raises:
        PipelineError: an option is out of range or of the wrong type.
    """

    name: ClassVar[str] = ""
    effect: ClassVar[Effect] = Effect.ANALYSIS
    needs: ClassVar[frozenset[Prop]] = frozenset()
    breaks: ClassVar[frozenset[Prop]] = frozenset({Prop.CANONICAL})
    paper: ClassVar[str] = ""
    parts: ClassVar[tuple[str, ...]] = ()
    """Names of passes that it runs in turn; it reports their misses as ``<name>: <reason>``."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for spec in options_of(type(self)):
            object.__setattr__(
                self,
                spec.name,
                validated(self.name, spec, hints[spec.name], getattr(self, spec.name)),
            )

    def check(self, program: Program, ctx: Context) -> None:
        """Raise `PreconditionError` if the pass makes no sense for this program."""

    def run(self, program: Program, ctx: Context) -> Stats:
        """Change the program in place and say what was done."""
        raise NotImplementedError

    def ensure(self, before: Program, program: Program, stats: Stats) -> None:
        """Raise `PostconditionError` if the pass broke its own law."""

    def call_as_before(self, before: Program, program: Program, feeds: Batch) -> dict[str, Any]:
        """Run the changed program so that it answers a call of the program before; `REFORMS` passes adapt the call.

        Args:
            before: the program before the pass.
            program: the program after it.
            feeds: named inputs of ``before``.

        Returns:
            The outputs of ``before``, by name.
        """
        outputs = program.run(program.feeds(**feeds))
        return {name: outputs[name] for name in before.main.outputs}

    @classmethod
    def neutral(cls) -> Self | None:
        """The settings at which the pass must equal the baseline exactly; None if every setting does."""
        return None

    @classmethod
    def planted(cls) -> Case | None:
        """A case in which the right answer is known and must be found; None for passes that choose nothing."""
        return None

    def to_text(self) -> str:
        """Canonical text: the name, and the options that differ from their defaults, in the order of declaration."""
        given = [
            f"{spec.name}={_format(getattr(self, spec.name))}"
            for spec in options_of(type(self))
            if getattr(self, spec.name) != spec.default
        ]
        return self.name + ("{" + " ".join(given) + "}" if given else "")

    def __str__(self) -> str:
        return self.to_text()


def same_outputs(before: Program, program: Program, pass_name: str) -> None:
    """Check that a pass left names, element types and shapes of the outputs as they were.

    Raises:
        PostconditionError: it did not.
    """
    old, new = ([(s.name, s.dtype, str(s.shape)) for s in p.outputs] for p in (before, program))
    if old != new:
        raise PostconditionError(f"the outputs changed from {old} to {new}", pass_name=pass_name)


def options_of(cls: type[Pass]) -> list[dataclasses.Field[Any]]:
    """The options of a pass class, in order of declaration."""
    return [f for f in dataclasses.fields(cls) if "help" in f.metadata]


def option_type(cls: type[Pass], name: str) -> Any:
    """The annotated type of an option (``int``, ``float``, ``str``, ``bool``, ``tuple[int, ...]``, ``int | None``)."""
    return get_type_hints(cls)[name]


_PLAIN_ENDS = frozenset(' \t\n,{}()="')


def _format(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(_format(v) for v in value)
    if isinstance(value, str):
        plain = value.isprintable() and value.isascii() and value not in ("", "none") and not _PLAIN_ENDS & set(value)
        return value if plain else json.dumps(value)
    return repr(value)


def kinds_of(hint: Any) -> tuple[Any, bool]:
    """The type of an option without ``| None``, and whether None is allowed."""
    arguments = get_args(hint)
    if get_origin(hint) is tuple or not arguments:
        return hint, hint is type(None)
    kinds = [a for a in arguments if a is not type(None)]
    return kinds[0], type(None) in arguments


def validated(owner: str, spec: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
    """An option's value in its declared type.

    Raises:
        PipelineError: wrong type, out of range, or none of the choices.
    """
    where = f"option '{spec.name}' of '{owner}'"
    kind, optional = kinds_of(hint)
    if value is None:
        if optional or spec.default is None:
            return value
        raise PipelineError(f"{where} is missing")
    value = _coerced(where, kind, value)
    for single in value if isinstance(value, tuple) else (value,):
        _check_bounds(where, spec, single)
    return value


def _coerced(where: str, kind: Any, value: Any) -> Any:
    if get_origin(kind) is tuple:
        items = value if isinstance(value, (tuple, list, range)) else (value,)
        return tuple(_coerced(where, get_args(kind)[0], item) for item in items)
    if isinstance(value, np.generic):
        value = value.item()
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise PipelineError(f"{where} is {value!r}", expected=f"{kind.__name__}")
    if isinstance(value, float) and math.isnan(value):
        raise PipelineError(f"{where} is not a number", expected="a number")
    return value


def _check_bounds(where: str, spec: dataclasses.Field[Any], value: Any) -> None:
    choices = spec.metadata["choices"]
    if choices and value not in choices:
        raise PipelineError(
            f"{where} is {value!r}{suggest(str(value), choices)}",
            expected=f"one of: {', '.join(choices)}",
        )
    tests: dict[str, Callable[[Any, Any], bool]] = {
        "ge": lambda a, b: a >= b,
        "gt": lambda a, b: a > b,
        "le": lambda a, b: a <= b,
        "lt": lambda a, b: a < b,
    }
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    bounds = spec.metadata["bounds"]
    if any(not tests[key](value, limit) for key, limit in bounds.items()):
        raise PipelineError(
            f"{where} is {value}",
            expected=" and ".join(f"{words[k]} {v}" for k, v in bounds.items()),
        )
