"""Follow the weights of an attention from their softmax to the product with the values.

Between them may stand casts, a reshape of the leading axes, the end of a column of sinks, and a guard that gives zero
weights to a query that sees no key. The guard may also stand after the product.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ...ir.rewrite import is_op
from .arguments import argument
from .refusal import NoAttention

aten = torch.ops.aten

SOFTMAX = (aten.softmax, aten._softmax, aten._safe_softmax)
_DEPTH = 16  # operators between a softmax and the product

Number = Callable[[Any], float | None]


def follow_weights(softmax: fx.Node, sinks: bool, number: Number) -> tuple[fx.Node, fx.Node, list[Any] | None]:
    """From a softmax to the product with the values.

    Args:
        softmax: makes the weights.
        sinks: whether their last column belongs to sinks, and has no value.
        number: the number that an argument is, or None.

    Returns:
        The product (or the guard after it), the values, and the sizes to which the weights are reshaped before (or
        None).

    Raises:
        NoAttention: the weights go elsewhere.
    """
    node, back = softmax, None
    for _ in range(_DEPTH):
        users = _without_guard(node, number)
        if len(users) != 1:
            raise NoAttention(f"its weights have {len(users)} users: " + ", ".join(sorted({name_of(u) for u in users})))
        user = users[0]
        args: Any = user.args
        if is_op(user, aten.matmul):
            if args[0] is not node or not isinstance(args[1], fx.Node):
                raise NoAttention("its weights are the second factor of a product")
            if args[1].meta["val"].dim() < 3:
                raise NoAttention("its weights are multiplied by a weight")
            if sinks:
                raise NoAttention("the column of its sinks has values")
            return _guard_after(user, softmax, node, number) or user, args[1], back
        if is_op(user, aten._to_copy) and user.meta["val"].dtype.is_floating_point:
            node = user
        elif is_op(user, aten.where) and args[2] is node:
            if number(args[1]) != 0 or not _guards(user, node, number):
                raise NoAttention("its weights are masked after the softmax")
            node = user  # rows without any key become zero: so does the operator
        elif is_op(user, aten.reshape) and back is None:
            before, after = node.meta["val"].shape, user.meta["val"].shape
            if tuple(map(str, before[-2:])) != tuple(map(str, after[-2:])):
                raise NoAttention("its weights are reshaped across queries and keys")
            node, back = user, list(args[1])
        elif is_op(user, aten.slice) and sinks and _drops_last(user):
            node, sinks = user, False
        else:
            raise NoAttention(f"its weights go to {name_of(user)}, not to a product with values")
    raise NoAttention("its weights do not go to a product with values")


def name_of(node: fx.Node) -> str:
    """What a node is, for a reason."""
    if node.op != "call_function":
        return {"get_attr": "a weight", "placeholder": "an input", "output": "an output"}.get(node.op, node.op)
    return str(node.target).removesuffix(".default")


def greatest_of(node: Any) -> Any:
    """The tensor of which a value is the greatest along its last axis, which stays as one of size 1; or None."""
    if isinstance(node, fx.Node) and node.target is operator.getitem and node.args[1] == 0:
        node = node.args[0]
        return node.args[0] if is_op(node, aten.max.dim) and _over_last(node) else None
    return node.args[0] if is_op(node, aten.amax) and _over_last(node) else None


def _over_last(node: fx.Node) -> bool:
    """Whether a reduction is over the last axis alone, and keeps it."""
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    dim: Any = argument(node, "dim")
    dims = [dim] if isinstance(dim, int) else list(dim or ())
    return [d % rank for d in dims] == [rank - 1] and bool(argument(node, "keepdim"))


def _without_guard(node: fx.Node, number: Number) -> list[fx.Node]:
    """The users of weights, without the tests for rows that have no key, when they guard these very weights."""
    users = list(node.users)
    tests = [u for u in users if is_op(u, aten.isnan, aten.ne) and all(is_op(v, aten.where) for v in u.users)]
    guards = [u for u in users if is_op(u, aten.where) and u.args[2] is node]
    if len(guards) == 1 and _guards(guards[0], node, number):
        return [u for u in users if u not in tests]
    return users


def _guard_after(product: fx.Node, softmax: fx.Node, weights: fx.Node, number: Number) -> fx.Node | None:
    """What gives zero to a query that sees no key, if that is all that reads the product."""
    if len(product.users) != 1:
        return None
    guard = next(iter(product.users))
    if not is_op(guard, aten.where) or guard.args[2] is not product or number(guard.args[1]) != 0:
        return None
    return guard if _Rows(softmax, (weights, softmax), number).without_key(guard.args[0]) else None


def _guards(where: fx.Node, weights: fx.Node, number: Number) -> bool:
    """``where(no key at all, 0, weights)``: the condition is on the weights themselves or on their scores."""
    softmax: Any = weights
    while not is_op(softmax, *SOFTMAX):
        softmax = softmax.args[0]
    return _Rows(softmax, (weights, softmax), number).without_key(where.args[0])


class _Rows:
    """Reads conditions on the rows of scores: a row that is minus infinity throughout sees no key."""

    def __init__(self, softmax: fx.Node, weights: tuple[fx.Node, ...], number: Number) -> None:
        self.scores, self.weights, self.number = softmax.args[0], weights, number

    def without_key(self, node: Any) -> bool:
        """Whether a condition is true for rows without a key, and for no others."""
        if is_op(node, aten.logical_not):
            return self._with_key(node.args[0])
        if is_op(node, aten.isnan):
            return node.args[0] in self.weights
        if is_op(node, aten.ne.Tensor):  # not-a-number alone differs from itself
            return node.args[0] is node.args[1] and node.args[0] in self.weights
        if is_op(node, aten.all.dim, aten.all.dims):
            return _over_last(node) and self._lowest(node.args[0])
        return is_op(node, aten.eq.Scalar, aten.eq.Tensor) and self._compares(node, greatest_of(node.args[0]))

    def _with_key(self, node: Any) -> bool:
        if is_op(node, aten.logical_not):
            return self.without_key(node.args[0])
        if is_op(node, aten.any.dim, aten.any.dims):
            inner: Any = node.args[0]
            if is_op(inner, aten.logical_not):
                return _over_last(node) and self._lowest(inner.args[0])
            different = is_op(inner, aten.ne.Scalar, aten.ne.Tensor) and self._compares(inner, inner.args[0])
            return _over_last(node) and different
        return is_op(node, aten.ne.Scalar, aten.ne.Tensor) and self._compares(node, greatest_of(node.args[0]))

    def _lowest(self, node: Any) -> bool:
        """Whether a condition is true where a score is minus infinity."""
        return is_op(node, aten.eq.Scalar, aten.eq.Tensor) and self._compares(node, node.args[0])

    def _compares(self, node: fx.Node, scores: Any) -> bool:
        return scores is self.scores and self.number(node.args[1]) == -math.inf


def _drops_last(node: fx.Node) -> bool:
    before, after = node.args[0].meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
    return str(before[-1] - 1) == str(after[-1]) and (node.args[2] if len(node.args) > 2 else 0) in (0, None)
