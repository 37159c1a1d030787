"""Biases where a layer has none: what compensation adds to an output needs a place to be added at."""

from __future__ import annotations

import torch
from torch import fx

from ...ir.axes.relate import bind
from ...ir.flow import op_name
from ...ir.program import Program
from ...ir.rewrite import Rewriter
from ...ir.weights import Weight
from .consumers import Consumer

aten = torch.ops.aten
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")


def give_bias(rewriter: Rewriter, consumer: Consumer) -> str:
    """Let a consumer add a bias of its own, zero at first, unless it has one that nothing else reads.

    Args:
        rewriter: of the program that the consumer is in.
        consumer: a linear map or convolution.

    Returns:
        Why it cannot have one; empty if it has.
    """
    node, program = consumer.node, rewriter.program
    if consumer.bias is not None and len(_readers(program, consumer.bias)) == 1:
        return ""
    name = op_name(node)
    bound = bind(node)
    old = bound.get("bias") if name == "linear" or name in _CONVOLUTIONS else None
    if name == "addmm" or (old is not None and consumer.bias is None):
        return f"%{node.name} ({name}) adds something that is no weight of its own"
    if consumer.bias is None and name not in ("linear", "mm", "matmul", *_CONVOLUTIONS):
        return f"%{node.name} ({name}) has no place for a bias"
    weight = program.weights[consumer.weight]
    value = node.meta["val"]
    channel = 1 if name in _CONVOLUTIONS else value.dim() - 1
    if name in ("mm", "matmul") and consumer.channel_dim != value.dim() - 1:
        return f"%{node.name} ({name}) has its weight on the left"
    zero = torch.zeros(int(value.shape[channel]), dtype=weight.dtype)
    start = program.weights[consumer.bias] if consumer.bias is not None else Weight.from_tensor(zero)
    bias = rewriter.weight(rewriter.fresh_weight_name(_beside(consumer.weight)), start)
    if name in ("mm", "matmul"):
        with rewriter.after(node):
            total = rewriter.call(aten.add.Tensor, node, bias, like=node)
        rewriter.replace(node, total, erase=False)
        return ""
    args = list(node.args)
    while len(args) < 3:
        args.append(None)
    args[2] = bias
    rewriter.set_args(node, args, {k: v for k, v in node.kwargs.items() if k != "bias"})
    return ""


def bias_of(consumer: Consumer) -> str | None:
    """The bias that a consumer adds, also where it is added by the operator after a plain product."""
    if consumer.bias is not None:
        return consumer.bias
    users = [u for u in consumer.node.users if op_name(u) == "add"]
    if op_name(consumer.node) in ("mm", "matmul") and len(users) == 1 == len(consumer.node.users):
        other = next((a for a in users[0].all_input_nodes if a is not consumer.node), None)
        value = consumer.node.meta["val"]
        if other is not None and other.op == "get_attr" and other.meta["val"].shape == value.shape[-1:]:
            return str(other.target)
    return None


def _readers(program: Program, name: str) -> list[fx.Node]:
    return [
        user
        for graph in program.graphs.values()
        for node in graph.find_nodes(op="get_attr")
        if node.target == name
        for user in node.users
    ]


def _beside(weight: str) -> str:
    """A name for the bias of a weight: where frameworks would put it."""
    stem, dot, last = weight.rpartition(".")
    return f"{stem}{dot}{last.removesuffix('weight')}bias" if last.endswith("weight") else f"{weight}.bias"
