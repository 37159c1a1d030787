"""``graphlathe passes``: the catalogue, generated from the registry and the options' own descriptions."""

from __future__ import annotations

import inspect
from typing import Any, get_args, get_origin

from ..passes.base import Pass, option_type, options_of
from ..passes.registry import get, names
from .console import console, new_table

_BOUND_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def show_passes(name: str | None, markdown: bool) -> None:
    """Print the catalogue, or one pass with its options."""
    if markdown:
        chosen = [get(name)] if name else [get(n) for n in names()]
        print("\n".join(_markdown(cls) for cls in chosen), end="")
    elif name:
        _show_one(get(name))
    else:
        table = new_table(None, ["pass", "effect", "what it does"])
        for each in names():
            cls = get(each)
            table.add_row(each, cls.effect.value, summary(cls))
        console().print(table)
        console().print("`graphlathe passes NAME` shows one with its options.")


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
    if get_origin(hint) is tuple:
        return f"list of {type_text(get_args(hint)[0])}"
    kinds = [a for a in get_args(hint) if a is not type(None)]
    return " or ".join(type_text(kind) for kind in kinds) if kinds else str(hint.__name__)


def _default(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(str(v) for v in value) if isinstance(value, tuple) else str(value)


def _range(metadata: Any) -> str:
    if metadata["choices"]:
        return ", ".join(metadata["choices"])
    return ", ".join(f"{_BOUND_SIGNS[key]} {value:g}" for key, value in metadata["bounds"].items())


def _show_one(cls: type[Pass]) -> None:
    out = console()
    out.print(f"{cls.name}: {cls.effect.value}", style="bold")
    out.print(_PROMISES[cls.effect.value])
    out.print()
    out.print(inspect.cleandoc(cls.__doc__ or ""))
    for label, props in (("needs", cls.needs), ("breaks", cls.breaks)):
        if props:
            out.print(f"{label}: {', '.join(sorted(p.value for p in props))}")
    if cls.paper:
        out.print(f"source: {cls.paper}")
    rows = describe_options(cls)
    if rows:
        table = new_table(None, list(rows[0]))
        for row in rows:
            table.add_row(*row.values())
        out.print(table)
    else:
        out.print("no options")


_PROMISES = {
    "analysis": "The graph is unchanged.",
    "exact": "Same outputs for every input, up to float reassociation.",
    "extends": "Old inputs and outputs behave exactly as before; new ones are added.",
    "reforms": "The interface changes; equal through the pass's own adapter.",
    "approximate": "Outputs drift; the drift is measured and reported.",
}


def _markdown(cls: type[Pass]) -> str:
    lines = [
        f"## `{cls.name}`",
        "",
        f"*{cls.effect.value}*: {_PROMISES[cls.effect.value]}",
        "",
        inspect.cleandoc(cls.__doc__ or ""),
        "",
    ]
    if cls.paper:
        lines += [f"Source: {cls.paper}", ""]
    rows = describe_options(cls)
    if rows:
        lines += ["| option | type | default | range | |", "|---|---|---|---|---|"]
        for row in rows:
            cells = [
                f"`{row['option']}`",
                row["type"],
                row["default"],
                row["range"],
                row["help"],
            ]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines) + "\n"
