"""``compress``: every choice of score, allocator and compensation meets its budget; what is refused; other imports."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import graphlathe
from graphlathe.ir.errors import GraphlatheError, InputError, PipelineError
from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.passes.base import Batch, Context
from graphlathe.passes.channels.compress import Compress
from graphlathe.passes.channels.tyr import Tyr
from graphlathe.passes.fidelity import output_distance
from graphlathe.passes.layers.evopress import EvoPress
from graphlathe.passes.manager import PassManager
from graphlathe.passes.pipeline import parse_pipeline
from graphlathe.passes.search.apply import COMPENSATIONS
from graphlathe.passes.search.place_table import Table
from graphlathe.passes.search.plan import Plan
from graphlathe.passes.search.recipe import ALLOCATORS, table_of
from graphlathe.passes.search.scores import CHANNEL_SCORES
from graphlathe.passes.search.widths import at_multiples
from graphlathe.tools import zoo
from tests.passes.channels.tiny import (
    WIDTH,
    Attention,
    Mlp,
    best_damping,
    data,
    hidden_rows,
    program_of,
    refused,
    removed,
    run,
    stack,
)
from tests.zoo_programs import traced

MODELS = ("llama", "bert", "plain_resnet")
QUICK: dict[str, Any] = {"steps": 4, "generations": 1, "offspring": 2}


@cache
def batches_of(name: str) -> list[Batch]:
    model = zoo.get(name)
    return [traced(name).feeds(**model.inputs(sizes)) for sizes in list(model.unseen_sizes)[:2]]


def limit_of(program: Program, settings: Compress, batches: list[Batch]) -> float:
    """What the budget allows: the model without a share of what its sites consist of, counted from their weights."""
    table = table_of(program, settings.recipe(), Context(calibration=batches))
    names = {m.weight for p in table.places for level in p.levels if level.site for m in level.site.group.members}
    return program.parameter_count - (settings.ratio or 0) * sum(program.weights[name].numel for name in names)


def meets_its_budget(name: str, settings: Compress) -> Program:
    program, batches = traced(name), batches_of(name)
    after, stats = run(program, settings, batches)
    limit = limit_of(program, settings, batches)
    assert after.parameter_count <= limit
    # Not much more is removed than was asked for: sites are small, one atom of them is a large step.
    assert after.parameter_count > limit - 0.5 * (program.parameter_count - limit)
    assert after.parameter_count == stats.plan["budget"]["after"]
    assert stats.plan["budget"]["before"] == program.parameter_count
    return after


def cases() -> list[Any]:
    """Each allocator with each compensation, and each score, on one of the models at a time and on all in the end."""
    scores = [name for name in CHANNEL_SCORES if name != "relevance"]  # nothing is registered for it
    pairs = list(itertools.product(ALLOCATORS, COMPENSATIONS))
    found = []
    for number, (allocator, compensation) in enumerate(pairs):
        for offset, model in enumerate(MODELS):
            score = scores[(number + 3 * offset) % len(scores)]
            # One model for each pair in the quick run; over the pairs, each score is taken.
            marks = [pytest.mark.xdist_group(model)] + ([] if number % 3 == offset else [pytest.mark.slow])
            label = f"{model}-{allocator}-{compensation}-{score}"
            found.append(pytest.param(model, allocator, compensation, score, id=label, marks=marks))
    return found


@pytest.mark.parametrize(("model", "allocator", "compensation", "score"), cases())
def test_every_choice_meets_its_budget(model: str, allocator: str, compensation: str, score: str) -> None:
    meets_its_budget(model, Compress(ratio=0.3, allocator=allocator, compensation=compensation, score=score, **QUICK))


def test_the_quick_cases_take_every_choice() -> None:
    quick = [case for case in cases() if not any(mark.name == "slow" for mark in case.marks)]
    for place, names in ((0, MODELS), (1, ALLOCATORS), (2, COMPENSATIONS), (3, CHANNEL_SCORES)):
        assert {case.values[place] for case in quick} >= set(names) - {"relevance"}


@pytest.mark.parametrize("model", [pytest.param(m, marks=pytest.mark.xdist_group(m)) for m in MODELS])
@pytest.mark.parametrize("better", ["least-squares", "mask-tuning"])
def test_compensation_brings_the_outputs_closer(model: str, better: str) -> None:
    program, batches = traced(model), batches_of(model)
    errors = []
    for compensation in ("none", better):
        settings = Compress(ratio=0.25, score="magnitude", allocator="uniform", compensation=compensation, **QUICK)
        after, stats = run(program, settings, batches)
        errors.append(sum(output_distance(after.run(b), program.run(b), b) for b in batches))
        assert any(removed(stats))
    assert errors[1] < errors[0]


def test_least_squares_is_the_solution_of_the_eager_model() -> None:
    """One site, all of it worked out in float64 from the eager model: which columns stay, and their new values."""
    model = stack(Mlp(8), seed=2)
    program, batches = program_of(model), data()
    atom = 2 * WIDTH + 1
    settings = Compress(sites=("mlp",), target=program.parameter_count - 3 * atom, score="wanda", allocator="greedy")
    after, stats = run(program, settings, batches)
    down = model.blocks[0].down
    old, bias = down.weight.detach(), down.bias.detach()  # type: ignore[operator,union-attr]

    def rows_of(part: Sequence[Batch]) -> torch.Tensor:
        return torch.cat(hidden_rows(model, part)[0])

    rows = rows_of(batches)
    scores = old.abs().sum(0) * rows.square().mean(0).sqrt()
    gone = sorted(scores.argsort()[:3].tolist())
    assert removed(stats) == [gone]
    kept = [c for c in range(8) if c not in gone]

    def solved(rows: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
        z = rows[:, kept] - rows[:, kept].mean(0)
        left = (rows - rows.mean(0)) @ old.T - z @ old[:, kept].T
        gram = z.T @ z / len(z)
        damped = gram + damping * gram.diagonal().mean() * torch.eye(len(kept), dtype=torch.float64)
        new = old[:, kept] + torch.linalg.solve(damped, z.T @ left / len(z)).T
        return new, old @ rows.mean(0) - new @ rows[:, kept].mean(0)

    def fit(part: Sequence[Batch], damping: float) -> Callable[[Sequence[Batch]], float]:
        new, shift = solved(rows_of(part), damping)

        def error(other: Sequence[Batch]) -> float:
            there = rows_of(other)
            return float((there[:, kept] @ new.T + shift - there @ old.T).square().sum(1).mean())

        return error

    new, shift = solved(rows, best_damping(batches, fit))
    torch.testing.assert_close(after.weights["blocks.0.down.weight"].tensor(), new, rtol=0, atol=1e-9)
    torch.testing.assert_close(after.weights["blocks.0.down.bias"].tensor(), bias + shift, rtol=0, atol=1e-9)


@pytest.mark.parametrize("allocator", ["knapsack", "evolution"])
def test_branches_and_channels_share_a_budget(allocator: str) -> None:
    """A branch that does nothing goes whole: dropping it costs nothing, whatever its channels score."""
    model = stack(Attention(2, 2), Mlp(8), Attention(2, 2), Mlp(8), seed=3)
    with torch.no_grad():
        model.blocks[2].o.weight.zero_()  # type: ignore[union-attr,operator]
        model.blocks[2].o.bias.zero_()  # type: ignore[union-attr,operator]
    program = program_of(model)
    # A search of no generation is what the cheap allocators make of the levels, which were tried.
    options: dict[str, Any] = {"allocator": allocator, "compensation": "none", "generations": 0}
    settings = Compress(sites=("heads", "mlp", "drop-attention"), ratio=0.2, **options)
    after, stats = run(program, settings, data())
    assert [(s["kind"], s["index"]) for s in stats.plan["sites"] if s["kind"] == "drop-attention" and s["removed"]] == [
        ("drop-attention", 1)
    ]
    assert "blocks.2.o.weight" not in after.used_weights()


def test_measured_levels_are_where_a_search_starts() -> None:
    """Scores take neurons that stand out; tried alone, those that nothing reads go first."""
    model = stack(Mlp(8), Mlp(8), seed=3)
    with torch.no_grad():
        model.blocks[0].up.weight.mul_(10)  # type: ignore[union-attr,operator]
        model.blocks[0].down.weight.zero_()  # type: ignore[union-attr,operator]
    program = program_of(model)
    settings = Compress(sites=("mlp",), ratio=0.5, score="activation", allocator="evolution", **QUICK)
    removes = []
    for measure in (False, True):
        given = replace(settings, measure=measure, compensation="none", generations=0)
        removes.append([len(gone) for gone in removed(run(program, given, data(6))[1])])
    assert removes[1][0] > removes[1][1] and removes[0] != removes[1]


def test_a_search_starts_from_windows_with_the_rest_narrower() -> None:
    program = program_of(stack(*(part for _ in range(4) for part in (Attention(2, 2), Mlp(8)))))
    sites = ("heads", "mlp", "drop-attention", "drop-mlp")
    settings = Compress(sites=sites, ratio=0.4, allocator="evolution", generations=0, offspring=2, steps=2)
    _, stats = run(program, settings, data())
    tried = {point["origin"] for point in stats.plan["search"]["evaluated"]}
    assert "seed: window of 1, knapsack" in tried and tried & {"seed: uniform", "seed: greedy", "seed: knapsack"}


def test_a_search_judges_on_as_much_as_it_is_told() -> None:
    """The candidates that survive a generation on so many batches, the states that led it on all."""
    program = program_of(stack(Mlp(8), Mlp(8), Mlp(8)))
    settings = Compress(ratio=0.3, allocator="evolution", small=1, large=2, finalists=2, **QUICK)
    _, stats = run(program, settings, data(6))
    everything = run(program, replace(settings, large=None, finalists=1), data(6))[1]
    assert stats.plan["search"]["tokens"] < everything.plan["search"]["tokens"]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.7, 1.0])
def test_a_budget_is_used_up_where_sites_save_less_together_than_apart(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sites that overlap count what they share twice: the first guess is far off, and is not given up for the least."""
    program = program_of(stack(Mlp(200), Mlp(200)))

    def cost(_: Program, table: Table, plan: Plan, *unused: Any) -> float:
        each = table.whole / sum(decision.units for decision in plan.decisions)
        return table.total - share * each * sum(len(decision.removed) for decision in plan.decisions)

    monkeypatch.setattr("graphlathe.passes.search.choose._cost", cost)
    settings = Compress(sites=("mlp",), ratio=0.08, score="magnitude", compensation="none")
    _, stats = run(program, settings, data())
    budget = stats.plan["budget"]
    assert budget["after"] <= budget["limit"]
    assert budget["limit"] - budget["after"] <= 0.1 * (budget["before"] - budget["limit"])


@pytest.mark.parametrize("groups", [2, 4])
def test_query_heads_are_cut_after_groups_of_heads(groups: int) -> None:
    """Also where one group is left, whose query heads are plain heads then."""
    program = program_of(stack(Attention(8, groups), Mlp(8), Attention(8, groups)))
    settings = Compress(sites=("heads", "query-heads"), ratio=0.6, floor=0.01, score="magnitude", compensation="none")
    after, stats = run(program, settings, data())
    kinds = {s["kind"] for s in stats.plan["sites"] if s["removed"]}
    assert kinds == {"heads", "query-heads"}
    assert after.parameter_count < program.parameter_count


@pytest.mark.parametrize("unit", ["params", "bytes", "macs"])
@pytest.mark.xdist_group("llama")
def test_budgets_count_what_they_say(unit: str) -> None:
    program, batches = traced("llama"), batches_of("llama")
    after, stats = run(program, Compress(ratio=0.3, budget=unit, **QUICK), batches)
    sizes = {name: dim.hint for name, dim in program.main.dims.by_name.items()} | program.check_feeds(batches[0])
    counts = {
        "params": lambda p: p.parameter_count, "bytes": lambda p: p.weight_nbytes, "macs": lambda p: p.cost(sizes).macs
    }  # fmt: skip
    budget = stats.plan["budget"]
    assert (budget["unit"], budget["before"], budget["after"]) == (unit, counts[unit](program), counts[unit](after))
    assert counts[unit](after) <= budget["limit"] < counts[unit](program)


def test_plans_do_not_depend_on_where_the_model_came_from(tmp_path: Path) -> None:
    """The same model traced, and read back from ONNX, in which nothing has the names that it had."""
    model = stack(Attention(4, 2), Mlp(8), Attention(4, 2), Mlp(8), seed=4).float()
    batches = [{"x": b["x"].float()} for b in data()]
    program = trace(model, batches[0])
    other = graphlathe.load(program.export_onnx(tmp_path / "model.onnx"))
    settings = Compress(ratio=0.4, sites=("heads", "mlp"))
    first, second = (PassManager(settings, calibration=batches).run(p) for p in (program, other))
    plans = [report.rows[-1].plan["sites"] for _, report in (first, second)]
    assert any(site["removed"] for site in plans[0])
    for a, b in zip(*plans, strict=True):
        assert [a[key] for key in ("kind", "block", "units", "removed")] == [
            b[key] for key in ("kind", "block", "units", "removed")
        ]
        np.testing.assert_allclose(a["scores"], b["scores"], rtol=1e-3, atol=1e-5)
    for batch in batches:
        torch.testing.assert_close(
            first[0].run(batch)["output"],
            next(iter(second[0].run(second[0].feeds(**batch)).values())),
            rtol=1e-3,
            atol=1e-4,
        )


def test_an_unreachable_budget_names_the_smallest_and_what_blocks_more() -> None:
    program = program_of(stack(Mlp(8), Mlp(8)))
    least = program.parameter_count - 14 * (2 * WIDTH + 1)
    settings = Compress(target=least - 1, compensation="none")
    for allocator in ALLOCATORS:
        error = refused(program, Compress(**{**_options(settings), "allocator": allocator}), data(), "out of reach")
        assert f"{least:,}" in str(error)
        assert "it is a dimension of an input (%x)" in str(error)
    after, _ = run(program, Compress(target=least, compensation="none"), data())
    assert after.parameter_count == least


def _options(settings: Compress) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in ("target", "compensation", "generations", "offspring")}


def test_bad_calibration_is_refused() -> None:
    program = program_of(stack(Mlp(8), Mlp(8)))
    refused(program, Compress(ratio=0.3), None, "calibration data")
    refused(program, Compress(ratio=0.3), [], "calibration data")
    bad = data()
    bad[1]["x"][0, 0, 0] = torch.nan
    for score in ("fluctuation", "optimal-compensation", "usage", "gradient", "removal"):
        refused(
            program, Compress(ratio=0.3, score=score, compensation="none"), bad, "NaN|not a number|not finite|no finite"
        )
    refused(program, Compress(ratio=0.3, score="magnitude"), bad, "NaN|not a number|not finite")
    evolution = Compress(
        ratio=0.3, score="magnitude", compensation="none", allocator="evolution", generations=1, offspring=2
    )
    refused(program, evolution, bad, "not numbers|NaN")
    before = program.fingerprint()
    for wrong in ({"x": torch.zeros(3, 7, WIDTH + 1, dtype=torch.float64)}, {"y": data(1)[0]["x"]}, {}):
        with pytest.raises(InputError, match=r"x|calibration"):
            graphlathe.optimize(program, passes=Compress(ratio=0.3), calibration=[wrong], progress=False)
    with pytest.raises(GraphlatheError):
        PassManager(Compress(ratio=0.3), calibration=[{"x": data(1)[0]["x"][..., :-1]}]).run(program)
    assert program.fingerprint() == before


def test_a_score_by_gradients_needs_gradients() -> None:
    class Chosen(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = stack(Mlp(8), Mlp(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x).argmax(-1)

    program = trace(Chosen(), data(1)[0])
    refused(program, Compress(ratio=0.3, score="gradient", compensation="none"), data(), "gradient|floating")
    # Other scores do not need any.
    run(program, Compress(ratio=0.3, score="wanda", compensation="none"), data())


def test_what_a_cache_is_made_of_is_blocked() -> None:
    """Heads whose keys and values go out as a cache: cutting them would change the interface."""
    model = stack(Attention(4, 2), Mlp(8)).double()

    class WithCache(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            x = self.inner.first(x)
            attention = self.inner.blocks[0]
            seen = attention.norm(x)  # type: ignore[operator,union-attr]
            keys, values = (m(seen).unflatten(-1, (-1, 2)).transpose(1, 2) for m in (attention.k, attention.v))  # type: ignore[operator,union-attr]
            return self.inner.head(self.inner.blocks[1](attention(x))), keys, values

    program = trace(WithCache(), data(1)[0])
    error = refused(program, Compress(ratio=0.3, sites=("heads",)), data(), "nothing of the kinds heads")
    assert "is a dimension of an output" in str(error)
    after, stats = run(program, Compress(ratio=0.3), data())
    assert {site["kind"] for site in stats.plan["sites"]} == {"mlp"}
    assert any("is a dimension of an output" in reason for reason in stats.misses)
    assert [str(s.shape) for s in after.outputs] == [str(s.shape) for s in program.outputs]
    shared = graphlathe.optimize(program, passes="canonicalize", progress=False)
    dropped, stats = run(shared, Compress(ratio=0.9, sites=("drop-attention",)), data())
    keys, values = program.main.outputs[1:]
    expected = f"attention of block 0 is dropped, but what makes the outputs {keys}, {values} stays"
    assert stats.notes.count(expected) == 1
    assert all(torch.equal(dropped(**data(1)[0])[n], program(**data(1)[0])[n]) for n in (keys, values))


def test_what_another_entry_reads_is_blocked() -> None:
    """A prefill and a decode entry share their weights and the state between them: neither may be cut alone."""
    program = program_of(stack(Mlp(8), Mlp(8)))
    program.entries["other"] = program.main.copy()
    error = refused(program, Compress(ratio=0.3), data(), "nothing of the kinds")
    assert "'other' reads it" in str(error)


def test_one_way_to_say_how_much() -> None:
    for options in ({}, {"ratio": 0.3, "target": 100}):
        with pytest.raises(PipelineError, match="one way to say how much"):
            Compress(**options)


def test_a_rank_without_anything_to_drop_is_said() -> None:
    """An error where nothing can be dropped, and a line in the report where nothing was."""
    with pytest.raises(PipelineError, match="sites=mlp,heads only cuts"):
        parse_pipeline("compress{sites=mlp,heads ratio=0.2 rank=16}")
    program = program_of(stack(Mlp(16), Mlp(16)))
    with_branches = ("mlp", "drop-attention")
    for settings, said in (
        (Compress(sites=with_branches, ratio=0.3, rank=2, steps=4), True),
        (Compress(sites=with_branches, ratio=0.3, steps=4), False),
        (EvoPress(mode="sparsity", ratio=0.3, rank=2, levels=4, generations=1, offspring=2), False),
        (Compress(sites=("drop-mlp",), ratio=0.5, rank=2, allocator="uniform"), False),
    ):
        stats = run(program, settings, data())[1]
        assert any("rank=2 had nothing to do" in note for note in stats.notes) == said, settings


def test_floor_and_multiple_hold_with_every_allocator() -> None:
    program = program_of(stack(Mlp(16), Mlp(16)))
    for allocator in ALLOCATORS:
        settings = Compress(
            ratio=0.3, floor=0.5, multiple=4, allocator=allocator, compensation="none", generations=1, offspring=2
        )
        for gone in removed(run(program, settings, data())[1]):
            assert (16 - len(gone)) % 4 == 0 and len(gone) <= 8


def test_a_multiple_counts_channels_and_not_heads() -> None:
    """Heads of two channels: of four of them two are a multiple of four; an MLP of four channels stays as it is."""
    program = program_of(stack(Attention(4, 4), Mlp(4), Mlp(16)))
    settings: dict[str, Any] = {"ratio": 0.3, "multiple": 4}
    for pass_ in (
        Compress(**settings, allocator="uniform", compensation="none"),
        Tyr(**settings, iterations=2, generations=2, offspring=4),
    ):
        after, stats = run(program, pass_, data())
        assert stats.misses["too few atoms"] == 1, pass_
        assert after.weights["blocks.0.o.weight"].shape[1] in (4, 8)
        assert after.weights["blocks.1.down.weight"].shape[1] == 4
        assert after.weights["blocks.2.down.weight"].shape[1] % 4 == 0
        assert after.parameter_count < program.parameter_count


@pytest.mark.parametrize("name", ["plain_resnet", "llama"])
@pytest.mark.parametrize("multiple", [1, 2])
def test_convolutions_of_odd_widths_are_said(name: str, multiple: int) -> None:
    program, batches = traced(name), batches_of(name)
    settings = Compress(ratio=0.25, score="magnitude", allocator="uniform", compensation="none", multiple=multiple)
    notes = run(program, settings, batches)[1].notes
    assert any("odd widths" in note for note in notes) == (name == "plain_resnet" and multiple == 1)


@pytest.mark.parametrize(
    ("counts", "most", "multiple", "expected"),
    [
        (range(1, 10), 9, 1, list(range(1, 10))),
        (range(1, 10), 9, 4, [2, 6]),  # 8 or 4 stay
        ([3], 9, 4, [6]),
        (range(1, 6), 5, 4, [2]),  # at least five are to stay
        ([0], 9, 4, []),
        (range(1, 10), 9, 16, []),
    ],
)
def test_numbers_that_leave_a_multiple(counts: Any, most: int, multiple: int, expected: list[int]) -> None:
    assert at_multiples(counts, 10, most, multiple) == expected
