"""Budgets in milliseconds, with a clock that counts multiplications: in place of the table, and of the clock alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from graphlathe.ir.errors import GraphlatheError, PreconditionError
from graphlathe.ir.program import Program
from graphlathe.passes.base import Context
from graphlathe.passes.optimize import Optimized, optimize
from graphlathe.passes.search import choose as choose_module
from graphlathe.passes.search import milliseconds
from graphlathe.passes.search import timed as module
from graphlathe.passes.search.budget import Meter
from graphlathe.passes.search.choose import compress
from graphlathe.passes.search.milliseconds import Milliseconds
from graphlathe.passes.search.paired_timing import paired_rounds
from graphlathe.passes.search.place_table import Table
from graphlathe.passes.search.plan import Plan
from graphlathe.passes.search.recipe import Recipe, table_of
from graphlathe.runtime.onnxruntime_backend import OnnxRuntimeSession
from graphlathe.runtime.session import ProgramSession
from tests.passes.channels.tiny import Attention, Mlp, data, program_of, stack
from tests.passes.search.small_models import context, meter_of
from tests.zoo_programs import traced

RECIPE = Recipe(
    kinds=("mlp", "drop-attention"), score="magnitude", allocator="uniform", compensation="least-squares", unit="ms",
    ratio=0.4, steps=8,
)  # fmt: skip


def macs(program: Program) -> float:
    return meter_of(traced("llama"), "macs", "llama").measure(program) / 1000


def tiny_macs(program: Program) -> float:
    return Meter(program, "macs", {}).measure(program) / 1000


class Clock:
    """Stands in for `ms_table`: a thousand multiplications take a millisecond."""

    def __init__(self, slower: float = 0.0) -> None:
        self.slower, self.calls, self.paths = slower, list[int](), list[Path | None]()

    def __call__(
        self, baseline: Program, variants: Mapping[Any, Callable[[], Program]], counts: Mapping[Any, int], feeds: Any,
        path: Path | None = None, **unused: Any,
    ) -> Milliseconds[Any]:  # fmt: skip
        self.calls.append(len(variants))
        self.paths.append(path)
        total = macs(baseline)
        saved = {key: (total - macs(make())) / counts[key] - self.slower for key, make in variants.items()}
        return Milliseconds(total, saved, 100 * len(variants))


def test_the_limit_is_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "ms_table", clock)
    program = traced("llama").clone()
    ctx = replace(context("llama"), journal=tmp_path / "journal")
    plan = Plan.from_json(compress(program, RECIPE, ctx, "test", name="test").plan)
    # Three MLPs of one class at eight levels, three attentions of one class that are dropped; then what came out.
    assert clock.calls == [9, 1] and clock.paths == [tmp_path / "journal" / "milliseconds.json", None]
    limit = plan.budget["limit"]
    assert 0.85 * limit < macs(program) <= limit * (1 + 1e-9)
    assert plan.budget["after"] == pytest.approx(macs(program)) and plan.budget["before"] == macs(traced("llama"))
    assert plan.budget["runs"] == 1000


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


def test_an_unreachable_budget_names_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fractions of them: a small model takes less than one."""
    monkeypatch.setattr(module, "ms_table", Clock())
    with pytest.raises(
        PreconditionError, match=r"budget of 0\.001 ms is out of reach: [\d.]*[1-9][\d.e+]* is"
    ) as found:
        compress(traced("llama").clone(), replace(RECIPE, ratio=None, target=0.001), context("llama"), "t", name="t")
    assert float(str(found.value.expected).removeprefix("at least ")) > 0.001


def test_as_many_levels_as_can_be_timed_where_nobody_says(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "ms_table", clock)
    table = table_of(traced("llama"), replace(RECIPE, kinds=("mlp",), steps=None), context("llama"))
    assert {len(place.levels) - 1 for place in table.places} == {module.TIMED_LEVELS}
    assert clock.calls


def test_savings_beyond_the_whole_are_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ms_table", Clock(slower=-1e3))
    table = table_of(traced("llama"), RECIPE, context("llama"))
    levels = table.levels()
    assert table.whole > table.total and levels.cost(levels.untouched) == pytest.approx(table.total)


def test_what_cannot_be_measured() -> None:
    with pytest.raises(PreconditionError, match="measured on calibration data"):
        table_of(traced("llama"), RECIPE, Context())
    with pytest.raises(PreconditionError, match=r"33 levels of .* would have to be measured"):
        table_of(traced("llama"), replace(RECIPE, steps=module.MOST_LEVELS + 1), context("llama"))


class Sessions:
    """A clock that real sessions of ONNX Runtime turn: a thousand multiplications of their program take a millisecond.

    Everything else is real: variants are cut, exported, loaded and run in rounds.

    Args:
        floor: milliseconds that every program takes at least.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, floor: float = 0.0) -> None:
        self.runs, self.now = 0, 0.0
        plain = ProgramSession.run

        def run(session: ProgramSession, feeds: Mapping[str, Any]) -> dict[str, Any]:
            assert isinstance(session, OnnxRuntimeSession)
            self.runs += 1
            self.now += max(tiny_macs(session.program), floor) / 1000
            return plain(session, feeds)

        monkeypatch.setattr(ProgramSession, "run", run)
        rounds = partial(paired_rounds, clock=lambda: (self.now, self.now))
        monkeypatch.setattr(milliseconds, "paired_rounds", rounds)


def compressed(options: str) -> tuple[Program, Optimized, dict[str, Any], str]:
    """A tiny program before and after ``compress``, the plan's budget, and the report's lines."""
    program = program_of(stack(Attention(4, 4), Mlp(8), Attention(4, 4), Mlp(8)))
    sites = "sites=mlp,drop-attention score=magnitude compensation=least-squares"
    text = f"compress{{budget=ms steps=2 {sites} {options}}}"
    result = optimize(program, passes=text, calibration=data(), progress=False)
    (plan,) = result.plan.values()
    return program, result, plan["budget"], "\n".join(result.report.rows[-1].notes)


@pytest.mark.parametrize("allocator", ["greedy", "knapsack", "evolution"])
def test_from_the_text_to_the_sessions(allocator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = Sessions(monkeypatch)
    program, result, budget, notes = compressed(f"ratio=0.4 allocator={allocator}")
    assert budget["before"] == pytest.approx(tiny_macs(program))
    assert budget["measured"] == pytest.approx(tiny_macs(result)) == pytest.approx(budget["after"])
    assert budget["measured"] <= budget["limit"] * (1 + 1e-9) < budget["before"]
    assert budget["runs"] == sessions.runs > 0
    assert f"timed in turn: {budget['before']:.4g} ms before, {budget['measured']:.4g} after" in notes


def test_a_result_that_misses_the_limit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """What either kind of site saves is measured in full; together they save less."""
    whole = tiny_macs(program_of(stack(Attention(4, 4), Mlp(8), Attention(4, 4), Mlp(8))))
    Sessions(monkeypatch, 0.5 * whole)
    _, result, budget, notes = compressed(f"target={0.4 * whole} allocator=knapsack")
    assert tiny_macs(result) < 0.5 * whole == pytest.approx(budget["measured"])
    assert budget["after"] <= budget["limit"] < budget["measured"]
    assert f"which the single levels would have met ({budget['after']:.4g})" in notes


def test_a_busy_machine_at_the_end_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*unused: Any) -> None:
        raise GraphlatheError("this machine is too busy to measure")

    Sessions(monkeypatch)
    monkeypatch.setattr(choose_module, "finished", busy)
    program, result, budget, notes = compressed("ratio=0.4")
    assert tiny_macs(result) < tiny_macs(program) and "measured" not in budget
    assert "the result was not timed: this machine is too busy to measure" in notes
