"""The raised form: all raising passes in one, and what each of them missed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.ir.verify import verify
from graphlathe.passes.base import Context
from graphlathe.passes.canonical.raise_all import RaiseAll
from tests.passes.rewriting import assert_same_outputs, rewritten


class Layer(nn.Module):
    """Attention with rotary positions, everything spelled out."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        angles = torch.arange(x.shape[1]).unsqueeze(-1) * 10.0 ** (-torch.arange(4) / 4.0)
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        q, k = (t * cos + torch.cat((-t[..., 4:], t[..., :4]), -1) * sin for t in (q, k))
        scores = q @ k.transpose(-1, -2) / 8**0.5
        hidden = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
        mixed = (scores + hidden).softmax(-1) @ v
        return x + self.out(mixed.transpose(1, 2).flatten(2))


def layer() -> Program:
    torch.manual_seed(0)
    return trace(Layer().eval(), (torch.randn(2, 6, 16),), dynamic={"x": {0: "B", 1: "S"}})


def operators(program: Program) -> list[str]:
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function"]


def test_a_layer_is_left_with_operators_that_have_names() -> None:
    before = layer()
    after = before.clone()
    stats = RaiseAll().run(after, Context())
    verify(after, 2)
    assert_same_outputs(after, before)
    names = operators(after)
    assert names.count("graphlathe.rotary_embedding.default") == 2
    assert names.count("aten.scaled_dot_product_attention.default") == 1
    assert not {"aten.softmax.int", "aten.matmul.default"} & set(names)
    assert not stats.misses and 0 < stats.hits <= stats.attempts
    again = after.clone()
    RaiseAll().run(again, Context())
    assert again.mutations == 0


def test_a_miss_says_which_pass_and_why() -> None:
    class Twice(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            weights = (q @ k.transpose(-1, -2)).softmax(-1)
            return weights @ v, weights

    program = trace(Twice(), tuple(torch.randn(1, 2, 5, 4) for _ in range(3)))
    stats = RaiseAll().run(program, Context())
    ((reason, count),) = stats.misses.items()
    assert reason.startswith("raise-attention: ") and count == 1
    assert list(stats.missed.values()) == [reason]


TEXT = """\
program @main(%q: f32[B, 2, S, 8], %k: f32[B, 2, S, 8], %v: f32[B, 2, S, 8], %cos: f32[S, 8], %sin: f32[S, 8]) -> %out {
  dim B = 2 in [1, inf]
  dim S = 5 in [1, inf]
  %0 = aten.mul.Tensor(%q, %cos) : f32[B, 2, S, 8]
  %1 = aten.slice.Tensor(%q, 3, 4, 9223372036854775807) : f32[B, 2, S, 4]
  %2 = aten.neg(%1) : f32[B, 2, S, 4]
  %3 = aten.slice.Tensor(%q, 3, 0, 4) : f32[B, 2, S, 4]
  %4 = aten.cat([%2, %3], -1) : f32[B, 2, S, 8]
  %5 = aten.mul.Tensor(%4, %sin) : f32[B, 2, S, 8]
  %6 = aten.add.Tensor(%0, %5) : f32[B, 2, S, 8]
  %7 = aten.transpose.int(%k, 2, 3) : f32[B, 2, 8, S]
  %8 = aten.matmul(%6, %7) : f32[B, 2, S, S]
  %9 = aten.div.Tensor(%8, 2.8284271247461903) : f32[B, 2, S, S]
  %10 = aten.softmax.int(%9, -1) : f32[B, 2, S, S]
  %11 = aten.matmul(%10, %v) : f32[B, 2, S, 8]
  return (%11,)
}
"""


def test_golden(golden: Callable[[str, str], None]) -> None:
    before, after, _ = rewritten(RaiseAll(), TEXT)
    golden("passes/raise", before.to_text() + "\n" + after.to_text())
