"""A weight in another shape or orientation, as an expression over the same numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import fx

from ...ir.rewrite import Rewriter
from ...ir.views import permutation

aten = torch.ops.aten


def reshaped(rewriter: Rewriter, node: fx.Node, shape: Sequence[int]) -> fx.Node:
    """A constant in another shape: a new weight over the same numbers, or a view of what is computed."""
    if list(node.meta["val"].shape) == list(shape):
        return node
    weight = rewriter.program.weights.get(str(node.target)) if node.op == "get_attr" else None
    if weight is None:
        return rewriter.call(aten.reshape.default, node, list(shape))
    return rewriter.weight(rewriter.fresh_weight_name(str(node.target)), weight.reshape(shape))


class Matrices:
    """Weights as the matrices ``[out, in]`` of linear layers; each is made once, whoever reads it."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, tuple[int, ...], int], str] = {}

    def of(self, rewriter: Rewriter, node: fx.Node, order: Sequence[int], rows: int) -> fx.Node:
        """A constant with its axes in another order, and then as a matrix.

        Args:
            rewriter: where new nodes go.
            node: the constant.
            order: its axes, those of the matrix's rows first.
            rows: how many axes make up the rows.
        """
        sizes = [int(node.meta["val"].shape[axis]) for axis in order]
        shape = [math.prod(sizes[:rows]), math.prod(sizes[rows:])]
        if list(order) == sorted(order):
            return reshaped(rewriter, node, shape)
        if node.op == "get_attr" and str(node.target) in rewriter.program.weights:
            return self._stored(rewriter, node, tuple(order), shape)
        if permutation(node) == list(order) == [1, 0]:
            return node.args[0]  # type: ignore[return-value]
        return reshaped(rewriter, rewriter.call(aten.permute.default, node, list(order), like=node), shape)

    def _stored(self, rewriter: Rewriter, node: fx.Node, order: tuple[int, ...], shape: list[int]) -> fx.Node:
        base = str(node.target)
        known = self._names.get((base, order, shape[0]))
        if known is not None:
            return rewriter.weight(known)
        weight = rewriter.program.weights[base].permute(order)
        if list(weight.shape) != shape:
            weight = weight.reshape(shape)
        name = rewriter.fresh_weight_name(f"{base}_transposed" if order == (1, 0) else f"{base}_matrix")
        self._names[base, order, shape[0]] = name
        return rewriter.weight(name, weight)
