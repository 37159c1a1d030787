"""Inputs made from a program's signature alone: random numbers, and integers that stay below what they index.

An integer input is followed through casts and views to the tables that it indexes (embeddings); the smallest of them
bounds its values. An integer that indexes nothing is taken for a mask, and is all ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ..ir.program import Program
from ..ir.rewrite import is_op
from .sizes import with_defaults

aten = torch.ops.aten

_PASSES_VALUES_ON = (
    aten.view,
    aten.reshape,
    aten._unsafe_view,
    aten.to,
    aten._to_copy,
    aten.slice,
    aten.unsqueeze,
    aten.squeeze,
    aten.expand,
    aten.clone,
    aten.contiguous,
    aten.alias,
    aten.detach,
    aten.transpose,
    aten.permute,
    aten.select,
    aten.flatten,
)

_COMPUTES = (aten.sub, aten.add, aten.rsub, aten.mul)


def example_feeds(program: Program, sizes: dict[str, int] | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs of the signature's dtypes and shapes.

    Args:
        program: the program.
        sizes: sizes of dynamic dimensions; others take those of the traced example.
        seed: equal seeds and sizes give equal inputs.
    """
    full = with_defaults(sizes or {}, program)
    generator = torch.Generator().manual_seed(seed)
    feeds: dict[str, Tensor] = {}
    initial = {pair.input for pair in program.main.state if pair.initial is not None}
    for name, node in zip(program.main.inputs, program.main.placeholders, strict=True):
        value = node.meta.get("val")
        if name in initial or not isinstance(value, Tensor):
            continue
        shape = [program.main.dims.evaluate(size, full) for size in value.shape]
        feeds[name] = _draw(shape, value.dtype, index_bound(node), generator)
    return feeds


def _draw(shape: list[int], dtype: torch.dtype, bound: int | None, generator: torch.Generator) -> Tensor:
    if dtype is torch.bool:
        return torch.ones(shape, dtype=dtype)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
    if bound is None:
        return torch.ones(shape, dtype=dtype)
    return torch.randint(0, bound, shape, generator=generator, dtype=dtype)


def index_bound(node: fx.Node) -> int | None:
    """The rows of the smallest table that an integer value indexes, or None if it indexes none that can be seen."""
    bounds: list[int] = []
    stack, seen = [node], {node}
    while stack:
        value = stack.pop()
        for user in value.users:
            rows = _rows(user, value)
            if rows is not None:
                bounds.append(rows)
            elif is_op(user, *_PASSES_VALUES_ON) and user.args[0] is value and user not in seen:
                seen.add(user)
                stack.append(user)
            elif is_op(user, *_COMPUTES) and _is_integer(user) and user not in seen and index_bound(user) is not None:
                # A difference of coordinates, say: only zeros are sure to give a valid index.
                seen.add(user)
                bounds.append(1)
    return min(bounds) if bounds else None


def _is_integer(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and not value.dtype.is_floating_point and not value.dtype.is_complex


def _rows(user: fx.Node, index: fx.Node) -> int | None:
    if is_op(user, aten.embedding) and user.args[1] is index:
        return _size(user.args[0], 0)
    if is_op(user, aten.index_select) and user.args[2] is index:
        return _size(user.args[0], int(user.args[1]))  # type: ignore[arg-type]
    if is_op(user, aten.index) and index in (user.args[1] or ()):  # type: ignore[operator]
        return _size(user.args[0], list(user.args[1]).index(index))  # type: ignore[arg-type]
    return None


def _size(table: object, axis: int) -> int | None:
    value = table.meta.get("val") if isinstance(table, fx.Node) else None
    size = value.shape[axis] if isinstance(value, Tensor) else None
    return size if isinstance(size, int) else None


def token_input(program: Program) -> str | None:
    """The input that holds token ids: of the integer inputs of rank 2 that index a table, the first."""
    for name, node in zip(program.main.inputs, program.main.placeholders, strict=True):
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not _is_integer(node) or value.dtype is torch.bool:
            continue
        if value.dim() == 2 and index_bound(node) is not None:
            return name
    return None
