"""Quantization to 8 bits by the range that a tensor happens to have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .define import free, operator
from .quantization import rounded, saturated

if TYPE_CHECKING:
    import onnx_ir
    from torch import fx

    from ..ir.to_onnx.translate import Translator


def _to_onnx(t: Translator, node: fx.Node, x: onnx_ir.Value) -> Any:
    value = node.args[0].meta["val"]  # type: ignore[union-attr]
    return t.recorder.op("DynamicQuantizeLinear", x) if value.dtype == torch.float32 else NotImplemented


@operator("dynamic_quantize(Tensor x) -> (Tensor, Tensor, Tensor)", macs=free, to_onnx=_to_onnx)
def dynamic_quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise to uint8 with the scale and the zero point that just cover the tensor's range, zero included.

    Args:
        x: real numbers, at least one.

    Returns:
        The quantised numbers, the scale (1 where all numbers are 0) and the zero point.
    """
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    span = (high - low) / 255
    scale = torch.where(span == 0, 1.0, span)
    zero_point = saturated(rounded(-low / scale, "half-even"), torch.uint8)
    return saturated(rounded(x / scale, "half-even") + zero_point, torch.uint8), scale, zero_point
