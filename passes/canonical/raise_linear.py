"""Products by a weight become ``linear``, with what is added to them as its bias.

    %w = weight "w" : f32[8, 16]            %w = weight "w_transposed" : f32[16, 8]
    %a = aten.matmul(%x, %w)
    %b = aten.add.Tensor(%bias, %a)         %b = aten.linear(%x, %w, %bias)

    %a = aten.reshape(%x, [-1, 8])
    %b = aten.addmm(%bias, %a, %w)
    %c = aten.reshape(%b, [%s, -1, 16])     %c = aten.linear(%x, %w, %bias)

    %a = aten.einsum("ibh,hnd->ibnd", [%x, %w])     a linear layer with ``n * d`` channels, and a reshape
    %t = aten.transpose(%x, 1, 2)
    %a = aten.matmul(%w, %t)                        a linear layer, and a transposition of its result

`linear_spelling` reads the products. A turned weight is an expression over the same numbers, and one for all its
readers. Constants with batch axes (as of grouped layers), vectors, and factors on the left of what is not transposed
are no weights of a linear map, and stay. So do 1x1 convolutions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ...ir.dims import Size
from ...ir.program import Program
from ...ir.rewrite import Rewriter, is_op
from ..base import Context, Effect, Pass, Prop, Stats
from .arguments import argument
from .constants import is_vector
from .linear_spelling import SpelledLinear, linear_at
from .refusal import Refused
from .sizes import same_size
from .weight_forms import Matrices, reshaped

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class RaiseLinear(Pass):
    """Write products by a weight (matmul, addmm, einsum), with their bias, as linear layers."""

    name: ClassVar[str] = "raise-linear"
    effect: ClassVar[Effect] = Effect.EXACT
    needs: ClassVar[frozenset[Prop]] = frozenset({Prop.CANONICAL})

    def run(self, program: Program, ctx: Context) -> Stats:
        """Rewrite the products, then let every linear layer take in the bias and the reshapes around it."""
        stats = Stats()
        matrices = Matrices()
        for name in program.graphs:
            rewriter = Rewriter(program, self.name, name)
            for node in list(rewriter.graph.nodes):
                try:
                    spelled = linear_at(node)
                except Refused as refused:
                    stats.attempts += 1
                    stats.miss(refused.reason, node)
                    continue
                linear = _raise(rewriter, spelled, matrices) if spelled is not None else node
                if is_op(linear, aten.linear):
                    grown = _grown(rewriter, linear)
                    hit = spelled is not None or grown is not linear
                    stats.attempts += hit
                    stats.hits += hit
            if rewriter.mutations:
                rewriter.erase_dead()
        return stats


def _raise(rewriter: Rewriter, spelled: SpelledLinear, matrices: Matrices) -> fx.Node:
    """Replace a product; returns the linear layer itself, below the views that its result may need."""
    node, x = spelled.result, spelled.x
    with rewriter.before(node):
        if spelled.x_order != sorted(spelled.x_order):
            x = rewriter.call(aten.permute.default, x, spelled.x_order, like=node)
        if spelled.summed > 1:
            x = rewriter.call(aten.flatten.using_ints, x, -spelled.summed, -1, like=node)
        weight = matrices.of(rewriter, spelled.weight, spelled.w_order, len(spelled.w_order) - spelled.summed)
        bias = () if spelled.bias is None else (reshaped(rewriter, spelled.bias, [spelled.features[0]]),)
        linear = new = rewriter.call(aten.linear.default, x, weight, *bias, like=node)
        if len(spelled.features) > 1:
            new = rewriter.call(aten.unflatten.int, new, -1, spelled.features, like=node)
        if spelled.out_order != sorted(spelled.out_order):
            new = rewriter.call(aten.permute.default, new, spelled.out_order, like=node)
    rewriter.replace(node, new)
    return linear


def _grown(rewriter: Rewriter, linear: fx.Node) -> fx.Node:
    """The linear layer with all that belongs to it."""
    while True:
        larger = _without_reshapes(rewriter, linear) or _with_bias(rewriter, linear)
        if larger is None:
            return linear
        linear = larger


def _without_reshapes(rewriter: Rewriter, linear: fx.Node) -> fx.Node | None:
    """A layer on what was reshaped to a matrix before it and back after it."""
    x: Any = linear.args[0]
    if not is_op(x, aten.reshape, aten.view) or not linear.users:
        return None
    source: Any = x.args[0]
    before, features = source.meta["val"].shape, x.meta["val"].shape[-1]
    if not len(before) or not same_size(before[-1], features):
        return None
    wanted = [*before[:-1], linear.meta["val"].shape[-1]]
    users = list(linear.users)
    if not all(is_op(user, aten.reshape, aten.view) and _has_shape(user, wanted) for user in users):
        return None
    with rewriter.before(linear):
        new = rewriter.call(aten.linear.default, source, *linear.args[1:], like=linear)
    for user in users:
        rewriter.replace(user, new)
    return new


def _has_shape(node: fx.Node, shape: list[Size]) -> bool:
    known = node.meta["val"].shape
    return len(known) == len(shape) and all(same_size(a, b) for a, b in zip(known, shape, strict=True))


def _with_bias(rewriter: Rewriter, linear: fx.Node) -> fx.Node | None:
    """A layer with the vector that is added to its result."""
    if len(linear.users) != 1 or argument(linear, "bias") is not None:
        return None
    total = next(iter(linear.users))
    if not is_op(total, aten.add.Tensor) or argument(total, "alpha") != 1:
        return None
    bias: Any = total.args[1] if total.args[0] is linear else total.args[0]
    size = linear.meta["val"].shape[-1]
    if not is_vector(bias, size, linear):
        return None
    with rewriter.before(total):
        new = rewriter.call(aten.linear.default, *linear.args[:2], reshaped(rewriter, bias, [size]), like=linear)
    rewriter.replace(total, new)
    return new
