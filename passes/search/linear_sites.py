"""Linear layers whose weights can be pruned, quantised or factorised.

A site is one weight that is multiplied with activations: by ``linear``, a product, or a convolution over single places.
Everything that reads the weight belongs to the site. Maps to outputs and what lies outside of the blocks of residual
streams are left out: they are few, and matter most. Nothing here reads a name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx

from ...ir.axes.relate import bind
from ...ir.flow import op_name, tensor_of
from ...ir.program import Program
from ...ir.projections import linear_map, weight_of
from ...ir.structure import Structure
from .consumers import EXPERTS, Consumer, other_readers

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution")
_PRODUCTS = {
    "linear": ("input", "weight"),
    "addmm": ("mat1", "mat2"),
    "mm": ("self", "mat2"),
    "matmul": ("self", "other"),
}
_OTHERS = (EXPERTS, "_grouped_mm", "transformers.grouped_mm", "transformers.grouped_mm_fallback", "einsum", "bmm")
_TURNS = ("t", "mT", "numpy_T", "transpose")


@dataclass(frozen=True, eq=False)
class LinearSite:
    """One weight of a linear layer.

    Attributes:
        index: its number among all linear layers of the program whose weights can be changed, in graph order.
        consumers: the operators that multiply by it, in graph order.
        weight: its name.
        inputs, outputs: the layer's widths.
        label: what it is, for reports: ``linear 3 of block 1``.
        block: the number of the block that it lies in, counted over all streams; None outside, or for several.
        first: position in the graph of the first of its operators.
    """

    index: int
    consumers: tuple[Consumer, ...]
    weight: str
    inputs: int
    outputs: int
    label: str
    block: int | None
    first: int

    @property
    def size(self) -> int:
        """How many numbers the weight has."""
        return self.inputs * self.outputs

    def __str__(self) -> str:
        return f"{self.label}: {self.inputs} -> {self.outputs}"


def linear_sites(
    program: Program, found: Structure, *, outside: bool = False
) -> tuple[list[LinearSite], dict[str, int]]:
    """The linear layers of the main entry, in graph order, and what was left out.

    Args:
        program: a program; it is not changed.
        found: its structure.
        outside: whether layers outside of the blocks count, too (maps to outputs never do).

    Returns:
        The sites, and for what was left out the reasons with their counts.
    """
    position = {node: i for i, node in enumerate(program.graph.nodes)}
    home = _blocks(found)
    heads = {head.projection.node for head in found.heads}
    linears = {projection.node for projection in found.linears}
    blocked: dict[str, int] = {}
    by_weight: dict[str, list[Consumer]] = {}
    for node in program.graph.nodes:
        if node not in linears and op_name(node) not in _CONVOLUTIONS and not _by_constant(node, home):
            if op_name(node) in _OTHERS and node in home and any(map(_constant, node.all_input_nodes)):
                reason = f"a weight that {op_name(node)} multiplies by"
                blocked[reason] = blocked.get(reason, 0) + 1
            continue
        read = _consumer(node)
        if isinstance(read, Consumer):
            by_weight.setdefault(read.weight, []).append(read)
        elif node in home:
            blocked[read] = blocked.get(read, 0) + 1
    sites: list[LinearSite] = []
    index = 0
    for weight, consumers in by_weight.items():
        block = _single(home.get(c.node) for c in consumers)
        inside = all(c.node in home for c in consumers)
        head = any(c.node in heads for c in consumers)
        reason = _refusal(program, consumers)
        usable = not reason
        if head:
            reason = "a map to an output"
        elif not inside and not outside:
            reason = "outside of the blocks of a residual stream"
        if reason:
            blocked[reason] = blocked.get(reason, 0) + 1
        else:
            where = "" if block is None else f" of block {block}"
            outputs = program.weights[weight].shape[1 - consumers[0].weight_dim]
            inputs = len(consumers[0].labels)
            label = f"linear {index}{where}"
            first = position[consumers[0].node]
            sites.append(LinearSite(index, tuple(consumers), weight, inputs, outputs, label, block, first))
        index += usable
    return sites, blocked


def _consumer(node: fx.Node) -> Consumer | str:
    """A linear map as a consumer of all of its input channels, or why it is none."""
    name, args = op_name(node), bind(node)
    if name in _CONVOLUTIONS:
        operand, stored = args["input"], args["weight"]
        if args.get("transposed") or int(args["groups"]) != 1:
            return "a transposed convolution" if args.get("transposed") else "a convolution of several groups"
        if any(size != 1 for size in stored.meta["val"].shape[2:]):
            return "a convolution over more than one place"
        weight = weight_of(stored)
        if weight is None or weight is not stored:
            return "a convolution whose kernel is computed"
        channel_dim, weight_dim = 1, 1
    else:
        projection = linear_map(node)
        if projection is None or name not in _PRODUCTS:
            return "a weight that is computed from what is stored"
        operand, stored = (args[key] for key in _PRODUCTS[name])
        weight = projection.weight
        turned = _turned(stored)
        if turned is None:
            return "a weight that is computed from what is stored"
        channel_dim = len(operand.meta["val"].shape) - 1
        weight_dim = 1 if (name == "linear") != turned else 0
    shape = weight.meta["val"].shape
    labels = np.arange(int(shape[weight_dim]), dtype=np.int64)
    bias = args.get("bias") if name != "addmm" else args["self"]
    known = None
    if isinstance(bias, fx.Node) and bias.op == "get_attr" and len(bias.meta["val"].shape) == 1:
        known = str(bias.target)
    return Consumer(node, operand, channel_dim, str(weight.target), weight_dim, labels, known)


def _by_constant(node: fx.Node, home: Mapping[fx.Node, int]) -> bool:
    """Whether an operator of a block multiplies by what is computed from weights alone."""
    name = op_name(node)
    return name in _PRODUCTS and node in home and _constant(bind(node)[_PRODUCTS[name][1]])


def _constant(node: fx.Node) -> bool:
    """Whether a value is a matrix (or several) that depends on no input."""
    value = tensor_of(node)
    if value is None or value.dim() < 2 or not value.is_floating_point():
        return False
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        below = stack.pop()
        if below.op == "placeholder":
            return False
        fresh = [operand for operand in below.all_input_nodes if operand not in seen]
        seen.update(fresh)
        stack += fresh
    return True


def _turned(node: Any) -> bool | None:
    """Whether a matrix is read transposed; None where what is stored is no plain matrix."""
    turned = False
    while isinstance(node, fx.Node) and node.op == "call_function":
        name = op_name(node)
        if name in _TURNS or (name == "permute" and [d % 2 for d in bind(node)["dims"]] == [1, 0]):
            turned = not turned
        elif name not in ("_to_copy", "permute"):
            return None
        node = node.args[0]
    return turned


def _refusal(program: Program, consumers: list[Consumer]) -> str:
    """Why the weight of these operators cannot be changed; empty if it can."""
    name = consumers[0].weight
    weight = program.weights.get(name)
    if weight is None or weight.is_meta:
        return "a weight without numbers"
    if not weight.dtype.is_floating_point:
        return f"a weight that holds {str(weight.dtype).removeprefix('torch.')}"
    readers = {consumer.node for consumer in consumers}
    if not set(other_readers(program, consumers[0])) <= readers:
        return "a weight that is read by something else, too"
    if any(pair.initial == name for entry in program.entries.values() for pair in entry.state):
        return "a weight that starts a state"
    if len({c.weight_dim for c in consumers}) > 1:
        return "a weight that is read in two orders of its dimensions"
    return ""


def _blocks(found: Structure) -> dict[fx.Node, int]:
    """The block of each operator, counted over all streams."""
    home: dict[fx.Node, int] = {}
    for number, block in enumerate(b for stream in found.streams for b in stream.blocks):
        for node in _nodes(block.nodes, *(branch.nodes for branch in block.branches)):
            home.setdefault(node, number)
    return home


def _nodes(*parts: Iterable[fx.Node]) -> Iterator[fx.Node]:
    for part in parts:
        yield from part


def _single(numbers: Iterable[int | None]) -> int | None:
    """The one number that all are, if there is one."""
    found = set(numbers)
    return found.pop() if len(found) == 1 else None
