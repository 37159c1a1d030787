"""A convolution of quantised numbers whose result is quantised again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .define import operator
from .integer_conv import conv_attributes, conv_macs, convolved, of_features
from .quantization import requantized, shifted, standard

if TYPE_CHECKING:
    import onnx_ir
    from torch import fx

    from ..ir.to_onnx.translate import Translator


def _to_onnx(t: Translator, node: fx.Node, *inputs: onnx_ir.Value | None, **options: Any) -> Any:
    attributes = conv_attributes(node, node.meta["val"].dim() - 2)
    if attributes is None or not standard(node):
        return NotImplemented
    return t.recorder.op("QLinearConv", *inputs, **attributes)


@operator(
    "quantized_conv(Tensor x, Tensor x_scale, Tensor x_zero_point, Tensor weight, Tensor weight_scale,"
    " Tensor weight_zero_point, Tensor scale, Tensor zero_point, Tensor? bias=None, *, int[] stride=[],"
    ' SymInt[] pads=[], int[] dilation=[], int groups=1, str rounding="half-even") -> Tensor',
    macs=conv_macs(3),
    to_onnx=_to_onnx,
)
def quantized_conv(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: Sequence[int] = (),
    pads: Sequence[Any] = (),
    dilation: Sequence[int] = (),
    groups: int = 1,
    rounding: str = "half-even",
) -> torch.Tensor:
    """The convolution of what ``x`` and ``weight`` stand for, quantised with ``scale`` and ``zero_point``.

    Args:
        x: [batch, channels, *spatial] of one to three spatial dimensions, int8 or uint8.
        x_scale: of x, one element.
        x_zero_point: of x, one element; padding stands for zero, too.
        weight: [features, channels / groups, *kernel], int8 or uint8.
        weight_scale: of the weight, one element or [features].
        weight_zero_point: of the weight, one element or [features].
        scale: of the result, one element.
        zero_point: of the result, one element in the result's type.
        bias: [features], int32, in units of ``x_scale * weight_scale``.
        stride: by spatial dimension; empty: 1.
        pads: widths at all beginnings, then at all ends; empty: none.
        dilation: by spatial dimension; empty: 1.
        groups: of channels.
        rounding: one of `quantization.ROUNDINGS`.

    Returns:
        [batch, features, *spatial].
    """
    kernel = of_features(weight, weight_zero_point)
    total = convolved(shifted(x, x_zero_point), kernel, stride, pads, dilation, groups)
    by_feature = [-1] + [1] * (x.dim() - 2)
    if bias is not None:
        total = total + bias.reshape(by_feature)
    factor = x_scale.double() * weight_scale.double() / scale.double()
    if factor.numel() != 1:
        factor = factor.reshape(by_feature)
    elif factor.dim():
        factor = factor.reshape([])
    return requantized(total, factor, zero_point.reshape([]), rounding)
