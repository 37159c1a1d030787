"""``shrp``: heads ranked by usage and cut, its plans, and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from graphlathe.ir.errors import PipelineError, PreconditionError
from graphlathe.ir.from_torch import trace
from graphlathe.ir.structure import structure
from graphlathe.passes.base import Context
from graphlathe.passes.heads.blocks import find_sites
from graphlathe.passes.heads.observed import Observed
from graphlathe.passes.heads.shrp import Shrp
from graphlathe.passes.heads.usage import head_usage, most_used
from graphlathe.passes.manager import PassManager
from graphlathe.passes.search.plan import Plan
from tests.passes.heads.small_encoder import (
    QUIET,
    Encoder,
    applied,
    data,
    encoder,
    hidden_inputs,
    inputs,
    run,
)
from tests.zoo_programs import traced, zoo_parameters


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
        Shrp(stage="expand").check(traced("plain_resnet"), context)
    with pytest.raises(PreconditionError, match="heads can be cut: no attention was found"):
        Shrp().run(traced("plain_resnet").clone(), context)


def test_heads_of_an_attention_that_is_spelled_out_are_cut() -> None:
    """A soft cap stands between the products: only `raise` knows that as an attention, but its heads are channels."""
    program = traced("gemma2")
    assert not structure(program).attention
    changed, stats = run(program, Shrp(heads=1), inputs("gemma2", 2))
    assert [len(row["kept"]) for row in stats.plan["heads"]] == [1, 1]
    assert changed.parameter_count < program.parameter_count


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
