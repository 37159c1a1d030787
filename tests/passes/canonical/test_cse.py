"""``cse``: equal computations become one; what only looks equal does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.ir.weights import Weight
from graphlathe.passes.base import Context
from graphlathe.passes.canonical.cse import CommonSubexpressions, weight_key
from graphlathe.tools import zoo
from tests.passes.rewriting import operators, rewritten

HEAD = """\
program @main(%x: f32[B, 4], %y: f32[B, 4]) -> (%a, %b) {
  dim B = 2 in [1, inf]
"""
HITS = {
    "same": "  %0 = aten.relu(%x) : f32[B, 4]\n  %1 = aten.relu(%x) : f32[B, 4]\n",
    "commuted": "  %0 = aten.add.Tensor(%x, %y) : f32[B, 4]\n  %1 = aten.add.Tensor(%y, %x) : f32[B, 4]\n",
    "default given": "  %0 = aten.softmax.int(%x, -1) : f32[B, 4]\n  %1 = aten.softmax.int(%x, -1, None) : f32[B, 4]\n",
    "alpha is one": (
        "  %0 = aten.add.Tensor(%x, %y) : f32[B, 4]\n  %1 = aten.add.Tensor(%y, %x, alpha=1) : f32[B, 4]\n"
    ),
}
MISSES = {
    "subtraction does not commute": (
        "  %0 = aten.sub.Tensor(%x, %y) : f32[B, 4]\n  %1 = aten.sub.Tensor(%y, %x) : f32[B, 4]\n"
    ),
    "another alpha": (
        "  %0 = aten.add.Tensor(%x, %y, alpha=2) : f32[B, 4]\n  %1 = aten.add.Tensor(%y, %x, alpha=2) : f32[B, 4]\n"
    ),
    "minus zero": "  %0 = aten.add.Tensor(%x, 0.0) : f32[B, 4]\n  %1 = aten.add.Tensor(%x, -0.0) : f32[B, 4]\n",
    "one is not 1.0": (
        "  %0 = aten.pow.Tensor_Scalar(%x, 1) : f32[B, 4]\n  %1 = aten.pow.Tensor_Scalar(%x, 1.0) : f32[B, 4]\n"
    ),
}


@pytest.mark.parametrize("body", HITS.values(), ids=HITS.keys())
def test_equal_computations_become_one(body: str) -> None:
    _, after, stats = rewritten(CommonSubexpressions(), HEAD + body + "  return (%0, %1)\n}\n")
    assert stats.hits == 1
    a, b = after.main.output_values
    assert a is b


@pytest.mark.parametrize("body", MISSES.values(), ids=MISSES.keys())
def test_what_only_looks_equal_stays(body: str) -> None:
    _, after, stats = rewritten(CommonSubexpressions(), HEAD + body + "  return (%0, %1)\n}\n")
    assert (stats.hits, after.mutations) == (0, 0)


def test_chains_merge_in_one_walk(golden: Callable[[str, str], None]) -> None:
    text = HEAD + (
        "  %0 = aten.relu(%x) : f32[B, 4]\n  %1 = aten.relu(%x) : f32[B, 4]\n"
        "  %2 = aten.mul.Tensor(%0, %y) : f32[B, 4]\n  %3 = aten.mul.Tensor(%y, %1) : f32[B, 4]\n"
        "  %4 = aten.tanh(%2) : f32[B, 4]\n  %5 = aten.tanh(%3) : f32[B, 4]\n  return (%4, %5)\n}\n"
    )
    _, after, stats = rewritten(CommonSubexpressions(), text)
    assert stats.hits == 3
    assert operators(after) == ["relu", "mul.Tensor", "tanh"]
    golden("passes/cse", after.to_text())


def test_random_operators_are_never_merged() -> None:
    class Noise(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.rand_like(x) - torch.rand_like(x) + x

    program = trace(Noise(), (torch.ones(8),))
    stats = CommonSubexpressions().run(program, Context())
    assert stats.hits == 0
    assert stats.misses == {"may be random, or has an effect": 2}


@pytest.mark.parametrize(("dropout", "hits"), [(0.0, 1), (0.1, 0)])
def test_attention_is_random_only_with_dropout(dropout: float, hits: int) -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            attention = nn.functional.scaled_dot_product_attention
            return attention(x, x, x, dropout_p=dropout) + attention(x, x, x, dropout_p=dropout)

    program = trace(Twice(), (torch.ones(1, 2, 4, 8),))
    stats = CommonSubexpressions().run(program, Context())
    assert (stats.hits, sum(stats.misses.values())) == (hits, 0 if hits else 2)


def test_equal_sizes_of_different_tensors_are_one_number() -> None:
    text = (
        "program @main(%x: f32[B, S], %y: f32[B, S]) -> (%a, %b) {\n  dim B = 2 in [1, inf]\n  dim S = 5 in [1, inf]\n"
        "  %0 = aten.sym_size.int(%x, 1) : int(S)\n  %1 = aten.sym_size.int(%y, 1) : int(S)\n"
        "  %2 = aten.arange(%0) : i64[S]\n  %3 = aten.arange(%1) : i64[S]\n  return (%2, %3)\n}\n"
    )
    _, after, stats = rewritten(CommonSubexpressions(), text)
    assert stats.hits == 2
    assert operators(after) == ["sym_size.int", "arange"]


class TwoViews(nn.Module):
    """Reads one tensor by two names, and another with equal numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(4))
        self.b = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.a + x * self.b


def _with_shared_weight() -> Program:
    program = trace(TwoViews(), (torch.randn(4),))
    program.weights["b"] = program.weights["a"]
    return program


def test_one_stored_weight_gets_one_name() -> None:
    program = _with_shared_weight()
    CommonSubexpressions().run(program, Context())
    assert operators(program) == ["mul.Tensor", "add.Tensor"]
    assert program.used_weights() == {"a"}
    assert program.tied == {"b": "a"}


def test_two_parameters_with_equal_numbers_stay_two() -> None:
    program = trace(TwoViews(), (torch.randn(4),))
    assert CommonSubexpressions().run(program, Context()).hits == 0
    assert program.used_weights() == {"a", "b"}


def test_weight_keys_tell_slices_apart() -> None:
    base = Weight.from_tensor(torch.arange(8.0))
    assert weight_key(base.slice(0, 0, 4)) == weight_key(base.slice(0, 0, 4))
    assert weight_key(base.slice(0, 0, 4)) != weight_key(base.slice(0, 4, 8))
    assert weight_key(Weight.from_tensor(torch.tensor(2.0))) == weight_key(Weight.from_tensor(torch.tensor(2.0)))
    assert weight_key(Weight.from_tensor(torch.tensor(2.0))) != weight_key(
        Weight.from_tensor(torch.tensor(2.0).double())
    )
    assert weight_key(Weight.from_tensor(torch.tensor(0.0))) != weight_key(Weight.from_tensor(torch.tensor(-0.0)))


def test_keys_cost_linear_time() -> None:
    # A chain in which every node reads the one before twice: a key that spelled out its arguments would be exponential.
    lines = ["  %0 = aten.add.Tensor(%x, %x) : f32[B, 4]\n"]
    lines += [f"  %{i} = aten.add.Tensor(%{i - 1}, %{i - 1}) : f32[B, 4]\n" for i in range(1, 60)]
    _, after, stats = rewritten(CommonSubexpressions(), HEAD + "".join(lines) + "  return (%59, %0)\n}\n")
    assert (stats.hits, after.mutations) == (0, 0)


def test_a_whole_model_repeats_itself_only_where_it_does() -> None:
    model = zoo.get("llama")
    program = trace(model.module(), model.example(), dynamic=model.dynamic)
    assert CommonSubexpressions().run(program, Context()).hits > 0
    assert CommonSubexpressions().run(program, Context()).hits == 0
