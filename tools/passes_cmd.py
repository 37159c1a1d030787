"""``graphlathe passes``: the catalogue, generated from the registry and the options' own descriptions."""

from __future__ import annotations

import inspect

from ..passes.base import Pass
from ..passes.catalogue import PROMISES, describe_options, pass_markdown, summary
from ..passes.catalogue import markdown as catalogue_markdown
from ..passes.registry import get, names
from .console import console, new_table


def show_passes(name: str | None, markdown: bool) -> None:
    """Print the catalogue, or one pass with its options."""
    if markdown:
        print(pass_markdown(get(name)) if name else catalogue_markdown(), end="")
    elif name:
        _show_one(get(name))
    else:
        table = new_table(None, ["pass", "effect", "what it does"])
        for each in names():
            cls = get(each)
            table.add_row(each, cls.effect.value, summary(cls))
        console().print(table)
        console().print("`graphlathe passes NAME` shows one with its options.")


def _show_one(cls: type[Pass]) -> None:
    out = console()
    out.print(f"{cls.name}: {cls.effect.value}", style="bold")
    out.print(PROMISES[cls.effect])
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
