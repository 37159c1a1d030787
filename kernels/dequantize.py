"""The real numbers that quantised ones stand for (arXiv:1712.05877, eq. 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .define import free, operator
from .quantization import spread
from .quantize import linear_node

if TYPE_CHECKING:
    import onnx_ir
    from torch import fx

    from ..ir.to_onnx.translate import Translator


def _to_onnx(
    t: Translator,
    node: fx.Node,
    x: onnx_ir.Value,
    scale: onnx_ir.Value,
    zero_point: onnx_ir.Value | None = None,
    **options: Any,
) -> Any:
    value, factor = (n.meta["val"] for n in node.args[:2])  # type: ignore[union-attr]
    if node.kwargs.get("dtype") not in (None, factor.dtype):
        return NotImplemented
    inputs = [x, scale] if zero_point is None else [x, scale, zero_point]
    return linear_node(t, node, "DequantizeLinear", inputs, value.dtype, factor.dtype)


@operator(
    "dequantize(Tensor x, Tensor scale, Tensor? zero_point=None, *, ScalarType? dtype=None, int axis=1,"
    " int block_size=0) -> Tensor",
    macs=free,
    to_onnx=_to_onnx,
)
def dequantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    axis: int = 1,
    block_size: int = 0,
) -> torch.Tensor:
    """``(x - zero_point) * scale``, the inverse of `quantize` but for what rounding lost.

    Args:
        x: quantised numbers.
        scale: one element, or one for each slice along the axis, or (with a ``block_size``) for each block.
        zero_point: the integer that stands for zero, in the shape of the scale; None: 0.
        dtype: the result's type; None: the scale's.
        axis: the dimension along which scales differ.
        block_size: how many neighbours along the axis share a scale; 0: all of a slice do.
    """
    wide = torch.float64 if scale.dtype == torch.float64 or x.dtype == torch.int32 else torch.float32
    number = x.to(wide)
    if zero_point is not None:
        number = number - spread(zero_point, x, axis, block_size).to(wide)
    product = number * spread(scale, x, axis, block_size).to(wide)
    return product.to(dtype or scale.dtype)
