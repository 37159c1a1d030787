"""How positions are rearranged on the way from one value to another: ``[batch, tokens]`` may be written as
``[batch * tokens]``, or the other way round.

    %o = linear(%heads, ...)    : [B*S, 32]
    %v = reshape(%o, [B, S, 32])                      a step
    %a = add(%stream, %v)       : [B, S, 32]
    %f = reshape(%a, [-1, 32])  : [B*S, 32]           a step

A step is an operator that moves axes before the last one, or rolls along them. All others on the way work position by
position: what is pointwise, or looks along the last axis only. So the steps say how any other value over the positions
of ``%o`` is laid out over those of ``%f``. Any other operator is no way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ...ir.errors import PreconditionError
from ...ir.flow import is_pointwise, keeps_value, op_name, shape_key, tensor_of
from ...ir.rewrite import Rewriter, is_op
from ...ir.views import permutation

_aten = torch.ops.aten
_LEADING = (_aten.flatten, _aten.unflatten, _aten.squeeze, _aten.unsqueeze)
_MAPS = {"linear", "matmul", "mm", "addmm"}
_ALONG_LAST = {
    "layer_norm", "native_layer_norm", "rms_norm", "mean", "sum", "var", "var_mean", "std", "amax", "amin",
    "linalg_vector_norm", "split", "split_with_sizes", "chunk", "slice", "cat", "glu", "getitem",
}  # fmt: skip
_SAME_ORDER = (_aten.reshape, _aten.view, _aten._unsafe_view, *_LEADING)

Steps = tuple[fx.Node, ...]


def steps_between(start: fx.Node, end: fx.Node) -> Steps | None:
    """The steps from one value to a later one.

    Returns:
        None where no way leads there.
    """
    ways: dict[fx.Node, Steps] = {start: ()}
    for node in start.graph.nodes:
        if node is end:
            break
        if node not in ways:
            continue
        for user in node.users:
            if user in ways:
                continue
            if is_step(user) and user.args[0] is node:
                ways[user] = (*ways[node], user)
            elif _keeps_positions(user, node):
                ways[user] = ways[node]
    return ways.get(end)


def _keeps_positions(user: fx.Node, node: fx.Node) -> bool:
    """Whether an operator works position by position on one of its operands."""
    if tensor_of(user) is None or shape_key(user)[:-1] != shape_key(node)[:-1]:
        return False
    if is_pointwise(user) or keeps_value(user):
        return True
    if op_name(user) in _MAPS:
        return user.args[-2 if op_name(user) == "addmm" else 0] is node
    # What looks along an axis, or takes a part of it, does so along the last one: the others have kept their sizes.
    return op_name(user) in _ALONG_LAST


def is_step(node: fx.Node) -> bool:
    """Whether an operator moves axes before the last one, or rolls along them, and leaves the last one where it is."""
    if is_op(node, _aten.roll):
        return bool(_rolled(node)[1])
    order = permutation(node)
    if order is not None:
        return bool(order) and order[-1] == len(order) - 1 and order != list(range(len(order)))
    if not is_op(node, *_SAME_ORDER) or not isinstance(node.args[0], fx.Node):
        return False
    before, after = shape_key(node.args[0]), shape_key(node)
    return bool(before and after) and before[-1] == after[-1] and before != after


def _rolled(node: fx.Node) -> tuple[list[int], list[int]]:
    """By how much ``roll`` rolls, and along which axes; no axes where it rolls the last one, too, or all as one."""
    arguments: Any = node.args
    rank = len(shape_key(node))
    shifts, axes = arguments[1], arguments[2] if len(arguments) > 2 else []
    if not all(isinstance(shift, int) for shift in shifts) or any(axis % rank == rank - 1 for axis in axes):
        return [], []
    return list(shifts), list(axes)


def rearranged(rewriter: Rewriter, value: fx.Node, steps: Steps, like: fx.Node) -> fx.Node:
    """The same steps taken by another value over the same positions, in the graph.

    Args:
        rewriter: told where to write.
        value: with as many axes as the first step's operand; its last axis may have another size.
        steps: of `steps_between`.
        like: a value over the positions after the steps.

    Raises:
        PreconditionError: two sizes in between are those of neither value.
    """
    sizes = _Sizes(rewriter, (value, like))
    width = int(value.meta["val"].shape[-1])
    for step in steps:
        order = permutation(step)
        if is_op(step, _aten.roll):
            value = rewriter.call(_aten.roll.default, value, *_rolled(step))
        elif order is not None:
            value = rewriter.call(_aten.permute.default, value, order)
        else:
            value = rewriter.call(_aten.reshape.default, value, [*sizes.leading(step), width])
    return value


def arranged_back(rewriter: Rewriter, value: fx.Node, steps: Steps, like: fx.Node) -> fx.Node:
    """A value over the positions after the steps, over those before them: `rearranged` the other way.

    Args:
        rewriter: told where to write.
        value: over the positions after the steps.
        steps: of `steps_between`.
        like: a value over the positions before them.

    Raises:
        PreconditionError: two sizes in between are those of neither value.
    """
    sizes = _Sizes(rewriter, (value, like))
    width = int(value.meta["val"].shape[-1])
    for step in reversed(steps):
        order = permutation(step)
        if is_op(step, _aten.roll):
            shifts, axes = _rolled(step)
            value = rewriter.call(_aten.roll.default, value, [-shift for shift in shifts], axes)
        elif order is not None:
            value = rewriter.call(_aten.permute.default, value, [order.index(i) for i in range(len(order))])
        else:
            source: Any = step.args[0]
            value = rewriter.call(_aten.reshape.default, value, [*sizes.leading(source), width])
    return value


class _Sizes:
    """The sizes of other values' leading axes, as numbers or as nodes that hold them.

    They are read off two values, not off the steps: what asked for a step's size would keep it alive.
    """

    def __init__(self, rewriter: Rewriter, known: Sequence[fx.Node]) -> None:
        self._rewriter = rewriter
        self._at = {size: (node, i) for node in known for i, size in enumerate(shape_key(node)[:-1])}

    def leading(self, node: fx.Node) -> list[Any]:
        found = [self._size(size) for size in shape_key(node)[:-1]]
        if found.count(-1) > 1:
            raise PreconditionError(
                "the order of positions cannot be written here: several sizes are unknown",
                pass_name="shrp",
                node=node.name,
                remedy="run the pass 'raise' first, or give the model fixed sizes",
            )
        return found

    def _size(self, size: Any) -> Any:
        if isinstance(size, int):
            return size
        if size not in self._at:
            return -1
        node, axis = self._at[size]
        return self._rewriter.call(_aten.sym_size.int, node, axis)


def moved(value: torch.Tensor, steps: Sequence[fx.Node], seen: Mapping[fx.Node, Any]) -> torch.Tensor:
    """A value after the steps, as numbers.

    Args:
        value: over the positions before them.
        steps: of `steps_between`.
        seen: the values of the steps themselves.
    """
    for step in steps:
        order = permutation(step)
        if is_op(step, _aten.roll):
            value = value.roll(*_rolled(step))
        elif order is not None:
            value = value.permute(order)
        else:
            value = value.reshape(*seen[step].shape[:-1], value.shape[-1])
    return value
