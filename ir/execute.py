"""Run a graph node by node, on real tensors.

Slower per node than generated code, and that is the point: intermediates are freed at their last use, weights are
materialised when reached (a model larger than memory runs), values can be observed (calibration), and an error names
the node and its origin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from .errors import GraphlatheError
from .weights import Weight

Observer = Callable[[fx.Node, Any], None]


def last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the values whose last user it is."""
    seen: set[fx.Node] = set()
    dead_after: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        for operand in node.all_input_nodes:
            if operand not in seen:
                seen.add(operand)
                dead_after.setdefault(node, []).append(operand)
    return dead_after


def subgraph_module(name: str, subgraphs: Mapping[str, fx.Graph], weights: Mapping[str, Weight]) -> fx.GraphModule:
    """A nested graph (the body of a ``cond`` or ``scan``) as a callable module, with its own nested graphs in it."""
    graph = subgraphs[name]
    root: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            target = str(node.target)
            root[target] = subgraph_module(target, subgraphs, weights) if target in subgraphs else weights[target].tensor()
    return fx.GraphModule(root, graph, class_name=name)


def run_graph(
    graph: fx.Graph,
    feeds: Mapping[str, Any],
    weights: Mapping[str, Weight],
    subgraphs: Mapping[str, fx.Graph] | None = None,
    *,
    observe: Observer | None = None,
    until: fx.Node | None = None,
    materialised: Mapping[str, torch.Tensor] | None = None,
) -> tuple[Any, ...]:
    """Run a graph.

    Args:
        graph: functional operators; weights are ``get_attr`` nodes named by weight.
        feeds: a value for each placeholder, by the placeholder's target.
        weights: the weights, materialised when reached.
        subgraphs: nested graphs by name.
        observe: called with every node and its value, before the value may be freed.
        until: stop after this node and return ``(its value,)``.
        materialised: tensors to take instead of materialising a weight again.

    Returns:
        The graph's outputs, in order.

    Raises:
        GraphlatheError: an operator failed; the message names the node and where it came from.
    """
    dead_after = last_uses(graph)
    env: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in graph.nodes:
            match node.op:
                case "placeholder":
                    value = feeds[str(node.target)]
                case "get_attr":
                    name = str(node.target)
                    if subgraphs and name in subgraphs:
                        value = subgraph_module(name, subgraphs, weights)
                    elif materialised and name in materialised:
                        value = materialised[name]
                    else:
                        value = weights[name].tensor()
                case "output":
                    return tuple(fx.node.map_arg(node.args[0], env.__getitem__))
                case _:
                    args = fx.node.map_arg(node.args, env.__getitem__)
                    kwargs = fx.node.map_arg(node.kwargs, env.__getitem__)
                    try:
                        value = node.target(*args, **kwargs)  # type: ignore[operator]
                    except GraphlatheError:
                        raise
                    except Exception as error:
                        raise GraphlatheError(
                            f"{node.target} failed: {error}", node=node.name, origin=node.meta.get("origin")
                        ) from error
            if observe is not None:
                observe(node, value)
            if node is until:
                return (value,)
            env[node] = value
            for dead in dead_after.get(node, ()):
                del env[dead]
            if not node.users and node.op != "placeholder":
                env.pop(node, None)
    raise GraphlatheError("the graph has no output node")
