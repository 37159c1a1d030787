"""The report: what every pass did, as a table and as JSON."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .base import Effect
from .fidelity import Drift

if TYPE_CHECKING:
    from rich.table import Table

_TOP_MISSES = 3
_SIZES = ("params", "weights", "MACs", "peak act.")


@dataclass(frozen=True)
class Size:
    """What a program weighs, at the example's sizes.

    Attributes:
        nodes: operators, over all graphs.
        params: elements of all used weights.
        weight_bytes: their bytes.
        macs: multiply-accumulates of one call.
        peak_activation_bytes: largest sum of live intermediate values during a call.
    """

    nodes: int
    params: int
    weight_bytes: int
    macs: int | None = None
    peak_activation_bytes: int | None = None


@dataclass
class Row:
    """What one run of one pass did.

    Attributes:
        index: its number in the run, from 1.
        text: the pass's canonical text.
        effect: what the pass promises.
        wanted_by: the pass that needed this one to run first, if it was not in the pipeline.
        seconds: time in the pass itself.
        check_seconds: time in verification, differential run and drift.
        nodes_before, nodes_after: operators, over all graphs.
        mutations: changes that the rewriter counted.
        hits, attempts, misses, missed, plan, notes: what the pass said, see `passes.base.Stats`.
        before, after: sizes (absent when costs are switched off).
        error: worst relative error of the differential run; None if it was not done.
        tolerance: what the error had to stay within.
        unchecked: why the promise was not checked, if it was not.
        drift: distance to the program before the pass (approximate passes).
        total_drift: distance to the program before the whole pipeline.
    """

    index: int
    text: str
    effect: Effect
    wanted_by: str | None = None
    seconds: float = 0.0
    check_seconds: float = 0.0
    nodes_before: int = 0
    nodes_after: int = 0
    mutations: int = 0
    hits: int = 0
    attempts: int = 0
    misses: dict[str, int] = field(default_factory=dict)
    missed: dict[str, str] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    before: Size | None = None
    after: Size | None = None
    error: float | None = None
    tolerance: float | None = None
    unchecked: str | None = None
    drift: Drift | None = None
    total_drift: Drift | None = None

    @property
    def name(self) -> str:
        """The pass's name."""
        return self.text.partition("{")[0]

    @property
    def top_misses(self) -> list[tuple[str, int]]:
        """The most frequent reasons for not rewriting."""
        return sorted(self.misses.items(), key=lambda item: -item[1])[:_TOP_MISSES]

    @property
    def verdict(self) -> str:
        """How the promise held, in a few words."""
        if self.effect is Effect.APPROXIMATE:
            return str(self.drift) if self.drift else f"drift not measured: {self.unchecked}"
        if self.unchecked:
            return f"unchecked: {self.unchecked}"
        if self.effect is Effect.ANALYSIS or not self.mutations:
            return "unchanged"
        return f"error {self.error:.1e}" if self.error is not None else ""


@dataclass
class Report:
    """What a pipeline did. ``str(report)`` is a table, ``report.to_json()`` the same and more as JSON.

    Attributes:
        pipeline: canonical text of what was asked for.
        rows: one for each run of a pass, in order.
        before, after: sizes of the first and the last program.
        sizes: the dimension sizes at which costs were computed.
        seconds: wall time of everything, checks included.
        drift: distance of the result to the first program, if an approximate pass ran and there was data.
        metric_before, metric_after: what the caller's ``evaluate`` returned.
        notes: lines about the whole run.
    """

    pipeline: str = ""
    rows: list[Row] = field(default_factory=list)
    before: Size | None = None
    after: Size | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    drift: Drift | None = None
    metric_before: float | None = None
    metric_after: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def plan(self) -> dict[str, dict[str, Any]]:
        """What was decided, by pass text; a second run of the same text gets ``#2``, and so on."""
        plans: dict[str, dict[str, Any]] = {}
        for row in self.rows:
            if not row.plan:
                continue
            key, count = row.text, 1
            while key in plans:
                count += 1
                key = f"{row.text}#{count}"
            plans[key] = row.plan
        return plans

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-serialisable data."""
        return {
            "pipeline": self.pipeline,
            "seconds": round(self.seconds, 4),
            "sizes": self.sizes,
            "before": _plain(self.before),
            "after": _plain(self.after),
            "drift": _plain(self.drift),
            "metric": {"before": self.metric_before, "after": self.metric_after},
            "notes": self.notes,
            "passes": [_row_dict(row) for row in self.rows],
        }

    def to_json(self, *, indent: int | None = 2) -> str:
        """The report as JSON text; numbers that are not finite become text."""
        return json.dumps(_finite(self.as_dict()), indent=indent, allow_nan=False)

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        return Group(self._passes_table(), self._sizes_table(), *(Text(line) for line in self._lines()))

    def __str__(self) -> str:
        from rich import box
        from rich.console import Console

        text = io.StringIO()
        console = Console(file=text, width=160, no_color=True, force_terminal=False, highlight=False)
        console.print(self._passes_table(box.MARKDOWN), self._sizes_table(box.MARKDOWN))
        for line in self._lines():
            console.print(line, markup=False, soft_wrap=True)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines() if line.strip())

    def _passes_table(self, style: Any = None) -> Table:
        """One row for each pass: what it promised, did, and how the promise held."""
        totals = {
            "#": "",
            "pass": "total",
            "effect": "",
            "s": f"{self.seconds:.2f}",
            "nodes": f"{self.before.nodes} -> {self.after.nodes}" if self.before and self.after else "",
            "hits": str(sum(row.hits for row in self.rows)),
            "check": str(self.drift) if self.drift else "",
        }
        table = _table(totals, ("pass", "effect", "check"), style)
        for row in self.rows:
            cells = (
                str(row.index),
                row.text if row.wanted_by is None else f"{row.text} (needed by {row.wanted_by})",
                row.effect.value,
                f"{row.seconds:.2f}",
                f"{row.nodes_before} -> {row.nodes_after}",
                f"{row.hits}/{row.attempts}" if row.attempts else str(row.hits),
                row.verdict,
            )
            _add_row(table, cells)
        return table

    def _sizes_table(self, style: Any = None) -> Table:
        """The program's size at first, and after every pass that changed it."""
        columns: list[str] = ["size after", *_SIZES]
        totals = dict(zip(columns, ("total", *_changes(self.before, self.after)), strict=True))
        table = _table(totals, ("size after",), style)
        if self.before:
            _add_row(table, ("start", *_changes(self.before, self.before)))
        for row in self.rows:
            if row.after != row.before:
                _add_row(table, (f"{row.index} {row.name}", *_changes(row.before, row.after)))
        return table

    def _lines(self) -> list[str]:
        lines: list[str] = []
        if self.sizes:
            lines.append("costs at " + ", ".join(f"{name}={size}" for name, size in self.sizes.items()))
        if self.drift:
            lines.append(
                f"drift from the first program, on {self.drift.batches} batches of {self.drift.source}: {self.drift}"
            )
        if self.metric_before is not None and self.metric_after is not None:
            lines.append(f"evaluate: {self.metric_before:.6g} -> {self.metric_after:.6g}")
        for row in self.rows:
            lines += [f"{row.index} {row.name}: {count} x not rewritten: {reason}" for reason, count in row.top_misses]
            lines += [f"{row.index} {row.name}: {note}" for note in row.notes]
        return lines + self.notes


def _table(totals: Mapping[str, str], left: Sequence[str], style: Any) -> Table:
    """An empty table with a column for each name and its total below; those in ``left`` hold text."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=style or box.SIMPLE_HEAD, show_footer=True, pad_edge=False, padding=(0, 1, 0, 0))
    for name, total in totals.items():
        # Text folds anywhere where it must: a pass's options would else make its column as wide as they are.
        table.add_column(name, Text(total), justify="left" if name in left else "right", overflow="fold")
    return table


def _add_row(table: Table, cells: Sequence[str]) -> None:
    from rich.text import Text

    table.add_row(*(Text(cell) for cell in cells))


def _changes(before: Size | None, after: Size | None) -> list[str]:
    """The new value of each of `_SIZES`, and its change."""
    if before is None or after is None:
        return [""] * len(_SIZES)
    return [
        _change(before.params, after.params, ""),
        _change(before.weight_bytes, after.weight_bytes, "B"),
        _change(before.macs, after.macs, ""),
        _change(before.peak_activation_bytes, after.peak_activation_bytes, "B"),
    ]


def _change(before: int | None, after: int | None, unit: str) -> str:
    if before is None or after is None:
        return "?"
    if before == after:
        return _short(after, unit)
    share = f" {(after - before) / before:+.1%}" if before else ""
    return _short(after, unit) + share


def _short(value: float, unit: str) -> str:
    """``1234567`` as ``1.23 M``; bytes in powers of 1024 (``1.18 MiB``)."""
    base, letters = (1024, ("", "Ki", "Mi", "Gi", "Ti")) if unit else (1000, ("", "k", "M", "G", "T"))
    step = 0
    while abs(value) >= base and step < len(letters) - 1:
        value /= base
        step += 1
    digits = f"{value:.0f}" if step == 0 else f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    return f"{digits} {letters[step]}{unit}".rstrip()


def _row_dict(row: Row) -> dict[str, Any]:
    return {
        "index": row.index,
        "pass": row.text,
        "effect": row.effect.value,
        "wanted_by": row.wanted_by,
        "seconds": round(row.seconds, 4),
        "check_seconds": round(row.check_seconds, 4),
        "nodes": {"before": row.nodes_before, "after": row.nodes_after},
        "mutations": row.mutations,
        "hits": row.hits,
        "attempts": row.attempts,
        "misses": row.misses,
        "missed": row.missed,
        "plan": row.plan,
        "notes": row.notes,
        "before": _plain(row.before),
        "after": _plain(row.after),
        "error": row.error,
        "tolerance": row.tolerance,
        "unchecked": row.unchecked,
        "drift": _plain(row.drift),
        "total_drift": _plain(row.total_drift),
    }


def _plain(value: Size | Drift | None) -> dict[str, Any] | None:
    return None if value is None else dict(vars(value))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
