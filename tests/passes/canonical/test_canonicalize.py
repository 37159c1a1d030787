"""``canonicalize``: one spelling per computation, to a fixed point, exact, linear."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from graphlathe.ir.from_torch import trace
from graphlathe.ir.verify import verify
from graphlathe.passes.base import Context
from graphlathe.passes.canonical.canonicalize import Canonicalize
from tests.counting import assert_linear, calls
from tests.passes.rewriting import assert_same_outputs, operators, rewritten
from tests.zoo_programs import over_zoo, traced

HEAD = (
    "program @main(%x: f32[B, 4], %y: f32[B, 4], %i: i64[B, 4], %m: bool[B, 4]) -> (%out) {\n  dim B = 2 in [1, inf]\n"
)
F, M = "f32[B, 4]", "bool[B, 4]"
SPELLINGS: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "and of truth values": ((f"aten.__and__.Tensor(%m, %m) : {M}",), ["logical_and"]),
    "and of integers": (("aten.__and__.Tensor(%i, %i) : i64[B, 4]",), ["bitwise_and.Tensor"]),
    "not": ((f"aten.bitwise_not(%m) : {M}",), ["logical_not"]),
    "synonym": ((f"aten.multiply.Tensor(%x, %y) : {F}",), ["mul.Tensor"]),
    "concat": (("aten.concat([%x, %y], -1) : f32[B, 8]",), ["cat"]),
    "maximum": ((f"aten.max.other(%x, %y) : {F}",), ["maximum"]),
    "clamp": ((f"aten.clamp_min(%x, 0.5) : {F}",), ["clamp"]),
    "scalar overload": ((f"aten.add.Scalar(%x, 2.5, 3) : {F}",), ["add.Tensor"]),
    "reverse subtraction": ((f"aten.rsub.Scalar(%x, 1.5) : {F}",), ["neg", "add.Tensor"]),
    "square": ((f"aten.square(%x) : {F}",), ["pow.Tensor_Scalar"]),
    "mm": (("aten.t(%y) : f32[4, B]", "aten.mm(%x, %0) : f32[B, B]"), ["transpose.int", "matmul"]),
    "zeros": (("aten.zeros([3, 4]) : f32[3, 4]",), ["full"]),
    "new_ones": (("aten.new_ones(%x, [3]) : f32[3]",), ["full"]),
    "split": (
        ("aten.split.Tensor(%x, 3, -1) : [f32[B, 3], f32[B, 1]]", "operator.getitem(%0, 1) : f32[B, 1]"),
        ["split_with_sizes", "getitem"],
    ),
    "chunk": (
        ("aten.chunk(%x, 2, 1) : [f32[B, 2], f32[B, 2]]", "operator.getitem(%0, 0) : f32[B, 2]"),
        ["split_with_sizes", "getitem"],
    ),
    "squeeze of a list": (
        ("aten.unsqueeze(%x, 1) : f32[B, 1, 4]", "aten.neg(%0) : f32[B, 1, 4]", f"aten.squeeze.dims(%1, [1]) : {F}"),
        ["unsqueeze", "neg", "squeeze.dim"],
    ),
    "flatten": (("aten.flatten.using_ints(%x) : f32[4*B]",), ["reshape"]),
    "unflatten": (("aten.unflatten.int(%x, 1, [2, 2]) : f32[B, 2, 2]",), ["reshape"]),
    "pad": (("aten.pad(%x, [1, 0]) : f32[B, 5]",), ["constant_pad_nd"]),
}
KEPT: dict[str, tuple[str, ...]] = {
    "reverse subtraction with a factor": (f"aten.rsub.Scalar(%x, 1.5, 2) : {F}",),
    "float minus integer": ("aten.rsub.Scalar(%i, 1.5) : f32[B, 4]",),
    "reflection": ('aten.pad(%x, [1, 0], "reflect") : f32[B, 5]',),
}


def program(lines: tuple[str, ...]) -> str:
    return HEAD + "".join(f"  %{i} = {line}\n" for i, line in enumerate(lines)) + f"  return (%{len(lines) - 1},)\n}}\n"


@pytest.mark.parametrize(("lines", "wanted"), SPELLINGS.values(), ids=SPELLINGS.keys())
def test_one_spelling(lines: tuple[str, ...], wanted: list[str]) -> None:
    _, after, stats = rewritten(Canonicalize(), program(lines))
    assert stats.hits >= 1
    assert operators(after) == wanted


@pytest.mark.parametrize("lines", KEPT.values(), ids=KEPT.keys())
def test_what_has_no_other_spelling_stays(lines: tuple[str, ...]) -> None:
    _, after, stats = rewritten(Canonicalize(), program(lines))
    assert (stats.hits, after.mutations) == (0, 0)


def test_batch_norm_has_one_form() -> None:
    class Norm(nn.Module):
        def __init__(self, inplace: bool) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
            self.relu = nn.ReLU(inplace)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.relu(self.norm(x))

    x = torch.randn(2, 3, 4, 4)
    forms = []
    for inplace in (False, True):
        model = Norm(inplace).eval()
        after = trace(model, (x,))
        Canonicalize().run(after, Context())
        assert torch.allclose(after(x), model(x), rtol=1e-6, atol=1e-6)
        forms.append(operators(after))
    assert forms[0] == forms[1] == ["batch_norm", "relu"]


def test_norms_with_statistics_have_the_form_without() -> None:
    """As `run_decompositions` writes them."""

    class Norms(nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            layer = torch.ops.aten.native_layer_norm.default(x, [4], w, None, 1e-3)[0]
            return torch.ops.aten._fused_rms_norm.default(layer, [4], w, 1e-3)[0]

    x, w = torch.randn(2, 3, 4), torch.randn(4)
    after = trace(Norms(), (x, w))
    Canonicalize().run(after, Context())
    assert operators(after) == ["layer_norm", "rms_norm"]
    assert torch.allclose(after(x, w), Norms()(x, w), rtol=1e-6, atol=1e-6)


def test_golden(golden: Callable[[str, str], None]) -> None:
    program_ = traced("llama").clone()
    Canonicalize().run(program_, Context())
    golden("passes/canonicalize", program_.to_text())


@over_zoo(quick=("llama", "bert", "plain_resnet"))
def test_zoo(name: str) -> None:
    from graphlathe.tools import zoo

    before = traced(name)
    after = before.clone()
    Canonicalize().run(after, Context())
    again = after.clone()
    Canonicalize().run(again, Context())
    assert again.mutations == 0
    model = zoo.get(name)
    feeds = [before.feeds(**model.inputs(sizes)) for sizes in (model.trace_sizes, *model.unseen_sizes)]
    verify(after, 3, reference=before, feeds=feeds, pass_name="canonicalize")


class Deep(nn.Module):
    """A chain of blocks with something to do for every part of `canonicalize`."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            h = layer(x.view(-1, 2, 4).transpose(1, 2).contiguous().transpose(1, 2).reshape(-1, 8))
            x = x + torch.relu(h) * torch.relu(h) + torch.zeros(8)
        return x


def test_work_is_linear_in_the_number_of_nodes() -> None:
    counts: list[int] = []
    for depth in (25, 200):
        program_ = trace(Deep(depth), (torch.randn(3, 8),), dynamic={"x": {0: "B"}})
        counts.append(calls(lambda program_=program_: Canonicalize().run(program_.clone(), Context())))
    assert_linear(*counts, 8)


def test_deep_chain_is_exact() -> None:
    before = trace(Deep(3), (torch.randn(2, 8),), dynamic={"x": {0: "B"}})
    after = before.clone()
    Canonicalize().run(after, Context())
    assert_same_outputs(after, before)
    assert len(operators(after)) < len(operators(before))
