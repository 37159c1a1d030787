"""Convolutions of 8-bit integers, summed without loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from .define import operator
from .quantization import shifted

if TYPE_CHECKING:
    import onnx_ir
    from torch import fx

    from ..ir.to_onnx.translate import Translator

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def conv_macs(weight: int) -> Any:
    """The cost rule of a convolution whose weight is the argument at this position."""

    def macs(node: fx.Node) -> Any:
        from ..ir.cost_rules import product, sizes

        return product(sizes(node)) * product(sizes(node.args[weight])[1:])

    return macs


def conv_attributes(node: fx.Node, rank: int) -> dict[str, Any] | None:
    """The attributes of ONNX's convolutions; None where padding depends on a size."""
    options = node.kwargs
    pads: Any = options.get("pads") or [0] * 2 * rank
    if not all(isinstance(p, int) for p in pads):
        return None
    return {
        "strides": list(options.get("stride") or [1] * rank),  # type: ignore[arg-type]
        "pads": list(pads),
        "dilations": list(options.get("dilation") or [1] * rank),  # type: ignore[arg-type]
        "group": options.get("groups", 1),
    }


def convolved(
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: Sequence[int],
    pads: Sequence[Any],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """A convolution with zeros around; ``pads`` are the widths at all beginnings, then at all ends."""
    rank = x.dim() - 2
    if pads and any(not isinstance(p, int) or p for p in pads):
        x = F.pad(x, [p for i in reversed(range(rank)) for p in (pads[i], pads[rank + i])])
    return _CONV[rank](x, weight, None, list(stride or [1] * rank), 0, list(dilation or [1] * rank), groups)


def _to_onnx(t: Translator, node: fx.Node, *inputs: onnx_ir.Value | None, **options: Any) -> Any:
    attributes = conv_attributes(node, node.meta["val"].dim() - 2)
    zero_point: Any = node.args[3] if len(node.args) > 3 else None
    if zero_point is not None and zero_point.meta["val"].numel() != 1:
        return NotImplemented  # ONNX Runtime takes one for the whole weight only
    return NotImplemented if attributes is None else t.recorder.op("ConvInteger", *inputs, **attributes)


@operator(
    "integer_conv(Tensor x, Tensor weight, Tensor? x_zero_point=None, Tensor? weight_zero_point=None, *,"
    " int[] stride=[], SymInt[] pads=[], int[] dilation=[], int groups=1) -> Tensor",
    macs=conv_macs(1),
    to_onnx=_to_onnx,
)
def integer_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_zero_point: torch.Tensor | None = None,
    weight_zero_point: torch.Tensor | None = None,
    *,
    stride: Sequence[int] = (),
    pads: Sequence[Any] = (),
    dilation: Sequence[int] = (),
    groups: int = 1,
) -> torch.Tensor:
    """The convolution of ``x - x_zero_point`` with ``weight - weight_zero_point`` in int32.

    Args:
        x: [batch, channels, *spatial] of one to three spatial dimensions, int8 or uint8.
        weight: [features, channels / groups, *kernel], int8 or uint8.
        x_zero_point: one element; padding stands for zero, too; None: 0.
        weight_zero_point: one element or [features]; None: 0.
        stride: by spatial dimension; empty: 1.
        pads: widths at all beginnings, then at all ends; empty: none.
        dilation: by spatial dimension; empty: 1.
        groups: of channels.

    Returns:
        [batch, features, *spatial].
    """
    total = convolved(shifted(x, x_zero_point), of_features(weight, weight_zero_point), stride, pads, dilation, groups)
    return total.to(torch.int32)


def of_features(weight: torch.Tensor, zero_point: torch.Tensor | None) -> torch.Tensor:
    """A weight without its zero point, which may differ by feature."""
    if zero_point is not None and zero_point.dim() == 1:
        zero_point = zero_point.reshape([-1] + [1] * (weight.dim() - 1))
    return shifted(weight, zero_point)
