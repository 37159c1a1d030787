"""Layers: matrix products, convolutions, normalizations, pooling, attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ImportModelError
from .registry import operator
from .values import Host


@operator("MatMul")
def matmul(a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


@operator("Gemm")
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


def _padding(
    x: Tensor,
    spatial: int,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int] | None,
    auto_pad: str,
) -> list[tuple[int, int]]:
    """Begin and end padding of each spatial dimension."""
    if auto_pad in ("NOTSET", "VALID"):
        values = list(pads) if pads and auto_pad == "NOTSET" else [0] * (2 * spatial)
        return list(zip(values[:spatial], values[spatial:], strict=True))
    result = []
    for i in range(spatial):
        size = x.shape[2 + i]
        total: Any = torch.sym_max(
            (-(-size // strides[i]) - 1) * strides[i] + (kernel[i] - 1) * dilations[i] + 1 - size, 0
        )
        small = total // 2
        result.append((small, total - small) if auto_pad == "SAME_UPPER" else (total - small, small))
    return result


def _symmetric(padding: Sequence[tuple[Any, Any]]) -> list[int] | None:
    """The padding as one number per dimension, or None when begin and end differ (or are not plain numbers)."""
    if all(isinstance(b, int) and isinstance(e, int) and b == e for b, e in padding):
        return [b for b, _ in padding]
    return None


def _pad(x: Tensor, padding: Sequence[tuple[Any, Any]], value: float = 0.0) -> Tensor:
    return F.pad(x, [p for pair in reversed(padding) for p in pair], value=value)


_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


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
    padding = _padding(x, spatial, [int(k) for k in weight.shape[2:]], strides, dilations, pads, auto_pad)
    even = _symmetric(padding)
    if even is None:
        x, even = _pad(x, padding), [0] * spatial
    return _CONV[spatial](x, weight, bias, strides, even, dilations, group)


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
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    spatial = x.dim() - 2
    padding = list(zip((pads or [0] * 2 * spatial)[:spatial], (pads or [0] * 2 * spatial)[spatial:], strict=True))
    even = _symmetric(padding)
    if auto_pad != "NOTSET" or even is None:
        raise ImportModelError("ConvTranspose with automatic or uneven padding is not supported", expected="even pads")
    one = [1] * spatial
    return _CONV_TRANSPOSE[spatial](
        x,
        weight,
        bias,
        list(strides or one),
        even,
        list(output_padding or [0] * spatial),
        group,
        list(dilations or one),
    )


@operator("MaxPool")
def max_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    storage_order: int = 0,
    strides: Sequence[int] | None = None,
    n_used: int,
) -> Tensor:
    if n_used > 1:
        raise ImportModelError("MaxPool with its output of indices is not supported", expected="one output")
    spatial = x.dim() - 2
    strides, dilations = list(strides or [1] * spatial), list(dilations or [1] * spatial)
    padding = _padding(x, spatial, kernel_shape, strides, dilations, pads, auto_pad)
    even = _symmetric(padding)
    if even is None or any(2 * p > k for p, k in zip(even, kernel_shape, strict=True)):
        if ceil_mode:
            raise ImportModelError(
                "MaxPool with ceil_mode and uneven padding is not supported", expected="even pads, or ceil_mode 0"
            )
        lowest = float("-inf") if x.is_floating_point() else torch.iinfo(x.dtype).min
        x, even = _pad(x, padding, lowest), [0] * spatial
    return _MAX_POOL[spatial](x, list(kernel_shape), strides, even, dilations, bool(ceil_mode))


@operator("AveragePool")
def average_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    spatial = x.dim() - 2
    strides = list(strides or [1] * spatial)
    padding = _padding(x, spatial, kernel_shape, strides, [1] * spatial, pads, auto_pad)
    even = _symmetric(padding)
    if any(d != 1 for d in dilations or ()):
        raise ImportModelError("AveragePool with dilations is not supported", expected="dilations of 1")
    if even is None:
        if not count_include_pad:
            raise ImportModelError(
                "AveragePool with uneven padding that does not count is not supported", expected="even pads"
            )
        x, even = _pad(x, padding), [0] * spatial
    return _AVERAGE_POOL[spatial](x, list(kernel_shape), strides, even, bool(ceil_mode), bool(count_include_pad))


@operator("GlobalAveragePool")
def global_average_pool(x: Tensor) -> Tensor:
    return x.mean(list(range(2, x.dim())), keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool(x: Tensor) -> Tensor:
    return x.amax(list(range(2, x.dim())), keepdim=True)


_RESIZE = {"linear": {1: "linear", 2: "bilinear", 3: "trilinear"}, "cubic": {2: "bicubic"}}


@operator("Resize", host=("roi", "scales", "sizes"))
def resize(
    x: Tensor,
    roi: Host | None = None,
    scales: Host | None = None,
    sizes: Host | None = None,
    *,
    antialias: int = 0,
    axes: Sequence[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    """The forms that torch has: spatial dimensions, stretched, with its own rules for coordinates."""
    spatial = x.dim() - 2
    which = [a % x.dim() for a in axes] if axes is not None else list(range(x.dim()))
    given = sizes if sizes is not None and sizes.items else scales
    if given is None or not given.items:
        raise ImportModelError("Resize without sizes and scales", expected="one of them")
    wanted = dict(zip(which, given.items, strict=True))
    outer_changes = any(
        not isinstance(wanted.get(axis, 1), torch.SymInt)
        and wanted.get(axis, 1) != (x.shape[axis] if given is sizes else 1)
        for axis in (0, 1)
        if axis in wanted
    )
    coordinates = coordinate_transformation_mode
    method = _RESIZE.get(mode, {}).get(spatial)
    corners = coordinates == "align_corners"
    if mode == "nearest":
        floor = coordinates == "asymmetric" and nearest_mode == "floor"
        exact = coordinates == "half_pixel" and nearest_mode == "round_prefer_ceil"
        method = "nearest" if floor else "nearest-exact" if exact else None
    elif coordinates not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        method = None
    plain = (
        not exclude_outside and keep_aspect_ratio_policy == "stretch" and (mode != "cubic" or cubic_coeff_a == -0.75)
    )
    if method is None or outer_changes or not plain:
        raise ImportModelError(
            f"Resize of rank {x.dim()} in mode '{mode}', coordinates '{coordinates}', {nearest_mode} is not supported",
            expected="what torch.nn.functional.interpolate does: linear and cubic with half_pixel or align_corners",
        )
    target = [wanted.get(axis, x.shape[axis] if given is sizes else 1.0) for axis in range(2, x.dim())]
    lengths = target if given is sizes else [n * s for n, s in zip(x.shape[2:], target, strict=True)]
    short = any(isinstance(length, (int, float)) and length < 2 for length in lengths)
    if coordinates == "pytorch_half_pixel" and mode != "nearest" and short:
        raise ImportModelError(
            "Resize to a length of 1 with 'pytorch_half_pixel' is not supported", expected="'half_pixel'"
        )
    options: dict[str, Any] = {} if mode == "nearest" else {"align_corners": corners, "antialias": bool(antialias)}
    return F.interpolate(x, **{"size" if given is sizes else "scale_factor": target}, mode=method, **options)


@operator("BatchNormalization")
def batch_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> Tensor:
    if training_mode:
        raise ImportModelError(
            "BatchNormalization in training mode is not supported", remedy="export the model in eval mode"
        )
    return F.batch_norm(x, mean, var, scale, bias, False, 0.0, epsilon)


@operator("InstanceNormalization")
def instance_norm(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    return F.instance_norm(x, weight=scale, bias=bias, eps=epsilon)


@operator("GroupNormalization", since=21)
def group_norm(
    x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    return F.group_norm(x, num_groups, scale, bias, epsilon)


@operator("LayerNormalization", since=17)
def layer_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    n_used: int,
) -> Any:
    """Torch computes statistics in float32 whatever the type is, which is what ``stash_type`` 1 asks for."""
    dims = list(range(axis % x.dim(), x.dim()))
    shape = [x.shape[d] for d in dims]
    if list(scale.shape) == shape and (bias is None or list(bias.shape) == shape):
        result = F.layer_norm(x, shape, scale, bias, epsilon)
    else:
        result = F.layer_norm(x, shape, None, None, epsilon) * scale
        result = result if bias is None else result + bias
    if n_used == 1:
        return result
    wide = x.float()
    mean = wide.mean(dims, keepdim=True)
    return (result, mean, torch.rsqrt((wide - mean).square().mean(dims, keepdim=True) + epsilon))[:n_used]


@operator("RMSNormalization", since=23)
def rms_norm(x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Tensor:
    dims = list(range(axis % x.dim(), x.dim()))
    wide = x.float() if stash_type == 1 and x.dtype in (torch.float16, torch.bfloat16) else x
    normal = wide * torch.rsqrt(wide.square().mean(dims, keepdim=True) + epsilon)
    return normal.to(x.dtype) * scale


@operator("Attention", since=23)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int = 0,
    q_num_heads: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    n_used: int,
) -> Tensor:
    """Scaled dot-product attention; three-dimensional inputs are split into heads. Caches are not read yet."""
    if softcap or n_used > 1:
        raise ImportModelError(
            "Attention with soft-capping or a cache is not supported", expected="one output, softcap 0"
        )
    flat = query.dim() == 3
    if flat:
        query, key, value = (
            t.unflatten(-1, (heads, -1)).transpose(1, 2)
            for t, heads in ((query, q_num_heads), (key, kv_num_heads), (value, kv_num_heads))
        )
    grouped = query.shape[1] != key.shape[1]
    result = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=bool(is_causal), scale=scale, enable_gqa=grouped
    )
    return result.transpose(1, 2).flatten(2) if flat else result
