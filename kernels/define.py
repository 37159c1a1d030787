"""How an operator of ours is defined: one schema, one plain PyTorch reference.

The reference is registered as *composite*: PyTorch derives the fake kernel, the gradients and the decomposition from
it, so the four cannot disagree. Tracing keeps the operator whole; anything that does not know it (a PyTorch exporter,
Inductor) sees what it is made of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import fx

NAMESPACE = "graphlathe"

_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


@dataclass(frozen=True)
class Operator:
    """An operator of ours.

    Attributes:
        target: what a graph calls, ``torch.ops.graphlathe.<name>.default``.
        reference: the same in plain PyTorch; also its decomposition, its fake kernel and its gradient.
        macs: multiply-accumulates of a call, symbolic in its sizes, under the conventions of `ir.cost_rules`.
        to_onnx: a translation, with the arguments of `ir.to_onnx.special`; None: it is translated decomposed.
    """

    target: torch._ops.OpOverload
    reference: Callable[..., Any]
    macs: Callable[[fx.Node], Any]
    to_onnx: Callable[..., Any] | None = None


OPERATORS: dict[Any, Operator] = {}


def free(node: fx.Node) -> Any:
    """The cost of an operator that only moves or scales elements: no multiply-accumulates."""
    return 0


def operator(
    schema: str,
    *,
    macs: Callable[[fx.Node], Any],
    to_onnx: Callable[..., Any] | None = None,
    elementwise: bool = False,
) -> Callable[[Callable[..., Any]], torch._ops.OpOverload]:
    """Define ``graphlathe::<schema>``; the decorated function is its reference.

    Args:
        schema: in the syntax of `torch.library`, without the namespace: ``name(Tensor x, *, int axis) -> Tensor``.
        macs: the cost of a call.
        to_onnx: how a call is written in ONNX, where the decomposition is not what a reader of the file wants.
        elementwise: every element of the result depends on one element of each operand (PyTorch's tag ``pointwise``).

    Returns:
        The overload that graphs call.
    """

    def define(reference: Callable[..., Any]) -> torch._ops.OpOverload:
        tags = (torch.Tag.pt2_compliant_tag, *((torch.Tag.pointwise,) if elementwise else ()))
        name = _LIBRARY.define(schema, tags=tags)
        _LIBRARY.impl(name, reference, "CompositeImplicitAutograd")
        target = getattr(getattr(torch.ops, NAMESPACE), name.split("::")[-1]).default
        OPERATORS[target] = Operator(target, reference, macs, to_onnx)
        return target

    return define
