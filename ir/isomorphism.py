"""Isomorphism of parts of a graph by Merkle hash: exact, and linear in the number of nodes.

A value's digest is that of its operator, its attributes and its operands' digests. Operands are ordered, except those
of commutative operators; weights count by shape and dtype, not by name or contents; the part's input counts as ``IN``;
symbolic sizes count by expression; operators that keep a value as it is (inactive dropout, copies) do not count.

Values outside the part (masks, tables, another stack's output) are hashed once for
the whole graph, so that two parts are equal only if they read equal side values.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from hashlib import blake2b
from typing import Any

import torch
from torch import fx

from .dims import Dims
from .flow import keeps_value, op_name, reads_shape_only, shape_key

_COMMUTATIVE = {
    "add",
    "mul",
    "maximum",
    "minimum",
    "logical_and",
    "logical_or",
    "__and__",
    "__or__",
    "py.add",
    "py.mul",
}


class Hasher:
    """Digests of the values of one graph.

    Args:
        inputs: the graph's placeholders, in order.
        dims: gives symbolic sizes the users' names.
        subgraphs: nested graphs of control flow, by name.
    """

    def __init__(self, inputs: Collection[fx.Node], dims: Dims, subgraphs: Mapping[str, fx.Graph]) -> None:
        self._inputs = {node: i for i, node in enumerate(inputs)}
        self._names = dims.names
        self._subgraphs = subgraphs
        self._outside: dict[fx.Node, str] = {}
        self._texts: dict[Any, str] = {}

    def part(self, start: fx.Node, end: fx.Node, inside: Collection[fx.Node]) -> str:
        """The digest of the part from ``start`` to ``end`` whose values are ``inside``."""
        memo = {start: self._digest(("IN", self._shape(start)))}
        return self._hash(end, memo, inside)

    def _hash(self, end: fx.Node, memo: dict[fx.Node, str], inside: Collection[fx.Node] | None) -> str:
        stack = [end]
        while stack:
            node = stack[-1]
            if node in memo:
                stack.pop()
                continue
            if inside is not None and node not in inside:
                memo[node] = self._hash(node, self._outside, None)
                continue
            waiting = [a for a in node.all_input_nodes if a not in memo]
            if waiting:
                stack.extend(waiting)
                continue
            memo[node] = self._of(node, memo)
            stack.pop()
        return memo[end]

    def _of(self, node: fx.Node, memo: Mapping[fx.Node, str]) -> str:
        if node.op == "placeholder":
            return self._digest(("INPUT", self._inputs.get(node, -1), self._shape(node)))
        if node.op == "get_attr":
            nested = self._subgraphs.get(str(node.target))
            return self._graph(nested) if nested is not None else self._digest(("WEIGHT", self._shape(node)))
        value = node.meta.get("val")
        if keeps_value(node):
            return memo[node.args[0]]  # type: ignore[index]
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self._digest(("SIZE", self._text(value)))
        name = op_name(node)
        if reads_shape_only(name):
            plain = [repr(a) for a in node.args if not isinstance(a, (fx.Node, list, tuple))]
            return self._digest((name, self._shape(node), plain))
        args = [self._argument(a, memo) for a in node.args]
        if name in _COMMUTATIVE and len(args) == 2:
            args.sort()
        kwargs = sorted((key, self._argument(a, memo)) for key, a in node.kwargs.items())
        return self._digest((name, args, kwargs))

    def _argument(self, argument: Any, memo: Mapping[fx.Node, str]) -> str:
        if isinstance(argument, fx.Node):
            return memo[argument]
        if isinstance(argument, (list, tuple)):
            return "(" + ",".join(self._argument(a, memo) for a in argument) + ")"
        if isinstance(argument, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self._text(argument)
        return repr(argument)

    def _shape(self, node: fx.Node) -> str:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return str(type(value).__name__)
        return f"{value.dtype}[{','.join(self._expression(s) for s in shape_key(node))}]"

    def _text(self, size: Any) -> str:
        return self._expression(size.node.expr)

    def _expression(self, expr: Any) -> str:
        if isinstance(expr, int):
            return str(expr)
        text = self._texts.get(expr)
        if text is None:
            text = self._texts[expr] = str(expr.xreplace(self._names))
        return text

    def _graph(self, graph: fx.Graph) -> str:
        memo: dict[fx.Node, str] = {}
        for i, node in enumerate(graph.nodes):
            if node.op == "placeholder":
                memo[node] = f"ARG{i}"
            elif node.op == "output":
                return self._digest(("GRAPH", self._argument(node.args[0], memo)))
            else:
                memo[node] = self._of(node, memo)
        return "GRAPH"

    @staticmethod
    def _digest(value: object) -> str:
        return blake2b(repr(value).encode(), digest_size=8).hexdigest()
