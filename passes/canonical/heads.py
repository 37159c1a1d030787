"""Keys and values that are repeated so that each head has its own: what they were before.

    %a = aten.unsqueeze(%kv, 2)                       # [B, kv_heads, 1, S, D]
    %b = aten.expand(%a, [B, kv_heads, groups, S, D])
    %c = aten.reshape(%b, [B, heads, S, D])           # each head, `groups` times in a row

The repeat may stand before a permutation and a rotary embedding, and be spelled ``repeat_interleave``; with one head it
may be any expansion.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ...ir.dims import size_expr
from ...ir.rewrite import Rewriter, is_op
from ...ir.views import permutation
from ...kernels import rotary_embedding

aten = torch.ops.aten


@dataclass(frozen=True)
class Repeated:
    """How a tensor was repeated along its heads.

    Attributes:
        source: the tensor before, perhaps with another order of axes, and perhaps with an axis of size 1 at `extra`.
        groups: how often each head was repeated.
        extra: the axis of size 1 of `source` that was expanded, or None.
        order: the permutation that came after the repeat, or None.
        rotary: the rotary embedding that came after both, or None.
    """

    source: fx.Node
    groups: int
    extra: int | None
    order: list[int] | None
    rotary: fx.Node | None = None

    def build(self, rewriter: Rewriter) -> fx.Node:
        """The tensor without the repeat, in the order of axes that it had with it."""
        x = self.source
        if self.extra is not None:
            x = rewriter.call(aten.squeeze.dim, x, self.extra, like=x)
        if self.order is not None:
            x = rewriter.call(aten.permute.default, x, self.order, like=x)
        if self.rotary is not None:
            options: dict[str, Any] = self.rotary.kwargs
            x = rewriter.call(rotary_embedding, x, *self.rotary.args[1:], like=self.rotary, **options)
        return x


def unrepeated(node: Any, heads_axis: int) -> Repeated | None:
    """Look for a repeat along one axis of a value; None if it has none."""
    if is_op(node, rotary_embedding):
        # The angles are the same for all heads, so heads may be repeated after they are rotated.
        angles = [a.meta["val"] for a in node.args[1:3]]
        rank = node.meta["val"].dim()
        shared = all(t.dim() < rank - heads_axis or t.shape[heads_axis - rank] == 1 for t in angles)
        found = unrepeated(node.args[0], heads_axis) if shared else None
        return None if found is None else replace(found, rotary=node)
    order = permutation(node)
    if order is not None:
        node, heads_axis = node.args[0], order[heads_axis]
    if is_op(node, aten.repeat_interleave) and isinstance(node.args[1], int):
        axis = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
        if axis is not None and axis % node.meta["val"].dim() == heads_axis and node.args[1] > 1:
            return Repeated(node.args[0], node.args[1], None, order)
        return None
    if not is_op(node, aten.reshape):
        return _expanded(node, heads_axis, order)
    wide: Any = node.args[0]
    if not is_op(wide, aten.expand) or wide.meta["val"].dim() != node.meta["val"].dim() + 1:
        return None
    narrow: Any = wide.args[0]
    extra = heads_axis + 1
    shape, before, after = (n.meta["val"].shape for n in (wide, narrow, node))
    if len(before) != len(shape) or not isinstance(shape[extra], int) or shape[extra] == 1 or before[extra] != 1:
        return None
    others = [size_expr(s) for i, s in enumerate(shape) if i != extra]
    if others != [size_expr(s) for i, s in enumerate(before) if i != extra]:
        return None  # something else is expanded too
    others[heads_axis] = others[heads_axis] * shape[extra]
    if others != [size_expr(s) for s in after]:
        return None
    return Repeated(narrow, int(shape[extra]), extra, order)


def _expanded(node: Any, heads_axis: int, order: list[int] | None) -> Repeated | None:
    """One head, expanded to all."""
    if not is_op(node, aten.expand):
        return None
    source = node.args[0]
    before, after = source.meta["val"].shape, node.meta["val"].shape
    if len(before) != len(after) or before[heads_axis] != 1 or not isinstance(after[heads_axis], int):
        return None
    if any(size_expr(a) != size_expr(b) for i, (a, b) in enumerate(zip(before, after, strict=True)) if i != heads_axis):
        return None
    return Repeated(source, int(after[heads_axis]), None, order) if after[heads_axis] > 1 else None
