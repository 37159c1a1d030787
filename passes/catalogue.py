"""The catalogue of passes as data and as Markdown, generated from the classes themselves."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, get_args, get_origin

from . import registry
from .base import Effect, Pass, kinds_of, option_type, options_of

PROMISES = {
    Effect.ANALYSIS: "The graph is unchanged.",
    Effect.EXACT: "Same outputs for every input, up to float reassociation.",
    Effect.EXTENDS: "Old inputs and outputs behave exactly as before; new ones are added.",
    Effect.REFORMS: "The interface changes; equal through the pass's own adapter.",
    Effect.APPROXIMATE: "Outputs drift; the drift is measured and reported.",
}

_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
_HEAD = """\
# Passes

Written by `graphlathe passes --markdown`; do not edit. A pipeline is a list such as
`canonicalize,repeat{max=4}(cse,dce),drop-layers{ratio=0.2}`: options stand in braces and are separated by blanks, lists
by commas, and a bare key means true.
"""


def summary(cls: type[Pass]) -> str:
    """The first sentence of a pass's own docstring."""
    text = inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    first, stop, _ = text.partition(". ")
    return first + "." if stop else text


def describe_options(cls: type[Pass]) -> list[dict[str, str]]:
    """Every option of a pass: name, type, default, range, help."""
    return [
        {
            "option": spec.name,
            "type": type_text(option_type(cls, spec.name)),
            "default": _default(spec.default),
            "range": _range(spec.metadata),
            "help": spec.metadata["help"],
        }
        for spec in options_of(cls)
    ]


def type_text(hint: Any) -> str:
    """An option's type as a user reads it: ``int``, ``list of int``."""
    kind, _ = kinds_of(hint)
    return f"list of {type_text(get_args(kind)[0])}" if get_origin(kind) is tuple else str(kind.__name__)


def _default(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(str(v) for v in value) if isinstance(value, tuple) else str(value)


def _range(metadata: Any) -> str:
    if metadata["choices"]:
        return ", ".join(metadata["choices"])
    return ", ".join(f"{_SIGNS[key]} {value:g}" for key, value in metadata["bounds"].items())


def markdown(names: Iterable[str] | None = None) -> str:
    """The catalogue of these passes (by default of all), as Markdown."""
    chosen = registry.names() if names is None else names
    return "\n".join([_HEAD, *(pass_markdown(registry.get(name)) for name in chosen)])


def pass_markdown(cls: type[Pass]) -> str:
    """One pass with its promise, needs and options, as Markdown."""
    lines = [f"## `{cls.name}`", "", f"*{cls.effect.value}*: {PROMISES[cls.effect]}", ""]
    # What a constructor may raise is for the API's readers.
    lines += [inspect.cleandoc(cls.__doc__ or "").partition("\n\nRaises:")[0], ""]
    if cls.needs:
        lines += [f"Needs: {', '.join(sorted(prop.value for prop in cls.needs))}.", ""]
    if cls.paper:
        lines += [f"Source: {cls.paper}", ""]
    rows = describe_options(cls)
    if rows:
        lines += ["| option | type | default | range | |", "|---|---|---|---|---|"]
        for row in rows:
            cells = [f"`{row['option']}`", row["type"], row["default"], row["range"], row["help"]]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)
