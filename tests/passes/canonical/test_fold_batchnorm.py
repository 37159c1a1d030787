"""``fold-batchnorm``: after and before convolutions and linear layers of every kind, and where it must stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphlathe.ir.program import Program
from graphlathe.ir.text import parse_program
from graphlathe.ir.weights import MetaSource, Weight
from graphlathe.passes.base import Context
from graphlathe.passes.canonical.fold_batchnorm import FoldBatchNorm
from tests.passes.canonical.spelled import raised
from tests.passes.rewriting import operators, rewritten

Function = Callable[..., Any]


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def norm_weights(channels: int) -> dict[str, Tensor]:
    return {
        "mean": random(channels),
        "var": random(channels).square() + 0.01,
        "g": random(channels),
        "h": random(channels),
    }


def norm(y: Tensor, mean: Tensor, var: Tensor, g: Tensor | None, h: Tensor | None) -> Tensor:
    return F.batch_norm(y, mean, var, g, h, False, 0.1, 1e-3)


# A layer with 6 output channels; the shapes of its input, weight and bias.
LAYERS: dict[str, tuple[Function, tuple[int, ...], tuple[int, ...], tuple[int, ...] | None]] = {
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b, padding=2), (3, 4, 7), (6, 4, 3), (6,)),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, stride=2, padding="valid"), (3, 4, 7, 7), (6, 4, 3, 3), (6,)),
    "conv2d without bias": (lambda x, w, b: F.conv2d(x, w, b, padding="same"), (3, 4, 5, 5), (6, 4, 3, 3), None),
    "conv3d": (lambda x, w, b: F.conv3d(x, w, b), (3, 4, 3, 3, 3), (6, 4, 2, 2, 2), (6,)),
    "grouped": (lambda x, w, b: F.conv2d(x, w, b, padding=1, groups=2), (3, 4, 5, 5), (6, 2, 3, 3), (6,)),
    "depthwise": (lambda x, w, b: F.conv2d(x, w, b, dilation=2, groups=6), (3, 6, 5, 5), (6, 1, 3, 3), (6,)),
    "transposed": (lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2), (3, 4, 5, 5), (4, 6, 3, 3), (6,)),
    "transposed in groups": (
        lambda x, w, b: F.conv_transpose1d(x, w, b, padding=1, groups=2),
        (3, 4, 5),
        (4, 3, 3),
        (6,),
    ),
    "linear": (F.linear, (3, 4), (6, 4), (6,)),
    "linear without bias": (F.linear, (3, 4), (6, 4), None),
    "linear of tokens": (lambda x, w, b: F.linear(x, w, b).transpose(1, 2), (3, 5, 4), (6, 4), (6,)),
    "linear of tokens as a matrix": (lambda x, w, b: F.linear(x, w, b).flatten(0, 1), (3, 5, 4), (6, 4), (6,)),
    "pixels as tokens": (lambda x, w, b: F.conv2d(x, w, b).flatten(2), (3, 4, 5, 5), (6, 4, 2, 2), (6,)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_after_a_layer(name: str) -> None:
    layer, shape, w_shape, b_shape = LAYERS[name]
    weights = {"w": random(*w_shape), **({} if b_shape is None else {"b": random(*b_shape)}), **norm_weights(6)}

    def function(x: Tensor, w: Tensor, mean: Tensor, var: Tensor, g: Tensor, h: Tensor, b: Tensor | None = None) -> Any:
        return norm(layer(x, w, b), mean, var, g, h)

    x = random(*shape)
    _, after, stats = raised(FoldBatchNorm(), function, x, **weights)
    assert "batch_norm" not in operators(after)
    assert (stats.hits, stats.attempts, stats.misses) == (1, 1, {})
    torch.testing.assert_close(after(x), function(x, **weights), rtol=1e-11, atol=1e-11)


BEFORE: dict[str, tuple[Function, tuple[int, ...], tuple[int, ...]]] = {
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b, stride=2), (3, 4, 7), (6, 4, 3)),
    "conv2d in groups": (lambda x, w, b: F.conv2d(x, w, b, dilation=2, groups=2), (3, 4, 7, 7), (6, 2, 3, 3)),
    "conv2d without bias": (lambda x, w, b: F.conv2d(x, w), (3, 4, 7, 7), (6, 4, 3, 3)),
    "linear": (F.linear, (3, 4), (6, 4)),
    "linear of tokens": (lambda x, w, b: F.linear(x.transpose(1, 2), w, b), (3, 4, 5), (6, 4)),
    "linear of pixels": (lambda x, w, b: F.linear(x.flatten(2).transpose(1, 2), w, b), (3, 4, 5, 5), (6, 4)),
}


@pytest.mark.parametrize("name", BEFORE)
def test_before_a_layer(name: str) -> None:
    layer, shape, w_shape = BEFORE[name]
    weights = {"w": random(*w_shape), "b": random(6), **norm_weights(4)}

    def function(x: Tensor, w: Tensor, b: Tensor, **rest: Tensor) -> Any:
        return layer(norm(x, **rest), w, b)

    x = random(*shape)
    _, after, stats = raised(FoldBatchNorm(), function, x, **weights)
    assert "batch_norm" not in operators(after)
    assert (stats.hits, stats.misses) == (1, {})
    torch.testing.assert_close(after(x), function(x, **weights), rtol=1e-11, atol=1e-11)


def test_without_factors_and_twice_in_a_row() -> None:
    weights = {"w": random(6, 4, 3), "mean": random(6), "var": random(6).square()}
    _, after, stats = raised(
        FoldBatchNorm(),
        lambda x, w, mean, var: norm(norm(F.conv1d(x, w), mean, var, None, None), mean, var, None, None),
        random(3, 4, 7),
        **weights,
    )
    assert operators(after) == ["conv1d"]
    assert stats.hits == 2


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_random_convolutions(data: st.DataObject) -> None:
    """Groups, strides, paddings and dilations; before the convolution only what does not pad is folded."""
    groups = data.draw(st.sampled_from([1, 2, 3]))
    inputs, outputs = (groups * data.draw(st.integers(1, 3)) for _ in range(2))
    padding, stride, dilation = (data.draw(st.integers(low, 2)) for low in (0, 1, 1))
    before = data.draw(st.booleans())
    size = (6 + 2 * padding - 2 * dilation) // stride + 1
    n = inputs if before else outputs
    text = (
        f"program @main(%x: f32[B, {inputs}, 7]) -> (%out) {{\n  dim B = 2 in [1, inf]\n"
        f'  %w0 = weight "w" : f32[{outputs}, {inputs // groups}, 3] #00000000\n'
        + "".join(
            f'  %w{i + 1} = weight "{name}" : f32[{n}] #00000000\n' for i, name in enumerate(("g", "h", "m", "v"))
        )
    )
    conv = f"[{stride}], [{padding}], [{dilation}], {groups}) : f32[B, {outputs}, {size}]\n"
    rest = "%w1, %w2, %w3, %w4, False, 0.1, 1e-05, True)"
    if before:
        text += f"  %0 = aten.batch_norm(%x, {rest} : f32[B, {n}, 7]\n  %1 = aten.conv1d(%0, %w0, None, {conv}"
    else:
        text += f"  %0 = aten.conv1d(%x, %w0, None, {conv}  %1 = aten.batch_norm(%0, {rest} : f32[B, {n}, {size}]\n"
    _, _, stats = rewritten(FoldBatchNorm(), text + "  return (%1,)\n}\n")
    assert stats.hits == (not before or not padding)


KEPT: dict[str, tuple[Function, str]] = {
    "batch statistics": (
        lambda x, w, v, **n: F.batch_norm(F.conv1d(x, w), None, None, n["g"], n["h"], True, 0.1, 1e-3),
        "the statistics are those of the batch",
    ),
    "read before": (
        lambda x, w, v, **n: (norm(F.conv1d(x, w), **n), F.conv1d(x, w)),
        "the layer's result is read elsewhere too",
    ),
    "shared weight": (
        lambda x, w, v, **n: norm(F.conv1d(x, w), **n) + F.conv1d(x.flip(2), w),
        "the layer's weight is read elsewhere too",
    ),
    "no layer": (lambda x, w, v, **n: norm(x.tanh(), **n), "no convolution or linear layer is next to it"),
    "an activation between": (
        lambda x, w, v, **n: norm(F.conv1d(x, w).relu(), **n),
        "no convolution or linear layer is next to it",
    ),
    "padding after it": (
        lambda x, w, v, **n: F.conv1d(norm(x, **n), w, padding=1),
        "the convolution after it extends its input at the border",
    ),
    "transposed after it": (
        lambda x, w, v, **n: F.conv_transpose1d(norm(x, **n), w),
        "the convolution after it extends its input at the border",
    ),
    "other channels": (
        lambda x, w, v, **n: norm(F.linear(x, v), **n),
        "no convolution or linear layer is next to it",
    ),
    "computed": (
        lambda x, w, v, **n: norm(F.conv1d(x, w * x[0, 0, 0]), **n),
        "the layer's weights are computed",
    ),
    "half precision": (
        lambda x, w, v, **n: norm(F.conv1d(x.bfloat16(), w.bfloat16()), **{k: t.bfloat16() for k, t in n.items()}),
        "the layer's weights are not of full precision",
    ),
    "no variance": (
        lambda x, w, v, **n: F.batch_norm(F.conv1d(x, w), n["mean"], n["var"] * 0, n["g"], n["h"], False, 0.1, 0.0),
        "a variance is so small that the scale is not finite",
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_where_it_stays_it_says_why(name: str) -> None:
    function, reason = KEPT[name]
    x = random(3, 4, 6)
    before, after, stats = raised(FoldBatchNorm(), function, x, w=random(4, 4, 3), v=random(4, 6), **norm_weights(4))
    assert after.to_text() == before.to_text()
    assert (stats.hits, stats.misses) == (0, {reason: 1})


TEXT = """\
program @main(%x: f32[B, 4, 8, 8]) -> (%out) {
  dim B = 2 in [1, inf]
  %w0 = weight "conv.weight" : f32[6, 4, 3, 3] #00000000
  %w1 = weight "bn.weight" : f32[6] #00000000
  %w2 = weight "bn.bias" : f32[6] #00000000
  %w3 = weight "bn.running_mean" : f32[6] #00000000
  %w4 = weight "bn.running_var" : f32[6] #00000000
  %0 = aten.conv2d(%x, %w0, None, [1, 1], [1, 1]) : f32[B, 6, 8, 8]
  %1 = aten.batch_norm(%0, %w1, %w2, %w3, %w4, False, 0.1, 1e-05, True) : f32[B, 6, 8, 8]
  %2 = aten.relu(%1) : f32[B, 6, 8, 8]
  return (%2,)
}
"""


def test_before_and_after(golden: Callable[[str, str], None]) -> None:
    before, after, _ = rewritten(FoldBatchNorm(), TEXT)
    assert operators(after) == ["conv2d", "relu"]
    golden("passes/fold-batchnorm", f"{before.to_text()}\n{after.to_text()}")


def test_weights_without_numbers_are_folded_to_weights_without_numbers() -> None:
    program: Program = parse_program(TEXT)
    for name, weight in list(program.weights.items()):
        program.weights[name] = Weight(MetaSource(weight.shape, weight.dtype))
    assert FoldBatchNorm().run(program, Context()).hits == 1
    assert {program.weights[name].is_meta for name in program.used_weights()} == {True}
    assert operators(program) == ["conv2d", "relu"]
