"""Pieces of a tensor along its last axis: what a slice, a split or a chunk took, and what a concatenation joins."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...ir.rewrite import is_op
from .sizes import same_size

aten = torch.ops.aten


@dataclass(frozen=True)
class Part:
    """Channels ``start, start + step...`` before ``stop`` of a tensor's last axis."""

    source: fx.Node
    start: int
    stop: int
    step: int = 1


def width(node: Any) -> int | None:
    """The size of the last axis, if it is a number."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor) or not value.dim():
        return None
    size = value.shape[-1]
    return size if isinstance(size, int) else None


def part_of(node: Any) -> Part | None:
    """What a slice or a piece of a split takes from the last axis of its operand; None for other operators."""
    if is_op(node, aten.slice):
        source: Any = node.args[0]
        rank = source.meta["val"].dim()
        dim, start, stop, step = (*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :])
        size = width(source)
        numbers = all(x is None or isinstance(x, int) for x in (dim, start, stop, step))
        if size is None or not numbers or dim % rank != rank - 1:
            return None
        return Part(source, *slice(start, stop, step).indices(size))
    if isinstance(node, fx.Node) and node.target is operator.getitem and is_op(node.args[0], aten.split_with_sizes):
        split: Any = node.args[0]
        source, sizes = split.args[0], split.args[1]
        rank = source.meta["val"].dim()
        axis = split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
        if axis % rank != rank - 1 or not all(isinstance(s, int) for s in sizes):
            return None
        start = sum(sizes[: node.args[1]])
        return Part(source, start, start + sizes[node.args[1]])  # type: ignore[index]
    return None


def joined(node: Any) -> list[Any] | None:
    """The pieces that a concatenation along the last axis joins; None for other operators."""
    if not is_op(node, aten.cat):
        return None
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    rank = node.meta["val"].dim()
    return list(node.args[0]) if axis % rank == rank - 1 else None


def interleaved(node: Any) -> tuple[Any, Any] | None:
    """The two tensors whose channels alternate in a value: ``stack((a, b), -1)`` with the last two axes joined."""
    if not is_op(node, aten.reshape):
        return None
    stack: Any = node.args[0]
    pieces = None
    rank = stack.meta["val"].dim()
    if is_op(stack, aten.stack):
        axis = stack.args[1] if len(stack.args) > 1 else stack.kwargs.get("dim", 0)
        pieces = list(stack.args[0]) if axis % rank == rank - 1 else None
    elif (parts := joined(stack)) is not None and all(is_op(p, aten.unsqueeze) for p in parts):
        last = all(p.args[1] % rank == rank - 1 for p in parts)
        pieces = [p.args[0] for p in parts] if last else None
    if pieces is None or len(pieces) != 2 or width(node) != 2 * (width(pieces[0]) or 0):
        return None
    # The reshape may join the last two axes only: the others keep their order.
    kept, given = node.meta["val"].shape[:-1], stack.meta["val"].shape[:-2]
    same = len(kept) == len(given) and all(same_size(a, b) for a, b in zip(kept, given, strict=True))
    return (pieces[0], pieces[1]) if same else None
