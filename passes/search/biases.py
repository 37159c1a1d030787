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
_PRODUCTS = ("mm", "matmul")


def give_bias(rewriter: Rewriter, consumer: Consumer) -> str:
    """Let a consumer add a bias of its own, zero at first, unless it has one that nothing else reads.

    Args:
        rewriter: of the program that the consumer is in.
        consumer: a linear map or convolution.

    Returns:
        Why it cannot have one; empty if it has.
    """
    node, program = consumer.node, rewriter.program
    reason = "" if own_bias(program, consumer) is not None else why_no_bias(consumer)
    if reason or own_bias(program, consumer) is not None:
        return reason
    shape, dtype = bias_type(consumer)
    start = Weight.from_tensor(torch.zeros(shape, dtype=dtype))
    if consumer.bias is not None:
        start = program.weights[consumer.bias]  # what others read as well stays theirs
    bias = rewriter.weight(rewriter.fresh_weight_name(_beside(consumer.weight)), start)
    if op_name(node) in _PRODUCTS:
        with rewriter.after(node):
            total = rewriter.call(aten.add.Tensor, node, bias, like=node)
        rewriter.replace(node, total, erase=False)
        return ""
    args = list(node.args)
    while len(args) < 3:
        args.append(None)
    args[0 if op_name(node) == "addmm" else 2] = bias
    rewriter.set_args(node, args, {k: v for k, v in node.kwargs.items() if k != "bias"})
    return ""


def why_no_bias(consumer: Consumer) -> str:
    """Why a consumer cannot add another bias than it does; empty if it can."""
    node, name = consumer.node, op_name(consumer.node)
    if name in _PRODUCTS:
        left = consumer.channel_dim != node.meta["val"].dim() - 1
        return f"%{node.name} ({name}) has its weight on the left" if left else ""
    if consumer.bias is not None:
        return ""
    if name == "addmm" or bind(node).get("bias") is not None:
        return f"%{node.name} ({name}) adds something that is no weight of its own"
    known = name == "linear" or name in _CONVOLUTIONS
    return "" if known else f"%{node.name} ({name}) has no place for a bias"


def bias_type(consumer: Consumer) -> tuple[int, torch.dtype]:
    """How many elements a bias has, and of which type."""
    value = consumer.node.meta["val"]
    channel = 1 if op_name(consumer.node) in _CONVOLUTIONS else value.dim() - 1
    return int(value.shape[channel]), value.dtype


def bias_of(consumer: Consumer) -> str | None:
    """The bias that a consumer adds, also where it is added by the operator after a plain product."""
    if consumer.bias is not None:
        return consumer.bias
    users = list(consumer.node.users)
    if op_name(consumer.node) not in _PRODUCTS or len(users) != 1 or why_no_bias(consumer):
        return None
    added = bind(users[0]) if op_name(users[0]) == "add" else {}
    if added.get("alpha", 1) != 1:
        return None
    other = next((a for a in users[0].all_input_nodes if a is not consumer.node), None)
    if not added or other is None or other.op != "get_attr" or other.meta["val"].shape != (bias_type(consumer)[0],):
        return None
    return str(other.target)


def own_bias(program: Program, consumer: Consumer) -> str | None:
    """The bias that a consumer adds, if nothing else reads it."""
    name = bias_of(consumer)
    return name if name is not None and len(_readers(program, name)) == 1 else None


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
