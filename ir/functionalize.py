"""Replace in-place operators by functional ones where that is plain to see, so that no second trace is needed.

``y = x.div_(z)`` becomes ``y = x.div(z)``, and later readers of ``x`` read ``y``. That is right if ``x`` owns its
memory and nothing that may share it is read again; a graph with any other mutation (of a view, of an input) is made
functional by PyTorch, which traces it once more.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .program import Program
from .rewrite import Rewriter

aten = torch.ops.aten


def functionalize(program: Program) -> bool:
    """Remove every in-place operator of a program, or leave the program as it is.

    Returns:
        Whether the program is functional now.
    """
    found = [
        (name, node, twin)
        for name, graph in program.graphs.items()
        for node in graph.nodes
        if is_mutation(node)
        for twin in [functional_twin(node)]
    ]
    order = {node: i for graph in program.graphs.values() for i, node in enumerate(graph.nodes)}
    if any(twin is None or not _owns_memory(node, order) for _, node, twin in found):
        return False
    for name, node, twin in found:
        assert twin is not None
        rewriter = Rewriter(program, "capture", name)
        target = node.args[0]
        assert isinstance(target, fx.Node)
        with rewriter.before(node):
            new = rewriter.call(twin, *node.args, like=node, **node.kwargs)
            new.meta.pop("made_by", None)
            if new.meta["val"].dtype != target.meta["val"].dtype:  # what is written takes the type of what is there
                new = rewriter.call(aten._to_copy.default, new, like=node, dtype=target.meta["val"].dtype)
                new.meta.pop("made_by", None)
        rewriter.replace(node, new)
        for user in [u for u in target.users if u is not new and order.get(u, -1) > order[node]]:
            rewriter.replace_in(user, target, new)
    return True


def is_mutation(node: fx.Node) -> bool:
    """Whether a node writes into one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def functional_twin(node: fx.Node) -> torch._ops.OpOverload | None:
    """The operator that returns what an in-place one writes (``div_.Tensor`` -> ``div.Tensor``), if there is one."""
    op = node.target
    assert isinstance(op, torch._ops.OpOverload)
    first, *others = op._schema.arguments
    name = op._schema.name.partition("::")[2]
    written = [a.name for a in (first, *others) if a.alias_info is not None and a.alias_info.is_write]
    if not name.endswith("_") or written != [first.name]:
        return None
    packet = getattr(getattr(torch.ops, op.namespace), name.removesuffix("_"), None)
    # Not always by the same name: ``pow_.Scalar`` is ``pow.Tensor_Scalar``.
    wanted = [(a.name, _plain(a)) for a in (first, *others)]
    for overload in packet.overloads() if packet is not None else ():
        twin = getattr(packet, overload)
        if [(a.name, _plain(a)) for a in twin._schema.arguments] == wanted and not twin._schema.is_mutable:
            return twin
    return None


def _plain(argument: Any) -> str:
    """An argument's type without what it says about memory."""
    return str(argument.type)


def _may_alias(node: fx.Node) -> bool:
    """Whether a node's result may share memory with an operand; composite operators are not looked into."""
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.op == "call_function"
    schema = node.target._schema
    if schema.is_mutable or any(r.alias_info is not None for r in schema.returns):
        return True
    return torch._C._dispatch_has_kernel_for_dispatch_key(node.target.name(), "CompositeImplicitAutograd")


def _owns_memory(node: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether the value that ``node`` writes into is its own, and no earlier reader may still see the memory."""
    value, link = node.args[0], node
    while isinstance(value, fx.Node) and value.op == "call_function":
        before = [u for u in value.users if u is not link and order[u] < order[node]]
        if any(_may_alias(u) and not is_mutation(u) and u.users for u in before):
            return False
        source = value.args[0] if value.target is operator.getitem else value
        assert isinstance(source, fx.Node)
        if not is_mutation(source):
            return source.op == "call_function" and not _may_alias(source)
        value, link = source.args[0], source  # a chain of in-place operators on one value
    return False
