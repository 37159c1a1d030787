"""Normalizations: over a batch, an instance, groups of channels, the last dimensions, neighbouring channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ImportModelError
from .registry import operator


@operator("BatchNormalization")
def batch_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    consumed_inputs: Any = None,
    epsilon: float = 1e-5,
    is_test: int | None = None,
    momentum: float = 0.9,
    spatial: int = 1,
    training_mode: int = 0,
    opset_version: int,
    n_used: int,
) -> Any:
    """In training mode (opset 14 and newer) the statistics are those of the batch, and the running ones are outputs."""
    if not spatial:
        raise ImportModelError("BatchNormalization of every position on its own is not supported", expected="spatial 1")
    if (opset_version < 7 and not is_test) or (opset_version < 14 and n_used > 1):
        raise ImportModelError(
            "BatchNormalization in training mode is not supported before opset 14", remedy="export it in eval mode"
        )
    if not training_mode:
        return F.batch_norm(x, mean, var, scale, bias, False, 0.0, epsilon)
    dims = [0, *range(2, x.dim())]
    wide = x if x.dtype == torch.float64 else x.float()
    now = wide.mean(dims)
    spread = wide.var(dims, correction=0)
    shape = [1, -1] + [1] * (x.dim() - 2)
    normal = (wide - now.reshape(shape)) * torch.rsqrt(spread.reshape(shape) + epsilon)
    result = (normal * scale.reshape(shape) + bias.reshape(shape)).to(x.dtype)
    running = ((old * momentum + new * (1 - momentum)).to(old.dtype) for old, new in ((mean, now), (var, spread)))
    return (result, *running)[:n_used]


@operator("InstanceNormalization")
def instance_norm(
    x: Tensor, scale: Tensor, bias: Tensor, *, consumed_inputs: Any = None, epsilon: float = 1e-5
) -> Tensor:
    return F.instance_norm(x, weight=scale, bias=bias, eps=epsilon)


@operator("GroupNormalization", since=18)
def group_norm_18(x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5) -> Tensor:
    """Scale and bias by group; newer opsets have them by channel."""
    repeats = x.shape[1] // num_groups
    return F.group_norm(x, num_groups, scale.repeat_interleave(repeats), bias.repeat_interleave(repeats), epsilon)


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


@operator("LpNormalization")
def lp_normalization(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    """A vector of zeros stays one."""
    length = x.abs().sum(axis, keepdim=True) if p == 1 else x.square().sum(axis, keepdim=True).sqrt()
    return torch.where(length == 0, 0.0, x / torch.where(length == 0, 1.0, length)).to(x.dtype)


@operator("MeanVarianceNormalization")
def mean_variance_normalization(x: Tensor, *, axes: Sequence[int] = (0, 2, 3)) -> Tensor:
    centred = x - x.mean(list(axes), keepdim=True)
    return centred / (centred.square().mean(list(axes), keepdim=True).sqrt() + 1e-9)


@operator("LRN")
def local_response_normalization(
    x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0
) -> Tensor:
    """Over ``size`` neighbouring channels, of an even number one more behind than before."""
    before = (size - 1) // 2
    squares = x.square().unsqueeze(1)
    flat = squares.reshape([x.shape[0], 1, x.shape[1], -1])
    flat = F.pad(flat, [0, 0, before, size - 1 - before])
    sums = F.avg_pool2d(flat, [size, 1], stride=1).reshape(x.shape)
    return x / (bias + alpha * sums) ** beta
