"""``fold-constants``: computes what depends on weights and literals alone, within bounds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.ir.text import parse_program
from graphlathe.ir.weights import TensorSource
from graphlathe.passes.base import Context, Stats
from graphlathe.passes.canonical.cse import CommonSubexpressions
from graphlathe.passes.canonical.fold_constants import FoldConstants
from tests.passes.rewriting import operators, rewritten


def program(weights: str, lines: str, result: str) -> str:
    head = "program @main(%x: f32[B, 4]) -> (%out) {\n  dim B = 2 in [1, inf]\n"
    return f"{head}{weights}{lines}  return ({result},)\n}}\n"


def fold(model: nn.Module, *inputs: torch.Tensor, max_bytes: int = 1 << 20) -> tuple[Program, Program, Stats]:
    before = trace(model, inputs)
    after = before.clone()
    stats = FoldConstants(max_bytes=max_bytes).run(after, Context())
    for name, want in before.run(before.feeds(*inputs)).items():
        assert torch.equal(after.run(after.feeds(*inputs))[name], want)
    return before, after, stats


def test_the_largest_constant_subgraph_becomes_one_weight(golden: Callable[[str, str], None]) -> None:
    text = program(
        '  %w0 = weight "scale" : f32[4] #00000000\n',
        "  %0 = aten.arange(4) : i64[4]\n  %1 = aten.unsqueeze(%0, 1) : i64[4, 1]\n"
        "  %2 = aten.ge.Tensor(%1, %0) : bool[4, 4]\n  %3 = aten.exp(%w0) : f32[4]\n"
        "  %4 = aten.where.self(%2, %3, %w0) : f32[4, 4]\n  %5 = aten.linear(%x, %4) : f32[B, 4]\n",
        "%5",
    )
    before, after, stats = rewritten(FoldConstants(), text)
    assert stats.hits == 1
    assert operators(after) == ["linear"]
    assert "scale" in before.used_weights() - after.used_weights()
    golden("passes/fold-constants", after.to_text())


def test_what_depends_on_an_input_or_a_symbolic_size_stays() -> None:
    text = program("", "  %0 = aten.sym_size.int(%x, 0) : int(B)\n  %1 = aten.arange(%0) : i64[B]\n", "%1")
    _, after, stats = rewritten(FoldConstants(), text)
    assert (stats.hits, after.mutations) == (0, 0)


def test_a_fixed_size_becomes_a_number() -> None:
    text = program("", "  %0 = aten.sym_size.int(%x, 1) : 4\n  %1 = aten.mul.Tensor(%x, %0) : f32[B, 4]\n", "%1")
    _, after, stats = rewritten(FoldConstants(), text.replace(": 4\n", ": int(4)\n"))
    assert stats.hits == 1
    assert operators(after) == ["mul.Tensor"]
    assert after.main.output_values[0].args[1] == 4


def test_a_shared_weight_keeps_its_other_reader() -> None:
    text = program(
        '  %w0 = weight "w" : f32[4, 4] #00000000\n',
        "  %0 = aten.tanh(%w0) : f32[4, 4]\n  %1 = aten.linear(%x, %0) : f32[B, 4]\n"
        "  %2 = aten.linear(%1, %w0) : f32[B, 4]\n",
        "%2",
    )
    _, after, stats = rewritten(FoldConstants(), text)
    assert stats.hits == 1
    assert len(after.used_weights()) == 2
    assert "w" in after.used_weights()


def test_views_of_a_shared_weight_share_its_numbers_and_are_one_where_equal() -> None:
    text = program(
        '  %w0 = weight "w" : f32[4, 4] #00000000\n',
        "  %0 = aten.slice.Tensor(%w0, 0, 0, 2) : f32[2, 4]\n  %1 = aten.transpose.int(%0, 0, 1) : f32[4, 2]\n"
        "  %2 = aten.slice.Tensor(%w0, 0, 0, 2) : f32[2, 4]\n  %3 = aten.transpose.int(%2, 0, 1) : f32[4, 2]\n"
        "  %4 = aten.matmul(%x, %1) : f32[B, 2]\n  %5 = aten.matmul(%x, %3) : f32[B, 2]\n"
        "  %6 = aten.linear(%x, %w0) : f32[B, 4]\n  %7 = aten.cat([%4, %5, %6], -1) : f32[B, 8]\n",
        "%7",
    )
    before, after, stats = rewritten(FoldConstants(), text)
    assert stats.hits == 2
    assert all(after.weights[name].shares_storage(before.weights["w"]) for name in after.used_weights())
    CommonSubexpressions().run(after, Context())
    assert operators(after) == ["matmul", "linear", "cat"]


def test_a_constant_that_is_an_output_is_folded_too() -> None:
    text = program("", "  %0 = aten.arange(4) : i64[4]\n  %1 = aten.neg(%0) : i64[4]\n", "%1")
    _, after, _ = rewritten(FoldConstants(), text)
    assert operators(after) == []
    assert after.run({"x": torch.zeros(2, 4)})["out"].tolist() == [0, -1, -2, -3]


def test_uniform_literals_stay_as_they_are() -> None:
    text = program("", "  %0 = aten.full([4], 2.0) : f32[4]\n  %1 = aten.mul.Tensor(%x, %0) : f32[B, 4]\n", "%1")
    _, after, stats = rewritten(FoldConstants(), text)
    assert (stats.hits, after.mutations) == (0, 0)


class Doubled(nn.Module):
    """Reads ``tanh`` of a weight, repeated."""

    def __init__(self, width: int, times: int = 1) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(width, width))
        self.times = times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ torch.tanh(self.w).repeat(1, self.times)


@pytest.mark.parametrize(
    ("width", "times", "max_bytes", "reason"),
    [
        (64, 1, 64 * 64 * 4, None),
        (64, 1, 64 * 64 * 4 - 1, "the result is too large"),
        # Four times the weight and more than tiny: its operator stays, but tanh(w) itself is no larger than w.
        (64, 4, 1 << 20, "the result is larger than what it is computed from"),
    ],
)
def test_bounds(width: int, times: int, max_bytes: int, reason: str | None) -> None:
    _, after, stats = fold(Doubled(width, times), torch.randn(2, width), max_bytes=max_bytes)
    assert set(stats.misses) == ({reason} if reason else set())
    assert ("tanh" in operators(after)) == (reason == "the result is too large")
    assert ("repeat" in operators(after)) == (times > 1 or reason is not None)


def test_views_of_a_large_weight_are_lazy() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(512, 1024))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.w.t()[:, :256]

    before, after, stats = fold(Halves(), torch.randn(2, 1024))
    assert stats.hits == 1
    assert operators(after) == ["matmul"]
    (name,) = after.used_weights()
    assert after.weights[name].shares_storage(before.weights["w"])
    assert after.weights[name].steps


def test_a_large_shared_weight_is_not_written_twice() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(1024, 512))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return nn.functional.embedding(ids, self.w) @ self.w.t()

    _, after, stats = fold(Tied(), torch.randint(0, 1024, (3,)))
    assert stats.hits == 0
    assert after.used_weights() == {"w"}


def test_quantised_storage_is_not_expanded() -> None:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("q", torch.randint(-128, 127, (16, 16), dtype=torch.int8))
            self.register_buffer("scale", torch.rand(16, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ (self.q.float() * self.scale)

    _, after, stats = fold(Quantised(), torch.randn(2, 16))
    assert stats.hits == 0
    assert after.weights["q"].dtype is torch.int8


def test_random_numbers_are_not_constants() -> None:
    class Noise(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand(4)

    program_ = trace(Noise(), (torch.zeros(4),))
    assert FoldConstants().run(program_, Context()).hits == 0


def test_weights_without_numbers_are_left_alone() -> None:
    with torch.device("meta"):
        model = Doubled(8)
    program_ = trace(model, (torch.empty(2, 8, device="meta"),))
    assert FoldConstants().run(program_, Context()).hits == 0


def test_a_folded_weight_owns_its_storage_and_is_named_after_its_module() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.exp(self.w).expand(3, 4)[1]

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    _, after, _ = fold(Outer(), torch.randn(4))
    (name,) = after.used_weights()
    assert name.startswith("inner.")
    source = after.weights[name].source
    assert isinstance(source, TensorSource)
    assert source.tensor.untyped_storage().nbytes() == 16


def test_what_cannot_be_computed_stays() -> None:
    text = program(
        '  %w0 = weight "numbers" : i64[4] #00000000\n',
        "  %0 = aten.softmax.int(%w0, 0) : i64[4]\n  %1 = aten.mul.Tensor(%x, %0) : f32[B, 4]\n",
        "%1",
    )
    parsed = parse_program(text)
    stats = FoldConstants().run(parsed, Context())
    assert parsed.mutations == 0
    assert [reason for reason in stats.misses if reason.startswith("it cannot be computed")]
