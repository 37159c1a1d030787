"""Budgets in milliseconds, with a clock that counts multiplications."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from graphlathe.ir.errors import PreconditionError
from graphlathe.ir.program import Program
from graphlathe.passes.base import Context
from graphlathe.passes.search import timed as module
from graphlathe.passes.search.choose import compress
from graphlathe.passes.search.place_table import Table
from graphlathe.passes.search.plan import Plan
from graphlathe.passes.search.recipe import Recipe, table_of
from tests.passes.search.small_models import context, meter_of
from tests.zoo_programs import traced

RECIPE = Recipe(
    kinds=("mlp", "drop-attention"), score="magnitude", allocator="uniform", compensation="least-squares", unit="ms",
    ratio=0.4, steps=8,
)  # fmt: skip


def macs(program: Program) -> float:
    return meter_of(traced("llama"), "macs", "llama").measure(program) / 1000


class Clock:
    """Stands in for `ms_table`: a thousand multiplications take a millisecond."""

    def __init__(self, slower: float = 0.0) -> None:
        self.slower, self.calls, self.path = slower, 0, None

    def __call__(
        self, baseline: Program, variants: Mapping[Any, Callable[[], Program]], counts: Mapping[Any, int], feeds: Any,
        path: Path | None = None, **unused: Any,
    ) -> dict[Any, float]:  # fmt: skip
        self.calls, self.path = len(variants), path
        total = macs(baseline)
        saved = {key: (total - macs(make())) / counts[key] - self.slower for key, make in variants.items()}
        return {None: total, **saved}


def test_the_limit_is_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "ms_table", clock)
    program = traced("llama").clone()
    ctx = replace(context("llama"), journal=tmp_path / "journal")
    plan = Plan.from_json(compress(program, RECIPE, ctx, "test", name="test").plan)
    # Three MLPs of one class at eight levels, three attentions of one class that are dropped.
    assert clock.calls == 9 and clock.path == tmp_path / "journal" / "milliseconds.json"
    limit = plan.budget["limit"]
    assert 0.85 * limit < macs(program) <= limit * (1 + 1e-9)
    assert plan.budget["after"] == pytest.approx(macs(program)) and plan.budget["before"] == macs(traced("llama"))


def test_a_search_is_given_the_limit_and_not_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Biases that a compensation adds are parameters, no milliseconds."""
    monkeypatch.setattr(module, "ms_table", Clock())
    asked: list[float] = []

    def choose(table: Table, limit: float) -> tuple[tuple[int, ...], None]:
        asked.append(limit)
        return table.levels().smallest(), None

    program = traced("llama").clone()
    plan = Plan.from_json(compress(program, RECIPE, context("llama"), "test", name="test", allocator=choose).plan)
    assert asked == [plan.budget["limit"]]


def test_levels_that_make_it_slower_are_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ms_table", Clock(slower=1e9))
    with pytest.raises(PreconditionError, match="out of reach"):
        compress(traced("llama").clone(), replace(RECIPE, ratio=None, target=1.0), context("llama"), "t", name="t")


def test_savings_beyond_the_whole_are_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ms_table", Clock(slower=-1e3))
    table = table_of(traced("llama"), RECIPE, context("llama"))
    levels = table.levels()
    assert table.whole > table.total and levels.cost(levels.untouched) == pytest.approx(table.total)


def test_what_cannot_be_measured() -> None:
    with pytest.raises(PreconditionError, match="measured on calibration data"):
        table_of(traced("llama"), RECIPE, Context())
    with pytest.raises(PreconditionError, match="set steps="):
        table_of(traced("llama"), replace(RECIPE, steps=None), context("llama"))
