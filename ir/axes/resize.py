"""How an operator's literal arguments change when dimensions of its operands and results are cut.

Most operators have no sizes among their arguments and need no rule here. A rule returns the operator, its arguments and
its keyword arguments; it may return another operator that does the same.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx

from ..errors import VerifyError
from ..flow import op_name
from ..rewrite import Rewriter
from ..types import expr_of
from .relate import bind

aten = torch.ops.aten
Mask = np.ndarray[Any, np.dtype[np.bool_]]
Call = tuple[Any, list[Any], dict[str, Any]]
ResizeRule = Callable[["Resize", fx.Node], Call]

RULES: dict[str, ResizeRule] = {}


def _rule(*names: str) -> Callable[[ResizeRule], ResizeRule]:
    def register(function: ResizeRule) -> ResizeRule:
        for name in names:
            RULES[name] = function
        return function

    return register


class Resize:
    """What is cut, for the rules.

    Args:
        rewriter: makes nodes where a rule needs some.
        masks: for each dimension that is cut, which of its elements stay.
        shapes: every value's shape before the cut.
    """

    def __init__(
        self, rewriter: Rewriter, masks: dict[tuple[fx.Node, int], Mask], shapes: dict[fx.Node, tuple[Any, ...]]
    ) -> None:
        self.rewriter = rewriter
        self.masks = masks
        self.shapes = shapes

    def mask(self, node: fx.Node, dim: int) -> Mask | None:
        """Which elements of a dimension stay; None when all do."""
        return self.masks.get((node, dim % max(len(self.shapes[node]), 1)))

    def size(self, node: fx.Node, dim: int) -> int:
        """The new size of a dimension of static size."""
        mask = self.mask(node, dim)
        return int(self.shapes[node][dim]) if mask is None else int(mask.sum())

    def expected(self, node: fx.Node) -> tuple[Any, ...]:
        """A value's shape after the cut, as numbers and expressions."""
        sizes: list[Any] = []
        for dim, size in enumerate(self.shapes[node]):
            mask = self.mask(node, dim)
            expr = expr_of(size)
            sizes.append(expr if mask is None else expr * int(mask.sum()) / len(mask) if not isinstance(expr, int)
                         else int(mask.sum()))  # fmt: skip
        return tuple(sizes)

    def sizes(self, node: fx.Node, values: Any, first: int = 0) -> list[Any]:
        """A list of sizes among the arguments, of the dimensions of ``node`` from ``first`` on."""
        new: list[Any] = []
        for dim, value in enumerate(values, first):
            mask = self.mask(node, dim)
            if mask is None or (isinstance(value, int) and value < 0):
                new.append(value)
            else:
                new.append(self.scaled(node, value, mask))
        return new

    def scaled(self, node: fx.Node, size: Any, mask: Mask) -> Any:
        """What is left of a size among the arguments: a number, or a new node where it is a node."""
        if isinstance(size, int):
            return int(mask.sum())
        with self.rewriter.before(node):
            rest = self.rewriter.call(operator.floordiv, size, len(mask), like=node)
            return self.rewriter.call(operator.mul, rest, int(mask.sum()), like=node)

    def call(self, node: fx.Node) -> Call:
        """The operator and arguments of a node after the cut."""
        rule = RULES.get(op_name(node))
        return rule(self, node) if rule else (node.target, list(node.args), dict(node.kwargs))


def _with(node: fx.Node, **changes: Any) -> Call:
    """The same operator with some arguments changed."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    bound = bind(node) | changes
    given = {p.name for p in target._schema.arguments[: len(node.args)]} | set(node.kwargs) | set(changes)
    positional = [p.name for p in target._schema.arguments if not p.kwarg_only]
    last = max((i for i, name in enumerate(positional) if name in given), default=-1)
    kwargs = {p.name: bound[p.name] for p in target._schema.arguments if p.kwarg_only and p.name in given}
    return target, [bound[name] for name in positional[: last + 1]], kwargs


@_rule("view", "_unsafe_view", "_reshape_alias", "reshape")
def _view(c: Resize, node: fx.Node) -> Call:
    args = bind(node)
    # The strides of the operand may be others now, and a view would refuse them.
    return aten.reshape.default, [args["self"], c.sizes(node, args.get("size", args.get("shape")))], {}


@_rule("unflatten")
def _unflatten(c: Resize, node: fx.Node) -> Call:
    args = bind(node)
    first = args["dim"] % len(c.shapes[args["self"]])
    return _with(node, sizes=c.sizes(node, args["sizes"], first))


@_rule("expand")
def _expand(c: Resize, node: fx.Node) -> Call:
    return _with(node, size=c.sizes(node, bind(node)["size"]))


@_rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty")
def _made(c: Resize, node: fx.Node) -> Call:
    return _with(node, size=c.sizes(node, bind(node)["size"]))


@_rule("repeat", "tile")
def _repeat(c: Resize, node: fx.Node) -> Call:
    args = bind(node)
    key = "repeats" if "repeats" in args else "dims"
    given = list(args[key])
    offset = len(c.shapes[node]) - len(c.shapes[args["self"]])
    shift = len(c.shapes[node]) - len(given)
    for place in range(len(given)):
        dim = place + shift
        mask = c.mask(node, dim)
        if mask is None:
            continue
        if dim < offset or expr_of(c.shapes[args["self"]][dim - offset]) == 1:
            given[place] = c.scaled(node, given[place], mask)
        elif isinstance(expr_of(c.shapes[node][dim]), int):
            given[place] = c.size(node, dim) // c.size(args["self"], dim - offset)
        # How often a symbolic dimension is repeated does not change, only what is.
    return _with(node, **{key: given})


@_rule("repeat_interleave")
def _repeat_interleave(c: Resize, node: fx.Node) -> Call:
    args = bind(node)
    x, dim = args["self"], args["dim"]
    if dim is None or (c.mask(node, dim) is None and c.mask(x, dim) is None):
        return node.target, list(node.args), dict(node.kwargs)
    dim %= len(c.shapes[node])
    target, out, kwargs = _with(node, repeats=c.size(node, dim) // c.size(x, dim))
    kwargs.pop("output_size", None)
    return target, out[:3], kwargs


def _span(mask: Mask, chosen: np.ndarray[Any, Any], node: fx.Node) -> tuple[int, int, int]:
    """Start, stop and step, among the elements of ``mask`` that stay, of those of ``chosen`` that stay."""
    kept = chosen[mask[chosen]]
    if not len(kept):
        before = int(mask[: int(chosen[0]) if len(chosen) else len(mask)].sum())
        return before, before, 1
    places = (np.cumsum(mask) - 1)[kept]
    steps = np.unique(np.diff(places))
    if len(steps) > 1:
        raise VerifyError(
            "the elements that a slice takes are not evenly spaced after the cut",
            node=node.name,
            remedy="keep other units",
        )
    return int(places[0]), int(places[-1]) + 1, int(steps[0]) if len(steps) else 1


@_rule("slice")
def _slice(c: Resize, node: fx.Node) -> Call:
    args = bind(node)
    x = args["self"]
    dim = args["dim"] % len(c.shapes[x])
    mask = c.mask(x, dim)
    if mask is None:
        return node.target, list(node.args), dict(node.kwargs)
    size = len(mask)
    start, stop, step = slice(args["start"], args["end"], args["step"]).indices(size)
    first, last, stride = _span(mask, np.arange(start, stop, step), node)
    end = last if last < int(mask.sum()) or stride > 1 else sys.maxsize
    return _with(node, start=first, end=end, step=stride)


@_rule("slice_scatter")
def _slice_scatter(c: Resize, node: fx.Node) -> Call:
    args = bind(node)
    if c.mask(args["self"], args["dim"]) is None:
        return node.target, list(node.args), dict(node.kwargs)
    return _with(node, start=0, end=sys.maxsize)  # only a slice of everything is cut


@_rule("narrow")
def _narrow(c: Resize, node: fx.Node) -> Call:
    args = bind(node)
    x = args["self"]
    dim = args["dim"] % len(c.shapes[x])
    mask = c.mask(x, dim)
    if mask is None:
        return node.target, list(node.args), dict(node.kwargs)
    start = args["start"] % len(mask)
    first, last, _ = _span(mask, np.arange(start, start + args["length"]), node)
    return _with(node, start=first, length=last - first)


@_rule("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "tensor_split")
def _split(c: Resize, node: fx.Node) -> Call:
    args = bind(node)
    x = args["self"]
    dim = args["dim"] % len(c.shapes[x])
    mask = c.mask(x, dim)
    if mask is None:
        return node.target, list(node.args), dict(node.kwargs)
    ends = np.cumsum([int(v.shape[dim]) for v in node.meta["val"]])
    sizes = [int(piece.sum()) for piece in np.split(mask, ends[:-1])]
    return aten.split_with_sizes.default, [x, sizes, args["dim"]], {}


@_rule("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _convolution(c: Resize, node: fx.Node) -> Call:
    args = bind(node)
    if args["groups"] == 1:
        return node.target, list(node.args), dict(node.kwargs)
    x, weight = args["input"], args["weight"]
    transposed = "transpose" in op_name(node) or bool(args.get("transposed"))
    channels, inside = (node, weight) if transposed else (x, weight)
    return _with(node, groups=c.size(channels, 1) // c.size(inside, 1))


@_rule("group_norm")
def _group_norm(c: Resize, node: fx.Node) -> Call:
    return _with(node, num_groups=_groups_left(c, node, int(bind(node)["num_groups"])))


@_rule("native_group_norm")
def _native_group_norm(c: Resize, node: fx.Node) -> Call:
    args = bind(node)
    return _with(node, C=c.size(args["input"], 1), group=_groups_left(c, node, int(args["group"])))


def _groups_left(c: Resize, node: fx.Node, groups: int) -> int:
    mask = c.mask(bind(node)["input"], 1)
    return groups if mask is None else int(mask.reshape(groups, -1).any(axis=1).sum())


@_rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def _layer_norm(c: Resize, node: fx.Node) -> Call:
    args = bind(node)
    x, shape = args["input"], args["normalized_shape"]
    return _with(node, normalized_shape=c.sizes(x, shape, len(c.shapes[x]) - len(shape)))


@_rule("scaled_dot_product_attention", "graphlathe.attention")
def _attention(c: Resize, node: fx.Node) -> Call:
    args = bind(node)
    if args["scale"] is not None or c.mask(args["query"], -1) is None:
        return node.target, list(node.args), dict(node.kwargs)
    # The default scale depends on the number of channels.
    return _with(node, scale=1 / math.sqrt(int(c.shapes[args["query"]][-1])))


@_rule("graphlathe.rotary_embedding")
def _rotary(c: Resize, node: fx.Node) -> Call:
    args = bind(node)
    mask = c.mask(args["x"], -1)
    return _with(node, rotary_dim=args["rotary_dim"] if mask is None else int(mask[: args["rotary_dim"]].sum()))
