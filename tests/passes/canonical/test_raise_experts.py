"""Mixtures of experts that sort their tokens, or gather their matrices, become linear maps that choose."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers.integrations.moe  # registers the grouped product; PyTorch's own traces in bfloat16 only
from torch import Tensor, fx, nn

from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.ir.rewrite import is_op
from graphlathe.ir.verify import verify
from graphlathe.kernels import expert_linear
from graphlathe.passes.base import Context, Stats
from graphlathe.passes.canonical.canonicalize import Canonicalize
from graphlathe.passes.canonical.raise_experts import RaiseExperts
from tests.passes.rewriting import assert_same_outputs, rewritten

assert transformers.integrations.moe
grouped_mm = torch.ops.transformers.grouped_mm_fallback

EXPERTS, TOP_K, WIDTH, HIDDEN = 4, 2, 8, 6


class Mixture(nn.Module):
    """A router, and experts in one of the forms that libraries write them in."""

    def __init__(self, form: str, biased: bool = False) -> None:
        super().__init__()
        self.form = form
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 2 * HIDDEN))
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH))
        self.bias = nn.Parameter(torch.randn(EXPERTS, WIDTH)) if biased else None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        weights, chosen = self.router(tokens).softmax(-1).topk(TOP_K, -1)
        return (x.reshape(-1, WIDTH) + getattr(self, self.form)(tokens, weights, chosen)).reshape(x.shape)

    def grouped(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Rows in the order of their experts, one product for each group of rows."""
        flat, order = chosen.reshape(-1).sort(stable=True)
        ends = torch.histc(flat.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0, dtype=torch.int32)
        rows = tokens[order // TOP_K]
        gate, up = grouped_mm(rows, self.up, ends).chunk(2, -1)
        rows = grouped_mm(nn.functional.silu(gate) * up, self.down, ends)
        if self.bias is not None:
            rows = rows + self.bias[flat]
        rows = rows * weights.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0])
        return rows[back].reshape(-1, TOP_K, WIDTH).sum(1)

    def gathered(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """A copy of the matrix for each row."""
        flat = chosen.reshape(-1)
        rows = tokens.unsqueeze(1).expand(-1, TOP_K, -1).reshape(-1, WIDTH)
        both = torch.bmm(self.up.transpose(1, 2)[flat], rows.unsqueeze(-1)).squeeze(-1)
        gate, up = both.chunk(2, -1)
        rows = torch.bmm((nn.functional.silu(gate) * up).unsqueeze(1), self.down[flat]).squeeze(1)
        if self.bias is not None:
            rows = rows + self.bias[flat]
        return (rows * weights.reshape(-1, 1)).reshape(-1, TOP_K, WIDTH).sum(1)

    def never_put_back(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Sums over rows that are still sorted."""
        flat, order = chosen.reshape(-1).sort(stable=True)
        ends = torch.histc(flat.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0, dtype=torch.int32)
        return grouped_mm(tokens[order // TOP_K], self.up, ends).sum(0)[:WIDTH] * weights.sum()

    def other_groups(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Groups of equal size, which no expert chose."""
        rows = torch.cat([tokens] * EXPERTS)
        ends = torch.arange(1, EXPERTS + 1, dtype=torch.int32) * tokens.shape[0]
        return grouped_mm(rows, self.up, ends)[: tokens.shape[0], :WIDTH] * weights[:, :1] + chosen[:, :1]


def raised(form: str, biased: bool = False) -> tuple[Program, Program, Stats]:
    torch.manual_seed(1)
    before = trace(Mixture(form, biased).eval(), (torch.randn(2, 6, WIDTH),), dynamic={"x": {0: "B", 1: "S"}})
    Canonicalize().run(before, Context())
    after = before.clone()
    stats = RaiseExperts().run(after, Context())
    Canonicalize().run(after, Context())
    verify(after, 2)
    assert_same_outputs(after, before)
    again = after.clone()
    RaiseExperts().run(again, Context())
    assert again.mutations == 0
    return before, after, stats


def operators(program: Program) -> list[fx.Node]:
    return [n for n in program.graph.nodes if is_op(n, expert_linear)]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("form", ["grouped", "gathered"])
def test_both_forms_are_linear_maps_that_choose(form: str, biased: bool) -> None:
    _, after, stats = raised(form, biased)
    up, down = operators(after)
    assert [n.args[1].meta["val"].shape for n in (up, down)] == [(EXPERTS, WIDTH, 2 * HIDDEN), (EXPERTS, HIDDEN, WIDTH)]  # type: ignore[union-attr]
    aten = torch.ops.aten
    assert not any(is_op(n, grouped_mm, aten.bmm, aten.sort, aten.histc) for n in after.graph.nodes)
    assert (stats.attempts, stats.hits, dict(stats.misses)) == (2, 2, {})


def test_the_grouped_form_leaves_no_sorted_rows() -> None:
    _, after, _ = raised("grouped")
    up, down = operators(after)
    assert up.args[2] is down.args[2], "both read the table [tokens, top_k] that the router chose"
    assert list(up.args[2].meta["val"].shape)[1:] == [TOP_K]  # type: ignore[union-attr]
    assert up.args[0].meta["val"].shape[1] == 1, "a token's row is not copied for its experts"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ("never_put_back", "the rows are not put back in the order of the tokens by an index"),
        ("other_groups", "its groups are not counted from a sort of the chosen experts"),
    ],
)
def test_other_grouped_products_stay_with_a_reason(form: str, reason: str) -> None:
    before, after, stats = raised(form)
    assert after.to_text() == before.to_text()
    assert dict(stats.misses) == {reason: stats.attempts}
    assert set(stats.missed.values()) == {reason}


GATHERED = """\
program @main(%x: f32[B, 4], %chosen: i64[B]) -> (%out) {
  dim B = 2 in [1, inf]
  %w = weight "w" : f32[2, 4, 3] #00000000
  %0 = aten.index.Tensor(%w, [%chosen]) : f32[B, 4, 3]
  %1 = aten.unsqueeze(%x, 1) : f32[B, 1, 4]
  %2 = aten.matmul(%1, %0) : f32[B, 1, 3]
  %3 = aten.squeeze.dim(%2, 1) : f32[B, 3]
  return (%3,)
}
"""


def test_golden(golden: Callable[[str, str], None]) -> None:
    before, after, stats = rewritten(RaiseExperts(), GATHERED)
    assert (stats.hits, stats.attempts) == (1, 1)
    golden("passes/raise-experts", before.to_text() + "\n" + after.to_text())
