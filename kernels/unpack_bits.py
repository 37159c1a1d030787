"""Integers of fewer than eight bits, several in a byte."""

from __future__ import annotations

import torch

from .define import free, operator


@operator("unpack_bits(Tensor packed, *, int bits) -> Tensor", macs=free)
def unpack_bits(packed: torch.Tensor, *, bits: int) -> torch.Tensor:
    """The numbers in a tensor of bytes, the lowest bits of each byte first.

    Args:
        packed: [..., bytes], uint8.
        bits: of a number: 1, 2, 4 or 8.

    Returns:
        [..., bytes * 8 / bits], uint8.
    """
    if bits == 8:
        return packed.clone()
    parts = [(packed >> place) & (2**bits - 1) for place in range(0, 8, bits)]
    return torch.stack(parts, -1).flatten(-2)
