"""Run a graph node by node, on real tensors.

Slower per node than generated code, and that is the point: intermediates are freed at their last use, weights are
materialised when reached (a model larger than memory runs), values can be observed (calibration), and an error names
the node and its origin.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from .errors import GraphlatheError
from .weights import Weight

Observer = Callable[[fx.Node, Any], None]


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """Copy a graph with its metadata; linear in the number of nodes."""
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        env[node] = new.node_copy(node, env.__getitem__)
    return new


def last_uses(
    graph: fx.Graph, wanted: Collection[fx.Node] | None = None, alias: Mapping[fx.Node, fx.Node] | None = None
) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the values whose last user it is (among the ``wanted`` nodes, reading through ``alias``)."""
    seen: set[fx.Node] = set()
    dead_after: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        if wanted is not None and node not in wanted:
            continue
        operands = [alias[node]] if alias and node in alias else node.all_input_nodes
        for operand in operands:
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
            root[target] = (
                subgraph_module(target, subgraphs, weights) if target in subgraphs else weights[target].tensor()
            )
    # A copy: a module stays reachable from its graph, and would keep these tensors alive.
    return fx.GraphModule(root, copy_graph(graph), class_name=name)


def memory_of(value: Any) -> set[int]:
    """Where a tensor's numbers lie; empty for what is no tensor."""
    return {value.untyped_storage().data_ptr()} - {0} if isinstance(value, torch.Tensor) else set()


def as_traced(value: Any) -> Any:
    """An input with the strides that graphs are traced for: a view of another layout would be refused."""
    return value.contiguous() if isinstance(value, torch.Tensor) and value.layout is torch.strided else value


def own_memory(values: Sequence[Any], held: Collection[int]) -> tuple[Any, ...]:
    """Outputs that a caller may write into: contiguous, and sharing memory with nothing else.

    In a functional graph a copy changes nothing, so passes remove copies; here those come back that a caller can see.

    Args:
        values: a graph's outputs.
        held: the memory of its inputs and weights (`memory_of`).
    """
    taken = set(held)
    owned: list[Any] = []
    for value in values:
        if isinstance(value, torch.Tensor) and value.layout is torch.strided:
            value = value.contiguous()
            if memory_of(value) & taken:
                value = value.clone()
            taken |= memory_of(value)
        owned.append(value)
    return tuple(owned)


def needed(
    graph: fx.Graph, given: Collection[fx.Node] = (), alias: Mapping[fx.Node, fx.Node] | None = None
) -> set[fx.Node]:
    """The nodes that the outputs need, when ``given`` values are known and ``alias`` ones are read elsewhere."""
    alias = alias or {}
    wanted: set[fx.Node] = set()
    stack = [next(iter(graph.find_nodes(op="output")))]
    while stack:
        node = stack.pop()
        if node in wanted:
            continue
        wanted.add(node)
        if node in alias:
            stack.append(alias[node])
        elif node not in given:
            stack.extend(node.all_input_nodes)
    return wanted


def run_graph(
    graph: fx.Graph,
    feeds: Mapping[str, Any],
    weights: Mapping[str, Weight],
    subgraphs: Mapping[str, fx.Graph] | None = None,
    *,
    observe: Observer | None = None,
    given: Mapping[fx.Node, Any] | None = None,
    alias: Mapping[fx.Node, fx.Node] | None = None,
    held: set[int] | None = None,
) -> tuple[Any, ...]:
    """Run a graph.

    With ``given`` and ``alias`` a change can be tried without rewriting: only what the outputs still need is run, so
    that trying a change late in the graph does not repeat what comes before it.

    Args:
        graph: functional operators; weights are ``get_attr`` nodes named by weight.
        feeds: a value for each placeholder, by the placeholder's target.
        weights: the weights, materialised when reached.
        subgraphs: nested graphs by name.
        observe: called with every node and its value, before the value may be freed.
        given: values that are known already; their nodes are not run.
        alias: nodes that take another, earlier node's value instead of being run.
        held: collects the memory of inputs and weights, for `own_memory`.

    Returns:
        The graph's outputs, in order. They may share memory with inputs, weights, and one another.

    Raises:
        GraphlatheError: an operator failed; the message names the node and where it came from.
    """
    given, alias = given or {}, alias or {}
    wanted = needed(graph, given, alias) if given or alias else None
    dead_after = last_uses(graph, wanted, alias)
    env: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in graph.nodes:
            if wanted is not None and node not in wanted:
                continue
            match node.op:
                case _ if node in given:
                    value = given[node]
                case _ if node in alias:
                    value = env[alias[node]]
                case "placeholder":
                    value = feeds[str(node.target)]
                case "get_attr":
                    name = str(node.target)
                    if subgraphs and name in subgraphs:
                        value = subgraph_module(name, subgraphs, weights)
                    else:
                        value = weights[name].tensor()
                case "output":
                    return tuple(map_arg(node.args[0], env.__getitem__))
                case _:
                    args = map_arg(node.args, env.__getitem__)
                    kwargs = map_arg(node.kwargs, env.__getitem__)
                    try:
                        value = node.target(*args, **kwargs)  # type: ignore[operator]
                    except GraphlatheError:
                        raise
                    except Exception as error:
                        raise GraphlatheError(
                            f"{node.target} failed: {error}",
                            node=node.name,
                            origin=node.meta.get("origin"),
                            remedy=_remedy(node, args),
                        ) from error
            if held is not None and (node.op in ("placeholder", "get_attr") or node in given):
                held |= memory_of(value)
            if observe is not None:
                observe(node, value)
            env[node] = value
            for dead in dead_after.get(node, ()):
                env.pop(dead, None)
            if not node.users:
                del env[node]
    raise GraphlatheError("the graph has no output node")


def _remedy(node: fx.Node, args: Sequence[Any]) -> str | None:
    """What to do about an operator that failed, where its operands tell."""
    if node.target is torch.ops.aten.embedding.default and args[1].numel() and int(args[1].max()) >= len(args[0]):
        return (
            f"{int(args[1].max())} was looked up in a table of {len(args[0])} rows: give smaller ids, or, where the "
            "table is of positions, shorter inputs"
        )
    return None
