"""Quantised operators: each becomes one of ours, which carries scale, zero point, axis and rounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import kernels
from .model_file import DTYPES
from .pooling import padding_of
from .registry import operator


def single(parameter: Tensor | None) -> Tensor | None:
    """A scale or zero point of one element as a scalar: files write both [] and [1]."""
    if parameter is not None and parameter.dim() == 1 and isinstance(parameter.shape[0], int):
        return parameter.reshape([]) if parameter.shape[0] == 1 else parameter
    return parameter


@operator("QuantizeLinear")
def quantize_linear(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: torch.dtype | None = None,
    precision: int = 0,
    saturate: int = 1,
) -> Tensor:
    """The stored type is that of the zero point, else ``output_dtype``, else uint8."""
    if precision:
        scale = scale.to(DTYPES[precision])
    dtype = zero_point.dtype if zero_point is not None else output_dtype or torch.uint8
    if not block_size:
        scale, zero_point = single(scale), single(zero_point)  # type: ignore[assignment]
    return kernels.quantize(x, scale, zero_point, dtype=dtype, axis=axis, block_size=block_size)


@operator("DequantizeLinear")
def dequantize_linear(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    if not block_size:
        scale, zero_point = single(scale), single(zero_point)  # type: ignore[assignment]
    return kernels.dequantize(x, scale, zero_point, dtype=output_dtype, axis=axis, block_size=block_size)


@operator("DynamicQuantizeLinear")
def dynamic_quantize_linear(x: Tensor) -> Any:
    return kernels.dynamic_quantize(x)


@operator("MatMulInteger")
def matmul_integer(a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None) -> Tensor:
    return kernels.integer_matmul(a, b, single(a_zero), single(b_zero))


@operator("QLinearMatMul")
def qlinear_matmul(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
) -> Tensor:
    left, right, result = ((single(s), single(z)) for s, z in ((a_scale, a_zero), (b_scale, b_zero), (y_scale, y_zero)))
    return kernels.quantized_matmul(a, *left, b, *right, *result)


def _conv_options(
    x: Tensor,
    weight: Tensor,
    auto_pad: str,
    dilations: Sequence[int] | None,
    group: int,
    pads: Sequence[int] | None,
    strides: Sequence[int] | None,
) -> dict[str, Any]:
    spatial = x.dim() - 2
    strides, dilations = list(strides or [1] * spatial), list(dilations or [1] * spatial)
    padding = padding_of(x, [int(k) for k in weight.shape[2:]], strides, dilations, pads, auto_pad)
    flat = [begin for begin, _ in padding] + [end for _, end in padding]
    return {"stride": strides, "pads": flat, "dilation": dilations, "groups": group}


@operator("ConvInteger")
def conv_integer(
    x: Tensor,
    weight: Tensor,
    x_zero: Tensor | None = None,
    w_zero: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    options = _conv_options(x, weight, auto_pad, dilations, group, pads, strides)
    return kernels.integer_conv(x, weight, single(x_zero), single(w_zero), **options)


@operator("QLinearConv")
def qlinear_conv(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    w_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    options = _conv_options(x, weight, auto_pad, dilations, group, pads, strides)
    left, right, result = ((single(s), single(z)) for s, z in ((x_scale, x_zero), (w_scale, w_zero), (y_scale, y_zero)))
    return kernels.quantized_conv(x, *left, weight, *right, *result, bias, **options)
