"""Integers of fewer than eight bits, several in a byte."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .define import free, operator

if TYPE_CHECKING:
    import onnx_ir
    from torch import fx

    from ..ir.to_onnx.translate import Translator


def _to_onnx(t: Translator, node: fx.Node, packed: onnx_ir.Value, *, bits: int) -> Any:
    """In unsigned bytes throughout: what is expanded must have the type of the zero point that it meets."""
    from ..ir.to_onnx.initializers import onnx_dtype

    if bits == 8:
        return t.recorder.op("Identity", packed)
    kind = onnx_dtype(torch.uint8)
    rank = int(node.args[0].meta["val"].dim())  # type: ignore[union-attr]
    low = t.recorder.constant(2**bits - 1, kind)
    parts: list[onnx_ir.Value] = []
    for place in range(0, 8, bits):
        amount = t.recorder.constant(place, kind)
        moved = t.node("BitShift", [packed, amount], {"direction": "RIGHT"}, 11)[0] if place else packed
        parts.append(t.recorder.op("Unsqueeze", t.node("BitwiseAnd", [moved, low], {}, 18)[0], t.recorder.vector([-1])))
    joined = t.recorder.op("Concat", *parts, axis=-1)
    return t.recorder.op("Reshape", joined, t.recorder.vector([0] * (rank - 1) + [-1]))


@operator("unpack_bits(Tensor packed, *, int bits) -> Tensor", macs=free, to_onnx=_to_onnx)
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
