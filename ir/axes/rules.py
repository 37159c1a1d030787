"""The rules of all operators, and what one node states.

Every module that is imported here registers its rules. What PyTorch tags as pointwise needs none.
"""

from __future__ import annotations

from types import ModuleType

from torch import fx

from ..flow import is_pointwise, op_name
from . import attention, contractions, lookups, norms, pointwise, reductions, reshape, selections
from .relate import RULES, Relate
from .space import Pin, Space, tensor_shape

FAMILIES: tuple[ModuleType, ...] = (
    attention,
    contractions,
    lookups,
    norms,
    pointwise,
    reductions,
    reshape,
    selections,
)
"""The modules that hold rules."""


def relate(space: Space, node: fx.Node) -> None:
    """Add the relations that one node states."""
    if node.op == "placeholder":
        for dim in range(len(tensor_shape(node) or ())):
            axis = space.axis(node, dim)
            if axis is not None:
                space.add(Pin(node, axis, "it is a dimension of an input"))
        return
    if node.op == "output":
        for value in node.all_input_nodes:
            for dim in range(len(tensor_shape(value) or ())):
                axis = space.axis(value, dim)
                if axis is not None:
                    space.add(Pin(node, axis, "it is a dimension of an output"))
        return
    if node.op != "call_function" or op_name(node) == "getitem":
        return
    r = Relate(space, node)
    found = pointwise.pointwise if is_pointwise(node) else RULES.get(r.name)
    if found is None:
        r.pin_all(f"blocked by {r.name}, which has no rule")
        return
    found(r)
    r.pin_rest()
