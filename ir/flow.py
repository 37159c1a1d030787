"""How data flows through a graph: which values depend on the inputs, on one another, and what dominates what.

This is the ground on which `ir.structure` finds residual streams. Nothing here reads a name. Everything is a constant
number of sweeps over the nodes in graph order (a topological order).

**Data values** are tensors that depend on the *contents* of a user input, not only on its sizes: rotary tables and
causal masks made from sizes and weights are constants here, and so vanish from the picture.

**Reach** is exact ancestry: a bit for each candidate stream value, joined forward in one sweep, so that 'does this
operand depend on that value' is one bit test.

**Dominators**: on a directed acyclic graph in topological order the immediate dominator of a value is the lowest
common ancestor of its operands in the dominator tree built so far (Aho, Hopcroft, Ullman). Each tree node keeps one
jump pointer besides its parent (Myers' skew-binary lists), so that a common ancestor takes logarithmic time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import fx

from .program import Entry

Shape = tuple[Any, ...]

_SHAPE_ONLY = {"sym_size", "sym_numel", "sym_stride", "size", "numel", "is_same_size"}
_VIEWS = {
    "view", "reshape", "_unsafe_view", "_reshape_alias", "view_as", "reshape_as", "expand", "expand_as", "permute",
    "transpose", "t", "mT", "unsqueeze", "squeeze", "flatten", "unflatten", "slice", "select", "narrow", "split",
    "split_with_sizes", "chunk", "unbind", "getitem", "alias", "detach", "diagonal", "unfold", "as_strided", "swapaxes",
    "movedim", "swapdims", "moveaxis", "numpy_T", "lift_fresh", "unsafe_split", "unsafe_chunk", "tensor_split",
    "contiguous", "clone", "to", "_to_copy", "type_as", "float", "dropout", "native_dropout", "feature_dropout",
    "alpha_dropout", "lift_fresh_copy", "real", "imag", "view_as_real", "view_as_complex", "real_if_close",
}  # fmt: skip
_SAME_VALUE = {
    "clone", "contiguous", "alias", "detach", "dropout", "feature_dropout", "alpha_dropout", "native_dropout", "to",
    "_to_copy", "type_as", "float", "lift_fresh", "lift_fresh_copy", "view", "reshape", "_unsafe_view", "view_as",
    "_reshape_alias", "expand", "expand_as", "reshape_as",
}  # fmt: skip
_SCALES = {"mul", "div", "multiply", "divide", "true_divide"}
ADDS = {"add", "py.add"}


@cache
def _target_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.rpartition("::")[2]
        return name if target.namespace == "aten" else f"{target.namespace}.{name}"
    name = str(getattr(target, "__name__", target))
    module = str(getattr(target, "__module__", ""))
    if name == "getitem":
        return name
    return f"py.{name}" if module in ("_operator", "math", "builtins", "torch") else name


def op_name(node: fx.Node) -> str:
    """An operator's name without overload: ``linear``, ``graphlathe.attention``, Python's as ``py.add``; or ''."""
    return _target_name(node.target) if node.op == "call_function" else ""


@cache
def _has_tag(target: Any, tag: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and tag in target.tags


def is_pointwise(node: fx.Node) -> bool:
    """Whether every output element depends on one element of each operand (PyTorch's own tag)."""
    return _has_tag(node.target, torch.Tag.pointwise)


def is_view(node: fx.Node) -> bool:
    """Whether an operator only rearranges, picks or casts elements."""
    return op_name(node) in _VIEWS


def tensor_of(node: fx.Node) -> torch.Tensor | None:
    """A node's value if it is a tensor (the first one of a tuple)."""
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        value = next((v for v in value if isinstance(v, torch.Tensor)), None)
    return value if isinstance(value, torch.Tensor) else None


def shape_key(node: fx.Node) -> Shape:
    """A value's shape as plain numbers and expressions: comparing it adds no guard, unlike comparing symbolic sizes."""
    value = tensor_of(node)
    if value is None:
        return ()
    return tuple(s.node.expr if isinstance(s, torch.SymInt) else int(s) for s in value.shape)


def reads_shape_only(name: str) -> bool:
    """Whether an operator looks at its operands' shapes and not at their contents (``zeros_like``, ``size``)."""
    return name in _SHAPE_ONLY or name.endswith("_like") or name.startswith("new_")


def keeps_value(node: fx.Node) -> bool:
    """Whether an operator returns its first operand as it is: same shape, same dtype (a copy, an inactive dropout)."""
    if op_name(node) not in _SAME_VALUE or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor) or before.dtype != after.dtype:
        return False
    return shape_key(node.args[0]) == shape_key(node)


class Flow:
    """The data flow of one graph.

    Args:
        entry: the callable whose graph it is.

    Attributes:
        nodes: the live nodes (some output needs them) in graph order.
        position: each live node's place in that order.
        data: for each live node, the inputs whose contents it depends on, as a bit set; 0 for constants.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.output = entry.output_node
        self.nodes = _live(entry.graph, self.output)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self._shapes: dict[fx.Node, Shape] = {}
        self._users: dict[fx.Node, list[fx.Node]] = {}
        self.data = self._depend_on_inputs()
        self._bits: dict[fx.Node, int] = {}
        self._reach: dict[fx.Node, int] = {}
        self._dominators: Dominators | None = None

    def shape(self, node: fx.Node) -> Shape:
        """The node's shape, see `shape_key`."""
        key = self._shapes.get(node)
        if key is None:
            key = self._shapes[node] = shape_key(node)
        return key

    def _depend_on_inputs(self) -> dict[fx.Node, int]:
        data: dict[fx.Node, int] = {}
        inputs = {node: 1 << i for i, node in enumerate(self.entry.placeholders)}
        for node in self.nodes:
            if node.op == "placeholder":
                data[node] = inputs[node] if tensor_of(node) is not None else 0
                continue
            name = op_name(node)
            bits = 0
            if not reads_shape_only(name):
                for operand in node.all_input_nodes:
                    bits |= data[operand]
            data[node] = bits if node.op == "output" or tensor_of(node) is not None else 0
        return data

    def is_float(self, node: fx.Node) -> bool:
        """Whether the value is a floating-point (or complex) data tensor."""
        value = tensor_of(node)
        return value is not None and bool(self.data.get(node)) and (value.is_floating_point() or value.is_complex())

    def users(self, node: fx.Node) -> list[fx.Node]:
        """The live users."""
        found = self._users.get(node)
        if found is None:
            found = self._users[node] = [user for user in node.users if user in self.position]
        return found

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """The operands that are floating-point data."""
        return [a for a in node.all_input_nodes if self.is_float(a)]

    # Looking through operators that keep the value

    def peel(self, node: fx.Node) -> fx.Node:
        """The value below casts, copies, inactive dropout and reshapes to the same shape."""
        while op_name(node) in _SAME_VALUE and node.args and isinstance(node.args[0], fx.Node):
            below = node.args[0]
            if self.shape(below) != self.shape(node) or not self.is_float(below):
                break
            node = below
        return node

    def unscale(self, node: fx.Node) -> fx.Node | None:
        """The value below a multiplication by something that depends on no input; None if it is none."""
        if op_name(node) not in _SCALES:
            return None
        for operand in self.operands(node)[:2]:
            others = [a for a in node.all_input_nodes if a is not operand]
            if self.shape(operand) == self.shape(node) and not any(self.data[o] for o in others):
                return self.peel(operand)
        return None

    def add_leaves(self, top: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
        """The operands of a tree of additions, as pairs of the addition and its operand, in order.

        Inner additions count as part of the tree when nothing else reads them.
        """
        leaves: list[tuple[fx.Node, fx.Node]] = []
        stack = [(top, operand) for operand in reversed(top.all_input_nodes)]
        while stack:
            add, operand = stack.pop()
            below = operand
            while len(self.users(below)) == 1 and (deeper := self.peel_once(below)) is not None:
                below = deeper
            inner = op_name(below) in ADDS and self.is_float(below) and self.shape(below) == self.shape(top)
            if inner and len(self.users(below)) == 1 and len(below.all_input_nodes) == 2:
                stack.extend((below, a) for a in reversed(below.all_input_nodes))
            else:
                leaves.append((add, operand))
        return leaves

    def addition_of(self, node: fx.Node) -> tuple[fx.Node, fx.Node]:
        """The addition that a value with one reader goes into, through casts and copies, and its operand there."""
        user = self.users(node)[0]
        while op_name(user) not in ADDS:
            node, user = user, self.users(user)[0]
        return user, node

    def peel_once(self, node: fx.Node) -> fx.Node | None:
        """One step of `peel`; None at the bottom."""
        if op_name(node) in _SAME_VALUE and node.args and isinstance(node.args[0], fx.Node):
            below = node.args[0]
            if self.shape(below) == self.shape(node) and self.is_float(below):
                return below
        return None

    # Ancestry

    def trace_reach(self, candidates: Iterable[fx.Node]) -> None:
        """Prepare `depends` for these values: one sweep over the graph."""
        self._bits = {node: 1 << i for i, node in enumerate(dict.fromkeys(candidates))}
        for node in self.nodes:
            bits = self._bits.get(node, 0)
            for operand in node.all_input_nodes:
                bits |= self._reach.get(operand, 0)
            if bits and self.data[node]:
                self._reach[node] = bits

    def depends(self, node: fx.Node, candidate: fx.Node) -> bool:
        """Whether ``node`` is ``candidate`` or computed from it (a candidate of `trace_reach`)."""
        return bool(self._reach.get(node, 0) & self._bits[candidate])

    def between(self, start: fx.Node, end: fx.Node) -> list[fx.Node]:
        """The values on the way from ``start`` (left out) to ``end`` (included), in graph order."""
        seen: set[fx.Node] = set()
        stack = [end]
        while stack:
            node = stack.pop()
            if node not in seen and node is not start and self.depends(node, start):
                seen.add(node)
                stack.extend(node.all_input_nodes)
        return sorted(seen, key=self.position.__getitem__)

    @property
    def dominators(self) -> Dominators:
        """The dominator tree of the floating-point data."""
        if self._dominators is None:
            self._dominators = Dominators(self)
        return self._dominators


class Dominators:
    """Immediate dominators of the floating-point data values.

    Operands of an elementwise operator that are smaller than its result (masks, gates, norms' factors) are left out
    as long as one has the result's shape: a stream multiplied by a padding mask is still that stream.
    """

    def __init__(self, flow: Flow) -> None:
        self.parent: dict[fx.Node, fx.Node | None] = {}
        self._depth: dict[fx.Node | None, int] = {None: 0}
        self._jump: dict[fx.Node | None, fx.Node | None] = {None: None}
        for node in flow.nodes:
            if not flow.is_float(node):
                continue
            operands = flow.operands(node)
            if len(operands) > 1 and is_pointwise(node):
                full = [a for a in operands if flow.shape(a) == flow.shape(node)]
                operands = full or operands
            self._insert(node, self._common(operands))

    def _insert(self, node: fx.Node, parent: fx.Node | None) -> None:
        self.parent[node] = parent
        self._depth[node] = self._depth[parent] + 1
        jump = self._jump[parent]
        span = self._depth[parent] - self._depth[jump]
        self._jump[node] = self._jump[jump] if span == self._depth[jump] - self._depth[self._jump[jump]] else parent

    def _common(self, nodes: Sequence[fx.Node]) -> fx.Node | None:
        if not nodes:
            return None
        result: fx.Node | None = nodes[0]
        for node in nodes[1:]:
            result = self._lowest(result, node)
        return result

    def _lowest(self, a: fx.Node | None, b: fx.Node | None) -> fx.Node | None:
        if self._depth[a] < self._depth[b]:
            a, b = b, a
        a = self._lift(a, self._depth[b])
        while a is not b:
            if self._jump[a] is not self._jump[b]:
                a, b = self._jump[a], self._jump[b]
            else:
                a, b = self._up(a), self._up(b)
        return a

    def _lift(self, node: fx.Node | None, depth: int) -> fx.Node | None:
        while self._depth[node] > depth:
            node = self._jump[node] if self._depth[self._jump[node]] >= depth else self._up(node)
        return node

    def _up(self, node: fx.Node | None) -> fx.Node | None:
        return None if node is None else self.parent[node]


def _live(graph: fx.Graph, output: fx.Node) -> list[fx.Node]:
    live = {output}
    for node in reversed(graph.nodes):
        if node in live:
            live.update(node.all_input_nodes)
    return [node for node in graph.nodes if node in live]
