"""Heads as experts: a router lets each token use a few of an attention's heads.

    before   y = o W_o                  o: [tokens, channels], all heads' outputs
    routed   y = (o * g(x)) W_o         g: one number for each head and token

With every gate one the routed graph is the dense one. Else ``g`` is the hard choice of the ``k`` heads with the largest
logits of a linear map of the stream, with the softmax's gradient (the straight-through estimator of Bengio et al. 2013,
arXiv 1308.3432): ``g = top_k(p) + p - stop(p)``, ``p = softmax(x R + r)``.

The routers alone are trained, for a few steps, to answer as the dense model does. Then each head's usage is a moving
average over the batches of the share of tokens that choose it. The router is not deployed: the heads that are used most
stay for every token.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ...ir.program import Program
from ...ir.rewrite import Rewriter
from ...ir.weights import Weight
from ..base import Batch
from ..fidelity import position_mask, seeded
from ..search.compensation.distill import DistillReport, DistillSettings, distill
from .blocks import HeadBlock
from .positions import arranged_back

_aten = torch.ops.aten
_EMA = 0.9
_SHARPNESS = 4.0  # how far the first logits tell the most used head from one that is never used


@dataclass(frozen=True, eq=False)
class Router:
    """One attention's router.

    Attributes:
        gates: the node of the gates: [..., heads].
        weights: the names of its weights; none where every head is used.
    """

    gates: fx.Node
    weights: tuple[str, ...]


def add_router(program: Program, block: HeadBlock, count: int | None, usage: torch.Tensor) -> Router:
    """Put gates between the heads of one block and their output projection.

    Args:
        program: changed in place.
        block: the block.
        count: heads for each token; None for all of them, with gates that are one.
        usage: [heads], what the router starts from: it says what it would say without looking at the token.
    """
    rewriter = Rewriter(program, "shrp")
    heads, stream = block.output.operand, block.attention.by
    size = block.heads.size
    dtype = heads.meta["val"].dtype
    names: tuple[str, ...] = ()

    def constant(part: str, value: torch.Tensor) -> fx.Node:
        name = rewriter.fresh_weight_name(f"shrp.{block.index}.router.{part}")
        return rewriter.weight(name, Weight.from_tensor(value))

    places = constant("place", torch.from_numpy(block.output.labels.copy()))
    with rewriter.before(block.output.node):
        if count is None:
            flat = rewriter.call(_aten.sum.dim_IntList, heads, [-1], True)
            one = rewriter.call(_aten.ones_like.default, flat)
            gates = rewriter.call(_aten.expand.default, one, [*[-1] * (one.meta["val"].dim() - 1), size])
        else:
            width = int(stream.meta["val"].shape[-1])
            matrix = constant("weight", torch.zeros(size, width, dtype=dtype))
            start = _SHARPNESS * usage / usage.max().clamp_min(torch.finfo(usage.dtype).tiny)
            bias = constant("bias", start.to(dtype))
            names = (str(matrix.target), str(bias.target))
            logits = rewriter.call(_aten.linear.default, stream, matrix, bias)
            gates = _straight_through(rewriter, logits, count, constant("range", torch.arange(size)))
            gates = arranged_back(rewriter, gates, block.to_sum, heads)
        gates = _cast(rewriter, gates, dtype)
        spread = rewriter.call(_aten.index_select.default, gates, -1, places)
        gated = rewriter.call(_aten.mul.Tensor, heads, spread)
    rewriter.replace_in(block.output.node, heads, gated)
    return Router(gates, names)


def _straight_through(rewriter: Rewriter, logits: fx.Node, count: int, numbers: fx.Node) -> fx.Node:
    """``top_k(p) + p - stop(p)``."""
    soft = rewriter.call(_aten.softmax.int, logits, -1)
    top = rewriter.call(_aten.topk.default, soft, count, -1)
    chosen = rewriter.call(operator.getitem, top, 1)
    apart = rewriter.call(_aten.unsqueeze.default, chosen, -1)
    same = rewriter.call(_aten.eq.Tensor, apart, numbers)
    hard = _cast(rewriter, rewriter.call(_aten.any.dim, same, -2), soft.meta["val"].dtype)
    still = rewriter.call(_aten.detach.default, soft)
    # In this order the forward value is exactly the hard choice.
    slope = rewriter.call(_aten.sub.Tensor, soft, still)
    return rewriter.call(_aten.add.Tensor, hard, slope)


def _cast(rewriter: Rewriter, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    if node.meta["val"].dtype == dtype:
        return node
    return rewriter.call(_aten._to_copy.default, node, dtype=dtype)


def routed_usage(
    program: Program,
    blocks: Sequence[HeadBlock],
    routers: Sequence[Router],
    batches: Sequence[Batch],
) -> list[torch.Tensor]:
    """A moving average, over batches, of the share of tokens that use each head.

    Args:
        program: with routers.
        blocks: whose routers.
        routers: in the same order.
        batches: named inputs.

    Returns:
        For each block float64 [heads].
    """
    averages = [torch.zeros(block.heads.size, dtype=torch.float64) for block in blocks]
    numbers = {router.gates: i for i, router in enumerate(routers)}
    for step, batch in enumerate(batches):

        def observe(node: fx.Node, value: Any, batch: Batch = batch, step: int = step) -> None:
            place = numbers.get(node)
            if place is None:
                return
            mask = position_mask(batch, value.shape[:-1], inside=True)
            rows = value.reshape(-1, value.shape[-1])
            rows = rows if mask is None else rows[mask.reshape(-1) != 0]
            share = (rows > 0.5).double().mean(0)
            # The first batch has the whole weight: an average that starts from nothing would be biased.
            averages[place] = share if step == 0 else _EMA * averages[place] + (1 - _EMA) * share

        feeds = program.feeds(**batch)
        seeded(lambda feeds=feeds, observe=observe: program.run(feeds, observe=observe))
    return averages


def trained_usage(
    program: Program,
    teacher: Program,
    blocks: Sequence[HeadBlock],
    counts: Sequence[int],
    usage: Sequence[torch.Tensor],
    batches: Sequence[Batch],
    settings: DistillSettings,
) -> tuple[list[torch.Tensor], DistillReport]:
    """Train routers on a copy of the program, and say how often they use each head.

    Args:
        program: the dense program; it is not changed.
        teacher: what the routed one should answer.
        blocks: the blocks, as found in ``program``.
        counts: for each, how many heads a token may use.
        usage: for each, where its router starts.
        batches: calibration data.
        settings: of the training.
    """
    routed = program.clone()
    nodes = {node.name: node for node in routed.graph.nodes}
    own = [_moved(block, nodes) for block in blocks]
    routers = [add_router(routed, b, c, u) for b, c, u in zip(own, counts, usage, strict=True)]
    names = [name for router in routers for name in router.weights]
    report = distill(routed, teacher, batches, settings, trainable=names)
    return routed_usage(routed, own, routers, batches), report


def _moved(block: HeadBlock, nodes: dict[str, fx.Node]) -> HeadBlock:
    """The same block in a clone: what a router reads and feeds."""
    output = replace(block.output, node=nodes[block.output.node.name], operand=nodes[block.output.operand.name])
    attention = replace(block.attention, by=nodes[block.attention.by.name])
    to_sum = tuple(nodes[step.name] for step in block.to_sum)
    return replace(block, output=output, attention=attention, to_sum=to_sum)
