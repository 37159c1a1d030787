"""A tensor written slice by slice until nothing of what was there before is left: a concatenation of the slices.

Programs write so when they fill an empty buffer (``states[..., :n] = a; states[..., n:] = b``). PyTorch keeps
``slice_scatter``; ONNX has only ``ScatterND``, imported as ``index_put`` at consecutive stored positions, between
transpositions that bring the axis to the front.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...ir.program import Program
from ...ir.rewrite import Rewriter, is_op
from ...ir.views import permutation
from .arguments import argument

aten = torch.ops.aten


@dataclass(frozen=True)
class _Write:
    """`value` at ``start`` to ``stop`` of `axis` of `into`."""

    into: fx.Node
    value: Any
    axis: int
    start: int
    stop: int


def side_by_side(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """The concatenation that a write, the last of several, completes; None if something old is left."""
    last = _write(rewriter.program, node)
    if last is None:
        return None
    size = node.meta["val"].shape[last.axis]
    writes: list[_Write] = []
    write: _Write | None = last
    current = node
    while write is not None and isinstance(size, int) and sum(w.stop - w.start for w in writes) < size:
        alone = current is node or len(current.users) == 1
        apart = all(write.stop <= w.start or w.stop <= write.start for w in writes)
        if write.axis != last.axis or not 0 <= write.start < write.stop <= size or not apart or not alone:
            return None
        writes.append(write)
        current = _untransposed(write.into)
        write = _write(rewriter.program, current)
    if len(writes) < 2 or sum(w.stop - w.start for w in writes) != size:
        return None
    pieces = [w.value for w in sorted(writes, key=lambda w: w.start)]
    with rewriter.before(node):
        return rewriter.call(aten.cat.default, pieces, last.axis, like=node)


def _write(program: Program, node: fx.Node) -> _Write | None:
    if is_op(node, aten.slice_scatter):
        axis = argument(node, "dim") % node.meta["val"].dim()
        size = node.meta["val"].shape[axis]
        start, stop = argument(node, "start") or 0, argument(node, "end")
        stop = size if stop is None or (isinstance(stop, int) and stop > size) else stop
        value: Any = argument(node, "src")
        if argument(node, "step") != 1 or not isinstance(start, int) or not isinstance(stop, int):
            return None
        if value.meta["val"].dtype != node.meta["val"].dtype:
            return None
        return _Write(node.args[0], value, axis, start, stop)  # type: ignore[arg-type]
    if is_op(node, aten.index_put) and not argument(node, "accumulate"):
        return _put(program, node)
    return None


def _put(program: Program, node: fx.Node) -> _Write | None:
    """Rows at stored consecutive positions."""
    into, indices, value = node.args[:3]
    if len(indices) != 1 or not isinstance(value, fx.Node):  # type: ignore[arg-type]
        return None
    (index,) = indices  # type: ignore[misc]
    if not isinstance(index, fx.Node) or index.op != "get_attr" or index.meta["val"].dim() != 1:
        return None
    weight = program.weights.get(str(index.target))
    if weight is None or weight.is_meta or weight.dtype is torch.bool:
        return None
    rows = weight.tensor().tolist()
    whole = [len(rows), *node.meta["val"].shape[1:]]
    if not rows or rows != list(range(rows[0], rows[0] + len(rows))):
        return None
    if [str(s) for s in value.meta["val"].shape] != [str(s) for s in whole]:
        return None  # broadcast into place
    return _Write(into, value, 0, rows[0], rows[-1] + 1)  # type: ignore[arg-type]


def _untransposed(node: fx.Node) -> fx.Node:
    """What is behind two permutations that undo each other."""
    outer = permutation(node)
    inner = permutation(node.args[0]) if outer is not None else None  # type: ignore[arg-type]
    if outer is None or inner is None or [inner[i] for i in outer] != list(range(len(outer))):
        return node
    return node.args[0].args[0]  # type: ignore[union-attr,return-value]
