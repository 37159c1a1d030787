"""``graphlathe bench``: print a record, write its JSON, and say whether the goals were met."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...ir.errors import GraphlatheError
from ...ir.files import check_writable
from ..console import console, count, duration, new_table, size
from .base import Record, Run, columns, get, known_rows, names, run_suite


def list_suites() -> None:
    """Print the suites with their goals."""
    table = new_table(None, ["suite", "what it measures", "goals"])
    for name in names():
        suite = get(name)
        table.add_row(name, suite.summary, "\n".join(suite.goals))
    console().print(table)


def bench(
    name: str | None,
    json_path: Path | None,
    check: bool,
    quick: bool,
    only: str | None = None,
    peers: Path | None = None,
    resume: bool = False,
) -> int:
    """Run a suite, print it, and return the exit code: 1 when ``check`` is set and a goal was missed."""
    if name is None:
        raise GraphlatheError(
            "no suite named",
            expected=f"one of: {', '.join(names())}",
            remedy="`graphlathe bench --list` shows them",
        )
    suite = get(name)
    if json_path is not None:
        check_writable(json_path)
    if resume and json_path is None:
        raise GraphlatheError("--resume goes on with a record", remedy="name its file with --json")
    known = known_rows(json_path, suite, quick) if resume and json_path is not None else []
    notes = console(stderr=True)
    run = Run(quick, only, peers, say=lambda line: notes.print(line, style="dim"), known=known)
    record = run_suite(suite, run, lambda record: None if json_path is None else record.write(json_path))
    show(record)
    if json_path is not None:
        record.write(json_path)
        notes.print(f"written: {json_path}")
    return 1 if check and record.missed else 0


def show(record: Record) -> None:
    """Print the rows, the circumstances and the goals."""
    out = console()
    rows = record.result.rows
    names_ = [name for name in columns(rows) if name not in record.result.hidden]
    words = [c for c in names_ if any(isinstance(r.get(c), str) for r in rows)]
    table = new_table(
        f"bench {record.suite}{' (quick)' if record.quick else ''}",
        words,
        [title(c) for c in names_ if c not in words],
    )
    for row in rows:
        table.add_row(*(cell(c, row.get(c)) for c in [*words, *(c for c in names_ if c not in words)]))
    out.print(table)
    machine = record.machine
    memory = size(machine["memory_bytes"]) if machine.get("memory_bytes") else "unknown memory"
    out.print(
        f"machine: {machine['cpu']}, {machine['cores']} cores, {memory}, load {machine['load_average']}, "
        f"{machine['torch_threads']} torch threads, {machine['system']}, Python {machine['python']}"
    )
    out.print(f"commit: {record.commit}   versions: " + ", ".join(f"{k} {v}" for k, v in record.versions.items()))
    for note in record.result.notes:
        out.print(f"note: {note}")
    if record.result.goals:
        goals = new_table("goals", ["goal"], ["value", "target", ""])
        for goal in record.result.goals:
            sign = ">=" if goal.at_least else "<="
            goals.add_row(
                goal.name,
                f"{goal.value:.3g}",
                f"{sign} {goal.target:g}",
                goal.margin,
                style=None if goal.met else "bold red",
            )
        out.print(goals)


def title(column: str) -> str:
    """A column's name for people."""
    return column.removesuffix("_seconds").removesuffix("_bytes").replace("_", " ") if column != "seconds" else "median"


def cell(column: str, value: Any) -> str:
    """A value with the unit that its column's name implies."""
    if value is None:
        return ""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if column.endswith("seconds"):
            return duration(value)
        if column.endswith("bytes"):
            return size(value)
        return count(value) if isinstance(value, int) else f"{value:.3g}"
    return str(value)
