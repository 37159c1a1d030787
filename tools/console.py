"""Printing for people: one console, tables that are never cut off when piped, numbers with units."""

from __future__ import annotations

import sys
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

PIPED_WIDTH = 240


def console(*, stderr: bool = False) -> Console:
    """A console on stdout (or stderr), wide when it is not a terminal."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(
        file=stream,
        width=None if stream.isatty() else PIPED_WIDTH,
        soft_wrap=False,
        highlight=False,
        markup=False,
        emoji=False,
    )


def new_table(title: str | None, left: list[str], right: list[str] = []) -> Table:  # noqa: B006 (read only)
    """A plain table with left-aligned columns, then right-aligned ones."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def count(value: Any) -> str:
    """A count with thousands separators; symbolic values as they are."""
    try:
        return f"{int(value):,}"
    except TypeError:
        return str(value)


def short(value: float) -> str:
    """A count with three digits and a decimal unit: ``3.54 M``."""
    for limit, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}" if abs(value) < 999.5 * limit else f"{value / limit:.0f}{unit}"
    return f"{value:.3g}"


def size(nbytes: float) -> str:
    """Bytes with a binary unit: ``513 MiB``."""
    for limit, unit in (
        (1 << 40, "TiB"),
        (1 << 30, "GiB"),
        (1 << 20, "MiB"),
        (1 << 10, "KiB"),
    ):
        if abs(nbytes) >= limit:
            return f"{nbytes / limit:.3g} {unit}" if abs(nbytes) < 1000 * limit else f"{nbytes / limit:.0f} {unit}"
    return f"{nbytes:.0f} B"


def duration(seconds: float) -> str:
    """Seconds with a unit: ``1.25 ms``."""
    for limit, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= limit:
            return f"{seconds / limit:.3g} {unit}" if seconds < 1000 * limit else f"{seconds / limit:.0f} {unit}"
    return f"{seconds * 1e9:.3g} ns"
