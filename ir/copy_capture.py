"""Copy captured operators into a graph of ours: modes are inlined, bodies of control flow become nested graphs."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx
from torch.fx.node import map_arg

from .errors import ImportModelError
from .program import ORIGIN


def copy_operators(
    module: fx.GraphModule, graph: fx.Graph, env: dict[fx.Node, fx.Node], subgraphs: dict[str, fx.Graph]
) -> None:
    """Copy operator nodes; nested graphs of control flow move into ``subgraphs``; captured modes are inlined."""
    for old in module.graph.nodes:
        if old.op == "call_function":
            inner = _mode_region(old, module)
            if inner is not None:
                body, operands = inner
                env[old] = _inline(body, operands, graph, env, subgraphs)  # type: ignore[assignment]
                continue
            if _is_projection(old, env):
                env[old] = env[old.args[0]][old.args[1]]  # type: ignore[index]
                continue
            new = graph.create_node(
                "call_function",
                old.target,
                map_arg(old.args, env.__getitem__),
                map_arg(old.kwargs, env.__getitem__),
                old.name,
            )
            new.meta["val"] = old.meta.get("val")
            new.meta[ORIGIN] = origin_of(old)
            env[old] = new
        elif old.op == "get_attr" and isinstance(getattr(module, str(old.target), None), fx.GraphModule):
            if any(not _is_mode(user) for user in old.users):
                name = str(old.target)
                while name in subgraphs:
                    name += "_"
                subgraphs[name] = _nested(getattr(module, str(old.target)), subgraphs)
                env[old] = graph.create_node("get_attr", name)
        elif old.op == "get_attr":
            raise ImportModelError(f"the graph reads an attribute '{old.target}' that is no weight", node=old.name)


def _nested(module: fx.GraphModule, subgraphs: dict[str, fx.Graph]) -> fx.Graph:
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for old in module.graph.find_nodes(op="placeholder"):
        env[old] = graph.placeholder(str(old.target))
        env[old].meta["val"] = old.meta.get("val")
    copy_operators(module, graph, env, subgraphs)
    output = next(iter(module.graph.find_nodes(op="output")))
    graph.output(map_arg(output.args[0], env.__getitem__))
    return graph


def enables_autocast(module: fx.GraphModule) -> bool:
    """Whether a captured graph, or a nested one, holds a region with autocast switched on: its casts are implicit."""
    for node in module.graph.nodes:
        if node.op == "call_function" and str(node.target) == "wrap_with_autocast" and bool(node.args[2]):
            return True
        inner = getattr(module, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(inner, fx.GraphModule) and enables_autocast(inner):
            return True
    return False


_MODES = ("wrap_with_set_grad_enabled", "wrap_with_autocast")


def _is_mode(node: fx.Node) -> bool:
    return node.op == "call_function" and str(node.target) in _MODES


def _mode_region(node: fx.Node, module: fx.GraphModule) -> tuple[fx.GraphModule, Sequence[Any]] | None:
    """The body and operands of a region that only sets a mode; an enabled autocast was made explicit before."""
    if not _is_mode(node):
        return None
    position = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr")
    body = getattr(module, str(node.args[position].target))  # type: ignore[union-attr]
    return body, node.args[position + 1 :]


def _inline(
    body: fx.GraphModule,
    operands: Sequence[Any],
    graph: fx.Graph,
    env: dict[fx.Node, fx.Node],
    subgraphs: dict[str, fx.Graph],
) -> tuple[Any, ...]:
    inner: dict[fx.Node, fx.Node] = {}
    for placeholder, operand in zip(body.graph.find_nodes(op="placeholder"), operands, strict=True):
        inner[placeholder] = env[operand] if isinstance(operand, fx.Node) else operand
    copy_operators(body, graph, inner, subgraphs)
    output = next(iter(body.graph.find_nodes(op="output")))
    return tuple(map_arg(output.args[0], inner.__getitem__))  # type: ignore[arg-type]


def _is_projection(node: fx.Node, env: Mapping[fx.Node, Any]) -> bool:
    """Whether a node picks one result of an inlined region."""
    return (
        node.target is operator.getitem
        and isinstance(node.args[0], fx.Node)
        and isinstance(env.get(node.args[0]), tuple)
    )


def origin_of(node: fx.Node) -> str:
    """The module path that a captured node came from, or the name that a front end recorded for it."""
    recorded = (node.meta.get("custom") or {}).get(ORIGIN)
    if recorded:
        return str(recorded)
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(next(reversed(stack.values()))[0])
    if path.startswith("_empty_nn_module_stack"):  # torch.export's word for "no module"
        return ""
    return path.removeprefix("L['self'].").removeprefix("L__self__").removeprefix(".")
