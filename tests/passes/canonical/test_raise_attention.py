"""``raise-attention``: every spelling becomes one operator with the same outputs; what is no attention stays."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

import graphlathe
from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.ir.rewrite import is_op
from graphlathe.ir.verify import verify
from graphlathe.kernels import attention
from graphlathe.passes.base import Context, Stats
from graphlathe.passes.canonical.canonicalize import Canonicalize
from graphlathe.passes.canonical.raise_attention import RaiseAttention
from tests.passes.rewriting import assert_same_outputs, rewritten

aten = torch.ops.aten
HEADS, WIDTH, LOWEST = 4, 8, torch.finfo(torch.float32).min

Spelling = Callable[[Tensor, Tensor, Tensor], Tensor]


def causal(q: Tensor) -> Tensor:
    positions = torch.arange(q.shape[-2])
    return positions[None, :] <= positions[:, None]


def additive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.where(causal(q), 0.0, LOWEST)
    return (q @ k.transpose(-1, -2) / math.sqrt(WIDTH) + mask).softmax(-1) @ v


def filled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q * WIDTH**-0.5) @ k.transpose(-1, -2)
    return scores.masked_fill(~causal(q), -math.inf).softmax(-1) @ v


def chosen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.permute(0, 1, 3, 2)) * WIDTH**-0.5
    return torch.where(causal(q), scores, -1e9).softmax(-1) @ v


def multiplied(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = causal(q).float()
    scores = q @ k.transpose(-1, -2) / math.sqrt(WIDTH)
    return (scores * keep - 1e4 * (1 - keep)).softmax(-1) @ v


def triangle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).tril()
    return torch.where(mask, q @ k.transpose(-1, -2) * WIDTH**-0.5, LOWEST).softmax(-1) @ v


def both_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    half = WIDTH**-0.25
    return ((q * half) @ (k.transpose(-1, -2) * half) + torch.where(causal(q), 0.0, -math.inf)).softmax(-1) @ v


def contracted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(WIDTH)
    weights = scores.masked_fill(~causal(q), LOWEST).softmax(-1)
    return torch.einsum("bhij,bhjd->bihd", weights, v).transpose(1, 2)


def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads in the batch; unfolded for the mask, as in Bloom and XGLM."""
    batch, length = q.shape[0], q.shape[2]
    q, k, v = (t.reshape(-1, t.shape[2], WIDTH) for t in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)) * WIDTH**-0.5
    scores = scores.view(batch, HEADS, length, length) + torch.where(causal(q), 0.0, LOWEST)
    weights = scores.view(-1, length, length).softmax(-1)
    return torch.bmm(weights, v).view(batch, HEADS, length, WIDTH)


def batch_first_add(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, length = q.shape[0], q.shape[2]
    q, k, v = (t.reshape(-1, t.shape[2], WIDTH) for t in (q, k, v))
    zero = torch.zeros(1, 1, length).expand(q.shape[0], 1, length)
    scores = torch.baddbmm(zero, q, k.transpose(1, 2), beta=1.0, alpha=WIDTH**-0.5)
    scores = scores.view(batch, HEADS, length, length).masked_fill(~causal(q), LOWEST)
    return torch.bmm(scores.softmax(-1).view(-1, length, length), v).view(batch, HEADS, length, WIDTH)


CAUSAL: dict[str, Spelling] = {
    f.__name__: f
    for f in (additive, filled, chosen, multiplied, triangle, both_scaled, contracted, folded, batch_first_add)
}


class Model(nn.Module):
    """Queries, keys and values by linear maps, then a spelling."""

    def __init__(self, spelling: Spelling, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.spelling = spelling
        self.kv_heads = kv_heads
        self.q = nn.Linear(16, HEADS * WIDTH)
        self.kv = nn.Linear(16, 2 * kv_heads * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        k, v = (t.unflatten(-1, (self.kv_heads, WIDTH)).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
        return self.spelling(q, k, v)


def raised(spelling: Spelling, kv_heads: int = HEADS) -> tuple[Program, Program, Stats]:
    torch.manual_seed(1)
    model = Model(spelling, kv_heads).eval()
    before = trace(model, (torch.randn(2, 6, 16),), dynamic={"x": {0: "B", 1: "S"}})
    Canonicalize().run(before, Context())
    after = before.clone()
    stats = RaiseAttention().run(after, Context())
    verify(after, 2)
    assert_same_outputs(after, before)
    again = after.clone()
    RaiseAttention().run(again, Context())
    assert again.mutations == 0
    return before, after, stats


def operator(program: Program) -> fx.Node:
    found = [n for n in program.graph.nodes if is_op(n, aten.scaled_dot_product_attention, attention)]
    assert len(found) == 1, program.to_text()
    return found[0]


@pytest.mark.parametrize("spelling", CAUSAL.values(), ids=CAUSAL)
def test_every_causal_spelling_is_one_causal_operator(spelling: Spelling) -> None:
    _, after, stats = raised(spelling)
    node = operator(after)
    assert node.kwargs.get("is_causal") is True and len(node.args) == 3 and "attn_mask" not in node.kwargs
    assert "scale" not in node.kwargs, "the default scale needs no number"
    assert not any(is_op(n, aten.softmax) for n in after.graph.nodes)
    assert not stats.misses


def _repeated(x: Tensor, groups: int) -> Tensor:
    batch, heads, length, width = x.shape
    return x[:, :, None].expand(batch, heads, groups, length, width).reshape(batch, heads * groups, length, width)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("how", ["expand", "interleave", "sdpa"])
def test_repeated_keys_and_values_become_groups(kv_heads: int, how: str) -> None:
    groups = HEADS // kv_heads

    def spelling(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if how == "interleave":
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        else:
            k, v = _repeated(k, groups), _repeated(v, groups)
        if how == "sdpa":
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return additive(q, k, v)

    _, after, _ = raised(spelling, kv_heads)
    node = operator(after)
    assert node.kwargs["enable_gqa"] is True
    assert node.args[1].meta["val"].shape[1] == kv_heads  # type: ignore[union-attr]
    assert node.args[2].meta["val"].shape[1] == kv_heads  # type: ignore[union-attr]


def test_one_head_that_is_broadcast_is_a_group() -> None:
    _, after, _ = raised(additive, kv_heads=1)
    assert operator(after).kwargs["enable_gqa"] is True


def test_a_soft_cap_takes_our_operator() -> None:
    def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.tanh(q @ k.transpose(-1, -2) * 0.3 / 5.0) * 5.0
        return (scores + torch.where(causal(q), 0.0, LOWEST)).softmax(-1) @ v

    _, after, _ = raised(capped)
    node = operator(after)
    assert node.target is attention
    assert node.kwargs == {"is_causal": True, "scale": pytest.approx(0.3), "softcap": 5.0}


def test_sinks_take_our_operator() -> None:
    sinks = torch.randn(HEADS)

    def sinking(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) * WIDTH**-0.5
        columns = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
        joined = torch.cat([scores, columns], -1)
        joined = joined - joined.max(-1, keepdim=True).values
        return joined.softmax(-1)[..., :-1] @ v

    _, after, _ = raised(sinking)
    node = operator(after)
    assert node.target is attention and "sinks" in node.kwargs


def test_a_window_and_a_bias_stay_in_the_mask() -> None:
    def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        positions = torch.arange(q.shape[-2])
        near = causal(q) & (positions[None, :] > positions[:, None] - 3)
        slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625]).reshape(1, HEADS, 1, 1)
        scores = q @ k.transpose(-1, -2) * WIDTH**-0.5 + slopes * positions
        return scores.masked_fill(~near, LOWEST).softmax(-1) @ v

    _, after, _ = raised(windowed)
    assert "attn_mask" in operator(after).kwargs and "is_causal" not in operator(after).kwargs


def test_a_query_whose_keys_are_all_hidden_keeps_its_mean() -> None:
    """The lowest finite number hides no key when it is added to all of them."""

    class Hidden(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
            return (q @ k.transpose(-1, -2)).masked_fill(seen == 0, LOWEST).softmax(-1) @ v

    q, k, v = (torch.randn(1, 2, 5, 4) for _ in range(3))
    seen = torch.ones(1, 1, 5, 5)
    seen[..., 2, :] = 0
    after = graphlathe.optimize(Hidden(), (q, k, v, seen), passes=["raise-attention"])
    operator(after)
    torch.testing.assert_close(after(q, k, v, seen)[0, :, 2], v[0].mean(1))


def test_a_mask_that_multiplies_is_found_below_another_mask() -> None:
    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = causal(q).float()
        scores = q @ k.transpose(-1, -2) / math.sqrt(WIDTH) * seen - 1e4 * (1 - seen)
        return (scores + k[:, :1, None, :, 0] * 0.1).softmax(-1) @ v

    _, after, _ = raised(both)
    assert "attn_mask" in operator(after).kwargs


def refused(spelling: Spelling) -> str:
    before, after, stats = raised(spelling)
    assert after.to_text() == before.to_text()
    (reason,) = stats.misses
    (node,) = stats.missed
    assert stats.missed[node] == reason
    assert any(n.name == node for n in after.graph.nodes)
    return reason


def test_what_is_no_attention_stays_with_a_reason() -> None:
    def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2)).softmax(-2) @ v

    def weak_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2)).masked_fill(~causal(q), -5.0).softmax(-1) @ v

    def thinned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        return weights.square() @ v

    def watched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        return weights @ v + weights.sum(-1, keepdim=True)

    def gated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q.sigmoid() * k).softmax(-1) * v

    def in_a_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        row = (q.mean((1, 2)) @ k.mean((1, 2)).t())[0]
        return torch.cat([row, row[:1]]).softmax(-1) @ torch.cat([v[:, 0, 0], v[:1, 0, 0]]) * q

    assert "a concatenation" in refused(in_a_row)
    assert "not over the last axis" in refused(over_queries)
    assert "does not hide" in refused(weak_mask)
    assert "not to a product with values" in refused(thinned)
    assert "users" in refused(watched)
    assert "not from a product" in refused(gated)


EAGER = """\
program @main(%q: f32[B, 2, S, 4], %k: f32[B, 2, S, 4], %v: f32[B, 2, S, 4], %m: bool[B, 1, 1, S]) -> (%out) {
  dim B = 2 in [1, inf]
  dim S = 5 in [1, inf]
  %0 = aten.transpose.int(%k, 2, 3) : f32[B, 2, 4, S]
  %1 = aten.matmul(%q, %0) : f32[B, 2, S, S]
  %2 = aten.mul.Tensor(%1, 0.25) : f32[B, 2, S, S]
  %3 = aten.full([], 0.0, dtype=f32) : f32[]
  %4 = aten.where.ScalarOther(%m, %3, -3.4028234663852886e+38) : f32[B, 1, 1, S]
  %5 = aten.add.Tensor(%2, %4) : f32[B, 2, S, S]
  %6 = aten.softmax.int(%5, -1) : f32[B, 2, S, S]
  %7 = aten.matmul(%6, %v) : f32[B, 2, S, 4]
  return (%7,)
}
"""


def test_golden(golden: Callable[[str, str], None]) -> None:
    before, after, stats = rewritten(RaiseAttention(), EAGER)
    assert (stats.hits, stats.attempts) == (1, 1)
    golden("passes/raise-attention", before.to_text() + "\n" + after.to_text())
