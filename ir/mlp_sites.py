"""MLP sites: the linear maps of a position-wise branch, plain, gated, or of experts that a router chooses."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from .attention_sites import Missing
from .branches import classify
from .flow import Flow, is_pointwise, is_view, op_name, tensor_of
from .projections import Projection, linear_map, projection_of

EXPERTS = "graphlathe.expert_linear"
GATED = "graphlathe.gated_activation"
_ACTIVATIONS = {
    "relu", "gelu", "silu", "sigmoid", "tanh", "elu", "leaky_relu", "mish", "hardswish", "hardsigmoid", "softplus",
    "relu6", "selu", "celu", "prelu",
}  # fmt: skip
_DEPTH = 40
_LARGEST_BRANCH = 60


@dataclass(frozen=True, eq=False)
class Experts:
    """The experts of a mixture, and how they are chosen.

    Attributes:
        count: how many there are.
        top_k: how many work on each token.
        router: the linear map whose results choose them; None where it was not found.
        gate_up, down: the expert-linear operators into and out of the hidden width.
    """

    count: int
    top_k: int
    router: Projection | None
    gate_up: tuple[fx.Node, ...]
    down: fx.Node


@dataclass(frozen=True, eq=False)
class MlpSite:
    """One MLP.

    Attributes:
        start: the value that it reads.
        output: its result.
        width: its hidden width: input channels of the map that ends it (of one expert, in a mixture).
        up: the linear maps into the hidden width: one, or gate and up; twice the same operator if they are fused.
        down: the linear map out of it; None for a mixture of experts alone.
        activation: the operator between them.
        gated: whether a gate multiplies.
        experts: the experts, if it is a mixture; a shared expert beside them is ``up`` and ``down``.
        why: what it was recognised by.
    """

    start: fx.Node
    output: fx.Node
    width: int
    up: tuple[Projection, ...]
    down: Projection | None
    activation: str
    gated: bool
    experts: Experts | None
    why: str

    @property
    def fused(self) -> bool:
        """Whether gate and up are one linear map."""
        return any(p.fused for p in self.up)

    def __str__(self) -> str:
        kind = "gated" if self.gated else "plain"
        kind += ", gate and up fused" if self.fused and self.gated else ""
        mixture = ""
        if self.experts is not None:
            mixture = f", {self.experts.top_k} of {self.experts.count} experts"
        return f"mlp %{self.start.name} -> %{self.output.name} ({kind}{mixture}): width {self.width}, " + (
            f"{self.activation or 'no activation'}; {self.why}"
        )


def find_mlp(flow: Flow, start: fx.Node, output: fx.Node, nodes: Sequence[fx.Node]) -> list[MlpSite | Missing]:
    """Read one position-wise branch: one MLP, or a mixture of experts and the expert that all tokens share.

    Args:
        flow: the graph's data flow.
        start: the stream value that the branch reads.
        output: its result.
        nodes: its operators in graph order.
    """
    inside = set(nodes)
    maps = [m for m in map(linear_map, nodes) if m is not None and flow.data.get(m.node)]
    experts = _experts(flow, [n for n in nodes if op_name(n) == EXPERTS])
    if experts is None and any("grouped_mm" in op_name(n) or op_name(n) == "topk" for n in nodes):
        return [Missing("mlp", output, "experts are chosen, but not by an operator of ours: run the pass 'raise'")]
    router = experts.router.node if experts is not None and experts.router is not None else None
    maps = [m for m in maps if m.node is not router]
    downs = _ends(flow, output, inside)
    down = next((m for m in downs if m.node is not router), None)
    ups = [m for m in maps if down is not None and m.node is not down.node]
    if down is None and experts is None:
        reason = "no linear map ends it" if maps else "it has no linear map with a known weight"
        return [Missing("mlp", output, reason)]
    if experts is None and not ups:
        return [Missing("mlp", output, "one linear map only, no hidden width")]
    if experts is None:
        assert down is not None
        return [_dense(flow, start, output, nodes, ups, down, None)]
    gated, activation, _ = _middle(flow, nodes, router)
    width = int(experts.down.args[1].meta["val"].shape[1])  # type: ignore[union-attr]
    why = f"{len(experts.gate_up) + 1} expert maps"
    found: list[MlpSite | Missing] = [
        MlpSite(start, output, width, (), None, activation, gated or _halved(experts), experts, why)
    ]
    ups = [m for m in ups if m.out_features != 1]  # a gate of the whole shared expert
    if down is not None and ups:
        shared = [n for n in nodes if op_name(n) != EXPERTS]
        found.append(_dense(flow, start, output, shared, ups, down, router))
    return found


def find_inner_mlps(flow: Flow, known: Collection[fx.Node]) -> list[MlpSite]:
    """MLPs of residual branches that belong to no stream of blocks: within another branch, or in a pooling head.

    Args:
        flow: the graph's data flow.
        known: the linear maps that end MLPs which are known already.
    """
    found: list[MlpSite] = []
    known = set(known)
    for add in flow.nodes:
        operands = [a for a in add.all_input_nodes if flow.is_float(a)]
        if op_name(add) != "add" or len(operands) != 2:
            continue
        for output, start in (operands, operands[::-1]):
            nodes = _between(flow, start, output)
            if nodes and classify(flow, start, nodes).kind == "mlp":
                sites = [s for s in find_mlp(flow, start, output, nodes) if isinstance(s, MlpSite)]
                found += [s for s in sites if s.down is not None and s.down.node not in known]
                known |= {s.down.node for s in sites if s.down is not None}
    return found


def _between(flow: Flow, start: fx.Node, output: fx.Node) -> list[fx.Node]:
    """The operators that compute one value from another and weights only; none if there are more than a branch has."""
    seen, stack, reached = {output}, [output], False
    while stack:
        for operand in stack.pop().all_input_nodes:
            reached = reached or operand is start
            if operand is start or operand in seen or not flow.data.get(operand):
                continue
            if operand.op == "placeholder" or len(seen) > _LARGEST_BRANCH:
                return []
            seen.add(operand)
            stack.append(operand)
    return sorted(seen, key=flow.position.__getitem__) if reached else []


def _dense(
    flow: Flow,
    start: fx.Node,
    output: fx.Node,
    nodes: Sequence[fx.Node],
    ups: list[Projection],
    down: Projection,
    router: fx.Node | None,
) -> MlpSite:
    gated, activation, parts = _middle(flow, nodes, router)
    if not gated:
        ups = [m for m in ups if m.out_features == down.in_features] or ups
        parts = ups[-1:]
    why = f"linear maps {', '.join(str(m) for m in (*parts, down))}"
    return MlpSite(start, output, down.in_features, tuple(parts), down, activation, gated, None, why)


def _experts(flow: Flow, nodes: Sequence[fx.Node]) -> Experts | None:
    """The expert maps of a branch: those whose result another one reads, and the one that ends."""
    if not nodes:
        return None
    down = nodes[-1]
    shape = down.args[1].meta["val"].shape  # type: ignore[union-attr]
    chosen: Any = down.args[2]
    topk = _back(flow, chosen, _chooses)
    router = None if topk is None else projection_of(flow, topk.args[0])  # type: ignore[arg-type]
    if router is None and topk is not None:
        found = _back(flow, topk, lambda n: op_name(n) in ("linear", "addmm", "matmul"))
        router = linear_map(found) if found is not None else None
    picked = chosen.meta["val"].shape[-1] if topk is None else _how_many(topk)
    return Experts(int(shape[0]), int(picked), router, tuple(nodes[:-1]), down)


def _chooses(node: fx.Node) -> bool:
    """Whether an operator picks the largest numbers; a sort of indices only groups the rows of each expert."""
    name = op_name(node)
    value = tensor_of(node.args[0]) if name == "sort" and isinstance(node.args[0], fx.Node) else None
    return name in ("topk", "argmax", "max") or (value is not None and value.dtype.is_floating_point)


def _how_many(choice: fx.Node) -> int:
    """How many are picked: what a top-k says, or how much is kept of a sort."""
    if op_name(choice) == "topk":
        return int(choice.args[1])  # type: ignore[arg-type]
    if op_name(choice) != "sort":
        return 1
    parts = [u for u in choice.users if u.target is operator.getitem]
    kept = [tensor_of(u) for part in parts for u in part.users if op_name(u) == "slice"]
    widths = [t.shape[-1] for t in (*kept, *map(tensor_of, parts)) if t is not None]
    return min(w for w in widths if isinstance(w, int))


def _halved(experts: Experts) -> bool:
    """Whether the first expert map is twice as wide as the second one reads: gate and up in one."""
    down = experts.down.args[1].meta["val"].shape  # type: ignore[union-attr]
    ups = [n.args[1].meta["val"].shape for n in experts.gate_up]  # type: ignore[union-attr]
    return any(u[-1] == 2 * down[1] for u in ups) or len(ups) == 2


def _back(flow: Flow, node: fx.Node, wanted: Callable[[fx.Node], bool]) -> fx.Node | None:
    """The nearest operator of a kind that a value is computed from."""
    seen = {node}
    layer = [node]
    for _ in range(_DEPTH):
        below: list[fx.Node] = []
        for current in layer:
            for operand in current.all_input_nodes:
                if operand.op == "call_function" and operand not in seen:
                    if wanted(operand):
                        return operand
                    seen.add(operand)
                    below.append(operand)
        layer = below
    return None


def _ends(flow: Flow, output: fx.Node, inside: set[fx.Node]) -> list[Projection]:
    """The linear maps from which the result comes through sums, scales, norms and rearrangements."""
    found: list[Projection] = []
    stack, seen = [output], {output}
    while stack:
        node = stack.pop()
        projection = linear_map(node)
        if projection is not None:
            found.append(projection)
            continue
        name = op_name(node)
        if not (is_view(node) or is_pointwise(node) or name in ("layer_norm", "rms_norm", "batch_norm")):
            continue
        for operand in node.all_input_nodes:
            if operand in inside and operand not in seen and flow.data.get(operand):
                seen.add(operand)
                stack.append(operand)
    return sorted(found, key=lambda p: -flow.position[p.node])


def _middle(flow: Flow, nodes: Sequence[fx.Node], router: fx.Node | None) -> tuple[bool, str, list[Projection]]:
    """Whether a gate multiplies, the activation, and the maps of gate and up."""
    activation = ""
    for node in nodes:
        name = op_name(node)
        if name == GATED:
            maps = [projection_of(flow, a) for a in node.args[:2]]  # type: ignore[arg-type]
            return True, str(node.kwargs.get("activation") or node.args[2]), [m for m in maps if m is not None]
        if name in _ACTIVATIONS and not activation:
            source = projection_of(flow, node.args[0])  # type: ignore[arg-type]
            if source is None or source.node is not router:
                activation = name
    for node in nodes:
        if op_name(node) != "mul":
            continue
        pair = [a for a in node.all_input_nodes if flow.data.get(a) and flow.shape(a) == flow.shape(node)]
        if len(pair) != 2:
            continue
        maps = [projection_of(flow, a) for a in pair]
        if maps[0] is None or maps[1] is None or router in (maps[0].node, maps[1].node):
            continue
        apart = maps[0].node is not maps[1].node or maps[0].channels != maps[1].channels
        if apart and maps[0].width == maps[1].width:
            return True, activation, [maps[0], maps[1]]
    return False, activation, []
