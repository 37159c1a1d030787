"""What stays of dropped units because the program still returns it: the keys and values that a cache is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from ...ir.program import Program
from ...ir.structure import BranchSite, Structure
from .units import Unit

Branches = Mapping[fx.Node, Sequence[BranchSite]]


def branches_of(found: Structure) -> Branches:
    """The branches that go with each unit, by the value that it replaces; to be asked before units are dropped."""
    blocks = [block for stream in found.streams for block in stream.blocks]
    whole = {block.end: block.branches for block in blocks}
    return whole | {branch.add: (branch,) for block in blocks for branch in block.branches}


def left_for_outputs(program: Program, units: Sequence[Unit], branches: Branches) -> list[str]:
    """A line for each unit that was dropped, but whose operators go on computing an output of their own.

    Args:
        program: without the units.
        units: the units.
        branches: of `branches_of`.
    """
    outputs = list(zip(program.main.output_values, program.main.outputs, strict=True))
    notes: list[str] = []
    for unit in units:
        inside = {node for branch in branches.get(unit.replaced, ()) for node in branch.nodes}
        kept = [name for node, name in outputs if node in inside]
        if kept:
            notes.append(f"{unit.label} is dropped, but what makes the outputs {', '.join(kept)} stays")
    return notes
