"""Operators in a few words, with their sizes: ``linear 576->1536``, ``conv 3x3 64->128``, ``9 heads of 64``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from ..ir.dims import Dims
from ..ir.rewrite import is_op

aten = torch.ops.aten

_REPEATS = (
    aten.reshape,
    aten.view,
    aten.expand,
    aten.unsqueeze,
    aten.slice,
    aten.clone,
    aten.contiguous,
    aten._unsafe_view,
    aten.repeat_interleave,
)
_VIEWS = (aten.t, aten.transpose, aten.permute, aten.view, aten.reshape, aten._to_copy, aten.to)
_SHORT = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}


def dtype_text(dtype: torch.dtype | None) -> str:
    """``f32`` for ``torch.float32``."""
    return _SHORT.get(dtype, str(dtype).removeprefix("torch.")) if dtype is not None else "number"


def type_text(value: Any, dims: Dims) -> str:
    """A value's dtype and symbolic shape: ``f32[B, S, 576]``."""
    if isinstance(value, torch.Tensor):
        return f"{dtype_text(value.dtype)}[{', '.join(dims.format(size) for size in value.shape)}]"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(type_text(item, dims) for item in value) + ")"
    return dims.format(value) if value is not None else ""


def op_text(node: fx.Node) -> str:
    """An operator's short name: ``linear``, ``add``, ``graphlathe.attention``."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = target._opname.removeprefix("_")
        return name if target.namespace == "aten" else f"{target.namespace}.{name}"
    return str(getattr(target, "__name__", target))


def weight_shape(node: Any) -> tuple[int, ...] | None:
    """The shape of the weight that an argument is (also through a transpose or cast), or None."""
    seen = 0
    while isinstance(node, fx.Node) and seen < 4:
        if node.op == "get_attr":
            value = node.meta.get("val")
            return tuple(int(s) for s in value.shape) if isinstance(value, torch.Tensor) else None
        if not is_op(node, *_VIEWS):
            return None
        node, seen = node.all_input_nodes[0], seen + 1
    return None


def describe(node: fx.Node) -> str | None:
    """What an operator that holds weights or attends does, with its sizes; None for all others."""
    if is_op(node, aten.linear, aten.conv1d, aten.conv2d, aten.convolution, aten.embedding):
        at = 0 if is_op(node, aten.embedding) else 1
        shape = weight_shape(node.args[at])
        if shape is None:
            return None
        if is_op(node, aten.linear):
            return f"linear {shape[1]}->{shape[0]}"
        if is_op(node, aten.embedding):
            return f"embedding {shape[0]}x{shape[1]}"
        groups = _groups(node)
        kernel = "x".join(str(s) for s in shape[2:])
        depthwise = groups > 1 and shape[1] == 1
        return f"{'depthwise ' if depthwise else ''}conv {kernel} {shape[1] * groups}->{shape[0]}"
    if is_op(node, aten.addmm, aten.mm):
        shape = weight_shape(node.args[2 if is_op(node, aten.addmm) else 1])
        return f"linear {shape[0]}->{shape[1]}" if shape and len(shape) == 2 else None
    if is_op(node, aten.scaled_dot_product_attention):
        query = node.args[0].meta["val"]  # type: ignore[union-attr]
        key = node.args[1].meta["val"]  # type: ignore[union-attr]
        if query.dim() != 4:
            return "attention"
        groups = _stored_heads(node.args[1], key.shape[1])
        shared = f" ({groups} key-value)" if str(groups) != str(query.shape[1]) else ""
        return f"{query.shape[1]} heads of {query.shape[3]}{shared}"
    return _with_matrix(node)


def _stored_heads(key: Any, heads: Any) -> Any:
    """How many heads a key has before it is repeated for grouped queries."""
    for _ in range(10):
        value = key.meta.get("val") if isinstance(key, fx.Node) else None
        if not isinstance(value, torch.Tensor) or not is_op(key, *_REPEATS):
            break
        key = key.args[0]
        before = key.meta["val"]
        if before.dim() == 4 and isinstance(before.shape[1], int):
            heads = min(heads, before.shape[1])
    return heads


def _with_matrix(node: fx.Node) -> str | None:
    """Any other operator that reads a matrix of weights: its name, and the matrix's shape."""
    for operand in node.all_input_nodes:
        shape = weight_shape(operand)
        if shape is not None and len(shape) > 1 and min(shape) > 1:
            return f"{op_text(node)} {'x'.join(str(s) for s in shape)}"
    return None


def _groups(node: fx.Node) -> int:
    position = 8 if is_op(node, aten.convolution) else 6
    return int(node.args[position]) if len(node.args) > position else 1  # type: ignore[arg-type]


def describe_all(nodes: Iterable[fx.Node]) -> str:
    """The operators of a part that matter to a reader: those with weights and attention, else the commonest."""
    nodes = list(nodes)
    main = Counter(text for text in map(describe, nodes) if text)
    if main:
        return ", ".join(text + (f" x{times}" if times > 1 else "") for text, times in main.items())
    common = Counter(op_text(node) for node in nodes).most_common(3)
    return ", ".join(name for name, _ in common) + (", ..." if len({op_text(n) for n in nodes}) > 3 else "")
