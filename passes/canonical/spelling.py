"""One spelling for each computation: rewrites that only reduce the number of different operators.

Every rule here is exact for all inputs, so that rules of other passes, exporters and costs need to know one form:

| written | becomes |
|---|---|
| ``__and__``, ``__or__``, ``__xor__`` | ``bitwise_*``; on truth values ``logical_*``, like ``bitwise_*`` there |
| ``multiply``, ``subtract``, ``concat``, ``greater``... | ``mul``, ``sub``, ``cat``, ``gt``... |
| ``max.other``, ``min.other``; ``clamp_min``, ``clamp_max`` | ``maximum``, ``minimum``; ``clamp`` |
| ``add.Scalar``... | ``add.Tensor``... with a number |
| ``rsub(x, s)`` | ``add(neg(x), s)`` |
| ``square(x)`` | ``pow(x, 2)`` |
| ``mm``, ``bmm`` | ``matmul`` |
| ``ones``, ``zeros``, ``new_*``, ``*_like`` of a fixed shape | ``full`` |
| ``chunk``, ``split`` of a fixed size | ``split_with_sizes`` |
| ``flatten``, ``unflatten``, ``reshape_as`` | ``reshape`` |
| ``squeeze`` of a list of one axis | of that axis |
| ``pad`` with a constant | ``constant_pad_nd`` |
| ``slice_scatter`` or ``index_put`` of all slices, side by side | ``cat`` |
| first result of ``_native_batch_norm_legit_no_training`` | ``batch_norm`` |
| first result of ``native_layer_norm``, ``_fused_rms_norm`` | ``layer_norm``, ``rms_norm`` |
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ...ir.rewrite import Rewriter, is_op
from .arguments import argument, given
from .layout import stride_sensitive
from .scattered import side_by_side
from .sizes import same_size

aten = torch.ops.aten

Rule = Callable[[Rewriter, fx.Node], fx.Node | None]


def respell(rewriter: Rewriter) -> int:
    """Apply the table to one graph, in one walk; returns how many nodes were written differently."""
    strict = stride_sensitive(rewriter.graph)
    hits = 0
    for node in list(rewriter.graph.nodes):
        if node.op != "call_function":
            continue
        rule = _BY_OVERLOAD.get(node.target) or _BY_PACKET.get(getattr(node.target, "overloadpacket", node.target))
        if rule is None or node in strict:
            continue
        new = rule(rewriter, node)
        if new is not None:
            rewriter.replace(node, new)
            hits += 1
    return hits


def _new(rewriter: Rewriter, node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    with rewriter.before(node):
        return rewriter.call(target, *args, like=node, same_value=True, **kwargs)


def _alias(target: Any) -> Rule:
    """The same operator under another name: arguments as they are."""
    return lambda rewriter, node: _new(rewriter, node, target, *node.args, **node.kwargs)


def _number(target: Any) -> Rule:
    """The overload for tensors, which takes numbers as well; its ``alpha`` is a keyword."""

    def rule(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
        values = given(node)
        operands = values.pop("self"), values.pop("other")
        return _new(rewriter, node, target, *operands, **values)

    return rule


def _logic(on_bools: Any, otherwise: Any) -> Rule:
    def rule(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
        operands = [a for a in node.args if isinstance(a, fx.Node)]
        bools = len(operands) == len(node.args) and all(a.meta["val"].dtype is torch.bool for a in operands)
        target = on_bools if bools else otherwise
        return None if node.target is target else _new(rewriter, node, target, *node.args)

    return rule


def _rsub(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    source, number = node.args[0], node.args[1]
    if argument(node, "alpha") != 1 or not isinstance(source, fx.Node) or isinstance(number, fx.Node):
        return None
    if source.meta["val"].dtype != node.meta["val"].dtype:
        return None  # ``1.0 - x`` of small integers: they would wrap around before they become floats
    with rewriter.before(node):
        negated = rewriter.call(aten.neg.default, source, like=node)
    return _new(rewriter, node, aten.add.Tensor, negated, number)


def _square(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    return _new(rewriter, node, aten.pow.Tensor_Scalar, node.args[0], 2)


def _clamp_min(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    return _new(rewriter, node, aten.clamp.default, node.args[0], argument(node, "min"))


def _clamp_max(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    return _new(rewriter, node, aten.clamp.default, node.args[0], None, argument(node, "max"))


def _squeeze_dims(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    dims: Any = node.args[1]
    return _new(rewriter, node, aten.squeeze.dim, node.args[0], dims[0]) if len(dims) == 1 else None


def _filled(value: float | None) -> Rule:
    """A uniform tensor of a shape that needs no size of the input (``new_ones``, ``zeros_like`` of a fixed shape)."""

    def rule(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
        made: torch.Tensor = node.meta["val"]
        fill = argument(node, "fill_value") if value is None else value
        names = node.target._schema.arguments  # type: ignore[union-attr]
        shape: Any = argument(node, "size") if any(a.name == "size" for a in names) else list(made.shape)
        if any(isinstance(s, torch.SymInt) for s in shape):
            return None  # the shape of another value, which has no node of its own
        number = bool(fill) if made.dtype is torch.bool and not isinstance(fill, fx.Node) else fill
        options: dict[str, Any] = {"dtype": made.dtype}
        if made.device.type != "cpu":
            options["device"] = made.device
        return _new(rewriter, node, aten.full.default, list(shape), number, **options)

    return rule


def _split(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    source, dim = node.args[0], argument(node, "dim")
    sizes = [part.shape[dim] for part in node.meta["val"]]
    if not isinstance(source, fx.Node) or not all(isinstance(s, int) for s in sizes):
        return None
    return _new(
        rewriter,
        node,
        aten.split_with_sizes.default,
        source,
        sizes,
        dim % source.meta["val"].dim(),
    )


def _reshape(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    source = node.args[0]
    shape = _shape_argument(rewriter, node) if isinstance(source, fx.Node) else None
    return None if shape is None else _new(rewriter, node, aten.reshape.default, source, shape)


def _shape_argument(rewriter: Rewriter, node: fx.Node) -> list[Any] | None:
    """A node's shape as an argument: numbers, sizes of its input, and at most one -1; None if that does not suffice."""
    source: Any = node.args[0]
    before, after = source.meta["val"].shape, node.meta["val"].shape
    plan: list[int | tuple[int]] = []  # a number, or (a dimension of the input,)
    for size in after:
        if isinstance(size, int):
            plan.append(size)
            continue
        same = next(
            (d for d, s in enumerate(before) if not isinstance(s, int) and same_size(s, size)),
            None,
        )
        plan.append(-1 if same is None else (same,))
    # With an empty dimension -1 could be anything.
    if plan.count(-1) > 1 or (-1 in plan and 0 in plan):
        return None
    if -1 not in plan and sum(isinstance(p, tuple) for p in plan) == 1:
        return [-1 if isinstance(p, tuple) else p for p in plan] if 0 not in plan else None
    with rewriter.before(node):
        return [rewriter.call(aten.sym_size.int, source, p[0], like=node) if isinstance(p, tuple) else p for p in plan]


def _pad(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    if argument(node, "mode") != "constant":
        return None
    value = argument(node, "value")
    return _new(
        rewriter,
        node,
        aten.constant_pad_nd.default,
        node.args[0],
        argument(node, "pad"),
        *(() if value is None else (value,)),
    )


def _first_result(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """A norm without its statistics."""
    norm, index = node.args
    if index != 0 or not isinstance(norm, fx.Node):
        return None
    if is_op(norm, aten.native_layer_norm):
        return _new(rewriter, node, aten.layer_norm.default, *norm.args)
    if is_op(norm, aten._fused_rms_norm):
        return _new(rewriter, node, aten.rms_norm.default, *norm.args)
    if not is_op(norm, aten._native_batch_norm_legit_no_training):
        return None
    x, weight, bias, mean, variance, momentum, eps = norm.args
    return _new(
        rewriter,
        node,
        aten.batch_norm.default,
        x,
        weight,
        bias,
        mean,
        variance,
        False,
        momentum,
        eps,
        False,
    )


_BY_OVERLOAD: dict[Any, Rule] = {
    aten.max.other: _alias(aten.maximum.default),
    aten.min.other: _alias(aten.minimum.default),
    aten.mm.default: _alias(aten.matmul.default),
    aten.bmm.default: _alias(aten.matmul.default),
    aten.add.Scalar: _number(aten.add.Tensor),
    aten.sub.Scalar: _number(aten.sub.Tensor),
    aten.mul.Scalar: _number(aten.mul.Tensor),
    aten.div.Scalar: _number(aten.div.Tensor),
    aten.rsub.Scalar: _rsub,
    aten.square.default: _square,
    aten.clamp_min.default: _clamp_min,
    aten.clamp_max.default: _clamp_max,
    aten.flatten.using_ints: _reshape,
    aten.unflatten.int: _reshape,
    aten.reshape_as.default: _reshape,
    aten.view_as.default: _reshape,
    aten.ones.default: _filled(1),
    aten.zeros.default: _filled(0),
    aten.new_ones.default: _filled(1),
    aten.new_zeros.default: _filled(0),
    aten.new_full.default: _filled(None),
    aten.ones_like.default: _filled(1),
    aten.zeros_like.default: _filled(0),
    aten.full_like.default: _filled(None),
    aten.split.Tensor: _split,
    aten.chunk.default: _split,
    aten.pad.default: _pad,
    aten.squeeze.dims: _squeeze_dims,
    aten.slice_scatter.default: side_by_side,
    aten.index_put.default: side_by_side,
    aten.__and__.Tensor: _logic(aten.logical_and.default, aten.bitwise_and.Tensor),
    aten.__or__.Tensor: _logic(aten.logical_or.default, aten.bitwise_or.Tensor),
    aten.__xor__.Tensor: _logic(aten.logical_xor.default, aten.bitwise_xor.Tensor),
    aten.bitwise_and.Tensor: _logic(aten.logical_and.default, aten.bitwise_and.Tensor),
    aten.bitwise_or.Tensor: _logic(aten.logical_or.default, aten.bitwise_or.Tensor),
    aten.bitwise_xor.Tensor: _logic(aten.logical_xor.default, aten.bitwise_xor.Tensor),
    aten.bitwise_not.default: _logic(aten.logical_not.default, aten.bitwise_not.default),
    operator.getitem: _first_result,
}

_SYNONYMS = {
    aten.multiply: aten.mul,
    aten.subtract: aten.sub,
    aten.divide: aten.div,
    aten.true_divide: aten.div,
    aten.absolute: aten.abs,
    aten.negative: aten.neg,
    aten.concat: aten.cat,
    aten.concatenate: aten.cat,
    aten.greater: aten.gt,
    aten.greater_equal: aten.ge,
    aten.less: aten.lt,
    aten.less_equal: aten.le,
    aten.not_equal: aten.ne,
    aten.clip: aten.clamp,
    aten.arccos: aten.acos,
    aten.arcsin: aten.asin,
    aten.arctan: aten.atan,
    aten.fix: aten.trunc,
}


def _synonym(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """Another name for an operator: the overload of the same name, where there is one."""
    target: Any = node.target
    overload = getattr(_SYNONYMS[target.overloadpacket], target._overloadname, None)
    return None if overload is None else _new(rewriter, node, overload, *node.args, **node.kwargs)


_BY_PACKET: dict[Any, Rule] = dict.fromkeys(_SYNONYMS, _synonym)
