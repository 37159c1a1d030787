"""A record of a benchmark as Markdown, for the documentation: one table for each model and level, then the goals."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from ...ir.errors import GraphlatheError
from ..console import size
from .base import Row, columns, get
from .show import cell, title

GROUPS = ("model", "level")
"""Columns that head a table instead of standing in each of its rows."""


def records(paths: Sequence[Path]) -> str:
    """Records, one after the other.

    Raises:
        GraphlatheError: a file is no record.
    """
    return "\n".join(_record(path) for path in paths)


def _record(path: Path) -> str:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        name, rows, goals, machine = data["suite"], data["rows"], data["goals"], data["machine"]
        hidden = frozenset(data.get("hidden", ()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GraphlatheError(
            f"'{path}' is no record of a benchmark", remedy="name a file of `bench --json`"
        ) from error
    memory = size(machine["memory_bytes"]) if machine.get("memory_bytes") else "unknown memory"
    lines = [f"## {name}", "", f"{get(name).summary[0].upper()}{get(name).summary[1:]}.", ""]
    command = f"graphlathe bench {name}{' --quick' if data['quick'] else ''}"
    processors = dict.fromkeys(row.get("cpu", machine["cpu"]) for row in rows) or [machine["cpu"]]
    lines += [f"`{command}` on {' and on '.join(processors)}, {machine['cores']} cores, {memory}.", ""]
    for heads, group in groupby(rows, key=lambda row: tuple(row[key] for key in GROUPS if key in row)):
        lines += [f"### {', '.join(heads)}", ""] if heads else []
        lines += [*_table(list(group), hidden | set(GROUPS)), ""]
    if goals:
        lines += ["### Goals", "", "| goal | value | target | |", "|---|---|---|---|"]
        lines += [_goal(goal) for goal in goals]
        lines.append("")
    lines += [f"- {note}" for note in data["notes"] if " = " not in note]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Row], hidden: frozenset[str]) -> list[str]:
    shown = [name for name in columns(rows) if name not in hidden and any(row.get(name) is not None for row in rows)]
    if all(row.get("state", "ok") == "ok" for row in rows) and "state" in shown:
        shown.remove("state")
    lines = ["| " + " | ".join(map(title, shown)) + " |", "|" + "---|" * len(shown)]
    return lines + ["| " + " | ".join(_cell(name, row.get(name)) for name in shown) + " |" for row in rows]


def _cell(column: str, value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1e6 and not column.endswith("bytes"):
        return f"{value / 1e9:.3g} G" if value >= 1e9 else f"{value / 1e6:.4g} M"
    return cell(column, value).replace("|", "\\|")


def _goal(goal: Mapping[str, Any]) -> str:
    value = math.nan if goal["value"] is None else goal["value"]
    sign = "at least" if goal["at_least"] else "at most"
    met = goal["margin"] if goal["met"] else f"**{goal['margin']}**"
    return f"| {goal['name']} | {value:.3g} | {sign} {goal['target']:g} | {met} |"
