"""Reads products of a value and a constant as linear maps over the value's last axis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...ir.rewrite import is_op
from ...ir.views import permutation
from .arguments import argument
from .constants import is_constant, is_vector
from .products import einsum_labels
from .refusal import Refused

aten = torch.ops.aten


@dataclass(frozen=True)
class SpelledLinear:
    """A linear map that was spelled out.

    Attributes:
        result: the node that holds its value.
        x: what is mapped.
        x_order: the axes of ``x``, those that are summed over last.
        summed: how many axes are summed over.
        weight: the constant.
        w_order: the axes of the constant: those of the result, then those that are summed over.
        features: the sizes of the result's axes that come from the constant.
        out_order: where each axis of the result is in ``[the rest of x, features]``.
        bias: a vector that is added.
    """

    result: fx.Node
    x: fx.Node
    x_order: list[int]
    summed: int
    weight: fx.Node
    w_order: list[int]
    features: list[int]
    out_order: list[int]
    bias: fx.Node | None = None


def linear_at(node: fx.Node) -> SpelledLinear | None:
    """The linear map that a node is; None for what is no product of a value and a constant.

    Raises:
        Refused: it is one, but no linear map over the value's last axis.
    """
    if is_op(node, aten.matmul):
        return _matmul(node)
    if is_op(node, aten.addmm):
        return _addmm(node)
    return _einsum(node) if is_op(node, aten.einsum) else None


def _is_weight(x: Any, weight: Any) -> bool:
    """Whether a value meets a constant of a type in which linear layers compute."""
    if not isinstance(x, fx.Node) or not is_constant(weight) or is_constant(x):
        return False
    return x.meta["val"].dtype.is_floating_point or x.meta["val"].dtype.is_complex


def _matmul(node: fx.Node) -> SpelledLinear | None:
    x: Any
    weight: Any
    x, weight = node.args[:2]
    if _is_weight(weight, x):
        return _from_the_left(node, weight, x)
    if not _is_weight(x, weight):
        return None
    return _product(node, x, weight)


def _from_the_left(node: fx.Node, x: fx.Node, weight: fx.Node) -> SpelledLinear:
    """``w @ transpose(x)``: the transposed result of a linear map of ``x``."""
    rank = x.meta["val"].dim()
    order, shape = permutation(x), weight.meta["val"].shape
    if len(shape) != 2 or order is None or order != [*range(rank - 2), rank - 1, rank - 2]:
        raise Refused("the constant is the left operand", node)
    source: Any = x.args[0]
    return SpelledLinear(node, source, list(range(rank)), 1, weight, [0, 1], [shape[0]], order)


def _product(node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None = None) -> SpelledLinear:
    rank, shape = x.meta["val"].dim(), list(weight.meta["val"].shape)
    if len(shape) == 1:
        raise Refused("the constant is a vector", node)
    batch = len(shape) - 2
    if shape[:batch] != [1] * batch or len(shape) > max(rank, 2):
        raise Refused("the constant has batch axes", node)
    out = list(range(rank))
    order = [*range(batch), batch + 1, batch]
    return SpelledLinear(node, x, out, 1, weight, order, [shape[-1]], out, bias)


def _addmm(node: fx.Node) -> SpelledLinear | None:
    bias: Any
    x: Any
    weight: Any
    bias, x, weight = node.args[:3]
    if not _is_weight(x, weight):
        return None
    if argument(node, "alpha") != 1 or argument(node, "beta") != 1:
        raise Refused("the product or what is added is scaled", node)
    if not is_vector(bias, weight.meta["val"].shape[-1], node):
        raise Refused("what is added is no bias", node)
    return _product(node, x, weight, bias)


def _einsum(node: fx.Node) -> SpelledLinear | None:
    operands: Any = node.args[1]
    if len(operands) != 2 or not (_is_weight(*operands) or _is_weight(*operands[::-1])):
        return None
    x, weight = operands if _is_weight(*operands) else operands[::-1]
    parts = einsum_labels(str(node.args[0]), operands)
    if parts is None:
        raise Refused("the einsum repeats a label, or says no result", node)
    (left, right), out = parts
    of_x, of_w = (left, right) if x is operands[0] else (right, left)
    if any(c in of_x and c in of_w for c in out):
        raise Refused("the constant has batch axes", node)
    summed = [c for c in of_x if c not in out]
    if set(summed) != set(of_w) - set(out):
        raise Refused("a label of one operand alone is summed over", node)
    features = [c for c in out if c in of_w]
    if not summed or not features:
        raise Refused("the constant is a vector", node)
    sizes = dict(zip(of_w, weight.meta["val"].shape, strict=True))
    if any(x.meta["val"].shape[of_x.index(c)] != sizes[c] for c in summed):
        raise Refused("one operand is broadcast along what is summed over", node)
    rest = [c for c in out if c in of_x]
    made = [*rest, *features]
    return SpelledLinear(
        node,
        x,
        [of_x.index(c) for c in (*rest, *summed)],
        len(summed),
        weight,
        [of_w.index(c) for c in (*features, *summed)],
        [sizes[c] for c in features],
        [made.index(c) for c in out],
    )
