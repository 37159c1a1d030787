"""Common subexpressions: two equal computations become one.

Value numbering in one forward walk: a node's key is its operator and the keys of its arguments, so that the second of
two equal nodes is found by one dictionary look-up. Arguments are matched by name with defaults left out
(``softmax(x, -1)`` equals ``softmax(x, dim=-1)``), operands of commutative operators in either order. Symbolic sizes
are equal where their expressions are, whatever they are sizes of. Random operators, and those with effects, are never
merged.

Weights that are expressions over the same stored numbers become one, and so do equal scalar constants. Two different
weights that merely hold equal numbers (two fresh norms, all ones) stay two: they are separate parameters of the model.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ...ir.program import Program
from ...ir.rewrite import Rewriter, has_effect, is_random
from ...ir.weights import FileSource, TensorSource, Weight
from ..base import Context, Effect, Pass, Prop, Stats
from .arguments import freeze, given

aten = torch.ops.aten

COMMUTATIVE = frozenset(
    {
        aten.add.Tensor,
        aten.mul.Tensor,
        aten.maximum.default,
        aten.minimum.default,
        aten.eq.Tensor,
        aten.ne.Tensor,
        aten.logical_and.default,
        aten.logical_or.default,
        aten.logical_xor.default,
        aten.bitwise_and.Tensor,
        aten.bitwise_or.Tensor,
        aten.bitwise_xor.Tensor,
    }
)


@dataclass(frozen=True, kw_only=True)
class CommonSubexpressions(Pass):
    """Compute equal expressions once, and read equal stored weights by one name."""

    name: ClassVar[str] = "cse"
    effect: ClassVar[Effect] = Effect.EXACT
    breaks: ClassVar[frozenset[Prop]] = frozenset()

    def run(self, program: Program, ctx: Context) -> Stats:
        """Merge equal nodes of every graph; nested graphs are numbered on their own."""
        stats = Stats()
        for name in program.graphs:
            _merge(Rewriter(program, self.name, name), stats)
        return stats


def _merge(rewriter: Rewriter, stats: Stats) -> None:
    program = rewriter.program
    first: dict[Hashable, fx.Node] = {}
    for node in list(rewriter.graph.nodes):
        if node.op not in ("call_function", "get_attr"):
            continue
        stats.attempts += 1
        key = node_key(node) if node.op == "call_function" else _attribute_key(program, str(node.target))
        if key is None:
            stats.miss("may be random, or has an effect")
            continue
        known = first.setdefault(key, node)
        if known is not node:
            if node.op == "get_attr" and node.target != known.target:
                program.tied[str(node.target)] = str(known.target)
            rewriter.replace(node, known)
            stats.hits += 1


def node_key(node: fx.Node) -> Hashable | None:
    """What two nodes must share to compute the same value; None if a node must never be merged."""
    target, value = node.target, node.meta.get("val")
    if isinstance(value, torch.SymInt):
        # Sizes of different tensors are one number where their expressions are equal.
        return "size", value.node.expr
    if isinstance(target, torch._ops.OpOverload):
        if has_effect(node) or is_random(node):
            return None
        arguments = given(node)
        if target in COMMUTATIVE and "alpha" not in arguments:
            a, b = arguments["self"], arguments["other"]
            if isinstance(a, fx.Node) and isinstance(b, fx.Node):
                arguments["self"], arguments["other"] = sorted((a, b), key=id)
        return target, tuple((name, freeze(value)) for name, value in sorted(arguments.items()))
    if isinstance(target, torch._ops.HigherOrderOperator):
        return None  # its body may draw random numbers
    return target, freeze(node.args), freeze(node.kwargs)


def _attribute_key(program: Program, name: str) -> Hashable:
    """A key for what a ``get_attr`` reads: a nested graph by name, a weight by its storage and steps."""
    weight = program.weights.get(name)
    return ("graph", name) if weight is None else weight_key(weight)


def weight_key(weight: Weight) -> Hashable:
    """Equal for weights that read the same stored numbers in the same way, and for equal scalars."""
    source = weight.source
    if isinstance(source, FileSource):
        return (
            "file",
            source.path,
            source.offset,
            source.shape,
            source.dtype,
            weight.steps,
        )
    if isinstance(source, TensorSource) and source.tensor.numel():
        tensor = source.tensor
        if weight.shape == () and weight.numel == 1:
            value = weight.tensor()
            return (
                "scalar",
                value.dtype,
                bytes(value.reshape(1).contiguous().view(torch.uint8).tolist()),
            )
        place = (
            tensor.untyped_storage().data_ptr(),
            tensor.storage_offset(),
            tuple(tensor.shape),
            tensor.stride(),
        )
        if place[0]:
            return ("memory", *place, tensor.dtype, weight.steps)
    return ("other", id(source), weight.steps)
