"""Rotary position embedding in its spellings becomes ``graphlathe.rotary_embedding``.

    %a = aten.mul(%x, %cos)
    %b = aten.cat([neg(%x[..., 4:]), %x[..., :4]], -1)
    %c = aten.mul(%b, %sin)
    %d = aten.add(%a, %c)                %d = graphlathe.rotary_embedding(%x, %cos, %sin, rotary_dim=8)

Spellings: the rotated copy above (halves, or neighbouring channels); the two halves computed one by one and joined,
``cat((a cos - b sin, b cos + a sin))``, or interleaved. Where only the first channels are
rotated and the others joined to them again, one operator does both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ...ir.program import Program
from ...ir.rewrite import Rewriter, is_op
from ...kernels import rotary_embedding
from ..base import Context, Effect, Pass, Stats
from .constants import scalar_of
from .parts import Part, interleaved, joined, part_of, width
from .sizes import same_type

aten = torch.ops.aten


@dataclass(frozen=True)
class _Rotation:
    x: fx.Node | tuple[fx.Node, fx.Node]  # two: its halves, which are no halves of one tensor
    cos: fx.Node
    sin: fx.Node
    dim: int
    pairs: bool  # neighbouring channels


class _NoRotation(Exception):
    """Why something that looks like a rotation is none."""


@dataclass(frozen=True, kw_only=True)
class RaiseRotary(Pass):
    """Write rotary position embeddings, however they are spelled, as one operator."""

    name: ClassVar[str] = "raise-rotary"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, program: Program, ctx: Context) -> Stats:
        """Visit every sum and every concatenation."""
        stats = Stats()
        for name in program.graphs:
            rewriter = Rewriter(program, self.name, name)
            for node in list(rewriter.graph.nodes):
                if node._erased:
                    continue
                try:
                    found = _read(program, node)
                except _NoRotation as reason:
                    stats.attempts += 1
                    stats.miss(str(reason), node)
                    continue
                if found is not None:
                    stats.attempts += 1
                    stats.hits += 1
                    with rewriter.before(node):
                        rewriter.replace(node, _build(rewriter, found, node))
            for node in list(rewriter.graph.nodes):
                if not node._erased and (whole := _partial(node)) is not None:
                    with rewriter.before(node):
                        rewriter.replace(node, _build(rewriter, whole, node))
            rewriter.erase_dead()
        return stats


def _build(rewriter: Rewriter, found: _Rotation, like: fx.Node) -> fx.Node:
    options: dict[str, Any] = {"rotary_dim": found.dim} | ({"interleaved": True} if found.pairs else {})
    x = rewriter.call(aten.cat.default, list(found.x), -1, like=like) if isinstance(found.x, tuple) else found.x
    return rewriter.call(rotary_embedding, x, found.cos, found.sin, like=like, **options)


def _read(program: Program, node: fx.Node) -> _Rotation | None:
    if is_op(node, aten.add):
        return _rotated_copy(program, node)
    pieces = joined(node)
    if pieces is not None and len(pieces) == 2:
        return _two_halves(program, node, pieces[0], pieces[1], pairs=False)
    both = interleaved(node)
    if both is not None:
        return _two_halves(program, node, *both, pairs=True)
    return None


def _factors(node: Any) -> list[tuple[Any, Any]]:
    """Both orders of a product's factors."""
    if not is_op(node, aten.mul) or not all(isinstance(a, fx.Node) for a in node.args):
        return []
    a, b = node.args
    return [(a, b), (b, a)]


def _negated(program: Program, node: Any) -> Any:
    """What a value is the negative of, or None."""
    if is_op(node, aten.neg):
        return node.args[0]
    if is_op(node, aten.mul) and scalar_of(program, node.args[1]) == -1.0:
        return node.args[0]
    return None


def _rotated_copy(program: Program, node: fx.Node) -> _Rotation | None:
    """``x cos + turned(x) sin``."""
    a, b = node.args[:2]
    if node.kwargs.get("alpha", 1) != 1:
        return None
    for straight, turned in ((a, b), (b, a)):
        for copy, sin in _factors(turned):
            source = _turned(program, copy)
            if source is None:
                continue
            x, pairs = source
            found = next((other for same, other in _factors(straight) if _same(same, x)), None)
            if found is None:
                raise _NoRotation("channels are turned, but not added to themselves times a cosine")
            size = width(x)
            if size is None or width(found) not in (size, 1) or width(found) != width(sin):
                raise _NoRotation("the cosines are not as wide as the channels")
            return _Rotation(x, found, sin, size, pairs) if width(found) == size else None
    return None


def _same(node: Any, x: Any) -> bool:
    """Whether two nodes are the same value, or the same channels of one."""
    a, b = part_of(node), part_of(x)
    return node is x or (a is not None and a == b)


def _turned(program: Program, node: Any) -> tuple[fx.Node, bool] | None:
    """``(-b, a)`` of the two halves, or of neighbouring channels: the tensor, and whether they are neighbours."""
    pieces = joined(node)
    if pieces is not None and len(pieces) == 2:
        first, second = _negated(program, pieces[0]), pieces[1]
        whole = _whole(part_of(second), part_of(first), node)
        return (whole, False) if whole is not None else None
    both = interleaved(node)
    if both is not None:
        a, b = part_of(both[1]), part_of(_negated(program, both[0]))
        size = width(node)
        even = a is not None and (a.start, a.stop, a.step) in ((0, size, 2), (0, (size or 0) - 1, 2))
        odd = b is not None and (b.start, b.stop, b.step) == (1, size, 2)
        if even and odd and a is not None and b is not None and a.source is b.source and width(a.source) == size:
            return a.source, True
    return None


def _whole(a: Part | None, b: Part | None, like: fx.Node) -> fx.Node | None:
    """The tensor whose first half is ``a`` and whose second is ``b``, if it is as wide as ``like``."""
    size = width(like)
    if a is None or b is None or a.source is not b.source or size is None or width(a.source) != size:
        return None
    halves = (a.start, a.stop, a.step, b.start, b.stop, b.step) == (0, size // 2, 1, size // 2, size, 1)
    return a.source if halves else None


def _two_halves(program: Program, node: fx.Node, first: Any, second: Any, *, pairs: bool) -> _Rotation | None:
    """``a cos - b sin`` and ``b cos + a sin``, joined."""
    if not is_op(first, aten.sub) or not is_op(second, aten.add):
        return None
    if first.kwargs or second.kwargs:
        return None
    for a, cos in _factors(first.args[0]):
        for b, sin in _factors(first.args[1]):
            for left, right in (second.args[:2], second.args[:2][::-1]):
                same = any(p == (b, cos) for p in _factors(left)) and any(p == (a, sin) for p in _factors(right))
                if not same:
                    continue
                if width(a) is None:
                    raise _NoRotation("the last axis has no fixed size")
                if width(cos) == width(a) == width(b) == width(sin):
                    return _joined_again(node, a, b, cos, sin, pairs)
    return None


def _joined_again(node: fx.Node, a: fx.Node, b: fx.Node, cos: fx.Node, sin: fx.Node, pairs: bool) -> _Rotation | None:
    size = width(node)
    parts = part_of(a), part_of(b)
    assert size is not None
    if pairs:
        first, second = parts
        if first is None or second is None or first.source is not second.source or width(first.source) != size:
            return None
        if (first.start, first.step, second.start, second.step) != (0, 2, 1, 2):
            return None
        return _Rotation(first.source, cos, sin, size, True)
    whole = _whole(*parts, node)
    if whole is None and not same_type(a.meta["val"], b.meta["val"]):
        raise _NoRotation("the two halves have different shapes or types")
    return _Rotation(whole or (a, b), cos, sin, size, False)


def _partial(node: fx.Node) -> _Rotation | None:
    """``cat((rotated(x[..., :r]), x[..., r:]))``: one operator on x."""
    pieces = joined(node)
    if pieces is None or len(pieces) != 2 or not is_op(pieces[0], rotary_embedding):
        return None
    rotated, rest = pieces
    first, second = part_of(rotated.args[0]), part_of(rest)
    dim = rotated.kwargs["rotary_dim"]
    if first is None or second is None or first.source is not second.source or len(rotated.users) != 1:
        return None
    if (first.start, first.stop, first.step) != (0, dim, 1) or width(rotated.args[0]) != dim:
        return None
    if (second.start, second.stop, second.step) != (dim, width(first.source), 1):
        return None
    x, cos, sin = first.source, rotated.args[1], rotated.args[2]
    return _Rotation(x, cos, sin, dim, bool(rotated.kwargs.get("interleaved", False)))
