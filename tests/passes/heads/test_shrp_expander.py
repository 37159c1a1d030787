"""``shrp``, stage ``expand``: routers, expanders and their closed forms, and the parameters that stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from graphlathe.ir.errors import PreconditionError
from graphlathe.ir.from_torch import trace
from graphlathe.ir.verify import relative_error, verify
from graphlathe.passes.heads.observed import affine_fit, linear_fit, unexplained
from graphlathe.passes.heads.planted import LOUD, loud_head_case
from graphlathe.passes.heads.router import add_router, routed_usage, trained_usage
from graphlathe.passes.heads.shrp import Shrp
from graphlathe.passes.search.compensation.distill import DistillSettings
from graphlathe.passes.search.plan import PARTIAL, Plan
from tests.passes.heads.small_encoder import (
    QUIET,
    applied,
    blocks_of,
    data,
    encoder,
    inputs,
    run,
)
from tests.zoo_programs import traced, zoo_parameters


@pytest.mark.parametrize(("router_steps", "ranking"), [(0, "top-1"), (1, "routed")])
def test_what_an_expander_learned_is_in_no_plan(router_steps: int, ranking: str, tmp_path: Path) -> None:
    _, program = encoder()
    settings = Shrp(stage="expand", heads=1, steps=1, router_steps=router_steps)
    changed, stats = run(program, settings, data())
    plan = Plan.from_json(stats.plan)
    assert plan.compensation == PARTIAL and plan.budget["after"] == changed.parameter_count
    assert [list(d.kept) for d in plan.decisions] == [row["kept"] for row in stats.plan["heads"]]
    assert {d.reason for d in plan.decisions} == {f"lowest {ranking} usage"}
    assert any("expanders and training are not in it" in note for note in stats.notes)
    with pytest.raises(PreconditionError, match="holds only what"):
        applied(program, stats.plan, tmp_path)


@pytest.mark.parametrize("name", zoo_parameters(["bert", "llama"], quick=["bert", "llama"]))
def test_routing_with_all_heads_is_the_dense_model(name: str) -> None:
    program = traced(name)
    routed = program.clone()
    for block in blocks_of(routed):
        add_router(routed, block, None, torch.ones(block.heads.size))
    verify(routed, 2)
    for batch in inputs(name):
        assert relative_error(routed.run(batch), program.run(batch)) == 0.0


@pytest.mark.parametrize("name", zoo_parameters(["bert", "llama"], quick=["bert", "llama"]))
def test_a_router_of_all_heads_chooses_all(name: str) -> None:
    """With as many choices as heads the hard gates are one, whatever the logits say."""
    program = traced(name)
    routed = program.clone()
    for block in blocks_of(routed):
        add_router(routed, block, block.heads.size, torch.rand(block.heads.size))
    for batch in inputs(name):
        assert relative_error(routed.run(batch), program.run(batch)) < 1e-5


@torch.no_grad()
def test_a_routed_token_uses_the_heads_with_the_largest_logits() -> None:
    """Against the eager model, with the router's formula written out; and usage counts what was chosen."""
    model, program = encoder(layers=1)
    batch = data(1)[0]
    routed = program.clone()
    block = blocks_of(routed)[0]
    router = add_router(routed, block, 2, torch.ones(4))
    generator = torch.Generator().manual_seed(5)
    matrix, bias = torch.randn(4, 16, generator=generator), torch.randn(4, generator=generator)
    for name, value in zip(router.weights, (matrix, bias), strict=True):
        routed.weights[name] = type(routed.weights[name]).from_tensor(value)
    m: Any = model.layers[0]
    x = model.embed(batch["ids"])
    chosen = (x @ matrix.T + bias).topk(2, -1).indices
    gates = torch.zeros(3, 9, 4).scatter(-1, chosen, 1.0)
    o = model.outputs(m, m["n1"](x), batch["attention_mask"][:, None, None, :] != 0)
    y = x + m["o"](o * gates.repeat_interleave(6, -1))
    wanted = y + m["down"](F.gelu(m["up"](m["n2"](y))))
    torch.testing.assert_close(routed(**batch), wanted, rtol=1e-5, atol=1e-5)
    usage = routed_usage(routed, [block], [router], [batch])[0]
    torch.testing.assert_close(usage, gates[batch["attention_mask"] != 0].double().mean(0), rtol=0, atol=1e-12)


def test_training_teaches_the_router_which_head_matters() -> None:
    """Started at another head, the router turns to the only one that says anything."""
    case = loud_head_case(Shrp())
    generator = torch.Generator().manual_seed(1)
    batches = [{"ids": torch.randint(0, 29, (4, 9), generator=generator)} for _ in range(6)]
    blocks = blocks_of(case.program)
    wrong = [torch.nn.functional.one_hot(torch.tensor(1), 4).double() * 0.2 + 0.2 for _ in blocks]
    settings = DistillSettings(steps=60, learning_rate=0.1, warmup=0, evaluate_every=10, patience=6)
    usage, report = trained_usage(case.program, case.program, blocks, [1, 1], wrong, batches, settings)
    assert [int(u.argmax()) for u in usage] == list(LOUD)
    assert report.held_out_after is not None and report.held_out_before is not None
    assert report.held_out_after < report.held_out_before


@torch.no_grad()
@pytest.mark.parametrize("post", [False, True])
def test_the_expander_equals_its_formula(post: bool) -> None:
    """``z = n2(n1(x) + E(o'))`` with norms after the sums, ``x + E(o')`` with norms before, written out eagerly."""
    model, program = encoder(post=post)
    batches = data()
    changed, stats = run(program, Shrp(stage="expand", heads=2, width=12, **QUIET), batches)
    batch = data(1, seed=3)[0]
    mask = batch["attention_mask"][:, None, None, :] != 0
    x = model.embed(batch["ids"])
    weights = {n: w.tensor() for n, w in changed.weights.items()}
    for index, m in enumerate(model.layers):
        layer: Any = m
        v, c, u, b = (
            weights[f"shrp.{index}.expander.{p}"] for p in ("up.weight", "up.bias", "down.weight", "down.bias")
        )
        o = model.outputs(layer, x if post else layer["n1"](x), mask).unflatten(-1, (4, 6))
        o = o[..., stats.plan["heads"][index]["kept"], :].flatten(-2)
        e = F.gelu(o @ v.T + c) @ u.T + b
        x = layer["n2"](layer["n1"](x) + e) if post else x + e
    torch.testing.assert_close(changed(**batch), x, rtol=1e-4, atol=1e-4)


def test_the_closed_form_beats_any_other_output_map() -> None:
    """Ridge regression against torch's least squares on a stacked system, in float64."""
    torch.manual_seed(0)
    x, y, start = torch.randn(40, 5).double(), torch.randn(40, 3).double(), torch.randn(3, 5).double()
    for old in (None, start):
        weight, bias = affine_fit(x, y, 0.1, old)
        centred, goal = x - x.mean(0), y - y.mean(0)
        level = (0.1 * (centred.T @ centred).diagonal().mean()).sqrt()
        pull = level * (old if old is not None else torch.zeros(3, 5).double()).T
        stacked = torch.linalg.lstsq(torch.cat([centred, level * torch.eye(5)]), torch.cat([goal, pull])).solution
        torch.testing.assert_close(weight, stacked.T, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(bias, y.mean(0) - weight @ x.mean(0))
    torch.testing.assert_close(linear_fit(x, y, 0.0, start), torch.linalg.lstsq(x, y).solution.T)
    assert unexplained(y, y) == 0.0 and unexplained(y, y.mean(0).expand_as(y)) == pytest.approx(1.0)


@torch.no_grad()
def test_an_expander_of_everything_gives_back_what_heads_can_say() -> None:
    """A feed-forward layer without effect: the expander of all heads must say what the output projection said."""
    model, _ = encoder(layers=1)
    m: Any = model.layers[0]
    m["down"].weight.zero_()
    program = trace(model, data(1)[0])
    batches = data(12)
    changed, stats = run(program, Shrp(stage="expand", share=1.0, width=200, **QUIET), batches)
    assert stats.plan["expanders"][0]["unexplained"] < 1e-3
    for batch in batches[:2]:
        kept = batch["attention_mask"] != 0
        error = (changed(**batch) - program(**batch))[kept].norm() / program(**batch)[kept].norm()
        assert float(error) < 0.02


@torch.no_grad()
@pytest.mark.parametrize("post", [False, True])
def test_a_stream_expander_of_everything_is_the_dense_model(post: bool) -> None:
    _, program = encoder(post=post)
    changed, _ = run(program, Shrp(stage="expand", reads="stream", share=1.0, **QUIET), data())
    for batch in data(2, seed=4):
        kept = batch["attention_mask"] != 0
        torch.testing.assert_close(changed(**batch)[kept], program(**batch)[kept], rtol=1e-4, atol=1e-4)


def test_a_stream_expander_finds_units_that_do_nothing() -> None:
    """Hidden units that never fire go first, and nothing is lost without them."""
    model, _ = encoder(layers=2)
    with torch.no_grad():
        for m in model.layers:
            m["down"].weight[:, ::2] = 0  # type: ignore[index]
    program = trace(model, data(1)[0])
    changed, stats = run(program, Shrp(stage="expand", reads="stream", share=1.0, width=10, **QUIET), data())
    assert all(row["width"] == 10 and row["unexplained"] < 1e-6 for row in stats.plan["expanders"])
    batch = data(1, seed=6)[0]
    kept = batch["attention_mask"] != 0
    torch.testing.assert_close(changed(**batch)[kept], program(**batch)[kept], rtol=1e-3, atol=1e-3)
    assert program.parameter_count - changed.parameter_count == 2 * 10 * (16 + 1 + 16)


@pytest.mark.parametrize("reads", ["heads", "stream"])
@pytest.mark.parametrize(
    ("spelled", "post"), [("flat", False), ("flat", True), ("turned", False), ("rolled", False), ("stream", False)]
)
def test_how_positions_are_laid_out_makes_no_difference(spelled: str, post: bool, reads: str) -> None:
    """Maps over [batch * tokens] or [tokens * batch] in between: the same heads, the same closed forms."""
    settings = Shrp(stage="expand", reads=reads, heads=2, width=12, router_steps=3, steps=0)
    batches = data()
    if spelled in ("turned", "rolled"):
        # Usage reads rows as they come, and a mask is only known for [batch, tokens] and [batch * tokens].
        batches = [{**batch, "attention_mask": torch.ones_like(batch["attention_mask"])} for batch in batches]
    plain, other = (run(encoder(spelled=s, post=post)[1], settings, batches) for s in ("", spelled))
    assert other[1].plan["heads"] == plain[1].plan["heads"]
    assert other[0].parameter_count == plain[0].parameter_count
    verify(other[0])
    for batch in data(2, seed=4):
        kept = batch["attention_mask"] != 0
        torch.testing.assert_close(other[0](**batch)[kept], plain[0](**batch)[kept], rtol=1e-4, atol=1e-4)


_FITTING = ("llama", "bert", "gpt2", "vit", "swin", "opt")


@pytest.mark.parametrize("reads", ["heads", "stream"])
@pytest.mark.parametrize(
    "name",
    zoo_parameters(
        [*_FITTING, "qwen3", "phi3", "olmo2", "biogpt", "roberta", "distilbert", "modernbert", "bart",
         "m2m_100", "umt5", "dinov2", "clip_vision", "yolos"],
        quick=_FITTING[:3],
    ),
)  # fmt: skip
def test_blocks_of_the_zoo_as_they_are_traced(name: str, reads: str) -> None:
    """One head and half of the units in every block, without any other pass before, and every block of the model."""
    program = traced(name)
    changed, stats = run(program, Shrp(stage="expand", reads=reads, router_steps=1, steps=1), inputs(name))
    verify(changed)
    assert stats.hits == len(stats.plan["expanders"]) >= 2
    assert changed.parameter_count < program.parameter_count
    assert all(bool(v.isfinite().all()) for v in changed.run(changed.feeds(**inputs(name)[0])).values())


def test_without_features_the_outputs_alone_are_trained() -> None:
    """The same closed form is judged by the outputs, and with a weight by the streams after the blocks as well."""
    program, batches = encoder()[1], data(6)
    settings: dict[str, Any] = {"stage": "expand", "heads": 1, "width": 8, "router_steps": 0, "steps": 5}

    def held_out(weight: float) -> float:
        return run(program, Shrp(**settings, feature_weight=weight), batches)[1].plan["distillation"]["held_out_before"]

    alone, beside, more = (held_out(weight) for weight in (0.0, 1.0, 3.0))
    assert 0 < alone < beside
    assert more - alone == pytest.approx(3 * (beside - alone), rel=1e-4)


def test_a_layer_of_bert_base_keeps_the_published_number_of_parameters() -> None:
    """One layer: query, key and value of one head, the expander 64 -> 3072 -> 768, and both norms."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig(num_hidden_layers=1, vocab_size=50)).eval()
    tokens = torch.arange(8).reshape(1, 8)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    changed, _ = run(trace(model, batch), Shrp(stage="expand", heads=1, **QUIET), [batch])
    names = [n for n in changed.used_weights() if n.startswith(("encoder.", "shrp."))]
    layer = sum(changed.weights[n].numel for n in names)
    assert layer == 3 * (768 * 64 + 64) + (64 * 3072 + 3072) + (3072 * 768 + 768) + 2 * 2 * 768
    whole, rest = 109_482_240, 109_482_240 - 12 * sum(p.numel() for p in model.encoder.parameters())
    assert rest + 12 * layer == 56_953_344
    assert f"{(rest + 12 * layer) / whole - 1:+.2%}" == "-47.98%"


@pytest.mark.slow
def test_bert_base_keeps_the_published_number_of_parameters() -> None:
    """-47.98 %: 56.95 of 109.48 million, with one head and one expander in each of twelve layers."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig()).eval()
    tokens = torch.arange(8).reshape(1, 8)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    program = trace(model, batch)
    changed, stats = run(program, Shrp(stage="expand", heads=1, **QUIET), [batch])
    counts = [sum(p.weights[n].numel for n in p.used_weights() if p.weights[n].dtype.is_floating_point)
              for p in (program, changed)]  # fmt: skip
    assert counts == [109_482_240, 56_953_344]
    assert f"{counts[1] / counts[0] - 1:+.2%}" == "-47.98%"
    assert stats.hits == 12 and [len(row["kept"]) for row in stats.plan["heads"]] == [1] * 12


@pytest.mark.parametrize("reads", ["heads", "stream"])
def test_distillation_improves_on_the_closed_form(reads: str) -> None:
    _, program = encoder(post=True)
    batches = data(10)
    settings = {"stage": "expand", "reads": reads, "heads": 2, "width": 8, "router_steps": 4}
    drifts = []
    for steps in (0, 120):
        changed, stats = run(program, Shrp(**settings, steps=steps, learning_rate=5e-3), batches)  # type: ignore[arg-type]
        batch = data(1, seed=9)[0]
        kept = batch["attention_mask"] != 0
        drifts.append(float((changed(**batch) - program(**batch))[kept].norm()))
    assert drifts[1] < 0.9 * drifts[0]
    report = stats.plan["distillation"]
    assert report["best_step"] > 0 and report["held_out_after"] < report["held_out_before"]
    assert stats.plan["router"]["steps"] == 4
    assert json.loads(json.dumps(stats.plan)) == json.loads(json.dumps(stats.plan, allow_nan=False))
