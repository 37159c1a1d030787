"""Attention sites: an attention operator with its projections, heads, positions and mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .flow import Flow, is_pointwise, is_view, op_name, tensor_of
from .index_functions import IndexFunctions
from .masks import Mask, read_mask
from .program import ORIGIN
from .projections import Projection, linear_map, projection_of

OPERATORS = ("scaled_dot_product_attention", "graphlathe.attention")
_ROTARY = "graphlathe.rotary_embedding"
_DEPTH = 40


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """One attention.

    Attributes:
        node: the attention operator.
        heads: query heads.
        kv_heads: heads of keys and values; fewer than `heads` when groups share them, 1 for multi-query attention.
        head_dim: channels of a query or key head.
        value_dim: channels of a value head.
        query, key, value, output: the linear maps around it, where each is found. One fused map appears three times,
            each time with its own channels.
        cross: whether keys come from another stack.
        rotary_dim: how many channels of each head carry rotary positions; 0 for none.
        mask: what hides keys from queries, and what is added to scores.
        softcap: bound of the scores, or None.
        sinks: whether each head has a sink.
        why: what it was recognised by.
    """

    node: fx.Node
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    query: Projection | None
    key: Projection | None
    value: Projection | None
    output: Projection | None
    cross: bool
    rotary_dim: int
    mask: Mask
    softcap: float | None
    sinks: bool
    why: str

    @property
    def kind(self) -> str:
        """``self`` or ``cross``, and how heads share keys: ``multi-head``, ``grouped`` or ``multi-query``."""
        shared = "multi-head" if self.heads == self.kv_heads else "multi-query" if self.kv_heads == 1 else "grouped"
        return f"{'cross' if self.cross else 'self'}, {shared}"

    def __str__(self) -> str:
        heads = f"{self.heads} heads of {self.head_dim}"
        if self.kv_heads != self.heads:
            heads += f" on {self.kv_heads} of keys and values"
        extras = [f"rotary {self.rotary_dim}"] if self.rotary_dim else []
        extras += [str(self.mask)]
        extras += [f"soft cap {self.softcap:g}"] if self.softcap is not None else []
        extras += ["sinks"] if self.sinks else []
        return f"attention %{self.node.name} ({self.kind}): {heads}, {', '.join(extras)}; {self.why}"


@dataclass(frozen=True)
class Missing:
    """Something that looks like a site but was not recognised.

    Attributes:
        kind: attention or mlp.
        node: where.
        reason: what was missing.
    """

    kind: str
    node: fx.Node
    reason: str

    def __str__(self) -> str:
        origin = self.node.meta.get(ORIGIN)
        return f"no {self.kind} site at %{self.node.name}{f' (from {origin})' if origin else ''}: {self.reason}"


def is_attention(node: fx.Node) -> bool:
    """Whether a node is an attention operator."""
    return op_name(node) in OPERATORS


def find_attention(flow: Flow, functions: IndexFunctions, cross: Sequence[fx.Node]) -> list[AttentionSite | Missing]:
    """All attention operators of a graph, and every softmax of products that is none yet.

    Args:
        flow: the graph's data flow.
        functions: its index functions, to read masks.
        cross: nodes of branches that are known to attend to another stack.
    """
    found: list[AttentionSite | Missing] = []
    elsewhere = set(cross)
    for node in flow.nodes:
        if is_attention(node):
            found.append(_site(flow, functions, node, node in elsewhere))
        elif "softmax" in op_name(node) and _follows_product(flow, node):
            reason = "softmax of a product, but no attention operator: run the pass 'raise' (or ask it --why-not)"
            found.append(Missing("attention", node, reason))
    return found


def _follows_product(flow: Flow, node: fx.Node) -> bool:
    """Whether scores come from a product of two activations and the weights go into another."""
    current: Any = node.args[0]
    for _ in range(_DEPTH):
        if op_name(current) in ("matmul", "bmm", "baddbmm", "einsum"):
            return sum(bool(flow.data.get(a)) for a in current.all_input_nodes) > 1 and _into_product(node)
        operands = [a for a in current.all_input_nodes if flow.data.get(a)]
        if not operands or not (is_pointwise(current) or is_view(current)):
            return False
        current = max(operands, key=lambda a: _rank(a))
    return False


def _into_product(node: fx.Node) -> bool:
    stack, seen = [node], set[fx.Node]()
    while stack:
        for user in stack.pop().users:
            if op_name(user) in ("matmul", "bmm", "einsum"):
                return True
            if (is_view(user) or is_pointwise(user)) and user not in seen and len(seen) < _DEPTH:
                seen.add(user)
                stack.append(user)
    return False


def _rank(node: fx.Node) -> int:
    value = tensor_of(node)
    return value.dim() if value is not None else -1


def _argument(node: fx.Node, position: int, *names: str) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return next((node.kwargs[name] for name in names if name in node.kwargs), None)


def _site(flow: Flow, functions: IndexFunctions, node: fx.Node, cross: bool) -> AttentionSite | Missing:
    q, k, v = (a.meta["val"] for a in node.args[:3])  # type: ignore[union-attr]
    head_dim, value_dim = q.shape[-1], v.shape[-1]
    if not isinstance(head_dim, int) or not isinstance(value_dim, int):
        return Missing("attention", node, "the size of a head depends on an input's size")
    maps = [projection_of(flow, a) for a in node.args[:3]]  # type: ignore[arg-type]
    heads, kv_heads = (_heads(x, m) for x, m in ((q, maps[0]), (k, maps[1])))
    if heads is None:
        return Missing(
            "attention", node, "its heads are folded into the batch, and no linear map says how many they are"
        )
    kv_heads = heads if kv_heads is None else kv_heads
    mask_node = _argument(node, 3, "attn_mask", "mask")
    mask = Mask() if mask_node is None else read_mask(functions, mask_node, flow.data)
    if node.kwargs.get("is_causal") or (op_name(node) == OPERATORS[0] and _argument(node, 5, "is_causal")):
        mask = Mask(causal=True, exactly_causal=mask_node is None, window=mask.window, chunk=mask.chunk,
                    padding=mask.padding, bias=mask.bias, other=mask.other)  # fmt: skip
    output = _output(flow, node)
    named = {"query": maps[0], "key": maps[1], "value": maps[2], "output": output}
    lost = [name for name, found in named.items() if found is None]
    why = f"{op_name(node)}, projections {', '.join(str(m) for m in named.values() if m is not None) or 'unknown'}"
    if lost:
        why += f" (no linear map found for {', '.join(lost)})"
    return AttentionSite(
        node=node, heads=heads, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim, query=maps[0], key=maps[1],
        value=maps[2], output=output, cross=cross,
        rotary_dim=_rotary(flow, node.args[0]), mask=mask,  # type: ignore[arg-type]
        softcap=node.kwargs.get("softcap"), sinks=node.kwargs.get("sinks") is not None, why=why,  # type: ignore[arg-type]
    )  # fmt: skip


def _heads(value: torch.Tensor, projection: Projection | None) -> int | None:
    """The axis before positions, unless heads are folded into the batch: then what the projection's width says."""
    if value.dim() >= 4 and isinstance(value.shape[-3], int):
        return int(value.shape[-3])
    width = value.shape[-1]
    if projection is not None and projection.width and isinstance(width, int) and projection.width % width == 0:
        return projection.width // width
    return None


def _rotary(flow: Flow, node: fx.Node) -> int:
    current: Any = node
    for _ in range(_DEPTH):
        if not isinstance(current, fx.Node) or current.op != "call_function" or linear_map(current) is not None:
            return 0
        if op_name(current) == _ROTARY:
            return int(current.kwargs["rotary_dim"])  # type: ignore[arg-type]
        if op_name(current) in ("cat", "concat"):
            parts = [a for a in current.args[0] if isinstance(a, fx.Node)]  # type: ignore[union-attr]
            return max((_rotary(flow, part) for part in parts), default=0)
        operands = [a for a in current.all_input_nodes if flow.data.get(a)]
        if not operands:
            return 0
        current = operands[0]
    return 0


def _output(flow: Flow, node: fx.Node) -> Projection | None:
    """The first linear map that reads the result, through rearrangements and elementwise operators."""
    current = node
    for _ in range(_DEPTH):
        users = flow.users(current)
        found = next((m for m in map(linear_map, users) if m is not None), None)
        if found is not None:
            return found
        through = [u for u in users if is_view(u) or is_pointwise(u) or op_name(u) in ("layer_norm", "rms_norm", "cat")]
        if not through:
            return None
        current = through[0]
    return None
