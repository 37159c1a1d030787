"""Linear quantization (arXiv:1712.05877, eq. 1): numbers as integers, with a scale and a zero point."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .define import free, operator
from .quantization import rounded, saturated, spread, standard

if TYPE_CHECKING:
    import onnx_ir
    from torch import fx

    from ..ir.to_onnx.translate import Translator


def linear_node(
    t: Translator, node: fx.Node, name: str, inputs: list[Any], stored: torch.dtype, real: torch.dtype
) -> Any:
    """``QuantizeLinear`` or ``DequantizeLinear``, where the opset has it for these types; else NotImplemented.

    Args:
        t: the translator.
        node: the call, with ``axis`` and ``block_size``.
        name: the ONNX operator.
        inputs: tensor, scale, and zero point or None.
        stored: the quantised type.
        real: the scale's type.
    """
    blocks = int(node.kwargs.get("block_size", 0))  # type: ignore[arg-type]
    since = 13
    if stored.is_floating_point or real != torch.float32:
        since = 19
    if stored in (torch.int16, torch.uint16) or blocks:
        since = 21
    if t.opset < since or stored == torch.uint32:
        return NotImplemented
    attributes = {"axis": int(node.kwargs.get("axis", 1)), "block_size": blocks}  # type: ignore[arg-type]
    return t.node(name, inputs, {k: v for k, v in attributes.items() if k == "axis" or v}, since)[0]


def _to_onnx(
    t: Translator,
    node: fx.Node,
    x: onnx_ir.Value,
    scale: onnx_ir.Value,
    zero_point: onnx_ir.Value | None = None,
    **options: Any,
) -> Any:
    """The type follows from the zero point: where there is none, one of zeros is made."""
    from ..ir.to_onnx.initializers import onnx_dtype

    dtype: Any = node.kwargs["dtype"]
    value, factor = (n.meta["val"] for n in node.args[:2])  # type: ignore[union-attr]
    if not standard(node) or value.dtype != factor.dtype:
        return NotImplemented
    if zero_point is None:
        kind = onnx_dtype(dtype)
        zeros = t.recorder.op("Mul", scale, t.recorder.constant(0.0, onnx_dtype(factor.dtype)))
        zero_point = t.recorder.op("Cast", zeros, to=int(kind)) if factor.dim() else t.recorder.constant(0, kind)
    return linear_node(t, node, "QuantizeLinear", [x, scale, zero_point], dtype, factor.dtype)


@operator(
    "quantize(Tensor x, Tensor scale, Tensor? zero_point=None, *, ScalarType dtype, int axis=1, int block_size=0,"
    ' str rounding="half-even") -> Tensor',
    macs=free,
    to_onnx=_to_onnx,
)
def quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    *,
    dtype: torch.dtype,
    axis: int = 1,
    block_size: int = 0,
    rounding: str = "half-even",
) -> torch.Tensor:
    """``saturate(round(x / scale) + zero_point)``.

    Args:
        x: real numbers (or int32 sums).
        scale: one element, or one for each slice along the axis, or (with a ``block_size``) for each block.
        zero_point: the integer that stands for zero, in the shape of the scale; None: 0.
        dtype: the stored type: an integer of 8, 16 or 32 bits, or a float of 8 (which is not rounded to integers).
        axis: the dimension along which scales differ.
        block_size: how many neighbours along the axis share a scale; 0: all of a slice do.
        rounding: one of `quantization.ROUNDINGS`.
    """
    quotient = x.to(scale.dtype) / spread(scale, x, axis, block_size)
    whole = quotient if dtype.is_floating_point else rounded(quotient, rounding).to(torch.float64)
    if zero_point is not None:
        whole = whole + spread(zero_point, x, axis, block_size).to(whole.dtype)
    return saturated(whole, dtype)
