"""Operators of ours, which `ir.to_onnx.local_functions` writes as functions."""

from __future__ import annotations

from torch import Tensor

from ...kernels import expert_linear
from .registry import operator


@operator("ExpertLinear", "BiasedExpertLinear", domain="graphlathe")
def expert_linear_function(x: Tensor, weight: Tensor, indices: Tensor, bias: Tensor | None = None) -> Tensor:
    """The operator itself, in place of the function's body."""
    return expert_linear(x, weight, indices, bias)
