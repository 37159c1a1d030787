"""ONNX Runtime's own quantised operators: packed weights of few bits, and arithmetic on 8-bit tensors.

Packed weights become bytes that are unpacked and dequantised in blocks. Arithmetic is done on the real numbers that
the tensors stand for, and its result quantised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import kernels
from ..errors import ImportModelError
from .microsoft_norms import MICROSOFT
from .pooling import average_pool
from .quantized import dequantize_linear, dynamic_quantize_linear, quantize_linear, single
from .registry import operator

operator("QuantizeLinear", domain=MICROSOFT)(quantize_linear)
operator("DequantizeLinear", domain=MICROSOFT)(dequantize_linear)

_BITS = (2, 4, 8)


def _zero_points(given: Tensor | None, rows: Any, blocks: Any, bits: int) -> Tensor:
    """[rows, blocks]: packed like the weight, or already real numbers; without any, the middle of the range."""
    if given is None:
        return torch.full([rows, blocks], 2 ** (bits - 1), dtype=torch.uint8)
    if given.dtype != torch.uint8:
        return given.reshape(rows, blocks)
    return kernels.unpack_bits(given.reshape(rows, -1), bits=bits)[:, :blocks]


@operator("MatMulNBits", domain=MICROSOFT)
def matmul_nbits(
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    zero_points: Tensor | None = None,
    groups: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    K: int,
    N: int,
    accuracy_level: int = 0,
    bits: int = 4,
    block_size: int,
    weight_prepacked: int = 0,
) -> Tensor:
    """A linear layer whose weight is [N, blocks, bytes of a block]; scales and zero points are [N, blocks]."""
    if groups is not None or bits not in _BITS or weight_prepacked:
        raise ImportModelError(
            "com.microsoft.MatMulNBits in this form is not supported",
            expected=f"no g_idx, weight_prepacked 0 and bits among {', '.join(map(str, _BITS))}",
        )
    blocks = -(-K // block_size)
    stored = kernels.unpack_bits(b.reshape(N, -1), bits=bits)[:, :K]
    scale = scales.reshape(N, blocks)
    zeros = _zero_points(zero_points, N, blocks, bits)
    weight = kernels.dequantize(stored, scale, zeros, axis=1, block_size=block_size)
    return F.linear(a, weight.to(a.dtype), bias)


@operator("GatherBlockQuantized", domain=MICROSOFT)
def gather_block_quantized(
    data: Tensor,
    indices: Tensor,
    scales: Tensor,
    zero_points: Tensor | None = None,
    *,
    bits: int = 4,
    block_size: int = 128,
    gather_axis: int = 0,
    quantize_axis: int = 1,
) -> Tensor:
    """Rows of a table of packed bytes, dequantised."""
    rank = data.dim()
    if data.dtype != torch.uint8 or gather_axis % rank or quantize_axis % rank != rank - 1 or rank != 2:
        raise ImportModelError(
            "com.microsoft.GatherBlockQuantized in this form is not supported",
            expected="a matrix of uint8, gather_axis 0 and quantize_axis 1",
        )
    rows, blocks = scales.shape
    zeros = _zero_points(zero_points, rows, blocks, bits)
    flat = indices.reshape(-1)
    stored, scale, zero = (F.embedding(flat, t) for t in (data, scales, zeros))
    table = kernels.dequantize(kernels.unpack_bits(stored, bits=bits), scale, zero, axis=1, block_size=block_size)
    return table.reshape([*indices.shape, table.shape[1]])


@operator("MatMulIntegerToFloat", domain=MICROSOFT)
def matmul_integer_to_float(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero: Tensor | None = None,
    b_zero: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    total = kernels.integer_matmul(a, b, single(a_zero), single(b_zero))
    product = total.to(a_scale.dtype) * (single(a_scale) * single(b_scale))  # type: ignore[operator]
    return product if bias is None else product + bias


@operator("DynamicQuantizeMatMul", domain=MICROSOFT)
def dynamic_quantize_matmul(
    a: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    stored, scale, zero = dynamic_quantize_linear(a)
    return matmul_integer_to_float(stored, b, scale, b_scale, zero, b_zero, bias)


def _real(x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    return kernels.dequantize(x, single(scale), single(zero))


def _stored(x: Tensor, scale: Tensor, zero: Tensor | None, like: Tensor) -> Tensor:
    return kernels.quantize(x, single(scale), single(zero), dtype=like.dtype)


@operator("QGemm", domain=MICROSOFT)
def quantized_gemm(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    bias: Tensor | None = None,
    y_scale: Tensor | None = None,
    y_zero: Tensor | None = None,
    *,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """Real numbers without a scale of the result; the bias counts in units of the factors' scales."""
    a, b = (a.t() if transA else a), (b.t() if transB else b)
    total = kernels.integer_matmul(a, b, single(a_zero), single(b_zero))
    total = total if bias is None else total + bias
    product = total.to(a_scale.dtype) * (single(a_scale) * single(b_scale) * alpha)  # type: ignore[operator]
    return product if y_scale is None else _stored(product, y_scale, y_zero, a if y_zero is None else y_zero)


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def apply(
        a: Tensor,
        a_scale: Tensor,
        a_zero: Tensor | None,
        b: Tensor,
        b_scale: Tensor,
        b_zero: Tensor | None,
        y_scale: Tensor,
        y_zero: Tensor | None = None,
    ) -> Tensor:
        return _stored(function(_real(a, a_scale, a_zero), _real(b, b_scale, b_zero)), y_scale, y_zero, a)

    return apply


operator("QLinearAdd", domain=MICROSOFT)(_binary(torch.add))
operator("QLinearMul", domain=MICROSOFT)(_binary(torch.mul))


@operator("QLinearSigmoid", domain=MICROSOFT)
def qlinear_sigmoid(
    x: Tensor, x_scale: Tensor, x_zero: Tensor | None, y_scale: Tensor, y_zero: Tensor | None = None
) -> Tensor:
    return _stored(torch.sigmoid(_real(x, x_scale, x_zero)), y_scale, y_zero, x)


@operator("QLinearLeakyRelu", domain=MICROSOFT)
def qlinear_leaky_relu(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    y_scale: Tensor,
    y_zero: Tensor | None = None,
    *,
    alpha: float = 0.01,
) -> Tensor:
    return _stored(F.leaky_relu(_real(x, x_scale, x_zero), alpha), y_scale, y_zero, x)


@operator("QLinearSoftmax", domain=MICROSOFT)
def qlinear_softmax(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    y_scale: Tensor,
    y_zero: Tensor,
    *,
    axis: int = -1,
    opset: int,
) -> Tensor:
    return _stored(_real(x, x_scale, x_zero).softmax(axis), y_scale, y_zero, x)


@operator("QLinearConcat", domain=MICROSOFT)
def qlinear_concat(y_scale: Tensor, y_zero: Tensor, *parts: Tensor, axis: int) -> Tensor:
    """The parts come as tensor, scale and zero point."""
    real = [_real(*parts[i : i + 3]) for i in range(0, len(parts), 3)]
    return _stored(torch.cat(real, axis), y_scale, y_zero, y_zero)


@operator("QLinearWhere", domain=MICROSOFT)
def qlinear_where(
    condition: Tensor,
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    y: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
    z_scale: Tensor,
    z_zero: Tensor,
) -> Tensor:
    chosen = torch.where(condition, _real(x, x_scale, x_zero), _real(y, y_scale, y_zero))
    return _stored(chosen, z_scale, z_zero, x)


@operator("QLinearGlobalAveragePool", domain=MICROSOFT)
def qlinear_global_average_pool(
    x: Tensor, x_scale: Tensor, x_zero: Tensor, y_scale: Tensor, y_zero: Tensor, *, channels_last: int = 0
) -> Tensor:
    dims = list(range(1, x.dim() - 1)) if channels_last else list(range(2, x.dim()))
    return _stored(_real(x, x_scale, x_zero).mean(dims, keepdim=True), y_scale, y_zero, x)


@operator("QLinearAveragePool", domain=MICROSOFT)
def qlinear_average_pool(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    y_scale: Tensor,
    y_zero: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    channels_last: int = 0,
    count_include_pad: int = 0,
    kernel_shape: Sequence[int],
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    options: dict[str, Any] = {"pads": pads, "strides": strides, "count_include_pad": count_include_pad}
    real = _real(x, x_scale, x_zero)
    real = real.movedim(-1, 1) if channels_last else real
    result = average_pool(real, auto_pad=auto_pad, ceil_mode=ceil_mode, kernel_shape=kernel_shape, **options)
    return _stored(result.movedim(1, -1) if channels_last else result, y_scale, y_zero, x)


@operator("QLinearReduceMean", domain=MICROSOFT)
def qlinear_reduce_mean(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    y_scale: Tensor,
    y_zero: Tensor | None = None,
    *,
    axes: Sequence[int] | None = None,
    keepdims: int = 1,
) -> Tensor:
    dims = list(range(x.dim())) if axes is None else list(axes)
    return _stored(_real(x, x_scale, x_zero).mean(dims, keepdim=bool(keepdims)), y_scale, y_zero, x)
