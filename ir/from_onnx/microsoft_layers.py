"""ONNX Runtime's own matrix products and convolutions: transposed, scaled, with an activation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import MissingOperatorError
from .layers import conv, gemm
from .microsoft_norms import MICROSOFT
from .registry import operator


def activated(x: Tensor, name: str, parameters: Sequence[float]) -> Tensor:
    """Apply an activation by ONNX's name for it, with its attributes in order.

    Raises:
        MissingOperatorError: it is not known.
    """
    match name, list(parameters):
        case "", _:
            return x
        case "Relu", _:
            return F.relu(x)
        case "Tanh", _:
            return torch.tanh(x)
        case "Sigmoid", _:
            return torch.sigmoid(x)
        case "LeakyRelu", [alpha, *_]:
            return F.leaky_relu(x, alpha)
        case "Clip", [low, high, *_]:
            return torch.clamp(x, low, high)
        case "HardSigmoid", [alpha, beta, *_]:
            return torch.clamp(alpha * x + beta, 0, 1)
        case _:
            raise MissingOperatorError(f"the activation '{name}' with {len(parameters)} parameters cannot be imported")


@operator("FusedMatMul", "TransposeMatMul", domain=MICROSOFT)
def fused_matmul(
    a: Tensor,
    b: Tensor,
    *,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    transBatchA: int = 0,
    transBatchB: int = 0,
) -> Tensor:
    """``transBatch`` has the last dimension but one in front of the batch."""
    a, b = (x.movedim(0, -2) if batch else x for x, batch in ((a, transBatchA), (b, transBatchB)))
    a, b = (x.transpose(-1, -2) if turned and x.dim() > 1 else x for x, turned in ((a, transA), (b, transB)))
    product = torch.matmul(a, b)
    return product if alpha == 1 else product * alpha


@operator("FusedGemm", domain=MICROSOFT)
def fused_gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    activation: str = "",
    activation_alpha: float | None = None,
    activation_beta: float | None = None,
    activation_gamma: float | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    given = [p for p in (activation_alpha, activation_beta, activation_gamma) if p is not None]
    return activated(gemm(a, b, c, alpha=alpha, beta=beta, transA=transA, transB=transB), activation, given)


@operator("GemmFastGelu", domain=MICROSOFT)
def gemm_fast_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product = torch.matmul(x, weight)
    return F.gelu(product if bias is None else product + bias, approximate="tanh")


@operator("FusedConv", domain=MICROSOFT)
def fused_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    skip: Tensor | None = None,
    *,
    activation: str = "",
    activation_params: Sequence[float] = (),
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Any:
    """The residual is added before the activation."""
    options: dict[str, Any] = {"dilations": dilations, "group": group, "pads": pads, "strides": strides}
    result = conv(x, weight, bias, auto_pad=auto_pad, **options)
    return activated(result if skip is None else result + skip, activation, activation_params)


@operator("NhwcConv", domain=MICROSOFT)
def nhwc_conv(
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
) -> Any:
    """Channels come last, in the input, the weight and the output."""
    options: dict[str, Any] = {"dilations": dilations, "group": group, "pads": pads, "strides": strides}
    return conv(x.movedim(-1, 1), weight.movedim(-1, 1), bias, auto_pad=auto_pad, **options).movedim(1, -1)
