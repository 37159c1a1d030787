"""``raise-norms``: many spellings of RMSNorm and LayerNorm become one operator; what only looks like one does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphlathe.passes.base import Context
from graphlathe.passes.canonical.raise_norms import RaiseNorms
from graphlathe.passes.manager import PassManager
from tests.passes.canonical.spelled import raised
from tests.passes.rewriting import operators, rewritten
from tests.zoo_programs import traced, zoo_parameters

Function = Callable[..., Any]
N = 6


def mean_of_squares(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True)


def tensorflow(x: Tensor, mean: Tensor, variance: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
    scale = torch.rsqrt(variance + eps) * w
    return x * scale + (b - mean * scale)


RMS: dict[str, Function] = {
    "weight last": lambda x, w, eps: w * (x * torch.rsqrt(mean_of_squares(x) + eps)),
    "weight on the right": lambda x, w, eps: (x * torch.rsqrt(mean_of_squares(x) + eps)) * w,
    "weight with the root": lambda x, w, eps: x * (torch.rsqrt(mean_of_squares(x) + eps) * w),
    "weight with the value": lambda x, w, eps: (x * w) * torch.rsqrt(mean_of_squares(x) + eps),
    "x times x": lambda x, w, eps: w * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)),
    "division by the root": lambda x, w, eps: w * (x / torch.sqrt(mean_of_squares(x) + eps)),
    "one divided by the root": lambda x, w, eps: w * (x * (1.0 / torch.sqrt(mean_of_squares(x) + eps))),
    "reciprocal": lambda x, w, eps: w * (torch.sqrt(mean_of_squares(x) + eps).reciprocal() * x),
    "power of minus a half": lambda x, w, eps: w * (x * (mean_of_squares(x) + eps).pow(-0.5)),
    "division by a power": lambda x, w, eps: (x / (eps + mean_of_squares(x)) ** 0.5) * w,
    "sum over n": lambda x, w, eps: w * (x * torch.rsqrt((x * x).sum(-1, keepdim=True) / N + eps)),
    "sum times 1/n": lambda x, w, eps: w * (x * torch.rsqrt((x * x).sum(-1, keepdim=True) * (1 / N) + eps)),
    "weight plus one": lambda x, w, eps: (x * torch.rsqrt(mean_of_squares(x) + eps)) * (1.0 + (w - 1.0)),
    "weight with more axes": lambda x, w, eps: w.reshape(1, 1, N) * (x * torch.rsqrt(mean_of_squares(x) + eps)),
    "positive axis": lambda x, w, eps: w * (x * torch.rsqrt(x.pow(2).mean(x.dim() - 1, keepdim=True) + eps)),
}

LAYER: dict[str, Function] = {
    "mean of squares": lambda x, w, b, eps: (
        (x - x.mean(-1, keepdim=True)) / torch.sqrt(mean_of_squares(x - x.mean(-1, keepdim=True)) + eps) * w + b
    ),
    "rsqrt": lambda x, w, b, eps: (
        b + w * ((x - x.mean(-1, True)) * torch.rsqrt(((x - x.mean(-1, True)) ** 2).mean(-1, True) + eps))
    ),
    "var": lambda x, w, b, eps: (
        (x - x.mean(-1, True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + eps) * w + b
    ),
    "var of the centred value": lambda x, w, b, eps: (
        (x + -x.mean(-1, True)) * (torch.var(x, -1, correction=0, keepdim=True) + eps) ** -0.5 * w + b
    ),
    "var_mean": lambda x, w, b, eps: (
        (x - torch.var_mean(x, -1, correction=0, keepdim=True)[1])
        * torch.rsqrt(torch.var_mean(x, -1, correction=0, keepdim=True)[0] + eps)
        * w
        + b
    ),
    "TensorFlow": lambda x, w, b, eps: tensorflow(
        x, x.mean(-1, True), (x - x.mean(-1, True)).square().mean(-1, True), w, b, eps
    ),
    "TensorFlow with var": lambda x, w, b, eps: tensorflow(
        x, x.mean(-1, True), x.var(-1, unbiased=False, keepdim=True), w, b, eps
    ),
    "sums": lambda x, w, b, eps: (
        (x - x.sum(-1, True) / N) / torch.sqrt((x - x.sum(-1, True) / N).pow(2).sum(-1, True) / N + eps) * w + b
    ),
}


def operands(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randn(size, generator=generator, dtype=torch.float64) for size in (shape, shape[-1:], shape[-1:]))
    x, w, b = (value.to(dtype) for value in drawn)
    return x, w, b


@pytest.mark.parametrize("name", RMS)
def test_spellings_of_rms_norm(name: str) -> None:
    x, w, _ = operands(3, 2, N)
    _, after, stats = raised(RaiseNorms(), lambda x, w: RMS[name](x, w, 1e-3), x, w=w)
    assert operators(after) == ["rms_norm"]
    assert (stats.hits, stats.attempts, stats.misses) == (1, 1, {})
    torch.testing.assert_close(after(x), F.rms_norm(x, (N,), w, 1e-3), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", LAYER)
def test_spellings_of_layer_norm(name: str) -> None:
    x, w, b = operands(3, 2, N)
    _, after, stats = raised(RaiseNorms(), lambda x, w, b: LAYER[name](x, w, b, 1e-3), x, w=w, b=b)
    assert operators(after) == ["layer_norm"]
    assert (stats.hits, stats.misses) == (1, {})
    torch.testing.assert_close(after(x), F.layer_norm(x, (N,), w, b, 1e-3), rtol=1e-12, atol=1e-14)


def test_a_weight_that_adds_axes_is_none_of_the_norm() -> None:
    x, w, _ = operands(N)
    _, after, _ = raised(RaiseNorms(), lambda x, w: RMS["weight last"](x, w, 1e-3), x, w=w)
    assert operators(after) == ["rms_norm"]
    _, after, _ = raised(RaiseNorms(), lambda x, w: RMS["weight last"](x, w, 1e-3), x, w=w.reshape(1, N))
    assert operators(after) == ["rms_norm", "mul.Tensor"]


def test_a_layer_norm_may_lack_weight_and_bias() -> None:
    x, w, b = operands(3, 2, N)

    def centred(x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True)

    def plain(x: Tensor) -> Tensor:
        return centred(x) * torch.rsqrt(mean_of_squares(centred(x)) + 1e-3)

    def folded(x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-3)
        return x * scale - x.mean(-1, keepdim=True) * scale

    for function in (plain, folded):
        _, after, _ = raised(RaiseNorms(), function, x)
        assert operators(after) == ["layer_norm"]
    _, after, _ = raised(RaiseNorms(), lambda x, w: plain(x) * w, x, w=w)
    torch.testing.assert_close(after(x), F.layer_norm(x, (N,), w, None, 1e-3))
    _, after, _ = raised(RaiseNorms(), lambda x, b: b + plain(x), x, b=b)
    assert operators(after) == ["layer_norm"]
    torch.testing.assert_close(after(x), F.layer_norm(x, (N,), None, b, 1e-3))


def wide(x: Tensor) -> Tensor:
    return x.float() * torch.rsqrt(mean_of_squares(x.float()) + 1e-3)


def test_casts_around_a_norm_go_where_the_operator_does_the_same() -> None:
    x, w, _ = operands(3, 2, N, dtype=torch.float16)
    # T5 and Llama: the root in float32 times the narrow value, cast back, then the weight.
    _, after, _ = raised(
        RaiseNorms(), lambda x, w: w * (x * torch.rsqrt(mean_of_squares(x.float()) + 1e-3)).half(), x, w=w
    )
    assert operators(after) == ["rms_norm"]
    _, after, _ = raised(RaiseNorms(), lambda x: wide(x).half(), x)
    assert operators(after) == ["rms_norm"]
    # Gemma: the weight in float32, then the cast back.
    _, after, _ = raised(RaiseNorms(), lambda x, w: (wide(x) * (1.0 + w.float())).to(x.dtype), x, w=w)
    assert operators(after) == ["_to_copy", "rms_norm", "_to_copy"]
    # The result stays in float32: there is no narrow norm with a wide weight.
    _, after, _ = raised(RaiseNorms(), lambda x, w: wide(x).to(x.dtype) * w, x, w=w.float())
    assert operators(after) == ["rms_norm", "mul.Tensor"]


def test_statistics_in_float64_are_not_narrowed() -> None:
    x, w, _ = operands(3, 2, N, dtype=torch.float32)
    _, after, _ = raised(
        RaiseNorms(), lambda x, w: w * (x.double() * torch.rsqrt(mean_of_squares(x.double()) + 1e-3)).float(), x, w=w
    )
    assert operators(after) == ["_to_copy", "rms_norm", "_to_copy", "mul.Tensor"]


def test_two_weights_make_two_norms() -> None:
    """What common-subexpression elimination merged comes apart again: two layers that read one value."""
    x, w, b = operands(3, 2, N)
    rms, layer = RMS["weight last"], LAYER["var"]
    _, after, stats = raised(RaiseNorms(), lambda x, w, v: (rms(x, w, 1e-3), rms(x, v, 1e-3)), x, w=w, v=b)
    assert (operators(after), stats.hits) == (["rms_norm"] * 2, 1)
    _, after, _ = raised(RaiseNorms(), lambda x, w, b: (layer(x, w, b, 1e-3), layer(x, b, w, 1e-3)), x, w=w, b=b)
    assert operators(after) == ["layer_norm"] * 2


def test_a_norm_whose_value_is_an_output_keeps_it() -> None:
    x, w, _ = operands(3, 2, N)

    def both(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        normal = x * torch.rsqrt(mean_of_squares(x) + 1e-3)
        return normal, w * normal

    _, after, _ = raised(RaiseNorms(), both, x, w=w)
    assert operators(after) == ["rms_norm", "mul.Tensor"]


def test_constants_may_be_weights_of_one_element() -> None:
    """As in a file of ONNX, whose numbers are initialisers; their shape may be [] or [1]."""
    x, w, _ = operands(3, 2, N)
    two, eps = torch.tensor(2.0, dtype=x.dtype), torch.tensor([1e-3], dtype=x.dtype)
    _, after, _ = raised(
        RaiseNorms(),
        lambda x, w, two, eps: w * (x / torch.sqrt(torch.pow(x, two).mean(-1, True) + eps)),
        x,
        w=w,
        two=two,
        eps=eps,
    )
    assert operators(after) == ["rms_norm"]
    assert list(after.used_weights()) == ["w"]


def test_a_shared_weight_of_another_shape_is_not_copied() -> None:
    x, w, _ = operands(3, 2, N)

    def twice(x: Tensor, w: Tensor) -> Tensor:
        return RMS["weight last"](RMS["weight last"](x, w, 1e-3) + w, w, 1e-3)

    before, after, stats = raised(RaiseNorms(), twice, x, w=w.reshape(1, N))
    assert stats.hits == 2
    assert all(after.weights[n].shares_storage(before.weights["w"]) for n in after.used_weights())


NEAR_MISSES: dict[str, tuple[Function, str]] = {
    "wrong axis": (
        lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-3)),
        "the statistics are not over the last axis",
    ),
    "two axes": (
        lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean((-1, -2), keepdim=True) + 1e-3)),
        "the statistics are not over the last axis",
    ),
    "cubes": (
        lambda x, w: w * (x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-3)),
        "what is averaged is no square",
    ),
    "sum": (
        lambda x, w: w * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / (N + 1) + 1e-3)),
        "a sum, not a mean (a Euclidean norm)",
    ),
    "unbiased": (
        lambda x, w: w * (x - x.mean(-1, True)) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-3),
        "the variance is divided by n - 1",
    ),
    "mean stays": (
        lambda x, w: w * x * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-3),
        "the root does not scale the value that it was computed from",
    ),
    "another value": (
        lambda x, w: w * (x.flip(-1) * torch.rsqrt(mean_of_squares(x) + 1e-3)),
        "the root does not scale the value that it was computed from",
    ),
    "division by the reciprocal root": (
        lambda x, w: w * (x / torch.rsqrt(mean_of_squares(x) + 1e-3)),
        "the root does not scale the value that it was computed from",
    ),
    "eps outside": (
        lambda x, w: w * (x / (torch.sqrt(mean_of_squares(x)) + 1e-3)),
        "the root does not scale the value that it was computed from",
    ),
    "clamped": (
        lambda x, w: w * (x * torch.rsqrt(mean_of_squares(x).clamp(min=1e-3))),
        "the mean of squares is clamped",
    ),
    "difference of means": (
        lambda x, w: w * (x - x.mean(-1, True)) * torch.rsqrt(mean_of_squares(x) - x.mean(-1, True) ** 2),
        "the variance is a difference of means, which rounds differently",
    ),
    "the root is read elsewhere": (
        lambda x, w: (w * (x * torch.rsqrt(mean_of_squares(x) + 1e-3)), torch.rsqrt(mean_of_squares(x) + 1e-3)),
        "the result of 'rsqrt' inside is read elsewhere too",
    ),
    "the mean is read elsewhere": (
        lambda x, w: (RMS["weight last"](x, w, 1e-3), mean_of_squares(x)),
        "the result of 'mean' inside is read elsewhere too",
    ),
    "half precision": (
        lambda x, w: w * (x.half() * torch.rsqrt(mean_of_squares(x.half()) + 1e-3)),
        "the statistics are computed in half precision",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_say_why(name: str) -> None:
    function, reason = NEAR_MISSES[name]
    x, w, _ = operands(3, 2, N)
    before, after, stats = raised(RaiseNorms(), function, x, w=w)
    assert (stats.hits, stats.misses) == (0, {reason: 1})
    assert after.to_text() == before.to_text()


def test_other_roots_are_no_misses() -> None:
    x, _, _ = operands(3, 2, N)
    _, _, stats = raised(RaiseNorms(), lambda x: (x.abs() + 1).sqrt() + (x.abs() + x).pow(0.5), x)
    assert stats.attempts == 0


@settings(max_examples=25)
@given(data=st.data())
def test_random_norms_keep_their_values(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 9))
    shape = (*data.draw(st.lists(st.integers(1, 4), max_size=3)), size)
    eps = data.draw(st.floats(1e-12, 1.0))
    x, w, b = operands(*shape, seed=data.draw(st.integers(0, 9)))
    centred = data.draw(st.booleans())

    def square(value: Tensor) -> Tensor:
        return value * value if data.draw(first) else value**2

    first = st.shared(st.booleans(), key="square")
    divide, flip = data.draw(st.booleans()), data.draw(st.booleans())

    def norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        value = x - x.mean(-1, keepdim=True) if centred else x
        below = square(value).mean(-1, keepdim=True) + eps
        normal = value / below.sqrt() if divide else value * below.rsqrt()
        return (w * normal if flip else normal * w) + (b if centred else 0)

    _, after, stats = raised(RaiseNorms(), norm, x, w=w, b=b)
    assert stats.hits == 1
    expected = F.layer_norm(x, (size,), w, b, eps) if centred else F.rms_norm(x, (size,), w, eps)
    torch.testing.assert_close(after(x), expected, rtol=1e-10, atol=1e-12)


TEXT = """\
program @main(%x: f32[B, S, 8]) -> (%out) {
  dim B = 2 in [1, inf]
  dim S = 5 in [1, inf]
  %w0 = weight "norm1.weight" : f32[8] #00000000
  %w1 = weight "norm2.weight" : f32[8] #00000000
  %w2 = weight "norm2.bias" : f32[8] #00000000
  %0 = aten.pow.Tensor_Scalar(%x, 2) : f32[B, S, 8]
  %1 = aten.mean.dim(%0, [-1], True) : f32[B, S, 1]
  %2 = aten.add.Tensor(%1, 1e-05) : f32[B, S, 1]
  %3 = aten.rsqrt(%2) : f32[B, S, 1]
  %4 = aten.mul.Tensor(%x, %3) : f32[B, S, 8]
  %5 = aten.mul.Tensor(%w0, %4) : f32[B, S, 8]
  %6 = aten.mean.dim(%5, [2], True) : f32[B, S, 1]
  %7 = aten.sub.Tensor(%5, %6) : f32[B, S, 8]
  %8 = aten.mul.Tensor(%7, %7) : f32[B, S, 8]
  %9 = aten.mean.dim(%8, [2], True) : f32[B, S, 1]
  %10 = aten.add.Tensor(%9, 0.001) : f32[B, S, 1]
  %11 = aten.sqrt(%10) : f32[B, S, 1]
  %12 = aten.div.Tensor(%7, %11) : f32[B, S, 8]
  %13 = aten.mul.Tensor(%12, %w1) : f32[B, S, 8]
  %14 = aten.add.Tensor(%13, %w2) : f32[B, S, 8]
  return (%14,)
}
"""


def test_before_and_after(golden: Callable[[str, str], None]) -> None:
    before, after, _ = rewritten(RaiseNorms(), TEXT)
    assert operators(after) == ["rms_norm", "layer_norm"]
    golden("passes/raise-norms", f"{before.to_text()}\n{after.to_text()}")


@pytest.mark.parametrize("name", zoo_parameters(quick=("t5", "gemma", "cohere")))
def test_no_norm_of_the_zoo_is_left_spelled_out(name: str) -> None:
    after, report = PassManager(RaiseNorms(), verify=0, costs=False).run(traced(name))
    row = report.rows[-1]
    assert row.misses == EXPLAINED.get(name, {})
    again = RaiseNorms().run(after, Context())
    assert (again.hits, again.misses) == (0, row.misses)


EXPLAINED: dict[str, dict[str, int]] = {
    "clip": {"a sum, not a mean (a Euclidean norm)": 2},
    "qwen3_next": {"a sum, not a mean (a Euclidean norm)": 2},
}
"""Models in which something else is computed with the root of a mean."""
