"""``shrp``: the ranking by brute force, the routed graph against the dense one, the expander against its formula."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphlathe.ir.errors import PipelineError, PreconditionError
from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.ir.structure import structure
from graphlathe.ir.verify import relative_error, verify
from graphlathe.passes.base import Batch, Context, Pass, Stats
from graphlathe.passes.heads.blocks import HeadBlock, find_sites, head_blocks
from graphlathe.passes.heads.observed import Observed, affine_fit, linear_fit, unexplained
from graphlathe.passes.heads.planted import LOUD, loud_head_case
from graphlathe.passes.heads.router import add_router, routed_usage, trained_usage
from graphlathe.passes.heads.shrp import Shrp
from graphlathe.passes.heads.usage import head_usage, most_used
from graphlathe.passes.manager import PassManager
from graphlathe.passes.search.apply_plan import ApplyPlan
from graphlathe.passes.search.compensation.distill import DistillSettings
from graphlathe.passes.search.plan import PARTIAL, Plan
from graphlathe.tools import zoo
from tests.zoo_programs import traced, zoo_parameters

QUIET: dict[str, Any] = {"steps": 0, "router_steps": 0}


def inputs(name: str, count: int = 3) -> list[dict[str, Any]]:
    """Calibration batches of a zoo model."""
    model = zoo.get(name)
    sizes = (list(model.unseen_sizes) * count)[:count]
    return [dict(traced(name).feeds(**model.inputs(each))) for each in sizes]


def run(program: Program, settings: Pass, batches: list[dict[str, Any]]) -> tuple[Program, Stats]:
    changed = program.clone()
    context = Context(calibration=batches)
    settings.check(changed, context)
    stats = settings.run(changed, context)
    settings.ensure(program, changed, stats)
    verify(changed, 2)
    return changed, stats


def blocks_of(program: Program) -> list[HeadBlock]:
    found = structure(program)
    return head_blocks(program, found, find_sites(program, found), Stats(), None)


class Encoder(nn.Module):
    """A pre-norm encoder in whose attention heads are easy to cut by hand."""

    def __init__(self, heads: int = 4, dim: int = 6, width: int = 20, layers: int = 2, post: bool = False) -> None:
        super().__init__()
        self.heads, self.dim, self.post = heads, dim, post
        stream = 16
        self.embed = nn.Embedding(31, stream)
        names = {"q": heads * dim, "k": heads * dim, "v": heads * dim}
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {n: nn.Linear(stream, size) for n, size in names.items()}
                | {
                    "o": nn.Linear(heads * dim, stream),
                    "up": nn.Linear(stream, width),
                    "down": nn.Linear(width, stream),
                }
                | {"n1": nn.LayerNorm(stream), "n2": nn.LayerNorm(stream)}
            )
            for _ in range(layers)
        )

    def outputs(self, m: Any, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, heads * dim]."""
        q, k, v = (m[n](x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for n in "qkv")
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        mask = attention_mask[:, None, None, :] != 0
        x = self.embed(ids)
        for m in self.layers:
            if self.post:
                x = m["n1"](x + m["o"](self.outputs(m, x, mask)))
                x = m["n2"](x + m["down"](F.gelu(m["up"](x))))
            else:
                x = x + m["o"](self.outputs(m, m["n1"](x), mask))
                x = x + m["down"](F.gelu(m["up"](m["n2"](x))))
        return x


def data(count: int = 4, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        mask = torch.ones(3, 9, dtype=torch.int64)
        mask[1, 6:] = 0
        batches.append({"ids": torch.randint(0, 31, (3, 9), generator=generator), "attention_mask": mask})
    return batches


def encoder(seed: int = 0, **form: Any) -> tuple[Encoder, Program]:
    torch.manual_seed(seed)
    model = Encoder(**form).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    dynamic = {"ids": {0: "B", 1: "S"}, "attention_mask": {0: "B", 1: "S"}}
    return model, trace(model, data(1)[0], dynamic=dynamic)


def hidden_inputs(model: Encoder, batch: Batch) -> list[tuple[Any, torch.Tensor]]:
    """Each layer with what its attention reads."""
    found = []
    mask = batch["attention_mask"][:, None, None, :] != 0
    x = model.embed(batch["ids"])
    for m in model.layers:
        if model.post:
            found.append((m, x))
            x = m["n1"](x + m["o"](model.outputs(m, x, mask)))  # type: ignore[index]
            x = m["n2"](x + m["down"](F.gelu(m["up"](x))))  # type: ignore[index]
        else:
            found.append((m, m["n1"](x)))  # type: ignore[index]
            x = x + m["o"](model.outputs(m, m["n1"](x), mask))  # type: ignore[index]
            x = x + m["down"](F.gelu(m["up"](m["n2"](x))))  # type: ignore[index]
    return found


@torch.no_grad()
def test_usage_equals_brute_force() -> None:
    """Head by head and token by token in the eager model, without masked tokens."""
    model, program = encoder()
    batches = data()
    sites = find_sites(program, structure(program)).heads
    found = head_usage(program, sites, batches, lambda items, total, label: items)
    for layer in range(2):
        counts = torch.zeros(4, dtype=torch.float64)
        for batch in batches:
            m, x = hidden_inputs(model, batch)[layer]
            o = model.outputs(m, x, batch["attention_mask"][:, None, None, :] != 0)
            for b, t in batch["attention_mask"].nonzero().tolist():
                terms = [m["o"].weight[:, h * 6 : h * 6 + 6] @ o[b, t, h * 6 : h * 6 + 6] for h in range(4)]
                counts[max(range(4), key=lambda h: float(terms[h].norm()))] += 1
        torch.testing.assert_close(found[layer], counts / counts.sum(), rtol=0, atol=1e-12)


@torch.no_grad()
def silence(model: Encoder, heads: Sequence[Sequence[int]]) -> None:
    """Let some heads of each layer write nothing."""
    for m, silent in zip(model.layers, heads, strict=True):
        for head in silent:
            m["o"].weight[:, head * 6 : head * 6 + 6] = 0  # type: ignore[index]


@torch.no_grad()
def test_pruned_heads_equal_an_eager_model_whose_heads_write_nothing() -> None:
    model, program = encoder()
    batches = data()
    changed, stats = run(program, Shrp(heads=2), batches)
    assert all(len(row["kept"]) == 2 for row in stats.plan["heads"])
    silence(model, [[h for h in range(4) if h not in row["kept"]] for row in stats.plan["heads"]])
    for batch in batches:
        torch.testing.assert_close(changed(**batch), model(**batch), rtol=1e-5, atol=1e-5)
    per_head = 3 * (16 * 6 + 6) + 6 * 16
    assert program.parameter_count - changed.parameter_count == 2 * 2 * per_head
    assert json.dumps(stats.plan)


class Normed(Encoder):
    """A norm over the outputs of all heads."""

    def outputs(self, m: Any, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(super().outputs(m, x, mask) * m.get_buffer("silent"), (self.heads * self.dim,), eps=1e-5)


@torch.no_grad()
def test_a_norm_over_heads_goes_on_counting_those_that_went() -> None:
    torch.manual_seed(0)
    model = Normed()
    for m in model.layers:
        m.register_buffer("silent", torch.ones(24))
    program = trace(model, data(1)[0])
    changed, stats = run(program, Shrp(heads=2), data())
    for m, row in zip(model.layers, stats.plan["heads"], strict=True):
        m.get_buffer("silent")[[i for i in range(24) if i // 6 not in row["kept"]]] = 0
    for batch in data(2, seed=3):
        torch.testing.assert_close(changed(**batch), model(**batch), rtol=1e-5, atol=1e-5)


def applied(program: Program, plan: dict[str, Any], folder: Path) -> Program:
    Plan.from_json(plan).save(folder / "plan.json")
    return run(program, ApplyPlan(path=str(folder / "plan.json")), [])[0]


@pytest.mark.parametrize("name", zoo_parameters(["bert", "llama", "gpt2", "qwen3"], quick=["bert", "llama"]))
def test_its_plan_does_it_again(name: str, tmp_path: Path) -> None:
    program = traced(name)
    changed, stats = run(program, Shrp(share=0.5), inputs(name))
    again = applied(program, stats.plan, tmp_path)
    assert again.fingerprint() == changed.fingerprint() != program.fingerprint()
    assert again.to_text().partition("\n")[2] == changed.to_text().partition("\n")[2]
    assert stats.plan["budget"] == {
        "unit": "params", "before": program.parameter_count, "after": changed.parameter_count
    }  # fmt: skip
    decisions = Plan.from_json(stats.plan).decisions
    assert [list(d.kept) for d in decisions] == [row["kept"] for row in stats.plan["heads"]]
    assert [d.scores for d in decisions] == [tuple(row["usage"]) for row in stats.plan["heads"]]
    assert {(d.kind, d.reason) for d in decisions} == {("heads", "lowest top-1 usage")}


@torch.no_grad()
def test_its_plan_may_be_edited(tmp_path: Path) -> None:
    model, program = encoder()
    _, stats = run(program, Shrp(heads=2), data())
    edits = [[0], [3, 1]]
    for site, heads in zip(stats.plan["sites"], edits, strict=True):
        site["removed"] = heads
    after = applied(program, stats.plan, tmp_path)
    silence(model, edits)
    for batch in data(2, seed=5):
        torch.testing.assert_close(after(**batch), model(**batch), rtol=1e-5, atol=1e-5)


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


def test_shared_key_heads_are_ranked_and_cut_as_groups() -> None:
    program = traced("llama")
    changed, stats = run(program, Shrp(share=0.5), inputs("llama"))
    before, after = structure(program).attention, structure(changed).attention
    assert {row["unit"] for row in stats.plan["heads"]} == {"KV group"}
    assert [a.kv_heads * 2 for a in after] == [b.kv_heads for b in before]
    assert [a.heads * 2 for a in after] == [b.heads for b in before]


def test_most_used_breaks_ties_by_number() -> None:
    assert most_used(torch.tensor([0.2, 0.3, 0.2, 0.3]), 3) == [0, 1, 3]
    assert most_used(torch.tensor([0.0, 0.0]), 1) == [0]


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


def test_only_the_blocks_that_are_named_change() -> None:
    _, program = encoder(layers=3)
    changed, stats = run(program, Shrp(stage="expand", blocks=(1,), heads=1, **QUIET), data())
    assert stats.attempts == stats.hits == 1
    assert [row["block"] for row in stats.plan["heads"]] == [1]
    assert {n for n in changed.used_weights() - program.used_weights()} == {
        f"shrp.1.expander.{part}" for part in ("up.weight", "up.bias", "down.weight", "down.bias")
    }
    gone = program.used_weights() - changed.used_weights()
    assert gone and all(".1." in name for name in gone)
    changed, _ = run(program, Shrp(blocks=(0, 2), heads=1), data())
    assert [a.heads for a in structure(changed).attention] == [1, 4, 1]


def test_blocks_of_another_form_are_misses_with_reasons() -> None:
    class Parallel(Encoder):
        def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)
            for m in self.layers:
                o = m["o"](self.outputs(m, m["n1"](x), attention_mask[:, None, None, :] != 0))  # type: ignore[index]
                x = x + (o + m["down"](F.gelu(m["up"](m["n2"](x)))))  # type: ignore[index]
            return x

    with pytest.raises(PreconditionError, match=r"side by side[\s\S]*stage=prune"):
        run(trace(Parallel(), data(1)[0]), Shrp(stage="expand", **QUIET), data())

    class Lopsided(Encoder):
        def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            x = super().forward(ids, attention_mask)
            m: Any = self.layers[0]
            return x + m["o"](self.outputs(m, m["n1"](x), attention_mask[:, None, None, :] != 0))

    torch.manual_seed(0)
    program = trace(Lopsided(layers=3), data(1)[0])
    _, stats = run(program, Shrp(stage="expand", **QUIET), data())
    assert (stats.attempts, stats.hits) == (4, 2)
    assert "its branches are attention, not attention and then mlp" in stats.misses
    assert "its heads are cut together with those of other blocks" in stats.misses


def test_a_second_run_changes_nothing_more() -> None:
    _, program = encoder()
    once, _ = run(program, Shrp(heads=2), data())
    twice, _ = run(once, Shrp(heads=2), data())
    assert twice.to_text() == once.to_text()
    single, _ = run(program, Shrp(heads=1), data())
    with pytest.raises(PreconditionError, match="it has one head"):
        run(single, Shrp(heads=1), data())


def test_through_the_manager() -> None:
    program = traced("bert")
    manager = PassManager(
        "shrp" if False else Shrp(stage="expand", steps=2, router_steps=2), calibration=inputs("bert"), verify=2
    )
    after, report = manager.run(program)
    assert after.parameter_count < program.parameter_count
    assert report.rows[-1].drift is not None


def test_bad_requests_are_refused() -> None:
    _, program = encoder()
    with pytest.raises(PipelineError, match="both heads and share"):
        Shrp(heads=2, share=0.5)
    context = Context(calibration=data())
    with pytest.raises(PreconditionError, match="no block 7"):
        Shrp(blocks=(7,)).check(program, context)
    with pytest.raises(PreconditionError, match="needs calibration data"):
        Shrp().check(program, Context())
    Shrp(share=1.0).check(program, Context())
    with pytest.raises(PreconditionError, match="no attention was found"):
        Shrp().check(traced("plain_resnet"), context)


def test_data_that_is_no_number_is_refused() -> None:
    class Soft(Encoder):
        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            mask = attention_mask[:, None, None, :] != 0
            for m in self.layers:
                x = x + m["o"](self.outputs(m, m["n1"](x), mask))  # type: ignore[index]
                x = x + m["down"](F.gelu(m["up"](m["n2"](x))))  # type: ignore[index]
            return x

    batch = {"x": torch.randn(3, 9, 16), "attention_mask": torch.ones(3, 9, dtype=torch.int64)}
    program = trace(Soft(), batch)
    batch["x"][0, 0, 0] = math.nan
    context = Context(calibration=[batch])
    for settings in (Shrp(), Shrp(stage="expand", **QUIET)):
        with pytest.raises(PreconditionError, match=r"the usage of the .* is not a number"):
            settings.run(program.clone(), context)
    with pytest.raises(PreconditionError, match="no finite number for calibration batch 0"):
        Observed(program, [batch]).rows([next(n for n in program.graph.nodes if "linear" in n.name)])


def test_neutral_and_planted_laws() -> None:
    case = Shrp.planted()
    changed, stats = run(case.program, case.settings, list(map(dict, case.calibration)))  # type: ignore[arg-type]
    assert case.found(changed, stats)
    same, stats = run(case.program, Shrp.neutral(), [])
    assert same.to_text() == case.program.to_text()
    assert not Plan.from_json(stats.plan).changes
