"""Remove operators that change nothing, and merge chains of views.

    %a = aten.view(%x, [2, 12])
    %b = aten._unsafe_view(%a, [24])        %b = aten.reshape(%x, [24])
    %c = aten.slice(%b, 0, 0, 9223372036854775807)
    %d = aten.dropout(%c, 0.1, False)
    return %d                               return %b

What counts as nothing: copies and aliases, casts to the type that a value has (and there and back through a wider one),
dropout at inference, views to the same shape, permutations that cancel, whole slices, padding by zero, concatenation of
one part, an axis added and taken away, multiplication by one, ``and true``. Permutations of two dimensions are written
``transpose``; ``view`` and ``_unsafe_view`` become ``reshape``, which asks nothing of strides. Then copies made only
for the sake of strides can go, except before operators that do look at strides.

``x + 0.0`` stays: it turns -0.0 into 0.0. Sizes are compared symbolically, at every size that the signature allows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ...ir.program import Program
from ...ir.rewrite import Rewriter, is_op
from ...ir.views import permutation
from ..base import Context, Effect, Pass, Prop, Stats
from .arguments import argument
from .layout import COMPOSED_VIEWS, stride_sensitive
from .sizes import same_size, same_type

aten = torch.ops.aten

Replacement = fx.Node | None
Handler = Callable[[Rewriter, fx.Node], Replacement]

DROPOUTS = (
    aten.dropout,
    aten.feature_dropout,
    aten.alpha_dropout,
    aten.feature_alpha_dropout,
)
COPIES = (
    aten.clone,
    aten.contiguous,
    aten.alias,
    aten.detach,
    aten.lift_fresh,
    aten.lift_fresh_copy,
)
KEEP_STRIDES = (aten.alias, aten.detach, aten.lift_fresh, *DROPOUTS)
CASTS = (aten.to, aten._to_copy, aten.type_as)
SAME_SHAPE_IS_SAME = (
    aten.expand,
    aten.expand_as,
    aten.broadcast_to,
    aten.repeat,
    aten.tile,
    aten.slice,
    aten.narrow,
)
"""Operators whose result, if it has their input's shape and dtype, is their input (whole slices, no padding...)."""

RESHAPES = (aten.view, aten._unsafe_view, aten.reshape, aten.view_as, aten.reshape_as)
PERMUTES = (aten.permute, aten.transpose, aten.t, aten.numpy_T, aten.mT)
SPLITS = (aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split)

# Every value of the key is a value of each type listed: a cast there and back changes nothing.
_WIDER: dict[torch.dtype, frozenset[torch.dtype]] = {
    torch.bool: frozenset(
        {
            torch.uint8,
            torch.int8,
            torch.int32,
            torch.int64,
            torch.float16,
            torch.bfloat16,
            torch.float32,
        }
    ),
    torch.uint8: frozenset(
        {
            torch.int16,
            torch.int32,
            torch.int64,
            torch.float16,
            torch.float32,
            torch.float64,
        }
    ),
    torch.int8: frozenset(
        {
            torch.int16,
            torch.int32,
            torch.int64,
            torch.float16,
            torch.float32,
            torch.float64,
        }
    ),
    torch.int16: frozenset({torch.int32, torch.int64, torch.float32, torch.float64}),
    torch.int32: frozenset({torch.int64, torch.float64}),
    torch.float16: frozenset({torch.float32, torch.float64}),
    torch.bfloat16: frozenset({torch.float32, torch.float64}),
    torch.float32: frozenset({torch.float64}),
}


@dataclass(frozen=True, kw_only=True)
class RemoveNoops(Pass):
    """Remove copies, casts, views, slices and dropouts that change nothing, and merge chains of views."""

    name: ClassVar[str] = "remove-noops"
    effect: ClassVar[Effect] = Effect.EXACT
    breaks: ClassVar[frozenset[Prop]] = frozenset()

    def run(self, program: Program, ctx: Context) -> Stats:
        """One forward walk over each graph; what a removal leaves unused is erased."""
        stats = Stats()
        for name in program.graphs:
            rewriter = Rewriter(program, self.name, name)
            strict = stride_sensitive(rewriter.graph)
            for node in list(rewriter.graph.nodes):
                handler = _HANDLERS.get(getattr(node.target, "overloadpacket", node.target))
                if handler is None or node.op != "call_function":
                    continue
                stats.attempts += 1
                if node in strict and not is_op(node, *KEEP_STRIDES):
                    stats.miss("an operator that looks at strides depends on it")
                    continue
                new = handler(rewriter, node)
                if new is not None and new is not node:
                    rewriter.replace(node, new)
                    stats.hits += 1
            if rewriter.mutations:
                rewriter.erase_dead()
        return stats


def _copy(rewriter: Rewriter, node: fx.Node) -> Replacement:
    return _source(node)


def _source(node: fx.Node) -> fx.Node | None:
    """The tensor that an operator reads first."""
    source = node.args[0] if node.args else node.kwargs.get("self")
    return source if isinstance(source, fx.Node) else None


def _same_type(rewriter: Rewriter, node: fx.Node) -> Replacement:
    source = _source(node)
    return source if source is not None and same_type(source.meta["val"], node.meta["val"]) else None


def _cast(rewriter: Rewriter, node: fx.Node) -> Replacement:
    source = _source(node)
    if source is None:
        return None
    before, after = source.meta["val"], node.meta["val"]
    if before.device != after.device:
        return None
    if before.dtype == after.dtype:
        return source
    inner = _source(source) if is_op(source, *CASTS) else None
    if inner is not None and inner.meta["val"].device == after.device:
        original = inner.meta["val"].dtype
        if before.dtype in _WIDER.get(original, ()):
            return (
                inner
                if original == after.dtype
                else _new(rewriter, node, aten._to_copy.default, inner, dtype=after.dtype)
            )
    if node.target is not aten._to_copy.default or set(node.kwargs) != {"dtype"}:
        return _new(rewriter, node, aten._to_copy.default, source, dtype=after.dtype)
    return None


def _new(rewriter: Rewriter, node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A node in the place of ``node``, of the same shape and dtype."""
    with rewriter.before(node):
        return rewriter.call(target, *args, like=node, same_value=True, **kwargs)


def _dropout(rewriter: Rewriter, node: fx.Node) -> Replacement:
    return _source(node) if argument(node, "train") is False or argument(node, "p") == 0 else None


def _pad(rewriter: Rewriter, node: fx.Node) -> Replacement:
    # Equal shapes would not do: padding by [1, -1] shifts.
    return _source(node) if all(isinstance(p, int) and p == 0 for p in argument(node, "pad")) else None


def _repeat_interleave(rewriter: Rewriter, node: fx.Node) -> Replacement:
    # The overloads with a tensor of counts may keep the size and yet repeat one entry and drop another.
    return _same_type(rewriter, node) if node.target is aten.repeat_interleave.self_int else None


def _view(rewriter: Rewriter, node: fx.Node) -> Replacement:
    """Views that keep row-major order: skip to the furthest value of that shape, else read the chain's root."""
    root = _source(node)
    found: fx.Node | None = None
    while root is not None:
        if same_type(root.meta["val"], node.meta["val"]):
            found = root
        if not _keeps_order(root):
            break
        root = _source(root)
    if found is not None or root is None:
        return found
    if not is_op(node, *RESHAPES) or (node.target is aten.reshape.default and root is node.args[0]):
        return None
    if node.target is aten.view.dtype:
        return None
    if is_op(node, aten.view_as, aten.reshape_as):
        shape = node.meta["val"].shape
        if not all(isinstance(s, int) for s in shape):
            return None  # its symbolic sizes may have no node yet
        return _new(rewriter, node, aten.reshape.default, root, [int(s) for s in shape])
    return _new(rewriter, node, aten.reshape.default, root, node.args[1])


def _keeps_order(node: fx.Node) -> bool:
    return is_op(node, *COMPOSED_VIEWS) and node.target is not aten.view.dtype


def _permute(rewriter: Rewriter, node: fx.Node) -> Replacement:
    dims = permutation(node)
    source = _source(node)
    if dims is None or source is None:
        return None
    inner, root = permutation(source), source
    if inner is not None and (below := _source(source)) is not None:
        dims, root = [inner[d] for d in dims], below
    if dims == list(range(len(dims))):
        return root
    moved = [d for d, target in enumerate(dims) if d != target]
    if len(moved) == 2:
        if root is source and node.target is aten.transpose.int and list(node.args[1:]) == moved:
            return None
        return _new(rewriter, node, aten.transpose.int, root, *moved)
    if root is source and node.target is aten.permute.default:
        return None
    return _new(rewriter, node, aten.permute.default, root, dims)


def _cat(rewriter: Rewriter, node: fx.Node) -> Replacement:
    parts: Any = node.args[0]
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    value = node.meta["val"]
    if not isinstance(dim, int):
        return None
    full = [p for p in parts if p.meta["val"].dim() == value.dim() and not same_size(p.meta["val"].shape[dim], 0)]
    if len(full) == 1 and same_type(full[0].meta["val"], value):
        return full[0]
    # Equal parts only: dtype promotion and the old rule for empty vectors must not change.
    dropped_safely = all(p.meta["val"].dtype == value.dtype for p in parts) and full
    return _new(rewriter, node, aten.cat.default, full, dim) if dropped_safely and len(full) < len(parts) else None


def _getitem(rewriter: Rewriter, node: fx.Node) -> Replacement:
    source: Any = node.args[0]
    if not is_op(source, *SPLITS):
        return None
    whole = source.args[0]
    return whole if same_type(whole.meta["val"], node.meta["val"]) else None


def _taken(rewriter: Rewriter, node: fx.Node) -> Replacement:
    """An axis of size one, taken away where it was added."""
    added, rank = node.args[0], node.meta["val"].dim() + 1
    if not is_op(added, aten.unsqueeze) or len(node.args) < 2 or not isinstance(node.args[1], int):
        return None
    return added.args[0] if node.args[1] % rank == added.args[1] % rank else None  # type: ignore[union-attr,operator,return-value]


def _copy_into(rewriter: Rewriter, node: fx.Node) -> Replacement:
    """``copy(dst, src)`` and ``slice_scatter(dst, src)``: all of ``dst`` is overwritten where the types are equal."""
    source = argument(node, "src")
    return source if isinstance(source, fx.Node) and same_type(source.meta["val"], node.meta["val"]) else None


def _with_literal(rewriter: Rewriter, node: fx.Node) -> Replacement:
    """``x and true``, ``x or false``."""
    neutral = is_op(node, aten.logical_and, aten.bitwise_and, aten.__and__)
    a, b = node.args[:2]
    for literal, other in ((a, b), (b, a)):
        if not isinstance(other, fx.Node) or not same_type(other.meta["val"], node.meta["val"]):
            continue
        # To an integer, true is 1: only its lowest bit would stay.
        if _all_are(literal, neutral) and (not neutral or other.meta["val"].dtype is torch.bool):
            return other
    return None


def _all_are(literal: Any, value: bool) -> bool:
    """Whether a tensor of truth values is a literal that holds ``value`` everywhere."""
    if not isinstance(literal, fx.Node) or getattr(literal.meta.get("val"), "dtype", None) is not torch.bool:
        return False
    if is_op(literal, aten.full, aten.full_like, aten.new_full, aten.scalar_tensor):
        fill = argument(literal, "s" if is_op(literal, aten.scalar_tensor) else "fill_value")
        return isinstance(fill, (bool, int, float)) and bool(fill) is value
    return is_op(
        literal,
        *((aten.ones, aten.new_ones, aten.ones_like) if value else (aten.zeros, aten.new_zeros, aten.zeros_like)),
    )


def _times_one(rewriter: Rewriter, node: fx.Node) -> Replacement:
    operands = [a for a in node.args if isinstance(a, fx.Node)]
    number: Any = next((a for a in node.args if not isinstance(a, fx.Node)), None)
    if len(operands) != 1 or len(node.args) != 2 or node.kwargs or isinstance(number, bool) or number != 1:
        return None
    divides = is_op(node, aten.div, aten.pow)
    if divides and node.args[0] is not operands[0]:
        return None
    return operands[0] if same_type(operands[0].meta["val"], node.meta["val"]) else None


def _minus_zero(rewriter: Rewriter, node: fx.Node) -> Replacement:
    source, number = _source(node), node.args[1]
    zero = not isinstance(number, (fx.Node, bool)) and number == 0 and str(number) != "-0.0"
    if not zero or source is None or len(node.args) != 2:
        return None
    integral = not source.meta["val"].is_floating_point() if isinstance(source.meta["val"], torch.Tensor) else False
    if is_op(node, aten.add) and not integral:
        return None
    return source if same_type(source.meta["val"], node.meta["val"]) else None


def _table() -> dict[Any, Handler]:
    import operator

    table: dict[Any, Handler] = {operator.getitem: _getitem, aten.cat: _cat}
    table |= dict.fromkeys(COPIES, _copy)
    table |= dict.fromkeys(CASTS, _cast)
    table |= dict.fromkeys(SAME_SHAPE_IS_SAME, _same_type)
    table |= dict.fromkeys(DROPOUTS, _dropout)
    table |= {
        aten.pad: _pad,
        aten.constant_pad_nd: _pad,
        aten.repeat_interleave: _repeat_interleave,
    }
    table |= dict.fromkeys((*RESHAPES, *COMPOSED_VIEWS), _view)
    table |= dict.fromkeys(PERMUTES, _permute)
    table |= dict.fromkeys((aten.mul, aten.div, aten.pow), _times_one)
    table |= dict.fromkeys((aten.copy, aten.slice_scatter), _copy_into)
    table |= {aten.select: _taken, aten.squeeze: _taken}
    logic = (
        aten.logical_and,
        aten.bitwise_and,
        aten.__and__,
        aten.logical_or,
        aten.bitwise_or,
        aten.__or__,
    )
    table |= dict.fromkeys(logic, _with_literal)
    table |= dict.fromkeys((aten.add, aten.sub), _minus_zero)
    return table


_HANDLERS = _table()
