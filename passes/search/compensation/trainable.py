"""Which weights of a graph are parameters, and which are constants that training must leave alone.

Nothing in a graph says so. What is read here as a parameter is a weight in one of these places, where the other
operand is an *activation* (floating data that comes from a float input, or from a table that was looked up):

- the matrix or bias of a linear map or convolution, of a mixture's experts, of a recurrent layer;
- the scale or bias of a normalisation, also spelled out: a vector that multiplies activations or is added to them;
- a table whose rows are looked up, unless the rows multiply activations (then they are sines and cosines of positions);
- the sinks of an attention.

Running statistics, masks, tables of positions, frequencies, epsilons, integer and quantised weights are in none.
Single numbers are left out (a learned temperature cannot be told from an epsilon), and so are tables that are added as
a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from ....ir.flow import Flow, is_pointwise, is_view, op_name, reads_shape_only, tensor_of
from ....ir.program import Program

_LOOKUPS = {"embedding": 0, "embedding_bag": 0, "_embedding_bag": 0, "index_select": 0, "index": 0}
# Operator: the place of the activation, and of the parameters.
_PLACES: dict[str, tuple[int, tuple[int, ...]]] = {
    "linear": (0, (1, 2)),
    "addmm": (1, (0, 2)),
    "baddbmm": (1, (0, 2)),
    "mm": (0, (1,)),
    "bmm": (0, (1,)),
    "matmul": (0, (1,)),
    "layer_norm": (0, (2, 3)),
    "native_layer_norm": (0, (2, 3)),
    "rms_norm": (0, (2,)),
    "_fused_rms_norm": (0, (2,)),
    "group_norm": (0, (2, 3)),
    "native_group_norm": (0, (1, 2)),
    "batch_norm": (0, (1, 2)),
    "instance_norm": (0, (1, 2)),
    "_native_batch_norm_legit_no_training": (0, (1, 2)),
    "lstm": (0, (2,)),
    "gru": (0, (2,)),
    "rnn_tanh": (0, (2,)),
    "rnn_relu": (0, (2,)),
    "_grouped_mm": (0, (1,)),
    "graphlathe.expert_linear": (0, (1, 3)),
}
_PRODUCTS = {"matmul", "mm", "bmm"}
_ATTENTION = "graphlathe.attention"
_SPREADS = {"repeat_interleave", "repeat", "tile", "cat", "concat", "stack"}
_ROTARY = "graphlathe.rotary_embedding"
_DEPTH = 8


def trainable_weights(program: Program, *, tables: bool = True) -> list[str]:
    """The names of the main entry's parameters, in the order of their first use (see the module's text).

    Args:
        program: a program; it is not changed.
        tables: whether tables whose rows are looked up are among them, with what shares their numbers (tied heads).
    """
    flow = Flow(program.main)
    active = _activations(flow)
    found: dict[str, None] = {}
    for node in flow.nodes:
        for operand in _parameters(flow, node, active):
            weight = _weight_below(operand)
            if weight is None or str(weight.target) not in program.weights:
                continue
            own = program.weights[str(weight.target)]
            if own.dtype.is_floating_point and own.numel > 1:
                found[str(weight.target)] = None
    if tables:
        return list(found)
    looked_up = [program.weights[name] for name in _tables(flow) & found.keys()]
    return [name for name in found if not any(program.weights[name].shares_storage(table) for table in looked_up)]


def _tables(flow: Flow) -> set[str]:
    """Weights whose rows are looked up."""
    below = (_weight_below(node.args[_LOOKUPS[op_name(node)]]) for node in flow.nodes if _is_lookup(node))
    return {str(weight.target) for weight in below if weight is not None}


def _activations(flow: Flow) -> set[fx.Node]:
    """Floating values made from a float input or from rows that were looked up."""
    active: set[fx.Node] = set()
    for node in flow.nodes:
        value = tensor_of(node)
        if value is None or not value.is_floating_point():
            continue
        if node.op == "placeholder":
            if value.dim() > 1:
                active.add(node)
        elif node.op == "call_function" and not reads_shape_only(op_name(node)):
            made = any(a in active for a in node.all_input_nodes) or _is_lookup(node)
            active.update([node] if made else [])
    return active


def _is_lookup(node: fx.Node) -> bool:
    place = _LOOKUPS.get(op_name(node))
    return place is not None and _weight_below(node.args[place]) is not None


def _parameters(flow: Flow, node: fx.Node, active: set[fx.Node]) -> Iterator[Any]:
    """The operands of an operator that are parameters if they are weights."""
    name = op_name(node)
    if name in _PLACES:
        first, places = _PLACES[name]
        if node.args[first] in active:
            for place in places:
                given = node.args[place] if place < len(node.args) else None
                yield from given if isinstance(given, (tuple, list)) else (given,)
        if name in _PRODUCTS and node.args[1] in active and not _is_vector(node.args[0]):
            yield node.args[0]
    elif name.startswith("conv"):
        if node.args[0] in active:
            yield from node.args[1:3]
    elif name == "einsum":
        yield from (a for a in node.all_input_nodes if a not in active)
    elif _is_lookup(node):
        if not _multiplies(flow, node, active):
            yield node.args[_LOOKUPS[name]]
    elif name == _ATTENTION:
        yield node.kwargs.get("sinks")
    elif name in ("add", "mul") and any(a in active for a in node.all_input_nodes):
        yield from (a for a in node.args[:2] if isinstance(a, fx.Node) and a not in active and _is_vector(a))


def _multiplies(flow: Flow, node: fx.Node, active: set[fx.Node]) -> bool:
    """Whether rows of a table become factors of activations: sines and cosines of positions."""
    rows, stack = {node}, [node]
    below = _computed_from(flow, node)
    while stack:
        for user in flow.users(stack.pop()):
            name = op_name(user)
            factors = user.all_input_nodes if name in ("mul", _ROTARY) else ()
            # What is computed from the rows themselves (a norm's factor) says nothing.
            if any(a in active and a not in below for a in factors):
                return True
            if (is_view(user) or name in _SPREADS) and user not in rows:
                rows.add(user)
                stack.append(user)
    return False


def _computed_from(flow: Flow, node: fx.Node) -> set[fx.Node]:
    found = {node}
    for later in flow.nodes[flow.position[node] :]:
        if not found.isdisjoint(later.all_input_nodes):
            found.add(later)
    return found


def _is_vector(node: Any) -> bool:
    """Whether a value has one dimension above size one: a scale or bias for each channel."""
    value = tensor_of(node) if isinstance(node, fx.Node) else None
    return value is not None and sum(not (isinstance(s, int) and s == 1) for s in value.shape) == 1


def _weight_below(value: Any) -> fx.Node | None:
    """The weight that a value is, through casts, rearrangements, and a number added to it (``1 + scale``)."""
    for _ in range(_DEPTH):
        if not isinstance(value, fx.Node) or value.op == "get_attr":
            return value if isinstance(value, fx.Node) else None
        shifted = op_name(value) == "add" and is_pointwise(value) and len(value.all_input_nodes) == 1
        if not shifted and not is_view(value):
            return None
        value = next(iter(value.all_input_nodes), None)
    return None
