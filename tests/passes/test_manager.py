"""The pass manager: contracts are enforced, needs are met, mutations are measured, failures leave no trace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from graphlathe.ir.errors import GraphlatheError, InputError, PostconditionError, PreconditionError, VerifyError
from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.ir.rewrite import Rewriter
from graphlathe.ir.weights import Weight
from graphlathe.passes.base import Batch, Context, Effect, Pass, Stats
from graphlathe.passes.canonical.canonicalize import Canonicalize
from graphlathe.passes.manager import PassManager
from graphlathe.passes.report import Report
from graphlathe.tools import zoo
from tests.passes.example_passes import (
    AddOutput,
    Approximate,
    BreaksItsLaw,
    Counter,
    Crash,
    Liar,
    Meddler,
    NeedsCanonical,
    NeedsData,
)
from tests.zoo_programs import traced


class Net(nn.Module):
    """Two linear layers with relus, some of the work in vain."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(6, 12, bias=False)
        self.b = nn.Linear(12, 10, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.a(x.clone()))
        return torch.relu(self.b(h * 1)) - torch.relu(self.b(h))[..., :0].sum()


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
BATCHES: list[Batch] = [{"x": X}, {"x": X[:1] * 2}]


@pytest.fixture(scope="module")
def program() -> Program:
    return trace(Net(), (X,), dynamic={"x": {0: "B"}})


def run(program: Program, passes: Any, **options: Any) -> tuple[Program, Report]:
    options.setdefault("feeds", {"x": X})
    text, mutations = program.to_text(), program.mutations
    try:
        return PassManager(passes, verify=options.pop("verify", 2), **options).run(program)
    finally:
        assert program.to_text() == text
        assert program.mutations == mutations
        assert program.listeners == []


def test_an_exact_pass_is_measured(program: Program) -> None:
    after, report = run(program, Canonicalize())
    (row,) = report.rows
    assert row.error == 0.0
    assert row.tolerance == 1e-5
    assert row.mutations > 0
    assert row.nodes_after < row.nodes_before
    assert after.history == ["canonicalize"]
    assert torch.equal(after(X), Net()(X))


def test_a_pass_that_lies_is_caught(program: Program) -> None:
    with pytest.raises(PostconditionError, match=r"test-liar: .* equal outputs, but 'output' differs by 1\.25"):
        run(program, Liar())


def test_a_small_lie_is_caught_too_and_reassociation_is_not(program: Program) -> None:
    with pytest.raises(PostconditionError, match="differs by"):
        run(program, Liar(factor=1.0001))
    _, report = run(program, Liar(factor=1.0 + 1e-6))
    assert report.rows[0].error == pytest.approx(2e-6, rel=0.2)


def test_without_examples_the_report_says_that_nothing_was_checked(program: Program) -> None:
    _, report = run(program, [Liar()], feeds=None)
    assert report.rows[0].error is None
    assert "unchecked: no example inputs" in str(report)


def test_the_reference_is_the_graph_before_this_pass(program: Program) -> None:
    # The drift of the first pass must not be blamed on the second one.
    _, report = run(program, [Approximate(), Canonicalize()])
    assert report.rows[1].error == 0.0
    with pytest.raises(PostconditionError, match="test-liar"):
        run(program, [Canonicalize(), Approximate(), Liar()])


def test_an_analysis_must_not_change_anything(program: Program) -> None:
    after, report = run(program, Counter())
    assert report.plan == {"test-counter": {"relus": 3}}
    assert after.history == []
    with pytest.raises(PostconditionError, match="test-meddler: an analysis changed the graph"):
        run(program, Meddler())


def test_extending_keeps_the_old_outputs(program: Program) -> None:
    after, report = run(program, AddOutput())
    assert report.rows[0].error == 0.0
    assert list(after(X)) == ["output", "relu"]
    with pytest.raises(PostconditionError, match="test-add-output"):
        run(program, AddOutput(spoil=True))
    # What is exact afterwards is compared on the new outputs, too.
    _, report = run(program, [AddOutput(), Canonicalize()])
    assert report.rows[1].error == 0.0


@dataclass(frozen=True, kw_only=True)
class Halves(Pass):
    """Renames the input: the caller's values go in under another name."""

    name: ClassVar[str] = "test-reform"
    effect: ClassVar[Effect] = Effect.REFORMS

    def run(self, program: Program, ctx: Context) -> Stats:
        entry = program.main
        entry.inputs, entry.arguments = ("z",), {"z": ("z",)}
        return Stats(hits=1)

    def call_as_before(self, before: Program, program: Program, feeds: Batch) -> dict[str, Any]:
        return program.run({"z": feeds["x"]})


def test_reforming_is_compared_through_the_adapter(program: Program) -> None:
    after, report = run(program, [Halves(), Canonicalize()])
    assert report.rows[0].error == 0.0
    assert report.rows[0].mutations > 0  # measured although no rewriter was involved
    assert [spec.name for spec in after.inputs] == ["z"]
    # The examples no longer fit, and the report says so.
    assert report.rows[1].unchecked == "no example inputs"


def test_drift_is_measured_against_the_pass_before_and_the_model(program: Program) -> None:
    _, report = run(program, [Approximate(factor=2.0), Approximate(factor=0.5)], calibration=BATCHES)
    first, second = report.rows
    assert first.drift is not None
    assert first.drift.batches == 2
    assert first.drift.source == "calibration"
    assert first.drift.relative == pytest.approx(3.0)  # two relus in a row: four times as large
    assert second.drift is not None
    assert second.drift.relative == pytest.approx(0.75)
    assert second.total_drift is not None
    assert second.total_drift.relative == pytest.approx(0.0, abs=1e-6)
    assert report.drift is second.total_drift


def test_drift_without_calibration_uses_the_examples_or_says_that_there_is_nothing(program: Program) -> None:
    _, report = run(program, Approximate())
    assert report.rows[0].drift is not None
    assert report.rows[0].drift.source == "example inputs"
    _, report = run(program, Approximate(), feeds=None)
    assert report.rows[0].drift is None
    assert "drift not measured: no calibration data or example inputs" in str(report)


def test_drift_on_some_of_the_data_or_on_none(program: Program) -> None:
    _, report = run(program, Approximate(factor=2.0), calibration=BATCHES, drift_batches=1)
    assert report.rows[0].drift is not None and report.rows[0].drift.batches == 1
    _, report = run(program, Approximate(factor=2.0), calibration=BATCHES, drift_batches=9)
    assert report.rows[0].drift is not None and report.rows[0].drift.batches == 2
    _, report = run(program, Approximate(factor=2.0), calibration=BATCHES, drift_batches=0)
    assert report.rows[0].drift is None and "drift not measured: switched off" in str(report)


@pytest.mark.parametrize(
    ("budget", "kept"),
    [({"relative": 4.0}, True), ({"relative": 1.0}, False), ({"top1": 0.9}, True), ({"drift": 0.0}, False)],
)
def test_budget(program: Program, budget: Mapping[str, float], kept: bool) -> None:
    if kept:
        run(program, Approximate(factor=2.0), calibration=BATCHES, budget=budget)
    else:
        with pytest.raises(PostconditionError, match="test-approximate: the drift is over budget"):
            run(program, Approximate(factor=2.0), calibration=BATCHES, budget=budget)


def test_a_budget_counts_the_sum_of_all_passes(program: Program) -> None:
    passes = [Approximate(factor=1.1), Approximate(factor=1.1)]
    run(program, passes[:1], budget={"relative": 0.3})
    with pytest.raises(PostconditionError, match="over budget"):
        run(program, passes, budget={"relative": 0.3})


def test_a_budget_that_cannot_be_checked_is_an_error(program: Program) -> None:
    with pytest.raises(PostconditionError, match="budget cannot be checked"):
        run(program, Approximate(), feeds=None, budget={"drift": 1.0})
    with pytest.raises(InputError, match="did you mean 'relative'"):
        run(program, Approximate(), budget={"relativ": 1.0})
    with pytest.raises(InputError, match="at least 0"):
        run(program, Approximate(), budget={"kl": -1.0})


@pytest.mark.parametrize("text", ["shortgpt{blocks=1}", "shrp{share=0.5}", "distill{steps=1}", "evopress{ratio=0.3}"])
def test_data_of_which_nothing_counts_is_refused(text: str) -> None:
    model, program = zoo.get("bert"), traced("bert")
    batch = dict(program.feeds(**model.example()))
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    with pytest.raises(PreconditionError, match="no position of the calibration data counts"):
        PassManager(f"canonicalize,{text}", calibration=[batch, batch]).run(program)


def test_needs_are_met_or_named(program: Program) -> None:
    after, report = run(program, [NeedsCanonical(), NeedsCanonical()])
    assert [row.text for row in report.rows] == ["canonicalize", "test-needs-canonical", "test-needs-canonical"]
    assert report.rows[0].wanted_by == "test-needs-canonical"
    assert after.history == [row.text for row in report.rows]
    # What breaks the form makes it needed again.
    _, report = run(program, [NeedsCanonical(), Approximate(), NeedsCanonical()])
    assert [row.name for row in report.rows].count("canonicalize") == 2
    # A program that was canonicalized in an earlier run is known to be.
    _, report = run(after, [NeedsCanonical()])
    assert len(report.rows) == 2 or report.rows[0].mutations == 0
    with pytest.raises(PreconditionError, match="test-needs-data: it needs calibration data"):
        run(program, NeedsData())
    _, report = run(program, NeedsData(), calibration=BATCHES)
    assert report.rows[0].plan == {"batches": 2}


def test_blocks_are_needed_where_there_are_none(program: Program) -> None:
    with pytest.raises(PreconditionError, match="drop-layers: the model has no residual stream"):
        run(program, "drop-layers{ratio=0.5}", calibration=BATCHES)


def test_repeat_runs_until_nothing_changes(program: Program) -> None:
    _, report = run(program, "repeat{max=9}(remove-noops,cse,dce)")
    assert len(report.rows) % 3 == 0
    assert 3 < len(report.rows) < 27
    assert all(row.mutations == 0 for row in report.rows[-3:])
    assert any(row.mutations for row in report.rows[:3])
    _, report = run(program, "repeat{max=1}(remove-noops,cse,dce)")
    assert len(report.rows) == 3


def test_errors_name_the_pass(program: Program) -> None:
    with pytest.raises(GraphlatheError, match="test-crash: it failed with ZeroDivisionError: by zero") as error:
        run(program, Crash())
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    with pytest.raises(PostconditionError, match="test-law: nothing was done"):
        run(program, BreaksItsLaw())


@dataclass(frozen=True, kw_only=True)
class Dangling(Pass):
    """Reads a weight that it forgets to add."""

    name: ClassVar[str] = "test-dangling"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, program: Program, ctx: Context) -> Stats:
        node = next(iter(program.graph.find_nodes(op="get_attr")))
        node.target = "nowhere"
        return Stats()


def test_a_malformed_result_is_caught_by_verification(program: Program) -> None:
    with pytest.raises(VerifyError, match="test-dangling"):
        run(program, Dangling())


@dataclass(frozen=True, kw_only=True)
class NewWeight(Pass):
    """Replaces the first weight by a copy of itself, past the rewriter or through it."""

    name: ClassVar[str] = "test-new-weight"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, program: Program, ctx: Context) -> Stats:
        program.weights["a.weight"] = Weight.from_tensor(program.weights["a.weight"].tensor().clone())
        return Stats()


def test_changes_past_the_rewriter_are_counted(program: Program) -> None:
    after, report = run(program, NewWeight())
    assert report.rows[0].mutations == 1
    assert report.rows[0].error == 0.0
    assert after.weights["b.weight"] is program.weights["b.weight"]


@dataclass(frozen=True, kw_only=True)
class Forgets(Pass):
    """Adds a weight, and then does not use it."""

    name: ClassVar[str] = "test-forgets"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, program: Program, ctx: Context) -> Stats:
        rewriter = Rewriter(program, self.name)
        rewriter.weight("unread", Weight.from_tensor(torch.zeros(12)))
        rewriter.erase_dead()
        return Stats()


def test_weights_that_nothing_reads_are_dropped(program: Program) -> None:
    after, _ = run(program, Forgets())
    assert set(after.weights) == set(program.weights) == {"a.weight", "b.weight"}
    assert all(after.weights[name] is program.weights[name] for name in after.weights)


def test_costs_can_be_switched_off(program: Program) -> None:
    _, report = run(program, "canonicalize", costs=False)
    assert report.after is not None
    assert report.after.macs is None
    assert report.after.params == program.parameter_count
    _, report = run(program, "canonicalize")
    assert report.before is not None
    assert report.before.macs == 4 * (6 * 12 + 2 * 12 * 10)
    assert report.after is not None
    assert report.after.macs == 4 * (6 * 12 + 12 * 10)
    assert report.sizes == {"B": 4}


def test_a_wrong_verification_level(program: Program) -> None:
    with pytest.raises(InputError, match="level 7"):
        PassManager("cse", verify=7)


def test_random_models_are_compared_with_fixed_numbers() -> None:
    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.clone() + torch.rand_like(x)

    state = torch.random.get_rng_state()
    _, report = run(trace(Noisy(), (X,)), "canonicalize")
    assert report.rows[0].error == 0.0
    assert torch.equal(torch.random.get_rng_state(), state)
