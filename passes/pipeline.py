"""Pipeline strings: ``canonicalize,repeat{max=4}(cse,dce),drop-layers{ratio=0.25 score=loss}``.

    pipeline := item ("," item)*
    item     := name ["{" option* "}"] | "repeat" ["{" option* "}"] "(" pipeline ")"
    option   := key | key "=" [value ("," value)*]

Options are separated by spaces, lists by commas; a bare key means true; text with blanks or any of ``,{}()="`` is
quoted as in JSON. An unknown name or key fails with a caret under it and a suggestion. Pass -> text -> pass
round-trips.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, get_args, get_origin

from ..ir.errors import PipelineError, suggest
from . import registry
from .base import Pass, kinds_of, option_type, options_of, validated

REPEAT = "repeat"
DEFAULT_ROUNDS = 10
_SEPARATORS = "options are separated by blanks, the values of a list by commas alone: {ratio=0.3 sites=mlp,heads}"
_STOPS = frozenset(" \t\r\n,{}()=")


@dataclass(frozen=True)
class Pipeline:
    """Passes in order; an item is a pass, or a group that is repeated."""

    items: tuple[Pass | Repeat, ...] = ()

    def to_text(self) -> str:
        """Canonical text, which `parse_pipeline` reads back to an equal pipeline."""
        return ",".join(item.to_text() for item in self.items)

    def __str__(self) -> str:
        return self.to_text()

    def passes(self) -> Iterator[Pass]:
        """Every pass in it, once, in order."""
        for item in self.items:
            yield from item.body.passes() if isinstance(item, Repeat) else (item,)


@dataclass(frozen=True)
class Repeat:
    """A group of passes that runs until a round changes nothing, or ``max`` times."""

    body: Pipeline
    max: int = DEFAULT_ROUNDS

    def __post_init__(self) -> None:
        if self.max < 1:
            raise PipelineError(
                f"'{REPEAT}' runs at least once, not {self.max} times",
                expected="max of at least 1",
            )

    def to_text(self) -> str:
        """Canonical text."""
        options = "" if self.max == DEFAULT_ROUNDS else f"{{max={self.max}}}"
        return f"{REPEAT}{options}({self.body.to_text()})"

    def __str__(self) -> str:
        return self.to_text()


def parse_pipeline(passes: Any) -> Pipeline:
    """Read a pipeline.

    Args:
        passes: a pipeline string, a `Pass`, a `Repeat`, a `Pipeline`, or a sequence of any of these.

    Raises:
        PipelineError: a syntax error, an unknown pass or option, or a value that an option does not allow.
    """
    if isinstance(passes, Pipeline):
        return passes
    if isinstance(passes, (Pass, Repeat)):
        return Pipeline((passes,))
    if isinstance(passes, str):
        return _Parser(passes).pipeline()
    if isinstance(passes, type) and issubclass(passes, Pass):
        raise PipelineError(
            f"{passes.__name__} is a class, not a pass",
            remedy=f"write {passes.__name__}() or '{passes.name}'",
        )
    if isinstance(passes, Sequence):
        return Pipeline(tuple(item for part in passes for item in parse_pipeline(part).items))
    raise PipelineError(
        f"a {type(passes).__name__} is no pipeline",
        expected="a string, a Pass, or a sequence of strings and passes",
    )


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def pipeline(self) -> Pipeline:
        if not self.text.strip():
            return Pipeline()
        items = self._items()
        if self.at < len(self.text):
            self._fail(
                f"unexpected '{self.text[self.at]}'",
                self.at,
                self.at + 1,
                expected="',' or the end",
            )
        return Pipeline(items)

    def _items(self) -> tuple[Pass | Repeat, ...]:
        items = [self._item()]
        while self._take(","):
            items.append(self._item())
        return tuple(items)

    def _item(self) -> Pass | Repeat:
        self._blanks()
        start = self.at
        name = self._word()
        end = self.at
        if not name:
            self._fail("a pass name is missing", start, start + 1)
        if name == REPEAT:
            return self._repeat(start)
        if name not in registry.names():
            known = [*registry.names(), REPEAT]
            self._fail(
                f"unknown pass '{name}'{suggest(name, known)}",
                start,
                end,
                expected=f"one of: {', '.join(known)}",
            )
        cls = registry.get(name)
        options = self._options({f.name: self._reader(cls, f.name) for f in options_of(cls)}, name)
        if self._peek() == "(":
            self._fail(
                f"'{name}' takes no group",
                self.at,
                self.at + 1,
                remedy=f"only '{REPEAT}' does; options go in {{ }}",
            )
        return self._guarded(lambda: cls(**options), start, self.at)

    def _repeat(self, start: int) -> Repeat:
        options = self._options({"max": lambda texts: _scalar(int, texts)}, REPEAT)
        if not self._take("("):
            self._fail(
                f"'{REPEAT}' needs a group",
                self.at,
                self.at + 1,
                expected=f"{REPEAT}(pass,pass)",
            )
        body = Pipeline(self._items())
        if not self._take(")"):
            self._fail("the group is not closed", self.at, self.at + 1, expected="')'")
        return self._guarded(lambda: Repeat(body, **options), start, self.at)

    def _reader(self, cls: type[Pass], name: str) -> Callable[[list[str]], Any]:
        spec = next(f for f in options_of(cls) if f.name == name)
        hint = option_type(cls, name)
        return lambda texts: validated(cls.name, spec, hint, _typed(hint, texts))

    def _options(self, readers: dict[str, Callable[[list[str]], Any]], owner: str) -> dict[str, Any]:
        """Read ``{key=value ...}``; every reader turns an option's texts (quoted ones marked) into its value."""
        given: dict[str, Any] = {}
        if not self._take("{"):
            return given
        while not self._take("}"):
            self._blanks()
            start = self.at
            key = self._word()
            if not key:
                found = "the end" if start >= len(self.text) else f"'{self.text[start]}'"
                self._fail(
                    f"an option is missing, found {found}",
                    start,
                    start + 1,
                    expected="key=value, or '}'",
                )
            name = key.replace("-", "_")
            if name not in readers:
                takes = f"one of: {', '.join(readers)}" if readers else f"no options, '{owner}' has none"
                self._fail(
                    f"unknown option '{key}' of '{owner}'{suggest(name, list(readers))}",
                    start,
                    self.at,
                    expected=takes,
                    remedy=_SEPARATORS if given else None,
                )
            if name in given:
                self._fail(f"option '{key}' is given twice", start, self.at)
            texts: list[str] = ["true"]
            value_at = start
            if self._next() == "=":
                self.at += 1
                value_at = self.at
                texts = self._values()
            given[name] = self._guarded(lambda name=name, texts=texts: readers[name](texts), value_at, self.at)
        return given

    def _values(self) -> list[str]:
        """The comma-separated texts of one option; `_Quoted` for what stood in quotes."""
        values: list[str] = []
        while True:
            if self._next() == '"':
                values.append(self._quoted())
            else:
                word = self._word()
                if not word and not values and self._next() != ",":
                    return []  # `key=` is the empty list
                if not word and values:
                    self._fail("a value is missing after ','", self.at, self.at + 1, remedy=_SEPARATORS)
                values.append(word)
            if self._next() != ",":
                return values
            self.at += 1

    def _quoted(self) -> str:
        start = self.at
        try:
            value, self.at = json.JSONDecoder().raw_decode(self.text, self.at)
        except json.JSONDecodeError as error:
            self._fail(
                f"bad quoted text: {error.msg}",
                start,
                len(self.text),
                expected="quotes as in JSON",
            )
        return _Quoted(value)

    def _word(self) -> str:
        start = self.at
        while self.at < len(self.text) and self.text[self.at] not in _STOPS:
            self.at += 1
        return self.text[start : self.at]

    def _next(self) -> str:
        return self.text[self.at : self.at + 1]

    def _blanks(self) -> None:
        while self._next().isspace():
            self.at += 1

    def _peek(self) -> str:
        self._blanks()
        return self._next()

    def _take(self, character: str) -> bool:
        if self._peek() != character:
            return False
        self.at += 1
        return True

    def _guarded(self, make: Callable[[], Any], start: int, end: int) -> Any:
        """Call ``make``; an error of ours gets a caret under the text that caused it."""
        try:
            return make()
        except PipelineError as error:
            raise self._error(error.message, start, end, expected=error.expected, remedy=error.remedy) from error

    def _fail(self, message: str, start: int, end: int, **details: str | None) -> NoReturn:
        raise self._error(message, start, end, **details)

    def _error(self, message: str, start: int, end: int, **details: str | None) -> PipelineError:
        # One line, so that the caret stands under its text also when the pipeline came from several.
        line = self.text.translate({9: " ", 10: " ", 13: " "})
        end = max(end, start + 1)
        return PipelineError(f"{message}\n    {line}\n    {' ' * start}{'^' * (end - start)}", **details)


class _Quoted(str):
    """Text that stood in quotes: never the word ``none``."""


def _typed(hint: Any, texts: list[str]) -> Any:
    """Turn an option's texts into a value of its declared type."""
    kind, optional = kinds_of(hint)
    if optional and len(texts) == 1 and texts[0] == "none" and not isinstance(texts[0], _Quoted):
        return None
    if get_origin(kind) is tuple:
        return tuple(_scalar(get_args(kind)[0], [text]) for text in texts)
    return _scalar(kind, texts)


def _scalar(kind: Any, texts: Sequence[str]) -> Any:
    if len(texts) != 1:
        raise PipelineError(
            "one value is wanted" if texts else "the value is missing",
            expected=kind.__name__,
            remedy=_SEPARATORS if texts else None,
        )
    text = str(texts[0])
    if kind is str:
        return text
    if kind is bool:
        if text in ("true", "false"):
            return text == "true"
        raise PipelineError(f"'{text}' is no truth value", expected="true or false")
    try:
        return kind(text)
    except ValueError as error:
        what = {int: "a whole number", float: "a number"}.get(kind, kind.__name__)
        raise PipelineError(f"'{text}' is not {what}", expected=what) from error
