"""A weight in another shape or orientation, as an expression over the same numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from ...ir.rewrite import Rewriter

aten = torch.ops.aten


def reshaped(rewriter: Rewriter, node: fx.Node, shape: Sequence[int]) -> fx.Node:
    """A constant in another shape: a new weight over the same numbers, or a view of what is computed."""
    if list(node.meta["val"].shape) == list(shape):
        return node
    weight = rewriter.program.weights.get(str(node.target)) if node.op == "get_attr" else None
    if weight is None:
        return rewriter.call(aten.reshape.default, node, list(shape))
    return rewriter.weight(rewriter.fresh_weight_name(str(node.target)), weight.reshape(shape))
