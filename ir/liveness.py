"""Peak activation bytes by liveness, in graph order.

Inputs and outputs live to the end, every other value from its operator to its last reader; while an operator runs, its
operands and its results are all there. Views share the storage of what they look at, and keep it alive. Weights are not
activations, nor is a view of a weight.

Sizes are symbolic, so the peak is a maximum of sums. Each sum is kept as a polynomial (monomial -> coefficient), and a
sum that another one bounds term by term is dropped: of the thousands of moments in a deep model a handful remain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import sympy
import torch
from torch import fx

from .cost_rules import tensors
from .dims import size_expr
from .flow import op_name

Polynomial = dict[Any, int]

_ALIASES = {
    "view", "_unsafe_view", "_reshape_alias", "view_as", "expand", "expand_as", "permute", "transpose", "t", "mT",
    "unsqueeze", "squeeze", "slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind", "getitem",
    "alias", "detach", "diagonal", "unfold", "as_strided", "swapaxes", "swapdims", "movedim", "moveaxis", "numpy_T",
    "lift_fresh", "unsafe_split", "unsafe_chunk", "tensor_split", "real", "imag", "view_as_real", "view_as_complex",
    "dropout", "feature_dropout", "alpha_dropout",
}  # fmt: skip
_ALIASES_IF_CONTIGUOUS = {"reshape", "flatten", "unflatten", "contiguous", "reshape_as"}
_ALIASES_IF_SAME_TYPE = {"to", "type_as", "float"}


def shares_storage(node: fx.Node) -> bool:
    """Whether an operator's result is a view of its first operand (or that operand itself)."""
    name = op_name(node)
    if name in _ALIASES:
        return True
    source = node.args[0] if node.args else None
    before = source.meta.get("val") if isinstance(source, fx.Node) else None
    after = node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    if name in _ALIASES_IF_CONTIGUOUS:
        return is_contiguous(before)
    return name in _ALIASES_IF_SAME_TYPE and before.dtype == after.dtype


def is_contiguous(value: torch.Tensor) -> bool:
    """Whether a value is laid out row by row, compared as expressions (asking PyTorch would add guards)."""
    expected: Any = sympy.Integer(1)
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        length = size_expr(size)
        if length != 1:
            step = size_expr(stride)
            if step != expected and sympy.expand(step - expected) != 0:
                return False
        expected = expected * length
    return True


def storage_bytes(value: Any, terms: Callable[[torch.Tensor], Polynomial]) -> Polynomial:
    """The bytes of all tensors in a value."""
    total: Polynomial = {}
    for tensor in tensors(value):
        for monomial, count in terms(tensor).items():
            total[monomial] = total.get(monomial, 0) + count
    return total


def peaks(
    graph: fx.Graph,
    terms: Callable[[torch.Tensor], Polynomial],
    nested: Mapping[fx.Node, list[Polynomial]],
) -> list[Polynomial]:
    """The sums of live bytes that can be the largest.

    Args:
        graph: the graph.
        terms: a tensor's bytes.
        nested: for each control-flow operator, what its nested graphs need at most, inputs and outputs left out.
    """
    owner = _owners(graph)
    last: dict[fx.Node, fx.Node] = {}
    forever: set[fx.Node] = {owner[n] for n in graph.find_nodes(op="placeholder")}
    for node in graph.nodes:
        for operand in node.all_input_nodes:
            last[owner[operand]] = node
        if node.op == "output":
            forever |= {owner[operand] for operand in node.all_input_nodes}
        last.setdefault(owner[node], node)
    dying: dict[fx.Node, list[fx.Node]] = {}
    for value, node in last.items():
        if value not in forever:
            dying.setdefault(node, []).append(value)
    live: Polynomial = {}
    found: dict[frozenset[tuple[Any, int]], Polynomial] = {}
    size: dict[fx.Node, Polynomial] = {}
    for node in graph.nodes:
        if owner[node] is node and node.op in ("placeholder", "call_function"):
            size[node] = storage_bytes(node.meta.get("val"), terms)
            _add(live, size[node], 1)
        for extra in nested.get(node, [{}] if node.op == "call_function" else []):
            moment = dict(live)
            _add(moment, extra, 1)
            found.setdefault(frozenset(moment.items()), moment)
        for value in dying.get(node, ()):
            _add(live, size.get(value, {}), -1)
    return undominated(found.values()) if found else [dict(live)]


def _owners(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """For each node, the node whose storage it uses."""
    owner: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        source = node.args[0] if node.op == "call_function" and node.args else None
        owner[node] = owner[source] if isinstance(source, fx.Node) and shares_storage(node) else node
    return owner


def _add(total: Polynomial, part: Polynomial, sign: int) -> None:
    for monomial, count in part.items():
        value = total.get(monomial, 0) + sign * count
        if value:
            total[monomial] = value
        else:
            total.pop(monomial, None)


def undominated(sums: Iterable[Polynomial]) -> list[Polynomial]:
    """The sums that no other one bounds term by term (sizes are positive, and so are their monomials)."""
    kept: list[Polynomial] = []
    for moment in sorted(sums, key=lambda p: sum(p.values()), reverse=True):
        if not any(_bounds(other, moment) for other in kept):
            kept.append(moment)
    return kept


def _bounds(a: Polynomial, b: Polynomial) -> bool:
    return all(a.get(m, 0) >= b.get(m, 0) for m in {**a, **b})
