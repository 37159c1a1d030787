"""Recognises the product of an activation and its ungated twin: SwiGLU, GeGLU, ReGLU, GLU (arXiv 2002.05202)."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...ir.rewrite import is_op
from ...kernels import expert_linear
from .arguments import argument
from .constants import is_constant
from .refusal import Refused, readers_inside
from .sizes import same_type

aten = torch.ops.aten

_VIEWS = (aten.reshape, aten.view, aten.transpose, aten.permute, aten.unsqueeze, aten.squeeze)
_PARTS = (aten.slice, aten.select, aten.split_with_sizes, aten.chunk, aten.unbind, operator.getitem)
_AFFINE = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
# Where each operator has its input and its matrix.
_LINEAR: dict[Any, tuple[int, int]] = {
    aten.linear.default: (0, 1),
    aten.matmul.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.conv1d.default: (0, 1),
    aten.conv2d.default: (0, 1),
    expert_linear: (0, 1),
}
_NAMES: dict[Any, str] = {aten.relu.default: "relu", aten.sigmoid.default: "sigmoid", aten.silu.default: "silu"}


@dataclass(frozen=True)
class Gating:
    """``activation(gate) * up``, with two linear maps of one value, or two parts of one linear map."""

    gate: fx.Node
    up: fx.Node
    activation: str


def gating_at(node: fx.Node) -> Gating | None:
    """The gating that a product is; None for products without an activation.

    Raises:
        Refused: an activation is multiplied with something else.
    """
    if not is_op(node, aten.mul.Tensor):
        return None
    refusal: Refused | None = None
    for activated, up in (node.args, node.args[::-1]):
        name = _activation(activated)
        if name is None or not isinstance(activated, fx.Node) or not isinstance(up, fx.Node):
            continue
        gate: Any = activated.args[0]
        if up in (activated, gate, *gate.args) or is_constant(up):
            continue  # a constant factor, a square, or an activation such as SiLU
        if name == "sigmoid" and _linear_map(gate) is None:
            continue  # as in the cell of a recurrent network
        try:
            _check(node, activated, gate, up)
        except Refused as reason:
            refusal = refusal or reason
            continue
        return Gating(gate, up, name)
    if refusal is not None:
        raise refusal
    return None


def _activation(node: Any) -> str | None:
    if is_op(node, aten.gelu.default):
        return {"none": "gelu", "tanh": "gelu_tanh"}[argument(node, "approximate")]
    return _NAMES.get(node.target) if isinstance(node, fx.Node) else None


def _check(node: fx.Node, activated: fx.Node, gate: fx.Node, up: fx.Node) -> None:
    first, second = _linear_map(gate), _linear_map(up)
    if first is None:
        raise Refused("the gate is no linear map", node)
    if second is None:
        raise Refused("what is gated is no linear map", node)
    if first is not second and _input(first) is not _input(second):
        raise Refused("the gate and what is gated are linear maps of different values", node)
    if not same_type(gate.meta["val"], up.meta["val"]):
        raise Refused("the gate is broadcast to what is gated", node)
    readers_inside({activated}, {node})


def _linear_map(node: Any) -> fx.Node | None:
    """The operator with the matrix, below views, parts, and sums and products with constants."""
    while isinstance(node, fx.Node):
        known = _LINEAR.get(node.target)
        if known is not None:
            return node if is_constant(node.args[known[1]]) else None
        if is_op(node, *_AFFINE):
            node = next(
                (a for a, b in (node.args, node.args[::-1]) if not isinstance(b, fx.Node) or is_constant(b)), None
            )
        elif is_op(node, *_VIEWS, *_PARTS):
            node = node.args[0]
        else:
            return None
    return None


def _input(linear: fx.Node) -> Any:
    """What is mapped, below views."""
    position, _ = _LINEAR[linear.target]
    value: Any = linear.args[position]
    while is_op(value, *_VIEWS):
        value = value.args[0]
    return value
