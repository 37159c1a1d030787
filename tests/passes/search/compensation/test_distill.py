"""Short distillation, against least squares, eager gradients and float64 formulas."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from graphlathe.ir.errors import InputError, PreconditionError
from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.ir.rewrite import Rewriter
from graphlathe.ir.weights import Weight
from graphlathe.kernels.dequantize import dequantize
from graphlathe.kernels.quantize import quantize
from graphlathe.passes.manager import PassManager
from graphlathe.passes.search.compensation.distill import DistillSettings, distill, positions, schedule, split
from graphlathe.passes.search.compensation.gradients import Trainer
from graphlathe.passes.search.compensation.targets import Distribution, divergence, losses, target_of
from graphlathe.passes.search.compensation.trainable import trainable_weights
from tests.zoo_programs import module, traced, zoo_parameters

SHORT = DistillSettings(steps=8, learning_rate=3e-3, warmup=2, evaluate_every=2, hold_out=0.25, embeddings=True)


def perturbed(program: Program, scale: float = 0.3, seed: int = 0) -> Program:
    """A copy whose parameters are disturbed; names and ties stay."""
    changed = program.clone()
    generator = torch.Generator().manual_seed(seed)
    for name in trainable_weights(program):
        old = program.weights[name].tensor()
        noise = torch.randn(old.shape, generator=generator).to(old.dtype)
        changed.weights[name] = Weight.from_tensor(old + scale * noise * old.std())
    return changed


def vectors(count: int, rows: int, width: int, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(rows, width, generator=generator)} for _ in range(count)]


class Affine(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class Partial(Affine):
    """Reads the first channels only: what is left when the others were cut."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out)
        self.width = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x[:, : self.width])


def affine(seed: int = 0) -> Program:
    torch.manual_seed(seed)
    return trace(Affine(6, 4), {"x": torch.zeros(32, 6)})


def test_a_perturbed_linear_map_is_recovered() -> None:
    teacher = affine()
    student = perturbed(teacher, 1.0)
    data = vectors(8, 32, 6)
    report = distill(student, teacher, data, DistillSettings(steps=400, learning_rate=0.05))
    for name in teacher.used_weights():
        torch.testing.assert_close(student.weights[name].tensor(), teacher.weights[name].tensor(), rtol=0, atol=2e-3)
    assert report.held_out_before is not None and report.held_out_before > 0.1
    assert report.held_out_after is not None and report.held_out_after < 1e-5


def test_what_cannot_be_recovered_becomes_least_squares() -> None:
    """Three of six correlated channels: the best weights are those of the regression on the channels that are left."""
    torch.manual_seed(0)
    teacher = trace(Affine(6, 4), {"x": torch.zeros(64, 6)})
    student = trace(Partial(3, 4), {"x": torch.zeros(64, 6)})
    x = torch.randn(64, 6) @ torch.randn(6, 6)
    data = [{"x": x}, {"x": x}]  # held-out and training data are one, so both have one optimum
    distill(student, teacher, data, DistillSettings(steps=1500, learning_rate=0.02, patience=100, hold_out=0.5))
    wanted = teacher(x=x).double()
    design = torch.cat([x[:, :3], torch.ones(64, 1)], 1).double()
    best = torch.linalg.lstsq(design, wanted).solution
    weight, bias = (student.weights[n].tensor().double() for n in ("linear.weight", "linear.bias"))
    torch.testing.assert_close(weight, best[:3].T, rtol=0, atol=5e-3)
    torch.testing.assert_close(bias, best[3], rtol=0, atol=5e-3)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("top_k", [3, 100])
def test_the_divergence_equals_its_formula(temperature: float, top_k: int) -> None:
    torch.manual_seed(0)
    p, q = torch.randn(2, 5, 9, dtype=torch.float64), torch.randn(2, 5, 9, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    batch = {"attention_mask": mask}
    target = target_of({"logits": p}, (), batch, temperature, top_k)
    found, _ = losses({"logits": q}, (), target, batch, temperature)
    total = 0.0
    for b, t in mask.nonzero().tolist():
        a, c = (torch.softmax(v[b, t] / temperature, -1) for v in (p, q))
        if top_k < 9:  # the rest as one event
            kept = a.topk(top_k).indices
            a, c = (torch.cat([v[kept], (1 - v[kept].sum()).reshape(1)]) for v in (a, c))
        total += float((a * (a / c).log()).sum())
    torch.testing.assert_close(float(found), temperature**2 * total / int(mask.sum()), rtol=1e-10, atol=0)


def test_entries_that_both_rule_out_give_no_gradient() -> None:
    logits = torch.tensor([[0.3, -math.inf, 1.0]])
    target = Distribution(torch.log_softmax(logits, -1), None)
    mine = torch.tensor([[0.1, -math.inf, 0.2]], requires_grad=True)
    loss = divergence(target, mine, 1.0)
    loss.backward()
    assert float(loss.detach()) > 0 and mine.grad is not None and bool(mine.grad.isfinite().all())


def test_masked_positions_and_features_count_as_they_should() -> None:
    torch.manual_seed(0)
    want, got = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = {"attention_mask": mask}
    outer, inner = losses({"h": got}, [got], target_of({"h": want}, [want], batch, 1.0, 8), batch, 1.0)
    chosen = mask == 1
    expected = float((got - want)[chosen].square().sum() / want[chosen].square().sum())
    assert float(outer) == pytest.approx(expected, rel=1e-6)
    assert float(inner) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", zoo_parameters(["llama", "bert", "mixtral"], quick=["llama", "bert", "mixtral"]))
def test_gradients_equal_those_of_the_eager_model(name: str) -> None:
    """Also through the operators of ours (rotary positions, gates, experts) that raising puts into the graph."""
    program = traced(name)
    feeds = program.feeds(**_example(name))
    raised, _ = PassManager("raise", feeds=feeds, costs=False).run(program)
    names = trainable_weights(raised)
    trainer = Trainer(raised, names)
    outputs, _ = trainer.run(feeds)
    first = next(iter(outputs.values()))
    trainer.backward(first.square().sum())
    model = module(name)
    model.zero_grad(set_to_none=True)
    value = model(**_example(name))
    (value if isinstance(value, torch.Tensor) else value[0]).square().sum().backward()
    eager = {n: p.grad for n, p in model.named_parameters()}
    compared = 0
    for weight in names:
        leaf = trainer.leaves[trainer._of[weight][0]]
        if eager.get(weight) is None or eager[weight].shape != leaf.shape:  # type: ignore[union-attr]
            continue
        compared += 1
        want = eager[weight]
        assert leaf.grad is not None and want is not None
        assert float((leaf.grad - want).norm()) <= 2e-5 * float(want.norm()) + 1e-6, weight
    model.zero_grad(set_to_none=True)
    assert compared >= len(names) // 2


def _example(name: str) -> dict[str, Any]:
    from graphlathe.tools import zoo

    return dict(zoo.get(name).example())


def _batches(name: str, count: int = 4) -> list[dict[str, Any]]:
    from graphlathe.tools import zoo

    model = zoo.get(name)
    return [dict(model.inputs(sizes)) for sizes in (list(model.unseen_sizes) * count)[:count]]


def test_a_raised_language_model_learns_and_nothing_else_changes() -> None:
    program = traced("llama")
    teacher, _ = PassManager("raise", feeds=program.feeds(**_example("llama")), costs=False).run(program)
    student = perturbed(teacher)
    before = dict(student.weights)
    text = teacher.to_text()
    report = distill(student, teacher, _batches("llama"), SHORT)
    assert report.held_out_after is not None and report.held_out_before is not None
    assert report.best_step > 0 and report.held_out_after < report.held_out_before
    parameters = set(trainable_weights(student))
    for name in student.used_weights():
        assert (student.weights[name] is before[name]) == (name not in parameters), name
    assert "rotary" not in " ".join(parameters)
    assert teacher.to_text() == text
    assert json.loads(json.dumps(report.as_dict()))["steps"] == report.steps == 8


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.middle(self.embed(ids))))


def _ids(count: int = 4) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [{"ids": torch.randint(0, 11, (3, 5), generator=generator)} for _ in range(count)]


def test_tied_weights_stay_tied() -> None:
    torch.manual_seed(0)
    teacher = trace(Tied(), {"ids": torch.zeros(3, 5, dtype=torch.int64)})
    student = perturbed(teacher)
    names = set(student.used_weights())
    distill(student, teacher, _ids(), SHORT)
    assert set(student.used_weights()) == names and student.tied == teacher.tied
    assert student.tied


def test_two_views_of_one_tensor_stay_views_of_one_tensor() -> None:
    """A table and its transpose under two names, as an ONNX file writes a tied head."""
    torch.manual_seed(0)

    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.head = nn.Parameter(torch.zeros(8, 11))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.embed(ids) @ self.head

    teacher = trace(Apart(), {"ids": torch.zeros(3, 5, dtype=torch.int64)})
    student = teacher.clone()
    table, head = (next(n for n in student.used_weights() if n.startswith(s)) for s in ("embed", "head"))
    teacher.weights[head] = Weight.from_tensor(torch.randn(8, 11))
    student.weights[head] = student.weights[table].permute((1, 0))
    report = distill(student, teacher, _ids(), SHORT)
    assert report.best_step > 0 and report.parameters == 88
    assert student.weights[table].shares_storage(student.weights[head])
    assert torch.equal(student.weights[table].tensor().T, student.weights[head].tensor())
    assert not torch.equal(student.weights[table].tensor(), teacher.weights[table].tensor())


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_tables_and_what_is_tied_to_them_may_stay(name: str) -> None:
    """Embeddings of words, positions and types, and tied heads, stay; an output map of its own is trained."""
    program = traced(name)
    own, everything = (trainable_weights(program, tables=tables) for tables in (False, True))
    eager = dict(module(name).named_parameters(remove_duplicate=False))
    tables = {id(m.weight) for m in module(name).modules() if isinstance(m, nn.Embedding)}
    assert set(own) == {n for n in everything if id(eager[n]) not in tables} < set(everything)


def test_tied_weights_are_left_alone_by_default() -> None:
    torch.manual_seed(0)
    teacher = trace(Tied(), {"ids": torch.zeros(3, 5, dtype=torch.int64)})
    student = perturbed(teacher)
    before = dict(student.weights)
    report = distill(student, teacher, _ids(), replace(SHORT, embeddings=False))
    assert report.best_step > 0 and report.parameters == 8 * 8 + 8
    assert {n for n, weight in student.weights.items() if weight is not before[n]} == {"middle.weight", "middle.bias"}


@pytest.mark.parametrize(
    "name",
    zoo_parameters(["resnet", "bert", "llama", "gptj", "t5", "bloom", "swin"], quick=["resnet", "llama", "gptj"]),
)
def test_statistics_and_tables_are_no_parameters(name: str) -> None:
    """The names say which tensors the eager model trains; the graph alone must give the same answer."""
    program = traced(name)
    eager = {n for n, _ in module(name).named_parameters(remove_duplicate=False)}
    assert set(trainable_weights(program)) == program.used_weights() & eager


def test_early_stopping_returns_the_best_weights() -> None:
    """A learning rate that destroys: the first weights are the best, and stay as they were."""
    teacher = affine()
    student = perturbed(teacher, 1e-4)
    before = dict(student.weights)
    report = distill(
        student,
        teacher,
        vectors(6, 32, 6),
        DistillSettings(steps=200, learning_rate=3.0, warmup=0, evaluate_every=2, patience=3),
    )
    assert report.stopped == "patience" and report.best_step == 0 and report.steps == 6
    assert report.held_out_after == report.held_out_before
    assert all(student.weights[n] is before[n] for n in before)
    later = distill(student, teacher, vectors(6, 32, 6), DistillSettings(steps=60, learning_rate=0.02, patience=2))
    assert later.held_out_after == min(loss for _, loss in later.held_out)
    assert dict(later.held_out)[later.best_step] == later.held_out_after


def test_a_seed_repeats_a_run_and_memory_for_targets_does_not_matter() -> None:
    teacher = affine()
    results = []
    for seed, memory in ((3, 1 << 30), (3, 1 << 30), (3, 0), (4, 1 << 30)):
        student = perturbed(teacher)
        settings = DistillSettings(steps=7, learning_rate=0.01, seed=seed, cache_bytes=memory)
        report = distill(student, teacher, vectors(5, 32, 6), settings)
        results.append((student.weights["linear.weight"].tensor(), report))
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]
    assert torch.equal(results[0][0], results[2][0])
    assert (results[0][1].cached, results[2][1].cached) == (1.0, 0.0)
    assert not torch.equal(results[0][0], results[3][0])


def test_half_precision_weights_stay_so() -> None:
    torch.manual_seed(0)
    teacher = trace(Affine(6, 4).bfloat16(), {"x": torch.zeros(32, 6, dtype=torch.bfloat16)})
    student = perturbed(teacher)
    data = [{"x": batch["x"].bfloat16()} for batch in vectors(4, 32, 6)]
    report = distill(student, teacher, data, DistillSettings(steps=60, learning_rate=0.02))
    assert report.best_step > 0
    assert all(student.weights[n].dtype == torch.bfloat16 for n in student.used_weights())


def test_no_steps_change_nothing_and_need_nothing() -> None:
    teacher = affine()
    student = teacher.clone()
    assert distill(student, teacher, [], DistillSettings(steps=0)).steps == 0
    assert student.mutations == teacher.mutations


def test_features_pull_values_inside_together() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.tanh(self.a(x)))

    torch.manual_seed(0)
    teacher = trace(Two(), {"x": torch.zeros(32, 6)})
    student = perturbed(teacher, 0.5)
    # The output is of no use: the map that makes it is another one, and stays.
    assert not torch.equal(student.weights["b.weight"].tensor(), teacher.weights["b.weight"].tensor())
    inner = [next(n for n in p.graph.nodes if "tanh" in str(n.target)) for p in (student, teacher)]
    settings = DistillSettings(steps=300, learning_rate=0.03, feature_weight=1e4, clip=1e6, patience=20)
    distill(student, teacher, vectors(6, 32, 6), settings, trainable=["a.weight", "a.bias"], features=[tuple(inner)])  # type: ignore[list-item]
    torch.testing.assert_close(
        student.weights["a.weight"].tensor(), teacher.weights["a.weight"].tensor(), rtol=0, atol=0.03
    )


class Rounded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("scale", torch.tensor(0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return dequantize(quantize(y, self.scale, None, dtype=torch.int8), self.scale)


def test_operators_without_gradients_are_named() -> None:
    teacher = trace(Rounded(), {"x": torch.zeros(32, 6)})
    with pytest.raises(PreconditionError, match=r"a program without gradients .*graphlathe\.quantize") as caught:
        distill(teacher.clone(), teacher, vectors(4, 32, 6), SHORT)
    assert caught.value.node == "quantize" and "before quantising" in str(caught.value)


def test_data_that_is_no_number_is_refused() -> None:
    teacher = affine()
    data = vectors(4, 32, 6)
    data[2]["x"][0, 0] = math.nan
    with pytest.raises(PreconditionError, match="holds NaN for batch 2"):
        distill(teacher.clone(), teacher, data, SHORT)
    student = teacher.clone()
    broken = student.weights["linear.bias"].tensor().clone()
    broken[0] = math.inf
    Rewriter(student, "test").weight("linear.bias", Weight.from_tensor(broken))
    with pytest.raises(PreconditionError, match="no finite number"):
        distill(student, teacher, vectors(4, 32, 6), SHORT)


def test_bad_requests_are_refused() -> None:
    teacher = affine()
    with pytest.raises(PreconditionError, match="needs calibration data"):
        distill(teacher.clone(), teacher, [], SHORT)
    with pytest.raises(PreconditionError, match="one batch only"):
        distill(teacher.clone(), teacher, vectors(1, 32, 6), SHORT)
    with pytest.raises(InputError, match=r"no weight 'linear.wieght'.*did you mean 'linear.weight'"):
        distill(teacher.clone(), teacher, vectors(2, 32, 6), SHORT, trainable=["linear.wieght"])
    with pytest.raises(InputError, match="trainable is empty"):
        distill(teacher.clone(), teacher, vectors(2, 32, 6), SHORT, trainable=[])
    with pytest.raises(InputError, match="x"):
        distill(teacher.clone(), teacher, [{"y": torch.zeros(32, 6)}] * 2, SHORT)
    for bad in ({"steps": -1}, {"learning_rate": 0.0}, {"hold_out": 1.0}, {"temperature": math.nan}, {"patience": 0}):
        with pytest.raises(InputError, match=next(iter(bad))):
            DistillSettings(**bad)  # type: ignore[arg-type]
    nothing = trace(nn.ReLU(), {"input": torch.zeros(3, 4)})
    with pytest.raises(PreconditionError, match="nothing to train"):
        distill(nothing.clone(), nothing, [{"input": torch.ones(3, 4)}] * 2, SHORT)


def test_without_held_out_batches_the_last_weights_stay() -> None:
    teacher = affine()
    student = perturbed(teacher)
    settings = DistillSettings(steps=150, learning_rate=0.03, hold_out=0)
    report = distill(student, teacher, vectors(1, 32, 6), settings)
    assert report.best_step == report.steps == 150 and report.held_out == [] and report.held_out_after is None
    assert report.train_loss[-1][1] < 0.01 * report.train_loss[0][1]
    assert report.tokens == 150 * 32


def test_the_schedule_rises_and_falls() -> None:
    factors = [schedule(step, 100, 10) for step in range(1, 101)]
    assert factors[9] == 1.0 and factors[-1] == pytest.approx(0.05)
    assert factors[:10] == sorted(factors[:10]) and factors[9:] == sorted(factors[9:], reverse=True)
    assert schedule(1, 1, 10) > 0


def test_the_split_is_what_is_trained_on() -> None:
    """Of one step, the held-out batches and one other are read: those in which a broken number is noticed."""
    teacher = affine()
    settings = DistillSettings(steps=1, hold_out=0.25)
    train, held = split(8, settings)
    assert sorted(train + held) == list(range(8)) and len(held) == 2
    noticed = []
    for index in range(8):
        data = vectors(8, 32, 6)
        data[index]["x"][0, 0] = math.nan
        try:
            distill(teacher.clone(), teacher, data, settings)
        except PreconditionError:
            noticed.append(index)
    assert len(noticed) == 3 and set(held) < set(noticed)


def test_positions_are_counted_without_padding() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert positions({"input_ids": torch.zeros(2, 3, dtype=torch.int64), "attention_mask": mask}) == 3
    assert positions({"input_ids": torch.zeros(2, 3, dtype=torch.int64)}) == 6
    assert positions({"pixels": torch.zeros(2, 3, 8, 8)}) == 2
