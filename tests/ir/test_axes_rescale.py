"""Residual width with RMSNorm: the cut program equals the zeroed one, to the last digits of float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from graphlathe.ir.axes import ChannelGroup, cut, cut_all, find_groups
from graphlathe.ir.axes.rescale import rescale_norms
from graphlathe.ir.errors import PreconditionError
from graphlathe.ir.from_onnx import from_onnx
from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.ir.rewrite import Rewriter
from graphlathe.ir.verify import relative_error, verify
from graphlathe.passes.base import Context
from graphlathe.passes.canonical.raise_all import RaiseAll
from graphlathe.tools import zoo
from tests.masked import zeroed


def raised(program: Program) -> Program:
    RaiseAll().run(program, Context())
    return program


def widest(program: Program) -> ChannelGroup:
    """The group with the most weights: the residual stream."""
    return max((g for g in find_groups(program) if g.prunable), key=lambda g: len(g.members))


def cut_exactly(program: Program, group: ChannelGroup, keep: list[int]) -> tuple[Program, list[str]]:
    smaller = program.clone()
    group = next(g for g in find_groups(smaller) if str(g) == str(group))
    missed = rescale_norms(smaller, group, keep, Rewriter(smaller, "test"))
    cut(smaller, group, keep)
    verify(smaller, 2)
    return smaller, missed


def check_exact(program: Program, feeds: dict[str, Tensor], keep: list[int], tolerance: float = 1e-12) -> Program:
    """Zeroing is the truth here: the norms of the zeroed program divide by the old width by themselves."""
    group = widest(program)
    assert "takes the mean over it" in group.zero_reason
    smaller, missed = cut_exactly(program, group, keep)
    assert missed == []
    masked = zeroed(program, group, keep)
    expected = masked.run(masked.feeds(**feeds))
    actual = smaller.run(smaller.feeds(**feeds))
    assert relative_error(actual, expected) < tolerance
    plain = program.clone()
    cut(plain, group, keep)
    assert relative_error(plain.run(plain.feeds(**feeds)), expected) > 1e-3  # without the change it is something else
    return smaller


def in_float64(name: str) -> tuple[Program, dict[str, Tensor]]:
    """A zoo model that computes all in float64, also what it casts to float32 (norms, rotary tables)."""
    model = zoo.get(name)
    feeds = {k: v.double() if v.is_floating_point() else v for k, v in model.example().items()}
    program = trace(model.module().double(), feeds, dynamic=model.dynamic)
    rewriter = Rewriter(program, "test")
    for node in program.graph.find_nodes(op="get_attr"):
        rewriter.weight(node.target, program.weights[node.target].cast(torch.float64))
    for node in program.graph.nodes:
        if node.op == "call_function":
            wider = {k: torch.float64 if v is torch.float32 else v for k, v in node.kwargs.items()}
            rewriter.set_args(node, node.args, wider)
    return program, feeds


def spread(size: int) -> list[int]:
    return [i for i in range(size) if i % 3 != 1]


@pytest.mark.parametrize("form", ["as traced", "raised"])
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_zoo_in_float64(name: str, form: str) -> None:
    program, feeds = in_float64(name)
    if form == "raised":
        raised(program)
    smaller = check_exact(program, feeds, spread(32))
    assert any(w.shape[-1:] == (21,) for w in smaller.weights.values())


def test_norms_inside_heads_and_then_heads() -> None:
    """Norms of queries and keys: channels of every head go, and then the heads of what is left."""
    program, feeds = in_float64("qwen3")

    def head_groups(p: Program) -> list[ChannelGroup]:
        return [g for g in find_groups(p) if g.unit == "KV group" and g.prunable]

    inside = next(g for g in find_groups(program) if g.unit == "query and key channel")
    expected = zeroed(program, inside, [0, 3])
    for group in head_groups(program):
        expected = zeroed(expected, group, [1])
    smaller = program.clone()
    assert rescale_norms(smaller, inside, [0, 3], Rewriter(smaller, "test")) == []
    cut(smaller, inside, [0, 3])
    cut_all(smaller, [(group, [1]) for group in head_groups(smaller)])
    verify(smaller, 2)
    assert relative_error(smaller.run(smaller.feeds(**feeds)), expected.run(expected.feeds(**feeds))) < 1e-12


@pytest.mark.parametrize("form", ["as read", "raised"])
def test_an_onnx_file_in_float64(form: str, tmp_path: Path) -> None:
    program, feeds = in_float64("llama")
    program = from_onnx(program.export_onnx(tmp_path / "llama.onnx"))
    if form == "raised":
        raised(program)
    check_exact(program, feeds, spread(32))


class Plain(nn.Module):
    """A stream of 12 channels and two norms, the operator's form; ``gain`` says what their gains are."""

    def __init__(self, gain: str) -> None:
        super().__init__()
        self.gain = gain
        self.into, self.up, self.down = nn.Linear(5, 12), nn.Linear(12, 7), nn.Linear(7, 12)
        self.out = nn.Linear(12, 3)
        self.weight, self.other = nn.Parameter(torch.rand(12) + 0.5), nn.Parameter(torch.rand(12) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Two norms, the second of the sum."""
        h = self.into(x)
        first, second, eps = self.weight, self.other, 0.1
        if self.gain == "shared by norms":
            second = first
        elif self.gain == "read elsewhere":
            h = h * first
        elif self.gain == "computed":
            first, second = 1 + first, 1 + second
        elif self.gain == "none":
            first = second = None  # type: ignore[assignment]
        elif self.gain == "default epsilon":
            eps = None  # type: ignore[assignment]
        h = h + self.down(torch.tanh(self.up(functional.rms_norm(h, (12,), first, eps))))
        return self.out(functional.rms_norm(h, (12,), second, eps))


GAINS = ["own", "shared by norms", "read elsewhere", "computed", "none", "default epsilon"]


def plain(gain: str) -> tuple[Program, dict[str, Tensor]]:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    return trace(Plain(gain).double().eval(), {"x": x}, dynamic={"x": {0: "B"}}), {"x": torch.randn_like(x)}


@pytest.mark.parametrize("gain", GAINS)
def test_gains(gain: str) -> None:
    program, feeds = plain(gain)
    keep = [0, 2, 3, 7, 11]
    smaller = check_exact(program, feeds, keep)
    if gain in ("own", "shared by norms"):  # scaled where they are, and once
        assert smaller.used_weights() == program.used_weights()
        expected = program.weights["weight"].tensor()[keep] * (12 / 5) ** 0.5
        torch.testing.assert_close(smaller.weights["weight"].tensor(), expected, rtol=1e-14, atol=0)


def test_one_channel_can_stay() -> None:
    program, feeds = plain("own")
    check_exact(program, feeds, [4])


def test_all_channels_can_stay() -> None:
    program, feeds = plain("own")
    smaller, missed = cut_exactly(program, widest(program), list(range(12)))
    assert missed == []
    assert smaller.fingerprint() == program.fingerprint()
    assert torch.equal(smaller(**feeds), program(**feeds))


class Normed(nn.Module):
    """A stream with one norm in it, given as a function."""

    def __init__(self, norm: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.into, self.out = norm, nn.Linear(5, 12), nn.Linear(12, 3)
        self.weight = nn.Parameter(torch.rand(12) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """In, norm, out."""
        return self.out(self.norm(self.into(x), self.weight))


def spelled_layer_norm(h: Tensor, w: Tensor) -> Tensor:
    centered = h - h.mean(-1, keepdim=True)
    return centered * torch.rsqrt(centered.pow(2).mean(-1, keepdim=True) + 1e-5) * w


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], list[str]]] = {
    "layer norm": (lambda h, w: functional.layer_norm(h, (12,), w), ["center over those that are gone"]),
    "layer norm spelled out": (spelled_layer_norm, ["not a mean of squares", "not zero"]),
    "what is not zero": (lambda h, w: functional.rms_norm(torch.sigmoid(h), (12,), w), ["not zero"]),
    "the largest": (lambda h, w: h * w / h.abs().amax(-1, keepdim=True), ["is no RMS norm"]),
    "channels of every group": (
        lambda h, w: functional.group_norm(h.transpose(1, 2), 3, w).transpose(1, 2),
        ["is no RMS norm"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_made_exact_is_reported_and_left_alone(name: str) -> None:
    norm, reasons = REFUSED[name]
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5)
    program = trace(Normed(norm).eval(), {"x": x}, dynamic={"x": {0: "B"}})
    text = program.to_text()
    group = next(g for g in find_groups(program) if g.prunable and not g.zeroable)
    missed = rescale_norms(program, group, [0], Rewriter(program, "test"))
    assert len(missed) == len(reasons)
    assert all(reason in entry and "(%" in entry for reason, entry in zip(reasons, missed, strict=True))
    assert program.to_text() == text


def test_whole_normalization_groups_count_nothing_that_is_gone() -> None:
    program = trace(Normed(REFUSED["channels of every group"][0]).eval(), {"x": torch.randn(2, 4, 5)})
    group = next(g for g in find_groups(program) if g.unit == "normalization group")
    assert rescale_norms(program, group, [0, 2], Rewriter(program, "test")) == []


@pytest.mark.parametrize("keep", [[], [12], [-1]])
def test_atoms_that_do_not_exist(keep: list[int]) -> None:
    program, _ = plain("own")
    text = program.to_text()
    with pytest.raises(PreconditionError, match="cannot keep"):
        rescale_norms(program, widest(program), keep, Rewriter(program, "test"))
    assert program.to_text() == text


def test_a_group_of_another_graph() -> None:
    program, _ = plain("own")
    group = widest(program)
    cut(program, group, [0, 1])
    with pytest.raises(PreconditionError, match="find the groups again"):
        rescale_norms(program, group, [0], Rewriter(program, "test"))
