"""``remove-noops``: what changes nothing goes, what changes anything stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from graphlathe.ir.from_torch import trace
from graphlathe.passes.base import Context
from graphlathe.passes.canonical.remove_noops import RemoveNoops
from tests.passes.rewriting import operators, rewritten

END = 9223372036854775807
HEAD = (
    "program @main(%x: f32[B, 4], %h: f16[B, 4], %i: i64[B, 4], %m: bool[B, 4]) -> (%out) {\n  dim B = 2 in [1, inf]\n"
)
F, H, I64, M = "f32[B, 4]", "f16[B, 4]", "i64[B, 4]", "bool[B, 4]"


def program(*lines: str) -> str:
    return HEAD + "".join(f"  %{i} = {line}\n" for i, line in enumerate(lines)) + f"  return (%{len(lines) - 1},)\n}}\n"


# The lines (a relu at the end keeps the output a value of the graph), and the operators that stay.
HITS: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "clone": ((f"aten.clone(%x) : {F}", f"aten.relu(%0) : {F}"), ["relu"]),
    "contiguous": ((f"aten.contiguous(%x) : {F}", f"aten.relu(%0) : {F}"), ["relu"]),
    "cast to the same": ((f"aten._to_copy(%x, dtype=f32) : {F}", f"aten.relu(%0) : {F}"), ["relu"]),
    "cast there and back": (
        (f"aten._to_copy(%h, dtype=f32) : {F}", f"aten._to_copy(%0, dtype=f16) : {H}", f"aten.relu(%1) : {H}"),
        ["relu"],
    ),
    "cast through a wider type": (
        (f"aten._to_copy(%h, dtype=f32) : {F}", "aten._to_copy(%0, dtype=f64) : f64[B, 4]"),
        ["_to_copy"],
    ),
    "dropout at inference": ((f"aten.dropout(%x, 0.5, False) : {F}", f"aten.relu(%0) : {F}"), ["relu"]),
    "dropout of nothing": ((f"aten.dropout(%x, 0.0, True) : {F}", f"aten.relu(%0) : {F}"), ["relu"]),
    "slice of everything": ((f"aten.slice.Tensor(%x, 1, 0, {END}) : {F}", f"aten.relu(%0) : {F}"), ["relu"]),
    "slice of all there is": ((f"aten.slice.Tensor(%x, 1, 0, 4) : {F}", f"aten.relu(%0) : {F}"), ["relu"]),
    "expand to the same": ((f"aten.expand(%x, [-1, 4]) : {F}", f"aten.relu(%0) : {F}"), ["relu"]),
    "view": (("aten.view(%x, [-1]) : f32[4*B]",), ["reshape"]),
    "view of a view": (("aten.view(%x, [-1, 2, 2]) : f32[B, 2, 2]", "aten.view(%0, [-1]) : f32[4*B]"), ["reshape"]),
    "view there and back": (
        ("aten.view(%x, [-1, 2, 2]) : f32[B, 2, 2]", f"aten.view(%0, [-1, 4]) : {F}", f"aten.relu(%1) : {F}"),
        ["relu"],
    ),
    "squeeze of unsqueeze": (
        ("aten.unsqueeze(%x, 1) : f32[B, 1, 4]", f"aten.squeeze.dim(%0, 1) : {F}", f"aten.relu(%1) : {F}"),
        ["relu"],
    ),
    "select of unsqueeze": (
        ("aten.unsqueeze(%x, 1) : f32[B, 1, 4]", f"aten.select.int(%0, -2, 0) : {F}", f"aten.relu(%1) : {F}"),
        ["relu"],
    ),
    "transposes that cancel": (
        (
            "aten.transpose.int(%x, 0, 1) : f32[4, B]",
            f"aten.permute(%0, [1, 0]) : {F}",
            f"aten.relu(%1) : {F}",
        ),
        ["relu"],
    ),
    "permutations in a row": (
        (
            "aten.reshape(%x, [-1, 2, 2]) : f32[B, 2, 2]",
            "aten.permute(%0, [1, 2, 0]) : f32[2, 2, B]",
            "aten.permute(%1, [1, 0, 2]) : f32[2, 2, B]",
        ),
        ["reshape", "transpose.int"],
    ),
    "t is a transpose": (("aten.t(%x) : f32[4, B]",), ["transpose.int"]),
    "cat of one": ((f"aten.cat([%x], 1) : {F}", f"aten.relu(%0) : {F}"), ["relu"]),
    "pad by nothing": ((f"aten.constant_pad_nd(%x, [0, 0], 1.0) : {F}", f"aten.relu(%0) : {F}"), ["relu"]),
    "times one": ((f"aten.mul.Tensor(%x, 1) : {F}", f"aten.relu(%0) : {F}"), ["relu"]),
    "minus zero": ((f"aten.sub.Tensor(%x, 0) : {F}", f"aten.relu(%0) : {F}"), ["relu"]),
    "integer plus zero": ((f"aten.add.Tensor(%i, 0) : {I64}", f"aten.neg(%0) : {I64}"), ["neg"]),
    "and true": (
        ("aten.full([], True) : bool[]", f"aten.logical_and(%0, %m) : {M}", f"aten.logical_not(%1) : {M}"),
        ["logical_not"],
    ),
    "all of a split": (
        (f"aten.split.Tensor(%x, 4, 1) : [{F}]", f"operator.getitem(%0, 0) : {F}", f"aten.relu(%1) : {F}"),
        ["relu"],
    ),
}
MISSES: dict[str, tuple[str, ...]] = {
    "narrower and back": (f"aten._to_copy(%x, dtype=f16) : {H}", f"aten._to_copy(%0, dtype=f32) : {F}"),
    "integer through float": (f"aten._to_copy(%i, dtype=f32) : {F}", f"aten._to_copy(%0, dtype=i64) : {I64}"),
    "a real slice": ("aten.slice.Tensor(%x, 1, 0, 3) : f32[B, 3]",),
    "padding that shifts": (f"aten.constant_pad_nd(%x, [1, -1], 0.0) : {F}",),
    "float plus zero changes the sign of zero": (f"aten.add.Tensor(%x, 0.0) : {F}",),
    "integer times 1.0 is a float": ("aten.mul.Tensor(%i, 1.0) : f32[B, 4]",),
    "one over x": (f"aten.pow.Scalar(1, %x) : {F}",),
    "a roll keeps the shape only": (f"aten.roll(%x, [1], [1]) : {F}",),
    "and false": ("aten.full([], False) : bool[]", f"aten.logical_and(%0, %m) : {M}"),
    "integer and true keeps one bit": ("aten.full([], True) : bool[]", f"aten.bitwise_and.Tensor(%i, %0) : {I64}"),
    "select of another axis": ("aten.unsqueeze(%x, 0) : f32[1, B, 4]", "aten.select.int(%0, 2, 0) : f32[1, B]"),
    "one of two transposes": ("aten.transpose.int(%x, 0, 1) : f32[4, B]",),
}


@pytest.mark.parametrize(("lines", "left"), HITS.values(), ids=HITS.keys())
def test_what_changes_nothing_goes(lines: tuple[str, ...], left: list[str]) -> None:
    _, after, stats = rewritten(RemoveNoops(), program(*lines))
    assert stats.hits >= 1
    assert operators(after) == left


@pytest.mark.parametrize("lines", MISSES.values(), ids=MISSES.keys())
def test_what_changes_something_stays(lines: tuple[str, ...]) -> None:
    _, after, stats = rewritten(RemoveNoops(), program(*lines))
    assert (stats.hits, after.mutations) == (0, 0)


def test_all_at_once(golden: Callable[[str, str], None]) -> None:
    text = program(
        "aten.view(%x, [-1, 2, 2]) : f32[B, 2, 2]",
        "aten.transpose.int(%0, 1, 2) : f32[B, 2, 2]",
        "aten.clone(%1, memory_format=contiguous_format) : f32[B, 2, 2]",
        "aten._unsafe_view(%2, [-1]) : f32[4*B]",
        f"aten.slice.Tensor(%3, 0, 0, {END}) : f32[4*B]",
        "aten.dropout(%4, 0.1, False) : f32[4*B]",
    )
    _, after, _ = rewritten(RemoveNoops(), text)
    golden("passes/remove-noops", after.to_text())


def test_an_input_may_become_an_output() -> None:
    _, after, _ = rewritten(RemoveNoops(), program(f"aten.clone(%x) : {F}"))
    assert after.main.output_values[0].op == "placeholder"


def test_a_value_with_other_readers_is_skipped_over_not_removed() -> None:
    text = (
        "program @main(%x: f32[B, 4]) -> (%a, %b) {\n  dim B = 2 in [1, inf]\n"
        "  %0 = aten.reshape(%x, [-1, 2, 2]) : f32[B, 2, 2]\n  %1 = aten.reshape(%0, [-1]) : f32[4*B]\n"
        "  return (%0, %1)\n}\n"
    )
    _, after, _ = rewritten(RemoveNoops(), text)
    a, b = after.main.output_values
    assert a.args[0] is b.args[0] is after.main.placeholders[0]


def test_copies_before_an_operator_that_looks_at_strides_stay() -> None:
    class Complex(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rotated = torch.view_as_complex(x.transpose(1, 2).contiguous())
            return torch.view_as_real(rotated * rotated).contiguous()

    x = torch.randn(3, 2, 5)
    program = trace(Complex(), (x,))
    stats = RemoveNoops().run(program, Context())
    assert operators(program).count("contiguous") == 1
    assert stats.misses == {"an operator that looks at strides depends on it": 2}
    assert torch.equal(program(x), Complex()(x))


def test_whole_in_the_example_is_not_whole() -> None:
    class First(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:4] * 2

    program = trace(First(), (torch.randn(4, 3),), dynamic={"x": {0: torch.export.Dim("B", min=4)}})
    RemoveNoops().run(program, Context())
    x = torch.randn(9, 3)
    assert torch.equal(program(x), x[:4] * 2)
