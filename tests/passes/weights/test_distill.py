"""``distill``: what it learns, what it never sees, and what it refuses."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graphlathe.ir.errors import InputError, PreconditionError
from graphlathe.ir.from_torch import trace
from graphlathe.ir.load import load
from graphlathe.ir.program import Program
from graphlathe.passes.base import Context
from graphlathe.passes.manager import PassManager
from graphlathe.passes.optimize import optimize
from graphlathe.passes.weights.distill import Distill
from graphlathe.tools import zoo
from tests.passes.channels.tiny import Mlp, data, divergence, refused, run, stack
from tests.zoo_programs import traced


def drift(changed: Program, original: Program, batches: list[dict[str, torch.Tensor]], output: str) -> float:
    """Mean divergence over all positions that no mask hides."""
    got, want = (
        torch.cat([p.run(b)[output].flatten(0, -2)[b.get("attention_mask", ones(b)).flatten() != 0] for b in batches])
        for p in (changed, original)
    )
    return divergence(got, want)


def ones(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.ones(next(iter(batch.values())).shape[:2])


@pytest.mark.xdist_group("llama")
def test_it_heals_what_dropping_a_block_did() -> None:
    """The pipeline of the documentation: the teacher is what the pipeline was given, not what distill was."""
    model, program = zoo.get("llama"), traced("llama")
    batches = [program.feeds(**model.inputs(size)) for size in (*model.unseen_sizes, *model.unseen_sizes)]
    short, _ = PassManager("shortgpt{blocks=1}", calibration=batches).run(program)
    healed, report = PassManager(
        "shortgpt{blocks=1},distill{steps=25 learning_rate=0.003 hold_out=0}", calibration=batches
    ).run(program)
    output = program.outputs[0].name
    before, after = (drift(each, program, batches, output) for each in (short, healed))
    assert after < 0.7 * before
    assert healed.parameter_count == short.parameter_count < program.parameter_count
    # The report's own number is this one.
    assert report.rows[-1].total_drift is not None
    assert report.rows[-1].total_drift.kl == pytest.approx(after, rel=1e-3)


@pytest.mark.xdist_group("llama")
def test_a_teacher_can_be_given(tmp_path: Path) -> None:
    """What was shortened and saved earlier learns from the original as it would have in one pipeline."""
    model, program = zoo.get("llama"), traced("llama")
    batches = [program.feeds(**model.inputs(size)) for size in model.unseen_sizes]
    settings: dict[str, Any] = {"calibration": batches, "progress": False, "costs": False}
    distill = "distill{steps=2 hold_out=0}"
    whole = optimize(program, passes=f"shortgpt{{blocks=1}},{distill}", **settings)
    short = optimize(program, passes="shortgpt{blocks=1}", **settings)
    for given, teacher in ((short, program), (short.save(tmp_path / "short"), program.save(tmp_path / "whole"))):
        later = optimize(given, passes=distill, teacher=teacher, **settings)
        assert all(torch.equal(w.tensor(), later.weights[n].tensor()) for n, w in whole.weights.items())
    alone = optimize(short, passes=distill, **settings)
    assert any(not torch.equal(w.tensor(), alone.weights[n].tensor()) for n, w in whole.weights.items())
    with pytest.raises(InputError, match="the teacher's inputs are"):
        optimize(short, passes=distill, teacher=traced("vit"), **settings)


def test_weights_of_files_are_told_apart(tmp_path: Path) -> None:
    """Files are mapped when they are read, and one of whole pages may be mapped where the one before it was."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(6)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x)

    torch.manual_seed(0)
    teacher, student = (trace(Deep(), {"x": torch.zeros(2, 64)}) for _ in range(2))
    batches = [{"x": torch.randn(2, 64)} for _ in range(4)]
    stored = load(student.save(tmp_path / "student"))
    settings: dict[str, Any] = {"passes": "distill{steps=2}", "calibration": batches, "progress": False}
    here, there = (optimize(given, teacher=teacher, **settings) for given in (student, stored))
    assert len(here.weights) == 6
    for name, weight in here.weights.items():
        assert torch.equal(there.weights[name].tensor(), weight.tensor()), name


def disturbed(seed: int = 0) -> tuple[Program, Program]:
    """An original, and a copy whose weights are disturbed; both in float32."""
    model = stack(Mlp(8), Mlp(8), seed=seed).float()
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    batch = floats(1)[0]
    return trace(model, batch), trace(other, batch)


def floats(count: int, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    return [{"x": b["x"].float()} for b in data(count, seed)]


def test_what_is_held_out_is_never_trained_on_and_never_gets_worse() -> None:
    original, program = disturbed()
    batches = floats(6)
    settings = Distill(steps=40, learning_rate=3e-3, hold_out=0.34, evaluate_every=10)
    after, stats = run(program, settings, batches, original)
    report = stats.plan["distillation"]
    assert (report["train_batches"], report["held_out_batches"]) == (4, 2)
    assert report["held_out_after"] < report["held_out_before"]
    # Which two were held out is found by their losses: no other pair has them.
    losses = [[divergence(p.run(b)["output"], original.run(b)["output"]) for b in batches] for p in (program, after)]
    pairs = [
        (i, j)
        for i in range(6)
        for j in range(i)
        if abs((losses[0][i] + losses[0][j]) / 2 - report["held_out_before"]) < 1e-5
    ]
    assert len(pairs) == 1
    assert sum(losses[1][i] for i in pairs[0]) / 2 == pytest.approx(report["held_out_after"], rel=1e-3)
    # Other numbers in the two batches change what is judged, not what is learned.
    settings = Distill(steps=10, learning_rate=3e-3, hold_out=0.34, evaluate_every=10)
    changed = [{"x": b["x"] * 1.01} if n in pairs[0] else b for n, b in enumerate(batches)]
    first, second = (run(program, settings, each, original)[0] for each in (batches, changed))
    for name in program.weights:
        assert torch.equal(first.weights[name].tensor(), second.weights[name].tensor())


def test_training_that_only_harms_changes_nothing() -> None:
    original, program = disturbed()
    after, stats = run(
        program, Distill(steps=8, learning_rate=50.0, hold_out=0.5, evaluate_every=2, patience=2), floats(4), original
    )
    assert stats.hits == 0
    assert stats.plan["distillation"]["best_step"] == 0
    for name in program.weights:
        assert torch.equal(after.weights[name].tensor(), program.weights[name].tensor())


def test_the_answer_of_a_linear_model_is_recovered() -> None:
    """Without hidden layers there is one solution up to what softmax ignores: the outputs' distribution is the
    teacher's.
    """

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(6, 9)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.map(x)

    torch.manual_seed(0)
    batches = floats(4)
    original, program = (trace(Linear(), batches[0]) for _ in range(2))
    after, _ = run(program, Distill(steps=300, learning_rate=0.05, hold_out=0.0, evaluate_every=100), batches, original)
    assert drift(program, original, batches, "output") > 0.1
    assert drift(after, original, batches, "output") < 1e-4


def test_equal_seeds_give_equal_weights_and_the_plan_is_json() -> None:
    original, program = disturbed()
    results = [run(program, Distill(steps=6, seed=3), floats(4), original) for _ in range(2)]
    assert results[0][0].fingerprint() == results[1][0].fingerprint()
    assert json.loads(json.dumps(results[0][1].plan))["distillation"]["steps"] == 6


def test_bad_input_is_refused() -> None:
    _, program = disturbed()
    refused(program, Distill(steps=2), None, "learns from calibration data")
    refused(program, Distill(steps=2), [], "learns from calibration data")
    refused(program, Distill(steps=2), floats(1), "none can be held out")
    bad = floats(4)
    bad[1]["x"][0, 0, 0] = torch.nan
    refused(program, Distill(steps=6), bad, "NaN|not a number|no finite number")
    with pytest.raises(PreconditionError, match="no original model") as caught:
        run(program, Distill(steps=2), floats(4))
    assert caught.value.pass_name == "distill"
    # Without steps nothing is needed.
    Distill(steps=0).check(program, Context())


def test_a_program_without_gradients_is_refused() -> None:
    """Rounding has the gradient zero everywhere: nothing could be learned through it."""

    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(6, 9)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.map(x).argmax(-1)

    program = trace(Rounded(), floats(1)[0])
    with pytest.raises(PreconditionError, match=r"floating point|gradient") as caught:
        PassManager(Distill(steps=2), calibration=floats(3)).run(program)
    assert caught.value.pass_name == "distill"
