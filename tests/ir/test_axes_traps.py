"""What rewriting graphs to other sizes trips over, one test each (copies of tied weights: see test_retie.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from graphlathe.ir.axes import ChannelGroup, cut, find_groups
from graphlathe.ir.from_onnx import from_onnx
from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.ir.verify import verify
from tests.masked import check_cut, half, zeroed

aten = torch.ops.aten


def operators(program: Program) -> list[Any]:
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


def group_of(program: Program, weight: str, unit: str) -> ChannelGroup:
    """The group of that unit that cuts the weight."""
    return next(g for g in find_groups(program) if g.unit == unit and any(m.weight == weight for m in g.members))


class Tied(nn.Module):
    """A residual block between an embedding and a head that share their matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.up, self.down = nn.Linear(12, 7), nn.Linear(7, 12)
        self.head = nn.Linear(12, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Scores of 20 tokens."""
        h = self.embed(ids)
        return self.head(h + self.down(torch.relu(self.up(h))))


@pytest.mark.parametrize("source", ["torch", "onnx"])
def test_tied_weights_stay_tied_and_parameters_shrink(source: str, tmp_path: Path) -> None:
    """One slice of the one matrix, whatever its names; untying would make the program grow."""
    torch.manual_seed(0)
    ids = torch.tensor([[1, 5, 19]])
    program = trace(Tied().eval(), {"ids": ids}, dynamic={"ids": {1: "S"}})
    if source == "onnx":
        program = from_onnx(program.export_onnx(tmp_path / "tied.onnx"))
    (alias,) = program.tied.items()
    group = group_of(program, alias[1], "channel")
    keep = half(group)
    expected = zeroed(program, group, keep)(ids=ids)
    cut(program, group, keep)
    verify(program, 2)
    assert dict([alias]) == program.tied
    assert {n for n in program.weights if "embed" in n or "head" in n} == {alias[1]}
    assert program.parameter_count == 20 * 6 + 2 * 6 * 7 + 7 + 6
    torch.testing.assert_close(program(ids=ids), expected, rtol=1e-5, atol=1e-6)
    again = from_onnx(program.export_onnx(tmp_path / "again.onnx"))
    assert again.parameter_count == program.parameter_count


class Attention(nn.Module):
    """Six query heads over three of keys and values, every head count a number in the graph; ``how`` they are split."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.q, self.k, self.v, self.o = nn.Linear(8, 24), nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(24, 8)

    def split(self, x: Tensor, heads: int) -> Tensor:
        """[1, 5, heads * 4] to [1, heads, 5, 4]."""
        view = aten._unsafe_view.default if self.how == "_unsafe_view" else aten.view.default
        return view(x, [1, 5, heads, 4]).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Attention over five positions."""
        q, k, v = self.split(self.q(x), 6), self.split(self.k(x), 3), self.split(self.v(x), 3)
        k, v = (aten.expand.default(t[:, :, None], [1, 3, 2, 5, 4]).reshape(1, 6, 5, 4) for t in (k, v))
        y = functional.scaled_dot_product_attention(q, k, v)
        y = y.transpose(1, 2)
        return self.o(aten.view.default(y, [1, 5, 24]) if self.how == "view" else y.flatten(2))


def attention(how: str) -> tuple[Program, dict[str, Tensor]]:
    torch.manual_seed(0)
    x = torch.randn(1, 5, 8)
    return trace(Attention(how).eval(), {"x": x}), {"x": torch.randn(1, 5, 8)}


@pytest.mark.parametrize("how", ["_unsafe_view", "view"])
def test_head_counts_that_are_numbers_in_the_graph(how: str) -> None:
    program, feeds = attention(how)
    group = group_of(program, "q.weight", "KV group")
    assert group.size == 3
    assert check_cut(program, group, feeds, [0, 2])
    cut(program, group, [1])
    sizes = [a for node in program.graph.nodes for a in node.args if isinstance(a, (list, tuple))]
    literals = {tuple(s) for s in sizes if all(isinstance(i, int) for i in s)}
    assert {(1, 5, 2, 4), (1, 5, 1, 4), (1, 1, 2, 5, 4)} <= literals
    assert not any(3 in s or 6 in s for s in literals)


def test_a_view_of_attention_becomes_a_reshape() -> None:
    """The operator may give other strides to fewer heads, which a view would refuse."""
    program, feeds = attention("view")
    assert aten.view.default in operators(program)
    cut(program, group_of(program, "q.weight", "KV group"), [0, 1])
    assert aten.view.default not in operators(program)
    assert aten.reshape.default in operators(program)
    assert torch.isfinite(program(**feeds)).all()


class Casts(nn.Module):
    """Casts that export guards with assertions about sizes and dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Up, to float64 and back, down."""
        return self.down(torch.tanh(self.up(x).to(torch.float64)).to(torch.float32))


def test_assertions_about_old_sizes_are_gone() -> None:
    x = torch.randn(2, 8)
    assertion = aten._assert_tensor_metadata.default
    exported = torch.export.export(Casts().eval(), (x,))
    assert any(node.target is assertion for node in exported.graph.nodes)
    program = trace(Casts().eval(), {"x": x})
    assert assertion not in operators(program)
    group = group_of(program, "up.weight", "channel")
    assert check_cut(program, group, {"x": x}, half(group))


class Cached(nn.Module):
    """Attention of one new position over keys and values that come in and go out."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The output, and the longer cache."""
        q, k, v = (layer(x).view(1, 1, 2, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        keys, values = torch.cat((keys, k), 2), torch.cat((values, v), 2)
        y = functional.scaled_dot_product_attention(q, keys, values)
        return self.o(y.transpose(1, 2).reshape(1, 1, 8)), keys, values


def blocked(program: Program, weight: str) -> str:
    groups = [g for g in find_groups(program) if any((m.weight, m.dim) == (weight, 0) for m in g.members)]
    assert groups and not any(group.prunable for group in groups)
    return "; ".join(group.reason for group in groups)


def test_a_cache_of_keys_and_values_is_part_of_the_interface() -> None:
    """Heads cannot go while the caller passes caches of the old shape; and the reason says which input it is."""
    x, cache = torch.randn(1, 1, 8), torch.randn(1, 2, 3, 4)
    program = trace(Cached().eval(), {"x": x, "keys": cache, "values": cache.clone()})
    for weight, name in (("k.weight", "keys"), ("v.weight", "values"), ("q.weight", "keys")):
        reason = blocked(program, weight)
        assert "a dimension of an input" in reason and f"%{name}" in reason


class Counter(nn.Module):
    """A buffer of channels that every call changes."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.register_buffer("total", torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        """Up, less what came before, down."""
        h = self.up(x)
        self.total.add_(h.mean(0))
        return self.down(h - self.total)


def test_state_is_part_of_the_interface() -> None:
    program = trace(Counter().eval(), {"x": torch.randn(2, 8)})
    assert program.main.state
    reason = blocked(program, "up.weight")
    assert "a dimension of an input" in reason and "total" in reason


def test_a_scale_that_was_the_default_is_written_down_before_channels_go() -> None:
    """1 / sqrt(4) must not become 1 / sqrt(2)."""
    program, feeds = attention("view")
    group = group_of(program, "q.weight", "query and key channel")
    assert check_cut(program, group, feeds, [0, 3], 1e-6)
    cut(program, group, [0, 3])
    (node,) = [n for n in program.graph.nodes if "scaled_dot" in str(n.target)]
    assert node.kwargs["scale"] == 0.5 and node.args[0].meta["val"].shape[-1] == 2
