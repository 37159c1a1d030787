"""Weights of few bits in a program: packed bytes, and the operators that make numbers of them.

    before   y = linear(x, w)               w: float32 [out, in]

    after    low, high: uint8, 2 bits and 1 bit of every code (for codes of 3 bits)
             codes = unpack_bits(low, 2) + 4 * unpack_bits(high, 1)           uint8 [out, in]
             w = dequantize(codes, scale, zero, block_size=group)
             y = linear(x, w)

The bits of a code are divided among parts whose widths divide 8 (`linear_solve.parts_of`), so that codes of 3, 5, 6
and 7 bits take no more than that. ONNX files hold the packed bytes; ONNX Runtime expands them when it loads a model,
so files are small, while memory and speed are those of the dense weight.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ... import kernels
from ...ir.rewrite import Rewriter
from ...ir.weights import Weight
from .linear_sites import LinearSite
from .linear_solve import parts_of
from .local.round_to_nearest import Quantized

aten = torch.ops.aten


def pack(codes: Tensor, width: int) -> Tensor:
    """Numbers of so many bits, several in a byte, the lowest bits first; the inverse of `kernels.unpack_bits`.

    Args:
        codes: [rows, columns], integers from 0 to ``2^width - 1``.
        width: 1, 2, 4 or 8.

    Returns:
        uint8 [rows, ceil(columns * width / 8)].
    """
    each = 8 // width
    filled = torch.nn.functional.pad(codes.to(torch.int32), (0, -codes.shape[1] % each)).unflatten(1, (-1, each))
    places = torch.arange(0, 8, width, dtype=torch.int32)
    return (filled << places).sum(-1).to(torch.uint8)


def store_codes(rewriter: Rewriter, site: LinearSite, quantized: Quantized) -> None:
    """Let a site's operators read packed codes instead of its weight.

    Args:
        rewriter: of the site's program.
        site: the site; it must not be used afterwards.
        quantized: its weight [outputs, inputs].
    """
    program = rewriter.program
    shape = program.weights[site.weight].shape
    offset = 2 ** (quantized.bits - 1)
    codes = quantized.codes.to(torch.int32) + offset
    zero = torch.zeros_like(quantized.scale, dtype=torch.int32) if quantized.zero is None else quantized.zero.int()
    old = [n for n in rewriter.graph.find_nodes(op="get_attr") if n.target == site.weight]
    first = min(user for node in old for user in node.users)
    with rewriter.before(first):
        value = _unpacked(rewriter, site, codes, quantized.bits)
        scale = _weight(rewriter, site, "scale", quantized.scale)
        zeros = _weight(rewriter, site, "zero", (zero + offset).to(torch.uint8))
        block = min(quantized.group_size, site.inputs)
        value = rewriter.call(kernels.dequantize, value, scale, zeros, axis=1, block_size=block)
        if site.consumers[0].weight_dim == 0:
            value = rewriter.call(aten.permute.default, value, [1, 0])
        if len(shape) > 2:
            value = rewriter.call(aten.reshape.default, value, list(shape))
    for node in old:
        rewriter.replace(node, value)


def _unpacked(rewriter: Rewriter, site: LinearSite, codes: Tensor, bits: int) -> fx.Node:
    """The codes [outputs, inputs] as uint8, from packed parts."""
    parts = parts_of(bits)
    found: fx.Node | None = None
    place = 0
    for number, width in enumerate(parts):
        packed = pack(codes >> place & 2**width - 1, width)
        part = _weight(rewriter, site, f"codes_{number}" if number else "codes", packed)
        if width < 8:
            part = rewriter.call(kernels.unpack_bits, part, bits=width)
        if part.meta["val"].shape[1] != site.inputs:
            part = rewriter.call(aten.slice.Tensor, part, 1, 0, site.inputs)
        if len(parts) > 1:
            # ONNX Runtime has no arithmetic on bytes.
            part = rewriter.call(aten._to_copy.default, part, dtype=torch.int32)
        if place:
            part = rewriter.call(aten.mul.Scalar, part, 2**place)
        found = part if found is None else rewriter.call(aten.add.Tensor, found, part)
        place += width
    assert found is not None
    return found if len(parts) == 1 else rewriter.call(aten._to_copy.default, found, dtype=torch.uint8)


def _weight(rewriter: Rewriter, site: LinearSite, what: str, value: Tensor) -> fx.Node:
    name = rewriter.fresh_weight_name(f"{site.weight}.{what}")
    return rewriter.weight(name, Weight.from_tensor(value.contiguous()))
