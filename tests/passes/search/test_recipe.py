"""Recipes meet their budgets, and use them; limits on single sites are obeyed; what cannot be is said."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from graphlathe.ir.errors import PreconditionError
from graphlathe.ir.program import Program
from graphlathe.ir.verify import verify
from graphlathe.passes.base import Context, Stats
from graphlathe.passes.search.allocators.global_threshold import global_threshold
from graphlathe.passes.search.candidates import Candidates
from graphlathe.passes.search.choose import compress
from graphlathe.passes.search.measured import measured
from graphlathe.passes.search.place_table import Table
from graphlathe.passes.search.plan import Plan
from graphlathe.passes.search.recipe import Recipe, table_of
from graphlathe.passes.search.widths import width_place
from tests.passes.search.small_models import batch as sample
from tests.passes.search.small_models import context, meter_of, sites_of
from tests.zoo_programs import traced

ALL = ("uniform", "global-threshold", "greedy", "knapsack")
BASE = Recipe(
    kinds=("mlp",), score="magnitude", allocator="global-threshold", compensation="none", unit="params", ratio=0.3
)


def run(name: str, recipe: Recipe, **options: Any) -> tuple[Program, Stats, Plan]:
    program = traced(name).clone()
    stats = compress(program, recipe, context(name), "test", name="test", **options)
    verify(program, 2)
    json.dumps(stats.plan, allow_nan=False)
    return program, stats, Plan.from_json(stats.plan)


@pytest.mark.parametrize("allocator", ALL)
@pytest.mark.parametrize("unit", ["params", "bytes", "macs"])
def test_the_budget_is_met_and_used(allocator: str, unit: str) -> None:
    for ratio, standardize in ((0.1, True), (0.5, False), (0.8, True)):
        recipe = replace(BASE, allocator=allocator, unit=unit, ratio=ratio, standardize=standardize)
        program, stats, plan = run("llama", recipe)
        meter = meter_of(traced("llama"), unit, "llama")
        whole = meter.whole([s for s in sites_of("llama") if s.kind == "mlp"], [])
        limit = meter.total - ratio * whole
        cost = meter.measure(program)
        assert cost <= limit and limit - cost <= 0.05 * (meter.total - limit) + whole / (3 * 64)
        assert plan.budget["after"] == cost and plan.budget["limit"] == pytest.approx(limit)
        assert stats.hits == len(plan.changes) and plan.budget["before"] == meter.total


@pytest.mark.parametrize("kinds", [("mlp", "stream"), ("heads", "mlp", "value-channels"), ("mlp", "drop-block")])
@pytest.mark.parametrize("compensation", ["none", "least-squares"])
def test_where_sites_meet_the_program_is_counted(kinds: tuple[str, ...], compensation: str) -> None:
    recipe = replace(BASE, kinds=kinds, ratio=None, target=24_000, compensation=compensation, allocator="uniform")
    program, _, plan = run("llama", recipe)
    # Whole blocks are coarse.
    assert (0 if "drop-block" in kinds else 22_000) < program.parameter_count <= 24_000
    assert plan.budget["after"] == program.parameter_count


def test_convolutions_on_both_sides() -> None:
    recipe = replace(BASE, kinds=("channels", "stream"), ratio=0.5, unit="macs", compensation="bias", score="wanda")
    program, _, plan = run("plain_resnet", recipe)
    meter = meter_of(traced("plain_resnet"), "macs", "plain_resnet")
    assert 0.8 * plan.budget["limit"] < meter.measure(program) <= plan.budget["limit"]


@pytest.mark.parametrize("allocator", ALL)
@pytest.mark.parametrize("standardize", [True, False])
def test_nothing_has_to_go(allocator: str, standardize: bool) -> None:
    """Standardised scores are negative for half of all atoms; removing them is no gain."""
    recipe = replace(BASE, allocator=allocator, ratio=0.0, standardize=standardize, compensation="bias")
    program, stats, plan = run("llama", recipe)
    assert program.fingerprint() == traced("llama").fingerprint() and not plan.changes
    assert any("nothing to remove" in note for note in stats.notes)
    program, _, _ = run("llama", replace(recipe, ratio=None, target=10.0**9))
    assert program.fingerprint() == traced("llama").fingerprint()


@pytest.mark.parametrize("allocator", ALL)
@pytest.mark.parametrize("per_saving", [True, False])
def test_no_more_than_needed_goes(allocator: str, per_saving: bool) -> None:
    recipe = replace(BASE, allocator=allocator, ratio=0.05, standardize=True, per_saving=per_saving)
    _, _, plan = run("llama", recipe)
    assert 0 < sum(len(d.removed) for d in plan.decisions) <= round(0.05 * 3 * 64)


def test_standardised_scores_compare_sites_by_what_stands_out_within_them() -> None:
    """A site whose scores are a thousand times those of another loses its share, too."""
    recipe = replace(BASE, ratio=0.5, standardize=True, per_saving=True)
    table = table_of(traced("llama"), recipe, context("llama"))
    scores = np.linspace(0, 1, 64)
    meter = table.meter
    for factor, standardize in ((1000.0, True), (1000.0, False)):
        places = []
        for site, scale in zip((s for s in sites_of("llama") if s.kind == "mlp"), (1.0, factor, 1.0), strict=True):
            values = scores * scale
            values = (values - values.mean()) / values.std() if standardize else values
            least = -2.0 if standardize else 0.0
            places.append(
                width_place(traced("llama"), site, values, meter, steps=None, weighted=True, least_score=least)
            )
        levels = Table(places, meter, whole=table.whole, total=table.total).levels()
        state = global_threshold(levels, table.limit(0.5, None)).state
        assert (max(state) - min(state) <= 1) == standardize


@pytest.mark.parametrize(
    ("floor", "multiple", "steps"), [(0.5, 1, None), (0.0, 16, None), (0.3, 8, None), (0.45, 12, 5)]
)
def test_floor_multiple_and_steps(floor: float, multiple: int, steps: int | None) -> None:
    recipe = replace(BASE, floor=floor, multiple=multiple, steps=steps, ratio=0.3)
    table = table_of(traced("llama"), recipe, context("llama"))
    for place in table.places:
        assert place.levels[0].count == 0
        counts = [level.count for level in place.levels[1:]]
        assert counts == sorted(set(counts)) and (steps is None or len(counts) <= steps)
        for count in counts:
            kept = 64 - count
            assert kept >= max(1, floor * 64) and kept % multiple == 0
            assert place.levels[counts.index(count) + 1].removed == tuple(
                sorted(np.argsort(place.scores, kind="stable")[:count].tolist())  # pyright: ignore[reportArgumentType,reportCallIssue]
            )
    program, _, plan = run("llama", recipe)
    assert all(len(d.kept) >= floor * 64 and (len(d.kept) % multiple == 0) for d in plan.changes)
    assert program.parameter_count < traced("llama").parameter_count


def test_of_equal_scores_the_last_go_first() -> None:
    site = next(s for s in sites_of("llama") if s.kind == "mlp")
    place = width_place(traced("llama"), site, np.zeros(64), meter_of(traced("llama")), steps=None)
    assert place.levels[3].removed == (61, 62, 63)
    assert [level.cost for level in place.levels] == sorted((level.cost for level in place.levels), reverse=True)


def test_out_of_reach() -> None:
    recipe = replace(BASE, kinds=("mlp",), ratio=None, target=100)
    with pytest.raises(PreconditionError) as error:
        run("llama", recipe)
    smallest = int(str(error.value).split("at least ")[1].split()[0].replace(",", ""))
    assert "budget of 100 params is out of reach" in str(error.value) and "raise the budget" in str(error.value)
    # What it says is true: that much can be reached, and one less cannot.
    assert run("llama", replace(recipe, target=smallest))[0].parameter_count <= smallest
    with pytest.raises(PreconditionError, match="out of reach"):
        run("llama", replace(recipe, target=smallest - 1))


def test_out_of_reach_names_what_blocks() -> None:
    recipe = replace(BASE, kinds=("drop-block",), ratio=None, target=100, allocator="uniform")
    with pytest.raises(PreconditionError, match=r"blocked elsewhere by: .*the stream changes from"):
        run("plain_resnet", recipe)


def test_the_smallest_that_is_named_has_the_biases_that_are_added() -> None:
    recipe = replace(BASE, compensation="bias", ratio=None, target=1.0)
    with pytest.raises(PreconditionError) as error:
        run("llama", recipe)
    smallest = int(str(error.value).split("at least ")[1].split()[0].replace(",", ""))
    program, _, _ = run("llama", replace(recipe, target=smallest))
    assert program.parameter_count == smallest
    assert sum(name.endswith("bias") for name in program.used_weights()) == 3


def test_nothing_of_that_kind() -> None:
    with pytest.raises(PreconditionError, match="nothing of the kinds drop-attention"):
        run("plain_resnet", replace(BASE, kinds=("drop-attention",)))


def test_a_branch_is_cut_or_dropped_never_both() -> None:
    recipe = replace(
        BASE, kinds=("mlp", "heads", "drop-mlp", "drop-attention"), ratio=0.6, steps=3, compensation="bias"
    )
    table = measured(traced("llama"), table_of(traced("llama"), recipe, context("llama")), context("llama"))
    assert len(table.places) == 6 and all(p.levels[-1].drop is not None for p in table.places)
    assert all(level.error is not None and level.error >= 0 for p in table.places for level in p.levels)
    program, _, plan = run("llama", recipe, table=table)
    assert len({(d.block, d.kind.removeprefix("drop-").replace("attention", "heads")) for d in plan.changes}) == len(
        plan.changes
    )
    assert program.parameter_count <= plan.budget["limit"]


def test_levels_are_tried_on_enough_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many batches as it takes, and no more."""
    batch = sample("llama")
    size = next(iter(batch.values())).numel()
    recipe = replace(BASE, kinds=("mlp",), steps=2)
    table = table_of(traced("llama"), recipe, context("llama"))
    for wanted, batches in ((1, 1), (size, 1), (size + 1, 2), (100 * size, 3)):
        monkeypatch.setattr("graphlathe.passes.search.measured.POSITIONS", wanted)
        used: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(Candidates, "__call__", lambda self, state, batch, used=used: used.append(batch) or 1.0)
            measured(traced("llama"), table, Context(calibration=[batch] * 3), every=True)
        assert set(used) == set(range(batches))


def test_measuring_needs_data() -> None:
    recipe = replace(BASE, kinds=("mlp", "drop-mlp"), steps=2)
    table = table_of(traced("llama"), recipe, context("llama"))
    with pytest.raises(PreconditionError, match="only be compared by trying"):
        measured(traced("llama"), table, Context())


def test_an_allocator_is_asked_once_where_its_plan_fits() -> None:
    asked: list[float] = []

    def choose(table: Table, limit: float) -> tuple[tuple[int, ...], None]:
        asked.append(limit)
        return table.levels().smallest(), None

    program, _, _ = run("llama", BASE, allocator=choose)
    assert len(asked) == 1 and torch.isfinite(next(iter(program.run(context("llama").calibration[0]).values()))).all()  # type: ignore[index]


def test_parts_that_are_shared_do_not_cost_more_than_the_whole() -> None:
    for kinds in (("mlp", "stream", "heads", "value-channels"), ("stream",), ("drop-block", "mlp")):
        table = table_of(traced("llama"), replace(BASE, kinds=kinds), context("llama"))
        levels = table.levels()
        assert levels.cost(levels.untouched) == pytest.approx(table.total, abs=len(table.places))
        assert levels.cost(levels.untouched) <= table.total
