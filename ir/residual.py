"""Residual units: the steps of which residual streams are made (`ir.chains` puts them in a row).

A **unit** is an addition (a tree of additions counts as one) of which one operand, the stream value `a`, is an
ancestor of other operands, its branches: ``b = a + f(a) [+ g(a)]``. That is the local form of 'b immediately
post-dominates a within its stack': unlike dominators over the whole graph it holds however many other values (another
stack's output, a mask, positions, the first embedding) enter the branches, and whatever is tapped from the stream for
heads, intermediate outputs or caches. Casts, copies and constant factors on either side are looked through, and a
branch must do some work beyond elementwise operators, which keeps formulas such as ``x + 0.04 * x**3`` out.

Two more kinds of unit exist inside a chain, and cannot be dropped: a **projection** (both operands of the addition are
branches of one value, their dominator: the strided blocks of a ResNet) and a **sequential** one (no addition, but the
same operators as a branch of the same stream: the strided blocks of a MobileNet).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import fx

from .flow import ADDS, Flow, is_pointwise, is_view, op_name

UnitKind = Literal["identity", "projection", "sequential"]

_WORK = {
    "linear", "mm", "addmm", "bmm", "baddbmm", "addbmm", "matmul", "einsum", "mv", "addmv", "dot", "tensordot",
    "convolution", "lstm", "gru", "scan", "while_loop", "cond", "map", "associative_scan", "bilinear", "_trilinear",
    "_grouped_mm",
}  # fmt: skip


def does_work(node: fx.Node) -> bool:
    """Whether an operator is more than elementwise, a view, a reduction or a norm."""
    name = op_name(node)
    if not name or is_view(node) or is_pointwise(node) or name.startswith("py."):
        return False
    return (
        name in _WORK
        or name.startswith(("conv", "fft_", "_fft", "rnn", "quantized", "_scaled_"))
        or "pool" in name
        or "attention" in name
        or "." in name
    )


def has_weight_kernel(node: fx.Node) -> bool:
    """Whether an operator is a linear map or convolution (of whatever spelling)."""
    name = op_name(node)
    return name in ("linear", "addmm", "mm", "matmul") or name.startswith("conv")


@dataclass(eq=False)
class Unit:
    """One step of a residual stream.

    Attributes:
        start: the stream value that it reads.
        end: the addition (for a sequential unit: its last value).
        kind: see the module's text.
        leaves: for each branch, the addition in the tree that takes it, and the branch's output.
        nodes: for each branch, the values from ``start`` (left out) to its output; values that several branches
            share belong to the first.
        scaled: whether the stream itself is multiplied by a constant on its way to the addition.
        children: units inside the branches.
        tail: what follows ``end`` on the way to the next unit's start (post-norms, activations).
    """

    start: fx.Node
    end: fx.Node
    kind: UnitKind
    leaves: list[tuple[fx.Node, fx.Node]]
    nodes: list[list[fx.Node]]
    scaled: bool = False
    children: list[Unit] = field(default_factory=list)
    tail: list[fx.Node] = field(default_factory=list)

    @property
    def after(self) -> fx.Node:
        """The stream value after the unit and its tail."""
        return self.tail[-1] if self.tail else self.end

    @property
    def size(self) -> int:
        """Values in all branches."""
        return sum(len(nodes) for nodes in self.nodes)


@dataclass
class Candidate:
    """An addition that looked like a residual one and is none.

    Attributes:
        node: the addition.
        reason: why it is not part of a stream.
    """

    node: fx.Node
    reason: str

    def __str__(self) -> str:
        return f"%{self.node.name}: {self.reason}"


@dataclass
class _Tree:
    """A tree of additions: its top, and its operands with the addition that takes each."""

    top: fx.Node
    leaves: list[tuple[fx.Node, fx.Node]]
    starts: list[fx.Node | None]
    scaled: list[fx.Node | None]
    fork: fx.Node | None


def find_units(flow: Flow) -> tuple[list[Unit], list[Candidate]]:
    """All residual units of a graph, nested ones included, in graph order, and the additions that are none."""
    trees = _addition_trees(flow)
    wanted = [n for tree in trees for n in (*tree.starts, *tree.scaled, tree.fork) if n is not None]
    flow.trace_reach(wanted)
    units: list[Unit] = []
    rejected: list[Candidate] = []
    while trees:
        tree = trees.pop()
        unit = _identity_unit(flow, tree)
        parts = _split(flow, tree) if unit is not None else []
        if parts:
            trees += parts
            continue
        found = unit or _projection_unit(flow, tree)
        if isinstance(found, Unit):
            units.append(found)
        elif found is not None:
            rejected.append(found)
    return sorted(units, key=lambda u: flow.position[u.end]), rejected


def _addition_trees(flow: Flow) -> list[_Tree]:
    inner: set[fx.Node] = set()
    trees: list[_Tree] = []
    for node in reversed(flow.nodes):
        if op_name(node) not in ADDS or node in inner or not flow.is_float(node):
            continue
        # A constant added to the stream (position embeddings halfway) is no part of what was added before it.
        if len(flow.operands(node)) < 2:
            continue
        leaves = flow.add_leaves(node)
        inner.update(add for add, _ in leaves)
        trees.append(_tree(flow, node, leaves))
    return trees


def _tree(flow: Flow, top: fx.Node, leaves: Sequence[tuple[fx.Node, fx.Node]]) -> _Tree:
    shape = flow.shape(top)
    starts: list[fx.Node | None] = []
    scaled: list[fx.Node | None] = []
    for _, operand in leaves:
        value = flow.peel(operand) if flow.is_float(operand) and flow.shape(operand) == shape else None
        starts.append(value if value is not None and _is_shared(flow, operand, value) else None)
        below = flow.unscale(value) if value is not None else None
        scaled.append(below if below is not None and len(flow.users(below)) > 1 else None)
    return _Tree(top, list(leaves), starts, scaled, flow.dominators.parent[top])


def _split(flow: Flow, tree: _Tree) -> list[_Tree]:
    """Two trees for one that holds a unit and something that is added to the stream after it (a long skip).

    In ``(x + f(x)) + y`` the inner addition is a unit of its own unless ``y`` depends on ``x`` (a parallel residual).
    """
    for add in dict.fromkeys(add for add, _ in tree.leaves):
        if add is tree.top:
            continue
        below = flow.add_leaves(add)
        part = _tree(flow, add, below)
        unit = _identity_unit(flow, part)
        outside = [leaf for leaf in tree.leaves if leaf not in below]
        if unit is not None and any(flow.is_float(a) and not flow.depends(a, unit.start) for _, a in outside):
            return [part, _tree(flow, tree.top, [*outside, flow.addition_of(add)])]
    return []


def _is_shared(flow: Flow, operand: fx.Node, value: fx.Node) -> bool:
    """Whether anything but the addition reads the value, at any depth of looking through casts and copies."""
    while True:
        if len(flow.users(operand)) > 1:
            return True
        if operand is value:
            return False
        operand = flow.peel_once(operand) or value


def _identity_unit(flow: Flow, tree: _Tree) -> Unit | None:
    best: tuple[int, int, fx.Node, bool] | None = None
    for values, is_scaled in ((tree.starts, False), (tree.scaled, True)):
        for at, value in enumerate(values):
            if value is None:
                continue
            count = sum(
                i != at and operand is not value and flow.depends(operand, value) and flow.peel(operand) is not value
                for i, (_, operand) in enumerate(tree.leaves)
            )
            if count and (best is None or (count, -flow.position[value]) > best[:2]):
                best = (count, -flow.position[value], value, is_scaled)
        if best is not None:
            break
    if best is None:
        return None
    start = best[2]
    used = next(i for i, v in enumerate(tree.scaled if best[3] else tree.starts) if v is start)
    unit = Unit(start, tree.top, "identity", [], [], scaled=best[3])
    _add_branches(flow, unit, [leaf for i, leaf in enumerate(tree.leaves) if i != used])
    worked = any(does_work(node) for nodes in unit.nodes for node in nodes)
    return unit if worked else None


def _add_branches(flow: Flow, unit: Unit, leaves: Sequence[tuple[fx.Node, fx.Node]]) -> None:
    """Give the unit its branches, in the order of the addition's operands (one that reads another comes after it)."""
    found = [(leaf, flow.between(unit.start, leaf[1])) for leaf in leaves if flow.depends(leaf[1], unit.start)]
    outputs = {operand for (_, operand), _ in found}
    taken: set[fx.Node] = set()
    for leaf, nodes in sorted(found, key=lambda branch: len(outputs.intersection(branch[1]))):
        unit.leaves.append(leaf)
        unit.nodes.append([node for node in nodes if node not in taken])
        taken.update(nodes)


def _projection_unit(flow: Flow, tree: _Tree) -> Unit | Candidate | None:
    """A unit of two or more branches of one value, each with a weight of its own, or why it is none."""
    if tree.fork is None or any(not flow.is_float(operand) for _, operand in tree.leaves):
        return None
    if any(flow.shape(operand) != flow.shape(tree.top) for _, operand in tree.leaves):
        return None
    unit = Unit(tree.fork, tree.top, "projection", [], [])
    _add_branches(flow, unit, tree.leaves)
    if len(unit.leaves) < 2 or not any(does_work(n) for nodes in unit.nodes for n in nodes):
        return None
    kernels = sorted(sum(has_weight_kernel(n) for n in nodes) for nodes in unit.nodes)
    if kernels[0] == 1 and kernels[-1] > 1:
        return unit
    return Candidate(
        tree.top, f"adds branches of %{tree.fork.name}, but none is that value itself or a projection of it"
    )
