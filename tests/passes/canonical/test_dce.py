"""``dce``: erases what no output needs, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from graphlathe.ir.from_torch import trace
from graphlathe.passes.base import Context
from graphlathe.passes.canonical.dce import DeadCode
from tests.passes.rewriting import operators, rewritten

CHAIN = """\
program @main(%x: f32[B, 4]) -> (%out, %twice) {
  dim B = 2 in [1, inf]
  %w0 = weight "used" : f32[4, 4] #00000000
  %w1 = weight "unused" : f32[4, 4] #00000000
  %0 = aten.add.Tensor(%x, %x) : f32[B, 4]
  %1 = aten.linear(%0, %w1) : f32[B, 4]
  %2 = aten.neg(%1) : f32[B, 4]
  %3 = aten.linear(%x, %w0) : f32[B, 4]
  return (%3, %0)
}
"""


def test_a_dead_chain_goes_with_its_weight(golden: Callable[[str, str], None]) -> None:
    before, after, stats = rewritten(DeadCode(), CHAIN)
    assert stats.hits == 3  # two operators and the weight's node
    assert operators(after) == ["add.Tensor", "linear"]
    assert before.used_weights() == {"used", "unused"}
    assert after.used_weights() == {"used"}
    golden("passes/dce", after.to_text())


def test_a_value_that_is_only_an_output_stays() -> None:
    _, after, _ = rewritten(DeadCode(), CHAIN)
    assert after.main.output_values[1].target is torch.ops.aten.add.Tensor


def test_nothing_dead_means_no_mutation() -> None:
    _, after, stats = rewritten(DeadCode(), CHAIN.replace("return (%3, %0)", "return (%3, %2)"))
    assert stats.hits == 0
    assert after.mutations == 0


def test_effects_stay() -> None:
    class Asserting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._assert_async((x > 0).all())
            return x + 1

    program = trace(Asserting(), (torch.ones(3),))
    DeadCode().run(program, Context())
    assert any("assert" in name for name in operators(program))
