"""What the quantised operators share: parameters spread over a tensor, rounding, and the range of a stored type."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROUNDINGS = ("half-even", "half-away", "toward-zero")
"""How a quotient becomes an integer: to the nearest, ties to the even one (ONNX, IEEE 754); to the nearest, ties away
from zero (TensorFlow Lite); or cut off."""


def spread(parameter: Tensor, x: Tensor, axis: int, block_size: int) -> Tensor:
    """A scale or zero point in a shape that broadcasts against ``x``.

    Args:
        parameter: one element (for the whole tensor); [x.shape[axis]] (for each slice); or, with a ``block_size``, of
            the rank of x, with one element for so many neighbours along the axis.
        x: what it belongs to.
        axis: the dimension.
        block_size: 0 for none.
    """
    if block_size:
        repeated = parameter.repeat_interleave(block_size, axis)
        return torch.ops.aten.slice.Tensor(repeated, axis, 0, x.shape[axis])
    if parameter.dim() == 0:
        return parameter
    return parameter.reshape([-1 if i == axis % x.dim() else 1 for i in range(x.dim())])


def rounded(x: Tensor, rounding: str) -> Tensor:
    """Whole numbers, by one of `ROUNDINGS`.

    Raises:
        ValueError: it is none of them.
    """
    match rounding:
        case "half-even":
            return torch.round(x)
        case "half-away":
            return torch.trunc(x + torch.copysign(torch.full_like(x, 0.5), x))
        case "toward-zero":
            return torch.trunc(x)
        case _:
            raise ValueError(f"no rounding '{rounding}': one of {', '.join(ROUNDINGS)}")


def saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Whole numbers (or, for an 8-bit float, any) in a stored type; what it cannot hold becomes its nearest bound."""
    if dtype.is_floating_point:
        limit = torch.finfo(dtype).max
        return x.clamp(-limit, limit).to(dtype)
    bounds = torch.iinfo(dtype)
    return x.clamp(bounds.min, bounds.max).to(dtype)


def shifted(x: Tensor, zero_point: Tensor | None) -> Tensor:
    """``x - zero_point`` in float64, which holds every sum of products of 8-bit integers exactly."""
    wide = x.to(torch.float64)
    return wide if zero_point is None else wide - zero_point.to(torch.float64)


def requantized(total: Tensor, factor: Tensor, zero_point: Tensor, rounding: str = "half-even") -> Tensor:
    """Sums of products, times a factor, as integers of the zero point's type around the zero point."""
    return saturated(rounded(total.to(torch.float64) * factor, rounding) + zero_point, zero_point.dtype)


def standard(node: Any) -> bool:
    """Whether a call rounds as ONNX does."""
    return node.kwargs.get("rounding", "half-even") == "half-even"
