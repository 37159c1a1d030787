"""What can be dropped: units of a residual stream, each written as 'this value is replaced by that earlier one'.

A block is dropped by reading the stream after it from before it; a branch, by reading the sum that it was added to
from the other operand. So every unit is one replacement, which can be tried without rewriting (``alias`` of
`ir.execute`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from ...ir.execute import needed
from ...ir.program import Program
from ...ir.structure import BlockSite, BranchSite, Structure

GRANULARITIES = ("block", "attention", "mlp")


@dataclass(frozen=True)
class Unit:
    """One removable unit.

    Attributes:
        index: its number among the units of its granularity, over all streams in order.
        stream: which residual stream it belongs to.
        replaced: the value that is replaced.
        by: the earlier value that replaces it.
        label: what it is, for reports.
        blocked: why it cannot be dropped; empty if it can.
    """

    index: int
    stream: int
    replaced: fx.Node
    by: fx.Node
    label: str
    blocked: str = ""


def removable_units(found: Structure, granularity: str) -> list[Unit]:
    """All units of one granularity, in execution order, including those that cannot be dropped (with the reason).

    Args:
        found: the program's structure.
        granularity: ``block``, ``attention`` (attention branches and what takes their place: convolutional or
            recurrent mixers are not counted) or ``mlp``.
    """
    units: list[Unit] = []
    for number, stream in enumerate(found.streams):
        for block in stream.blocks:
            if granularity == "block":
                units.append(_block_unit(len(units), number, block))
                continue
            for branch in block.branches:
                if branch.kind == granularity:
                    units.append(_branch_unit(len(units), number, block, branch))
    return units


def _block_unit(index: int, stream: int, block: BlockSite) -> Unit:
    blocked = "" if block.droppable else block.reason or "not droppable"
    return Unit(index, stream, block.end, block.start, f"block {index}", blocked)


def _branch_unit(index: int, stream: int, block: BlockSite, branch: BranchSite) -> Unit:
    label = f"{branch.kind} of block {block.index}"
    others = [a for a in branch.add.all_input_nodes if a is not branch.output]
    if len(others) != 1:
        return Unit(index, stream, branch.add, branch.start, label, "its sum has no single other operand")
    return Unit(index, stream, branch.add, others[0], label, _type_difference(branch.add, others[0]))


def _type_difference(a: fx.Node, b: fx.Node) -> str:
    x, y = a.meta.get("val"), b.meta.get("val")
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        return "not a tensor"
    same = x.dtype == y.dtype and x.dim() == y.dim()
    if not same or any(
        isinstance(p, int) != isinstance(q, int) or str(p) != str(q) for p, q in zip(x.shape, y.shape, strict=True)
    ):
        return f"the stream changes from {list(y.shape)} to {list(x.shape)}"
    return ""


def replacements(units: Collection[Unit]) -> dict[fx.Node, fx.Node]:
    """The units' removal as an alias map; chains (a dropped block after a dropped block) need no resolving."""
    return {unit.replaced: unit.by for unit in units}


def remaining_weights(program: Program, alias: Mapping[fx.Node, fx.Node]) -> set[str]:
    """Names of the weights that are still read when ``alias`` values are replaced."""
    nodes = needed(program.graph, (), alias)
    return {str(n.target) for n in nodes if n.op == "get_attr"} - set(program.subgraphs)
