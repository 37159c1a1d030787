"""ONNX Runtime's own activations, with a bias or a residual added before or after."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .microsoft_norms import MICROSOFT
from .registry import operator


@operator("Gelu", domain=MICROSOFT)
def gelu(x: Tensor) -> Tensor:
    return F.gelu(x)


@operator("BiasGelu", domain=MICROSOFT)
def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


@operator("FastGelu", domain=MICROSOFT)
def fast_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@operator("QuickGelu", domain=MICROSOFT)
def quick_gelu(x: Tensor, *, alpha: float = 1.702) -> Tensor:
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


@operator("BiasSplitGelu", domain=MICROSOFT)
def bias_split_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """The first half of the channels times the GELU of the second."""
    value, gate = (x + bias).chunk(2, -1)
    return value * F.gelu(gate)


@operator("BiasAdd", domain=MICROSOFT)
def bias_add(x: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
    return x + bias + skip


@operator("BiasSoftmax", domain=MICROSOFT)
def bias_softmax(x: Tensor, bias: Tensor, *, axis: int = 1, is_inner_broadcast: int) -> Tensor:
    """Over all dimensions from the axis on; the bias lacks leading dimensions, or ones just before the axis."""
    axis = axis % x.dim()
    if not is_inner_broadcast:
        missing = x.dim() - bias.dim()
        bias = bias.reshape([*bias.shape[: axis - missing], *[1] * missing, *bias.shape[axis - missing :]])
    return (x + bias).flatten(axis).softmax(-1).reshape(x.shape)
