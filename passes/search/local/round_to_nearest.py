"""Integer weights on a grid per group of columns, by rounding to nearest.

A group is ``group_size`` neighboring columns of one output row. Its weights become ``scale * (code - zero)`` with codes
of ``bits`` bits, stored as signed numbers from ``-2^(bits-1)`` to ``2^(bits-1) - 1``:

- asymmetric: ``scale = (hi - lo) / (2^bits - 1)`` over the range of the group, widened to hold 0, and ``zero`` such
  that ``lo`` gets the lowest code;
- symmetric: ``scale = 2 max|w| / (2^bits - 1)`` and ``zero = 0``. The largest magnitude is then up to half a step
  beyond the last code, which is no more than rounding does elsewhere, and all codes are used.

Either way no weight moves by more than half a step, and 0 stays 0. The grid is that of `gptq`, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ....ir.errors import InputError, PreconditionError

BITS = range(2, 9)
"""Numbers of bits that a code can have."""


@dataclass(frozen=True)
class Quantized:
    """A weight of integer codes.

    Attributes:
        codes: int8 [out, in], from ``-2^(bits-1)`` to ``2^(bits-1) - 1``.
        scale: [out, groups], in the type of the weight.
        zero: int8 [out, groups], the code of 0; None if it is 0 everywhere (symmetric).
        bits: bits of a code.
        group_size: columns of a group; the last group may have fewer.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    group_size: int

    def dequantize(self) -> Tensor:
        """The weight [out, in] that the codes stand for, in the type of ``scale``."""
        scale, zero = (_per_column(t, self.codes.shape[1], self.group_size) for t in (self.scale, self.zero))
        assert scale is not None
        return from_codes(self.codes.to(scale.dtype), scale, zero)

    @property
    def nbytes(self) -> int:
        """Bytes on disk: every row's codes packed without gaps and filled up to a byte, scales as they are, and zeros
        packed like codes. A format that pads codes to 4 or 8 bits takes more.
        """
        rows, width = self.codes.shape
        total = rows * _packed(width, self.bits) + self.scale.numel() * self.scale.element_size()
        return total if self.zero is None else total + rows * _packed(self.zero.shape[1], self.bits)


def _packed(count: int, bits: int) -> int:
    return (count * bits + 7) // 8


def _per_column(values: Tensor | None, width: int, group_size: int) -> Tensor | None:
    """Values per group [out, groups] as values per column [out, width]."""
    return None if values is None else values.repeat_interleave(group_size, dim=1)[:, :width]


def fit_grid(
    weight: Tensor, bits: int, group_size: int | None, symmetric: bool, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """The grid of every group.

    Args:
        weight: [out, in].
        bits: bits of a code, 2 to 8.
        group_size: columns of a group; None for whole rows. The last group may have fewer.
        symmetric: whether 0 is in the middle of the codes.
        dtype: the type of the scale; None for that of ``weight``.

    Returns:
        ``scale`` [out, groups], and ``zero`` int8 [out, groups], or None if symmetric.

    Raises:
        InputError: the shape, the bits or the group size is out of range.
        PreconditionError: the weight is not finite.
    """
    if weight.dim() != 2 or not weight.numel() or not weight.is_floating_point():
        raise InputError(f"a weight of shape {list(weight.shape)} and {weight.dtype}", expected="floats [out, in]")
    if bits not in BITS:
        raise InputError(f"codes of {bits} bits", expected=f"{BITS[0]} to {BITS[-1]}")
    size = weight.shape[1] if group_size is None else group_size
    if size < 1:
        raise InputError(f"groups of {size} columns", expected="1 or more, or None for whole rows")
    if not bool(weight.isfinite().all()):
        raise PreconditionError("the weight of a layer holds NaN or infinity", expected="finite weights")
    values = weight.detach().double()
    # The zeros that fill up the last group change no range, since every range holds 0.
    values = torch.nn.functional.pad(values, (0, -values.shape[1] % size)).unflatten(1, (-1, size))
    steps = 2**bits - 1
    low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
    spread = 2 * torch.maximum(high, -low) if symmetric else high - low
    # Codes must suit the scale as it is stored, and a group of zeros or of denormal numbers needs some scale, too.
    stored = weight.dtype if dtype is None else dtype
    scale = (spread / steps).clamp(min=torch.finfo(stored).tiny).to(stored)
    if symmetric:
        return scale, None
    lowest = -(2 ** (bits - 1))
    zero = lowest - (low / scale.double()).round()
    return scale, zero.clamp(lowest, lowest + steps).to(torch.int8)


def to_codes(values: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """The nearest codes, as floating numbers in the type of ``values``; arguments broadcast."""
    codes = (values / scale).round()
    codes = codes if zero is None else codes + zero
    return codes.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def from_codes(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """The values of codes; arguments broadcast."""
    return (codes if zero is None else codes - zero) * scale


def quantize_groups(weight: Tensor, bits: int, group_size: int | None = None, symmetric: bool = False) -> Quantized:
    """Round every weight to the nearest point of its group's grid.

    Args:
        weight: [out, in].
        bits: bits of a code, 2 to 8.
        group_size: columns of a group; None for whole rows.
        symmetric: whether 0 is in the middle of the codes.

    Raises:
        InputError, PreconditionError: as `fit_grid`.
    """
    scale, zero = fit_grid(weight, bits, group_size, symmetric)
    width = weight.shape[1]
    size = width if group_size is None else group_size
    wide_scale, wide_zero = _per_column(scale.double(), width, size), _per_column(zero, width, size)
    assert wide_scale is not None
    codes = to_codes(weight.detach().double(), wide_scale, wide_zero, bits).to(torch.int8)
    return Quantized(codes, scale, zero, bits, size)
