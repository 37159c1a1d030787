"""Batch norms with fixed statistics go into the weights of the convolution or linear layer beside them.

    %a = aten.conv2d(%x, %w, %b)
    %c = aten.batch_norm(%a, %g, %h, %mean, %var, False, 0.1, 1e-05, True)      %c = aten.conv2d(%x, %w2, %b2)

A batch norm is ``y s + t`` in each channel, with ``s = g / sqrt(var + eps)`` and ``t = h - mean s`` (arXiv 1502.03167,
alg. 2), so that the layer becomes

| where the batch norm is | weight | bias |
|---|---|---|
| after the layer | ``s W`` | ``s b + t`` |
| before it | ``W s`` | ``b + sum(W t)`` |

Before a convolution that pads it stays, as the zeros at the border would have to be ``-t / s``. New weights are
computed in float64. A layer stays as it is if something else reads its result or its weight, or if its weight is in
half precision and would be rounded once more.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ...ir.program import Program
from ...ir.rewrite import Rewriter, is_op
from ...ir.weights import MetaSource, Weight
from ..base import Context, Effect, Pass, Prop, Stats
from .arguments import argument
from .channel_maps import ChannelMap, map_after, map_before
from .refusal import Refused

aten = torch.ops.aten

_FULL = (torch.float32, torch.float64)


@dataclass(frozen=True, kw_only=True)
class FoldBatchNorm(Pass):
    """Fold batch norms with fixed statistics into the convolution or linear layer before or after them."""

    name: ClassVar[str] = "fold-batchnorm"
    effect: ClassVar[Effect] = Effect.EXACT
    needs: ClassVar[frozenset[Prop]] = frozenset({Prop.CANONICAL})
    breaks: ClassVar[frozenset[Prop]] = frozenset()

    def run(self, program: Program, ctx: Context) -> Stats:
        """Look at every batch norm."""
        stats = Stats()
        nodes = [node for graph in program.graphs.values() for node in graph.nodes]
        readers = Counter(str(node.target) for node in nodes if node.op == "get_attr" for _ in node.users)
        for name in program.graphs:
            rewriter = Rewriter(program, self.name, name)
            for node in list(rewriter.graph.nodes):
                if not is_op(node, aten.batch_norm):
                    continue
                stats.attempts += 1
                try:
                    _fold(rewriter, node, readers)
                except Refused as refused:
                    stats.miss(refused.reason, node)
                    continue
                stats.hits += 1
            if rewriter.mutations:
                rewriter.erase_dead()
        return stats


def _fold(rewriter: Rewriter, norm: fx.Node, readers: Counter[str]) -> None:
    if argument(norm, "training"):
        raise Refused("the statistics are those of the batch", norm)
    before = map_before(norm)
    layer = before or map_after(norm)
    if layer is None:
        raise Refused("no convolution or linear layer is next to it", norm)
    if readers[str(layer.weight.target)] > 1:
        raise Refused("the layer's weight is read elsewhere too", norm)
    weight, bias = _folded(rewriter.program, norm, layer, after_layer=before is not None)
    name = str(layer.weight.target)
    bias_name = f"{name.rpartition('.')[0]}.bias".lstrip(".") if layer.bias is None else f"{layer.bias.target}_folded"
    node = layer.node
    with rewriter.before(node):
        new_weight = rewriter.weight(rewriter.fresh_weight_name(f"{name}_folded"), weight)
        new_bias = rewriter.weight(rewriter.fresh_weight_name(bias_name), bias)
        kwargs = {key: value for key, value in node.kwargs.items() if key != "bias"}
        new = rewriter.call(node.target, node.args[0], new_weight, new_bias, *node.args[3:], like=node, **kwargs)  # type: ignore[arg-type]
    rewriter.replace(node, new)
    rewriter.replace(norm, norm.args[0])  # type: ignore[arg-type]


def _folded(program: Program, norm: fx.Node, layer: ChannelMap, *, after_layer: bool) -> tuple[Weight, Weight]:
    """The layer's new weight and bias."""
    weight, bias = (_stored(program, norm, node, "layer's weights") for node in (layer.weight, layer.bias))
    names = ("running_mean", "running_var", "weight", "bias")
    mean, var, gamma, beta = (_stored(program, norm, argument(norm, name), "batch norm's weights") for name in names)
    if weight is None or mean is None or var is None:
        raise Refused("the batch norm has no statistics", norm)
    known = [w for w in (weight, bias, mean, var, gamma, beta) if w is not None]
    width = weight.shape[1] * layer.groups if layer.transposed else weight.shape[0]
    if any(w.is_meta for w in known):
        return tuple(Weight(MetaSource(tuple(shape), weight.dtype)) for shape in (weight.shape, (width,)))  # type: ignore[return-value]
    matrix, offset = weight.tensor().double(), torch.zeros(width, dtype=torch.float64)
    if bias is not None:
        offset = bias.tensor().double()
    scale = torch.rsqrt(var.tensor().double() + argument(norm, "eps"))
    if gamma is not None:
        scale = scale * gamma.tensor().double()
    shift = -mean.tensor().double() * scale
    if beta is not None:
        shift = shift + beta.tensor().double()
    if not torch.isfinite(scale).all():
        raise Refused("a variance is so small that the scale is not finite", norm)
    if after_layer:
        matrix, offset = layer.scaled_out(matrix, scale), offset * scale + shift
    else:
        added = layer.scaled_in(matrix, shift).flatten(1).sum(1)
        matrix, offset = layer.scaled_in(matrix, scale), offset + added
    return Weight.from_tensor(matrix.to(weight.dtype)), Weight.from_tensor(offset.to(weight.dtype))


def _stored(program: Program, norm: fx.Node, node: Any, what: str) -> Weight | None:
    """The weight that an argument of the batch norm or the layer is; None if it was left out."""
    if node is None:
        return None
    weight = program.weights.get(str(node.target)) if isinstance(node, fx.Node) and node.op == "get_attr" else None
    if weight is None:
        raise Refused(f"the {what} are computed", norm)
    if weight.dtype not in _FULL:
        raise Refused(f"the {what} are not of full precision", norm)
    return weight
