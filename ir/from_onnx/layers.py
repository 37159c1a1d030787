"""Layers: matrix products and convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .pooling import CONV, padded, padding_of, symmetric
from .registry import operator


@operator("MatMul")
def matmul(a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


@operator("Gemm")
def gemm_old(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    broadcast: int = 0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """Before opset 7: the bias only broadcasts if asked to, which it always may."""
    return gemm(a, b, c, alpha=alpha, beta=beta, transA=transA, transB=transB)


@operator("Gemm", since=7)
def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """``alpha * a @ b + beta * c``; the usual form is a linear layer."""
    a = a.t() if transA else a
    if transB and alpha == 1 and (c is None or (beta == 1 and c.dim() == 1)):
        return F.linear(a, b, c)
    if c is not None and alpha == beta == 1:
        return torch.addmm(c, a, b.t() if transB else b)
    product = torch.mm(a, b.t() if transB else b)
    product = product if alpha == 1 else product * alpha
    return product if c is None else product + (c if beta == 1 else c * beta)


@operator("Einsum")
def einsum(*operands: Tensor, equation: str) -> Tensor:
    return torch.einsum(equation, *operands)


_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@operator("Conv")
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    spatial = x.dim() - 2
    strides, dilations = list(strides or [1] * spatial), list(dilations or [1] * spatial)
    padding = padding_of(x, [int(k) for k in weight.shape[2:]], strides, dilations, pads, auto_pad)
    even = symmetric(padding)
    if even is None:
        x, even = padded(x, padding), [0] * spatial
    return CONV[spatial](x, weight, bias, strides, even, dilations, group)


@operator("ConvTranspose")
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    output_padding: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Padding cuts off the full result: as the file says, or so that the output is the input times the stride, or
    ``output_shape``; of an odd number, the begin gets more unless ``SAME_UPPER`` says otherwise.
    """
    spatial = x.dim() - 2
    strides, dilations = list(strides or [1] * spatial), list(dilations or [1] * spatial)
    extra = list(output_padding or [0] * spatial)
    kernel = [int(k) for k in weight.shape[2:]]
    padding = list(zip((pads or [0] * 2 * spatial)[:spatial], (pads or [0] * 2 * spatial)[spatial:], strict=True))
    if output_shape is not None or auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        padding = []
        for i in range(spatial):
            full = strides[i] * (x.shape[2 + i] - 1) + extra[i] + (kernel[i] - 1) * dilations[i] + 1
            wanted = x.shape[2 + i] * strides[i] if output_shape is None else output_shape[i - spatial]
            total: Any = full - wanted
            short = torch.sym_max(total, 0)  # an output that is too short is filled up at its end
            half = short // 2
            begin = half if auto_pad == "SAME_UPPER" else short - half
            padding.append((begin, total - begin))
    even = symmetric(padding)
    if even is not None and all(p >= 0 for p in even):
        return _CONV_TRANSPOSE[spatial](x, weight, bias, strides, even, extra, group, dilations)
    result = _CONV_TRANSPOSE[spatial](x, weight, bias, strides, [0] * spatial, extra, group, dilations)
    return padded(result, [(-begin, -end) for begin, end in padding])
