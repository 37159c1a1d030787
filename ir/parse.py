"""The syntax of the text form: text to records, without looking anything up. `ir.from_text` makes a program of them.

Every error names the line and column, and shows the line with a caret.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

from .errors import ImportModelError
from .types import DTYPES


@dataclass(frozen=True)
class Place:
    """Where something stands in the text, for messages."""

    number: int
    text: str
    column: int

    def fail(self, message: str, *, expected: str | None = None, remedy: str | None = None) -> NoReturn:
        """Raise an error that points here.

        Raises:
            ImportModelError: always.
        """
        pointer = f"line {self.number}, column {self.column + 1}: {message}\n    {self.text}\n    {' ' * self.column}^"
        raise ImportModelError(pointer, expected=expected, remedy=remedy)


@dataclass(frozen=True)
class Ref:
    """A use of a value (``%0``), or of a nested graph (``@body``)."""

    name: str
    nested: bool
    place: Place


@dataclass(frozen=True)
class TypeText:
    """A type as written, and where."""

    text: str
    place: Place


@dataclass
class WeightLine:
    """``%w0 = weight "name" : f32[4, 4] #a1b2c3d4``."""

    result: str
    name: str
    type: TypeText
    origin: tuple[str, str]


@dataclass
class OperatorLine:
    """``%0 = aten.add.Tensor(%a, %b, alpha=2) : f32[4]``."""

    result: str
    target: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    type: TypeText
    origin: tuple[str, str]
    place: Place


@dataclass
class StateLine:
    """``state %past -> %past.next = weight "past" : f32[4] #a1b2c3d4``."""

    input: str
    output: str
    initial: WeightLine | None
    place: Place


@dataclass
class DimLine:
    """``dim S = 12 in [1, 512]``; or ``dim u0``, a size that depends on data (``hint`` None)."""

    name: str
    hint: int | None
    min: int
    max: int | None
    place: Place


@dataclass
class Section:
    """One ``program`` or ``graph``."""

    kind: str
    name: str
    place: Place
    inputs: list[tuple[str, TypeText]]
    outputs: list[str] = field(default_factory=list)
    bare_output: bool = False
    dims: list[DimLine] = field(default_factory=list)
    guards: list[TypeText] = field(default_factory=list)
    arguments: dict[str, tuple[str, ...]] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    state: list[StateLine] = field(default_factory=list)
    weights: list[WeightLine] = field(default_factory=list)
    operators: list[OperatorLine] = field(default_factory=list)
    returns: Any = None
    end: Place | None = None


@dataclass
class Document:
    """A whole text."""

    sections: list[Section] = field(default_factory=list)
    history: list[str] = field(default_factory=list)
    tied: dict[str, str] = field(default_factory=dict)


_STRING = r'"(?:[^"\\]|\\.)*"'
_TOKEN = re.compile(
    rf"(?P<string>{_STRING})"
    rf"|(?P<ref>[%@](?:{_STRING}|[\w.]+))"
    r"|(?P<number>-?(?:inf|nan)\b|-?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)"
    r"|(?P<word>[A-Za-z_][\w.]*(?::\d+)?)"
    r"|(?P<digest>\#[0-9a-f]{8}\b)"
    r"|(?P<mark>->|[()\[\]{},=:;])"
)
_SPACE = re.compile(r"\s*")
_COMMENT = re.compile(rf"\s*(?:from (?P<origin>{_STRING}|\S+))?\s*(?:by (?P<maker>{_STRING}|\S+))?\s*$")
_WORDS: dict[str, Any] = {
    "None": None,
    "True": True,
    "False": False,
    **DTYPES,
    "strided": torch.strided,
    "sparse_coo": torch.sparse_coo,
    "sparse_csr": torch.sparse_csr,
    "contiguous_format": torch.contiguous_format,
    "preserve_format": torch.preserve_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}
_CLOSING = {"(": ")", "[": "]", "{": "}"}


class Line:
    """A cursor over one line."""

    def __init__(self, number: int, text: str) -> None:
        self.number = number
        self.text = text
        self.at = 0
        self._skip()

    def _skip(self) -> None:
        space = _SPACE.match(self.text, self.at)
        self.at = space.end() if space else self.at

    def place(self) -> Place:
        """The current position."""
        return Place(self.number, self.text, self.at)

    def peek(self) -> tuple[str, str]:
        """Kind and text of the next token; ``("end", "")`` at the end."""
        if self.at >= len(self.text):
            return "end", ""
        match = _TOKEN.match(self.text, self.at)
        if match is None:
            self.place().fail(f"'{self.text[self.at]}' is not understood")
        return str(match.lastgroup), match.group()

    def next(self, kind: str | None = None, text: str | None = None, what: str = "") -> str:
        """Take the next token, which must be of a kind, or be one text."""
        found, value = self.peek()
        if (kind is not None and found != kind) or (text is not None and value != text):
            wanted = what or (f"'{text}'" if text else str(kind))
            self.place().fail(_found(value), expected=wanted)
        self.at += len(value)
        self._skip()
        return value

    def accept(self, text: str) -> bool:
        """Take the next token if it is this one."""
        if self.peek()[1] != text:
            return False
        self.next()
        return True

    def end(self) -> None:
        """Nothing but a comment may follow."""
        if self.peek()[1] not in ("", ";"):
            self.place().fail(f"'{self.peek()[1]}' is too much here", expected="the end of the line")

    def string(self) -> str:
        """A string in quotes."""
        return str(json.loads(self.next("string", what="a string in quotes")))

    def name(self, sign: str = "%") -> str:
        """A name after ``%`` or ``@``; names in quotes keep a quote in front, so that they differ from plain ones."""
        place = self.place()
        text = self.next("ref", what=f"a name with {sign}")
        if text[0] != sign:
            place.fail(f"found '{text}'", expected=f"a name with {sign}")
        return unquoted(text[1:])

    def key(self) -> str:
        """A plain or quoted name without a sign."""
        return self.string() if self.peek()[0] == "string" else self.next("word", what="a name")

    def type(self) -> TypeText:
        """A type, up to the end of the argument or line."""
        place, depth, start = self.place(), 0, self.at
        for at in range(start, len(self.text) + 1):
            char = self.text[at] if at < len(self.text) else ";"
            if depth == 0 and char in ",);#":
                self.at = at
                break
            depth += (char in "([") - (char in ")]")
        text = self.text[start : self.at].strip()
        if not text or depth:
            place.fail("a type is missing or not closed", expected="such as f32[B, 4]")
        self._skip()
        return TypeText(text, place)

    def value(self) -> Any:
        """An argument: a constant, a list, or a use of a value."""
        place = self.place()
        kind, text = self.peek()
        match kind:
            case "ref":
                self.next()
                return Ref(unquoted(text[1:]), text[0] == "@", place)
            case "number":
                self.next()
                return float(text) if set(text) & set(".eEin") else int(text)
            case "string":
                return self.string()
            case "mark" if text in _CLOSING:
                return self._sequence(text)
            case "word":
                self.next()
                return self._word(text, place)
            case _:
                place.fail(_found(text), expected="a value")

    def _sequence(self, opening: str) -> Any:
        self.next()
        items: list[Any] = []
        keys: list[str] = []
        comma = False
        while not self.accept(_CLOSING[opening]):
            if items and not comma:
                self.next(text=_CLOSING[opening], what=f"',' or '{_CLOSING[opening]}'")
            if opening == "{":
                keys.append(self.string())
                self.next(text=":")
            items.append(self.value())
            comma = self.accept(",")
        if opening == "{":
            return dict(zip(keys, items, strict=True))
        return tuple(items) if opening == "(" else items

    def _word(self, text: str, place: Place) -> Any:
        if text in _WORDS:
            return _WORDS[text]
        if text in ("slice", "complex") and self.peek()[1] == "(":
            parts = self._sequence("(")
            try:
                return slice(*parts) if text == "slice" else complex(*parts)
            except TypeError as error:
                place.fail(f"{text}{parts}: {error}")
        try:
            return torch.device(text)
        except RuntimeError:
            place.fail(f"'{text}' is no value", expected="a number, a string, a dtype, a device, %value or @graph")

    def comment(self) -> tuple[str, str]:
        """Origin and maker from a comment at the end of the line."""
        if self.peek()[1] != ";":
            self.end()
            return "", ""
        match = _COMMENT.match(self.text, self.at + 1)
        self.at = len(self.text)
        if match is None:
            return "", ""
        return tuple(  # type: ignore[return-value]
            "" if word is None else str(json.loads(word)) if word.startswith('"') else word for word in match.groups()
        )

    def weight(self, result: str) -> WeightLine:
        """``"name" : f32[4] #a1b2c3d4``, after the word ``weight``."""
        name = self.string()
        self.next(text=":")
        written = self.type()
        if self.peek()[0] == "digest":
            self.next()
        return WeightLine(result, name, written, self.comment())


def _found(text: str) -> str:
    return f"found '{text}'" if text else "found the end of the line"


_NUMBERED = re.compile(r"[wa]?\d+")


def public_name(name: str) -> str:
    """A name without the quote that tells it from the canonical ones."""
    return name[1:] if name.startswith('"') and _NUMBERED.fullmatch(name[1:]) else name


def unquoted(text: str) -> str:
    """The name that stands after a sign: quotes are kept as one leading quote, so that ``%"w0"`` is not ``%w0``."""
    if not text.startswith('"'):
        return text
    name = str(json.loads(text))
    return f'"{name}' if _NUMBERED.fullmatch(name) else name


def parse_document(text: str) -> Document:
    """Split a text into sections and their lines.

    Raises:
        ImportModelError: bad syntax; the message shows where.
    """
    document = Document()
    section: Section | None = None
    line = Line(0, "")
    for number, raw in enumerate(text.splitlines(), start=1):
        line = Line(number, raw)
        kind, word = line.peek()
        if kind == "end" or word == ";":
            continue
        if section is None:
            section = _top(line, document)
        elif line.accept("}"):
            line.end()
            document.sections.append(section)
            section = None
        else:
            _statement(line, section)
    if section is not None:
        line.place().fail(f"'{section.name}' is not closed", expected="'}'")
    if not any(s.kind == "program" for s in document.sections):
        line.place().fail("the text holds no program", expected="program @main(...) -> (...) {")
    return document


def _top(line: Line, document: Document) -> Section | None:
    """A line outside of sections; returns the section that it opens."""
    place = line.place()
    match line.next("word", what="'program', 'graph', 'history' or 'tied'"):
        case "program" | "graph" as kind:
            return _open(line, kind)
        case "history":
            document.history.append(line.string())
        case "tied":
            alias = line.string()
            line.next(text="->")
            document.tied[alias] = line.string()
        case other:
            place.fail(f"'{other}' is not understood", expected="'program', 'graph', 'history' or 'tied'")
    line.end()
    return None


def _open(line: Line, kind: str) -> Section:
    place = line.place()
    section = Section(kind, public_name(line.name("@")), place, _list(line, _port))
    if kind == "program":
        line.next(text="->")
        section.bare_output = line.peek()[1] != "("
        section.outputs = [line.name()] if section.bare_output else _list(line, lambda inner: inner.name())
        section.outputs = [public_name(name) for name in section.outputs]
    line.next(text="{")
    line.end()
    return section


def _port(line: Line) -> tuple[str, TypeText]:
    name = line.name()
    line.next(text=":")
    return name, line.type()


def _list(line: Line, item: Callable[[Line], Any]) -> list[Any]:
    items: list[Any] = []
    line.next(text="(")
    while not line.accept(")"):
        if items:
            line.next(text=",", what="',' or ')'")
        items.append(item(line))
    return items


def _statement(line: Line, section: Section) -> None:
    place = line.place()
    if line.peek()[0] == "ref":
        result = line.name()
        line.next(text="=")
        target = line.next("word", what="an operator, or 'weight'")
        if target == "weight":
            section.weights.append(line.weight(result))
        else:
            section.operators.append(_operator(line, result, target, place))
        return
    match line.next("word", what="a statement"):
        case "return":
            section.returns = line.value()
            section.end = place
        case "dim":
            section.dims.append(_dim(line, place))
        case "guard":
            section.guards.append(TypeText(line.text[line.at :].strip(), line.place()))
            return
        case "argument":
            key = line.key()
            section.arguments[key] = tuple(public_name(name) for name in _list(line, lambda inner: inner.name()))
        case "constant":
            key = line.key()
            line.next(text="=")
            section.constants[key] = line.value()
        case "state":
            section.state.append(_state(line, place))
            return
        case other:
            place.fail(
                f"'{other}' is not understood",
                expected="%name = ..., return, dim, guard, argument, constant or state",
            )
    line.end()


def _operator(line: Line, result: str, target: str, place: Place) -> OperatorLine:
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    line.next(text="(")
    while not line.accept(")"):
        if args or kwargs:
            line.next(text=",", what="',' or ')'")
        kind, word = line.peek()
        if kind == "word" and line.text[line.at + len(word) : line.at + len(word) + 1] == "=":
            key = line.next()
            line.next(text="=")
            kwargs[key] = line.value()
        elif kwargs:
            line.place().fail("a positional argument after a named one")
        else:
            args.append(line.value())
    line.next(text=":", what="':' and the type of the result")
    written = line.type()
    return OperatorLine(result, target, tuple(args), kwargs, written, line.comment(), place)


def _dim(line: Line, place: Place) -> DimLine:
    name = line.next("word", what="a name")
    if not line.accept("="):
        return DimLine(name, None, 0, None, place)
    hint = _whole(line)
    line.next("word", "in")
    line.next(text="[")
    low = _whole(line)
    line.next(text=",")
    high = None if line.accept("inf") else _whole(line)
    line.next(text="]")
    return DimLine(name, hint, low, high, place)


def _whole(line: Line) -> int:
    place, text = line.place(), line.next("number", what="a whole number")
    if not text.isdigit():
        place.fail(f"found '{text}'", expected="a whole number")
    return int(text)


def _state(line: Line, place: Place) -> StateLine:
    before = public_name(line.name())
    line.next(text="->")
    after = public_name(line.name())
    initial = None
    if line.accept("="):
        line.next("word", "weight")
        initial = line.weight("")
    line.end()
    return StateLine(before, after, initial, place)
