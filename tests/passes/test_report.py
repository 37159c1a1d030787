"""The report: table and JSON."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable

from rich.console import Console

from graphlathe.passes.base import Effect
from graphlathe.passes.fidelity import Drift
from graphlathe.passes.report import Report, Row, Size

BEFORE = Size(nodes=100, params=2_000_000, weight_bytes=8 << 20, macs=3_000_000, peak_activation_bytes=1 << 20)
AFTER = Size(nodes=60, params=1_500_000, weight_bytes=6 << 20, macs=2_000_000, peak_activation_bytes=1 << 20)


def report() -> Report:
    exact = Row(
        1,
        "canonicalize",
        Effect.EXACT,
        wanted_by="drop-layers",
        seconds=0.25,
        nodes_before=100,
        nodes_after=80,
        mutations=40,
        hits=20,
        attempts=90,
        misses={"a": 1, "b": 5, "c": 3, "d": 2},
        before=BEFORE,
        after=BEFORE,
        error=1.5e-7,
        tolerance=1e-5,
    )
    drift = Drift(0.3, 0.05, 0.9, 4)
    cut = Row(
        2,
        "drop-layers{ratio=0.2}",
        Effect.APPROXIMATE,
        seconds=1.5,
        nodes_before=80,
        nodes_after=60,
        mutations=30,
        hits=2,
        attempts=10,
        plan={"removed": [3, 4]},
        notes=["[bold]as it is[/bold]"],
        before=BEFORE,
        after=AFTER,
        drift=drift,
        total_drift=drift,
    )
    return Report(
        "drop-layers{ratio=0.2}",
        [exact, cut],
        BEFORE,
        AFTER,
        {"B": 2, "S": 16},
        seconds=3.0,
        drift=drift,
        metric_before=12.0,
        metric_after=13.5,
        notes=["stopped after drop-layers"],
    )


def test_table(golden: Callable[[str, str], None]) -> None:
    golden("passes/report", str(report()))


def test_json_says_all_of_it() -> None:
    data = json.loads(report().to_json())
    first, second = data["passes"]
    assert first["misses"] == {"a": 1, "b": 5, "c": 3, "d": 2}
    assert first["error"] == 1.5e-7
    assert first["wanted_by"] == "drop-layers"
    assert second["plan"] == {"removed": [3, 4]}
    assert second["drift"]["kl"] == 0.05
    assert second["after"]["weight_bytes"] == 6 << 20
    assert data["metric"] == {"before": 12.0, "after": 13.5}
    assert data["sizes"] == {"B": 2, "S": 16}


def test_numbers_that_are_not_finite_are_still_json() -> None:
    broken = report()
    broken.rows[1].drift = Drift(math.inf, math.nan, 0.0, 1)
    broken.metric_after = math.inf
    data = json.loads(broken.to_json())
    assert data["passes"][1]["drift"]["relative"] == "inf"
    assert data["passes"][1]["drift"]["kl"] == "nan"
    assert data["metric"]["after"] == "inf"


def test_plans_of_equal_passes_are_kept_apart() -> None:
    twice = report()
    twice.rows.append(twice.rows[1])
    assert list(twice.plan) == ["drop-layers{ratio=0.2}", "drop-layers{ratio=0.2}#2"]


def test_rich_prints_brackets_as_they_are() -> None:
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(report())
    text = console.export_text()
    assert "drop-layers{ratio=0.2}" in text
    assert "[bold]as it is[/bold]" in text


def test_an_empty_report_prints() -> None:
    assert "total" in str(Report())
