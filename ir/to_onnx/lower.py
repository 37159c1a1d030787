"""Decompose one operator by PyTorch's own tables, on the symbolic values of its operands.

The stock exporter decomposes the whole program before it translates, which takes most of its time. Few operators lack
a translation, and isomorphic blocks repeat them: each distinct call is traced once.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import make_fx
from torch.onnx._internal.exporter import _decomp, _registration

from ..program import Program


def _adaptive_avg_pool1d(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    return torch.ops.aten._adaptive_avg_pool2d(x.unsqueeze(-2), [1, *size]).squeeze(-2)


def _rms_norm(
    x: torch.Tensor, shape: Sequence[int], weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # as PyTorch's kernel computes in half precision
    # Not `mean`: over two dimensions it would become a pooling, which runtimes lack in double precision.
    mean = wide.square().sum(dim=list(range(-len(shape), 0)), keepdim=True) / math.prod(shape)
    scaled = wide * torch.rsqrt(mean + (torch.finfo(x.dtype).eps if eps is None else eps))
    return (scaled if weight is None else scaled * weight).to(x.dtype)


# Operators whose own decomposition writes in place, in terms of ones whose does not.
_INSTEAD: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.adaptive_avg_pool1d.default: _adaptive_avg_pool1d,
    torch.ops.aten.rms_norm.default: _rms_norm,
}


@cache
def registry_for(opset: int) -> _registration.ONNXRegistry:
    """PyTorch's operator translations for an opset."""
    logger = logging.getLogger(_registration.__name__)
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns about operators of packages that are not installed
    try:
        return _registration.ONNXRegistry.from_torchlib(opset_version=opset)
    finally:
        logger.setLevel(level)


@cache
def decompositions_for(opset: int) -> dict[Any, Callable[..., Any]]:
    """PyTorch's decompositions of all operators that have no translation."""
    registered = set(_decomp.get_onnx_implemented_overloads(registry_for(opset)))
    return _decomp.create_onnx_friendly_decomposition_table(registered)


@dataclass(frozen=True)
class Lowered:
    """The decomposition of a call: a graph with one placeholder per distinct operand."""

    graph: fx.Graph
    operands: tuple[fx.Node, ...]
    constants: dict[str, torch.Tensor]


class Lowering:
    """Decomposes calls of one program, each distinct one once."""

    def __init__(self, program: Program, opset: int) -> None:
        self.program = program
        self.table = decompositions_for(opset)
        self.cache: dict[Any, Lowered | None] = {}

    def lower(self, node: fx.Node) -> Lowered | None:
        """The decomposition of a call, or None when PyTorch has none.

        Raises:
            Exception: whatever PyTorch raises when the operator refuses symbolic sizes.
        """
        leaves, spec = pytree.tree_flatten((node.args, dict(node.kwargs)))
        operands = tuple(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, fx.Node)))
        position = {operand: index for index, operand in enumerate(operands)}
        key = (
            node.target,
            str(spec),
            tuple(
                ("node", position[leaf]) if isinstance(leaf, fx.Node) else (type(leaf), repr(leaf)) for leaf in leaves
            ),
            tuple(_describe(operand.meta.get("val")) for operand in operands),
        )
        if key not in self.cache:
            self.cache[key] = self._trace(node, leaves, spec, operands)
        found = self.cache[key]
        return None if found is None else Lowered(found.graph, operands, found.constants)

    def _trace(self, node: fx.Node, leaves: list[Any], spec: Any, operands: tuple[fx.Node, ...]) -> Lowered | None:
        def call(*values: Any) -> Any:
            by_node = dict(zip(operands, values, strict=True))
            args, kwargs = pytree.tree_unflatten([by_node[x] if isinstance(x, fx.Node) else x for x in leaves], spec)
            return _INSTEAD.get(node.target, node.target)(*args, **kwargs)  # type: ignore[arg-type,operator]

        values = [operand.meta["val"] for operand in operands]
        with warnings.catch_warnings(), torch.no_grad(), self.program.fake_mode, enable_python_dispatcher():
            warnings.simplefilter("ignore")
            module = make_fx(call, decomposition_table=self.table, tracing_mode="real")(*values)
            if any(_writes(inner) for inner in module.graph.nodes):
                pure = torch.func.functionalize(call, remove="mutations_and_views")
                module = make_fx(pure, decomposition_table=self.table, tracing_mode="real")(*values)
        module.graph.eliminate_dead_code()
        if any(inner.op == "call_function" and inner.target is node.target for inner in module.graph.nodes):
            return None
        constants = {str(n.target): getattr(module, str(n.target)) for n in module.graph.find_nodes(op="get_attr")}
        return Lowered(module.graph, operands, constants)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _describe(value: Any) -> Any:
    """What a decomposition may depend on: types and symbolic sizes, not which value it is."""
    if isinstance(value, torch.Tensor):
        return (value.dtype, tuple(str(s) for s in value.shape), tuple(str(s) for s in value.stride()))
    if isinstance(value, (list, tuple)):
        return tuple(_describe(v) for v in value)
    return (type(value), str(value))
