"""The cost table: MACs, bytes moved and parameters per operator, site or module; symbolic, or at given sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from ..ir.cost import Cost, cost
from ..ir.program import Program
from .console import count, new_table
from .sites import Part, find_parts, shared_origin
from .sizes import sizes_text, with_defaults


@dataclass
class Line:
    """One row: its name, what it is, and its costs (numbers, or expressions in the dynamic dimensions)."""

    name: str
    what: str
    origin: str
    macs: Any = 0
    bytes: Any = 0
    params: int = 0


def cost_table(
    program: Program,
    title: str,
    *,
    by: str = "node",
    sort: str = "order",
    limit: int = 0,
    sizes: dict[str, int] | None = None,
) -> Table:
    """The cost table of a program's main graph.

    Args:
        program: the program.
        title: printed above.
        by: a row per ``node``, ``site`` or ``origin`` (module).
        sort: ``order`` (the graph's), or largest ``macs``, ``bytes`` or ``params`` first.
        limit: at most this many rows; 0 for all. What is left out is summed in one row.
        sizes: sizes of dynamic dimensions; empty for symbolic costs (sorted by their values at the traced example).
    """
    full = with_defaults(sizes or {}, program)
    symbolic, numeric = cost(program), cost(program).at(**full)
    lines = _lines(program, numeric, by)
    ranks = {line.name: line for line in lines}
    if not sizes and full:
        lines = _lines(program, symbolic, by)
    if sort != "order":
        lines.sort(key=lambda line: getattr(ranks[line.name], sort), reverse=True)
    at = f", at {sizes_text(full)}" if sizes else (f", in {', '.join(full)}" if full else "")
    table = new_table(
        f"{title}: cost by {by}{at}",
        [by, "operator" if by == "node" else "made of"],
        ["MACs", "bytes moved", "parameters"],
    )
    if by != "origin":
        table.add_column("from", overflow="fold")
    shown, hidden = (lines[:limit], lines[limit:]) if limit else (lines, [])
    for line in shown:
        _add(table, line, by)
    if hidden:
        _add(table, _sum(f"{len(hidden)} more", hidden), by)
    table.add_section()
    _add(table, _sum("whole", lines), by)
    return table


def _add(table: Table, line: Line, by: str) -> None:
    cells = [line.name, line.what, count(line.macs), count(line.bytes), count(line.params)]
    table.add_row(*cells, *([] if by == "origin" else [line.origin]))


def _sum(name: str, lines: Sequence[Line]) -> Line:
    return Line(name, "", "", sum(x.macs for x in lines), sum(x.bytes for x in lines), sum(x.params for x in lines))


def _lines(program: Program, costs: Cost, by: str) -> list[Line]:
    if by == "node":
        return [Line(f"%{c.node}", c.op, c.origin or "", c.macs, c.bytes, c.params) for c in costs.nodes]
    groups: dict[str, list[Any]] = {}
    if by == "origin":
        for item in costs.nodes:
            groups.setdefault(item.origin or "(none)", []).append(item)
    else:
        named = {node.name: site for site, node in _sites(find_parts(program))}
        for item in costs.nodes:
            groups.setdefault(named.get(item.node, "(nested graphs)"), []).append(item)
    return [
        Line(
            name,
            f"{len(items)} operators",
            "" if by == "origin" else shared_origin(i.origin or "" for i in items),
            sum(i.macs for i in items),
            sum(i.bytes for i in items),
            sum(i.params for i in items),
        )
        for name, items in groups.items()
    ]


def _sites(parts: Sequence[Part], prefix: str = "") -> list[tuple[str, Any]]:
    """(site name, node) for every operator; blocks and equal branches are numbered."""
    found: list[tuple[str, Any]] = []
    counts: dict[str, int] = {}
    for part in parts:
        number = counts.get(part.label, 0)
        counts[part.label] = number + 1
        several = part.kind == "block" or sum(p.label == part.label for p in parts) > 1
        name = prefix + (f"{part.label} {number}" if several else part.label)
        found.extend((name + (" / between" if part.children else ""), node) for node in part.own)
        found.extend(_sites(part.children, f"{name} / "))
    return found
