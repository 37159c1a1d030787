"""Operators that only rearrange dimensions, read as permutations."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .rewrite import is_op

aten = torch.ops.aten


def permutation(node: fx.Node) -> list[int] | None:
    """Which input dimension each output dimension of a permutation is; None for other operators."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    value = node.args[0].meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    rank = value.dim()
    order = list(range(rank))
    arguments: tuple[Any, ...] = node.args
    if is_op(node, aten.permute):
        return [int(d) % rank for d in arguments[1]]
    if is_op(node, aten.transpose) and len(arguments) == 3 and rank:
        a, b = int(arguments[1]) % rank, int(arguments[2]) % rank
        order[a], order[b] = order[b], order[a]
        return order
    if (is_op(node, aten.t) and rank == 2) or (is_op(node, aten.mT) and rank >= 2):
        order[-1], order[-2] = order[-2], order[-1]
        return order
    if is_op(node, aten.numpy_T):
        return order[::-1]
    return order if is_op(node, aten.t) else None
