"""Which linear map a value comes from: back through what splits heads, normalises, rotates and scales."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from .flow import Flow, is_pointwise, is_view, op_name, tensor_of

LINEAR = {"linear", "addmm", "mm"}
_NORMS = {"layer_norm", "rms_norm", "native_layer_norm", "group_norm", "batch_norm", "_fused_rms_norm"}
_THROUGH = {"graphlathe.rotary_embedding", "repeat_interleave", "repeat", "tile", "pad", "constant_pad_nd", "roll"}
_DEPTH = 64


@dataclass(frozen=True, eq=False)
class Projection:
    """A linear map, or the part of its output channels that was used.

    Attributes:
        node: the operator: ``linear``, a 1x1 convolution, or a product by a weight.
        weight: the node of its weight.
        in_features, out_features: of the whole map.
        channels: first and one past the last of the output channels that are used; None if a part of every head is.
    """

    node: fx.Node
    weight: fx.Node
    in_features: int
    out_features: int
    channels: tuple[int, int] | None

    @property
    def width(self) -> int | None:
        """How many of its output channels are used, if that is known."""
        return None if self.channels is None else self.channels[1] - self.channels[0]

    @property
    def fused(self) -> bool:
        """Whether other parts of its output are used for something else."""
        return self.width != self.out_features

    def __str__(self) -> str:
        part = "a part of each head of " if self.channels is None else ""
        if self.channels is not None and self.fused:
            part = f"[{self.channels[0]}:{self.channels[1]}] of "
        return f"{part}%{self.node.name} {self.in_features}->{self.out_features}"


@dataclass(frozen=True)
class _Piece:
    """What a split or slice took: ``count`` of ``size`` places from ``first`` on, each ``below`` channels wide."""

    first: int
    count: int
    size: int
    below: int | None

    def of(self, out_features: int) -> tuple[int, int] | None:
        """The channels, if the axis was the outermost one that the channels were divided into."""
        below = self.below
        if below is None:
            below, rest = divmod(out_features, self.size)
            if rest:
                return None
        if below * self.size != out_features:
            return None
        return self.first * below, (self.first + self.count) * below


def linear_map(node: fx.Node) -> Projection | None:
    """A node as a linear map over the channels, if it is one whose weight is known."""
    name = op_name(node)
    if name == "linear":
        weight, transposed = node.args[1], True
    elif name in ("addmm", "mm", "matmul"):
        weight, transposed = node.args[2 if name == "addmm" else 1], False
    elif name.startswith("conv") and name.endswith("d"):
        weight, transposed = node.args[1], True
    else:
        return None
    weight = weight_of(weight)
    shape = None if weight is None else tuple(weight.meta["val"].shape)
    if weight is None or shape is None or len(shape) < 2 or not all(isinstance(s, int) for s in shape):
        return None
    if name.startswith("conv"):
        groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
        return Projection(node, weight, shape[1] * int(groups), shape[0], (0, shape[0]))  # type: ignore[call-overload]
    if len(shape) != 2:
        return None
    source: Any = node.args[1] if name != "addmm" else node.args[2]
    turned = _is_turned(source)
    out, inner = shape if transposed != turned else shape[::-1]
    return Projection(node, weight, inner, out, (0, out))


def weight_of(node: Any) -> fx.Node | None:
    """The weight that a value is, through casts and transpositions; None if it is computed otherwise."""
    for _ in range(8):
        if not isinstance(node, fx.Node):
            return None
        if node.op == "get_attr":
            return node
        if op_name(node) not in ("t", "transpose", "permute", "_to_copy", "mT", "numpy_T", "graphlathe.dequantize"):
            return None
        node = node.args[0]
    return None


def _is_turned(node: Any) -> bool:
    turned = False
    while isinstance(node, fx.Node) and node.op == "call_function":
        if op_name(node) in ("t", "transpose", "permute", "mT", "numpy_T"):
            turned = not turned
        node = node.args[0]
    return turned


_SOME_OF_EACH_HEAD = _Piece(0, 1, 1, -1)


def projection_of(flow: Flow, node: fx.Node) -> Projection | None:
    """The linear map that a value's channels come from, up to norms, rotations, scales and rearrangements."""
    piece: _Piece | None = None
    current: Any = node
    for _ in range(_DEPTH):
        if not isinstance(current, fx.Node) or current.op != "call_function":
            return None
        found = linear_map(current)
        if found is not None:
            return found if piece is None else replace(found, channels=piece.of(found.out_features))
        name = op_name(current)
        if name == "getitem":
            taken = _piece_of_split(current)
            current = current.args[0].args[0]  # type: ignore[union-attr]
            piece = taken or piece
        elif name in ("slice", "select", "narrow"):
            piece = _piece_of_slice(current) or piece
            current = current.args[0]
        elif name == "index" and flow.data.get(current.args[0]) and not any(map(flow.data.get, current.args[1])):  # type: ignore[arg-type]
            piece, current = _SOME_OF_EACH_HEAD, current.args[0]
        elif name in ("cat", "concat", "stack"):
            parts = [a for a in current.args[0] if isinstance(a, fx.Node) and flow.data.get(a)]  # type: ignore[union-attr]
            current = max(parts, key=_width, default=None)
        elif name in _NORMS or name in _THROUGH or is_view(current):
            current = current.args[0]
        elif is_pointwise(current):
            computed = [a for a in current.all_input_nodes if a.op == "call_function"]
            # A query may be learned: then none of its operands depends on an input.
            operands = [a for a in computed if flow.data.get(a)] or computed
            current = max(operands, key=_size, default=None)
        else:
            return None
    return None


def _size(node: fx.Node) -> int:
    value = tensor_of(node)
    return value.dim() if value is not None else -1


def _width(node: fx.Node) -> int:
    value = tensor_of(node)
    return int(value.shape[-1]) if value is not None and value.dim() and isinstance(value.shape[-1], int) else 0


def _piece_of_split(node: fx.Node) -> _Piece | None:
    split: Any = node.args[0]
    index: Any = node.args[1]
    source, pieces = tensor_of(split.args[0]), split.meta.get("val")
    if source is None or not isinstance(pieces, (tuple, list)):
        return None
    if op_name(split) == "unbind":
        axis = int(split.args[1] if len(split.args) > 1 else split.kwargs.get("dim", 0)) % source.dim()
        return _piece(source, axis, index, 1)
    axis = int(split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)) % source.dim()
    sizes = [p.shape[axis] for p in pieces]
    if not all(isinstance(size, int) for size in sizes):
        return None
    return _piece(source, axis, sum(sizes[:index]), sizes[index])


def _piece_of_slice(node: fx.Node) -> _Piece | None:
    source, value = tensor_of(node.args[0]), tensor_of(node)  # type: ignore[arg-type]
    if source is None or value is None:
        return None
    axis = int(node.args[1] if len(node.args) > 1 else 0) % source.dim()  # type: ignore[call-overload]
    start: Any = (node.args[2] if len(node.args) > 2 else 0) or 0
    if op_name(node) == "select":
        return _piece(source, axis, start, 1)
    if (node.args[4] if len(node.args) > 4 else 1) != 1:
        return None
    return _piece(source, axis, start, value.shape[axis])


def _piece(source: Any, axis: int, first: Any, count: Any) -> _Piece | None:
    """None if the axis is no axis of channels (its size, or where the piece starts, depends on an input's size)."""
    size = source.shape[axis]
    if not all(isinstance(number, int) for number in (size, first, count)) or count == size:
        return None
    after = source.shape[axis + 1 :]
    below = math.prod(after) if all(isinstance(s, int) for s in after) else None
    return _Piece(int(first) % size, int(count), int(size), below)
