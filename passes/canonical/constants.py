"""Numbers in a graph, however they were written: as an argument, a literal tensor, or a weight of one element."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ...ir.program import Program
from ...ir.rewrite import is_op, is_random
from .arguments import argument

aten = torch.ops.aten


def scalar_of(program: Program, value: Any) -> float | None:
    """The real number that a value is, whatever the input; None if it is something else.

    A tensor of one element still takes part in broadcasting and type promotion (``[1, 1]`` adds dimensions to a
    vector, and float32 ``[1]`` widens float16): a rewrite that leaves it out must compare the result's type.

    Args:
        program: whose weights are read.
        value: an argument of a node: a number, or a node.

    Returns:
        The number as its type holds it (0.1 of float32 is 0.10000000149); truth values are no numbers.
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, fx.Node):
        return None
    known = value.meta.get("val")
    if not isinstance(known, torch.Tensor) or known.dtype is torch.bool or known.dtype.is_complex:
        return None
    if not all(isinstance(size, int) for size in known.shape) or math.prod(known.shape) != 1:
        return None
    if value.op == "get_attr":
        weight = program.weights.get(str(value.target))
        return None if weight is None or weight.is_meta else float(weight.tensor().item())
    if is_op(value, aten.full, aten.scalar_tensor):
        fill = argument(value, "s" if is_op(value, aten.scalar_tensor) else "fill_value")
        if isinstance(fill, (int, float)) and not isinstance(fill, bool):
            return float(torch.tensor(fill, dtype=known.dtype).item())
    return None


def is_constant(node: Any, limit: int = 16) -> bool:
    """Whether a value depends on weights and literals alone, over at most ``limit`` operators in a row."""
    if not isinstance(node, fx.Node) or node.op == "get_attr":
        return isinstance(node, fx.Node)
    if node.op != "call_function" or limit == 0 or is_random(node):
        return False
    return all(is_constant(operand, limit - 1) for operand in node.all_input_nodes)


def is_vector(node: Any, size: int, like: fx.Node) -> bool:
    """Whether a value is a constant of ``size`` elements along the last axis of ``like``, of the same dtype.

    It may have leading dimensions of size 1, but not more dimensions than ``like``.
    """
    known = node.meta.get("val") if isinstance(node, fx.Node) else None
    other = like.meta["val"]
    if not isinstance(known, torch.Tensor) or not 0 < known.dim() <= other.dim() or known.dtype != other.dtype:
        return False
    return list(known.shape) == [1] * (known.dim() - 1) + [size] and is_constant(node)
