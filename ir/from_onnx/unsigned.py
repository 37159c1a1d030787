"""Arithmetic on unsigned integers of 16, 32 and 64 bits, which torch stores but hardly computes with.

The smaller two fit into int64. For uint64 the bits are kept in an int64: sums, differences and products wrap alike,
comparisons flip the top bit, and division goes by half the dividend where the top bit is set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SMALL = (torch.uint16, torch.uint32)
TOP_BIT = -(2**63)


def is_unsigned(value: Any) -> bool:
    """Whether a value is a tensor of a type that torch does not compute with."""
    return isinstance(value, Tensor) and (value.dtype in SMALL or value.dtype == torch.uint64)


def wrapping(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An operator whose low bits depend on low bits only: sums, products, bitwise operators."""

    def call(*values: Any) -> Tensor:
        dtype = next((v.dtype for v in values if is_unsigned(v)), None)
        if dtype is None:
            return function(*values)
        return function(*(_wide(v) for v in values)).to(dtype)

    return call


def ordered(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An operator that depends on the order of the numbers only: comparisons, smallest and largest."""

    def call(*values: Any) -> Tensor:
        dtype = next((v.dtype for v in values if is_unsigned(v)), None)
        if dtype is None:
            return function(*values)
        flip = dtype == torch.uint64
        result = function(*(_flipped(_wide(v)) if flip else _wide(v) for v in values))
        if result.dtype == torch.bool:
            return result
        return (_flipped(result) if flip else result).to(dtype)

    return call


def divide(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """Quotient and remainder of unsigned numbers, in their type."""
    dtype = next(v.dtype for v in (a, b) if is_unsigned(v))
    x, y = (_as_tensor(v) for v in (_wide(a), _wide(b)))
    if dtype in SMALL:
        quotient = torch.div(x, y, rounding_mode="trunc")
        return quotient.to(dtype), (x - quotient * y).to(dtype)
    # Half of x is never negative; its quotient, doubled, is at most one too small. A divisor with its top bit set fits
    # at most once.
    half = torch.bitwise_right_shift(x, 1) & (2**63 - 1)
    quotient = torch.div(half, torch.where(y > 0, y, 1), rounding_mode="trunc") * 2
    quotient = torch.where(y > 0, quotient, 0)
    rest = x - quotient * y
    again = _flipped(rest) >= _flipped(y)
    return (quotient + again.to(torch.int64)).to(dtype), torch.where(again, rest - y, rest).to(dtype)


def _as_tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=torch.int64)


def _wide(value: Any) -> Any:
    """The bits as an int64."""
    if isinstance(value, Tensor):
        return value.to(torch.int64)
    return value - 2**64 if isinstance(value, int) and value >= 2**63 else value


def _flipped(value: Any) -> Any:
    """The same order among signed numbers (its own inverse)."""
    return value ^ TOP_BIT
