"""How an operator's rule states relations, and the registry of rules.

A rule gets a `Relate` for one node and must speak about every axis of every operand and result. An axis it says nothing
about is pinned, and so is everything around an operator without a rule: what is not known is never cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from ..flow import op_name
from ..types import expr_of
from .space import Count, Index, Junction, Pin, Role, Space, Sum, Tie, tensor_shape

Place = tuple[fx.Node, int]
RelateRule = Callable[["Relate"], None]

RULES: dict[str, RelateRule] = {}


def rule(*names: str) -> Callable[[RelateRule], RelateRule]:
    """Decorator: the rule of the operators ``names`` (as `flow.op_name` calls them)."""

    def register(function: RelateRule) -> RelateRule:
        for name in names:
            RULES[name] = function
        return function

    return register


def bind(node: fx.Node) -> dict[str, Any]:
    """An operator's arguments by the names of its schema, defaults included."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return {str(i): a for i, a in enumerate(node.args)} | dict(node.kwargs)
    bound: dict[str, Any] = {}
    for position, parameter in enumerate(target._schema.arguments):
        if position < len(node.args):
            bound[parameter.name] = node.args[position]
        elif parameter.name in node.kwargs:
            bound[parameter.name] = node.kwargs[parameter.name]
        elif parameter.has_default_value():
            bound[parameter.name] = parameter.default_value
        else:
            bound[parameter.name] = None
    return bound


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are the same number or the same expression."""
    return bool(expr_of(a) == expr_of(b))


class Relate:
    """States the relations of one node.

    Attributes:
        node: the operator.
        args: its arguments by name.
        results: its tensors: the node itself, or by position the ``getitem`` nodes of an operator with several.
    """

    def __init__(self, space: Space, node: fx.Node) -> None:
        self.space = space
        self.node = node
        self.name = op_name(node)
        self.args = bind(node)
        self.results: dict[int, fx.Node] = {}
        if isinstance(node.meta.get("val"), (tuple, list)):
            for user in node.users:
                if op_name(user) == "getitem" and isinstance(user.args[1], int):
                    self.results[user.args[1]] = user
        else:
            self.results[0] = node
        self._spoken: set[int] = set()

    # What a rule asks.

    def shape(self, node: fx.Node) -> tuple[Any, ...]:
        """A value's shape."""
        shape = tensor_shape(node)
        assert shape is not None
        return shape

    def rank(self, node: fx.Node) -> int:
        """A value's number of dimensions."""
        return len(self.shape(node))

    def tensors(self) -> list[fx.Node]:
        """The operands that are tensors, each once."""
        return [n for n in self.node.all_input_nodes if tensor_shape(n) is not None]

    def dim(self, node: fx.Node, dim: int) -> int:
        """A dimension counted from the front."""
        return dim % max(self.rank(node), 1)

    def axis(self, place: Place) -> int | None:
        """The axis of a dimension that may be counted from the end, and note that the rule knows it."""
        node, dim = place
        axis = self.space.axis(node, self.dim(node, dim))
        if axis is not None:
            self._spoken.add(axis)
        return axis

    # What a rule states.

    def tie(self, left: Place, right: Place, left_index: Index | None = None, right_index: Index | None = None) -> None:
        """Tie two dimensions, element by element."""
        a, b = self.axis(left), self.axis(right)
        if a is None and b is None:
            return
        if a is None or b is None:
            self._lonely(a, b, left_index if b is None else right_index)
            return
        wanted = self.space.size[a] if left_index is None else len(left_index)
        if wanted != (self.space.size[b] if right_index is None else len(right_index)):
            self.pin(left, f"{self.name} relates sizes that differ")
            self.pin(right, f"{self.name} relates sizes that differ")
            return
        self.space.add(Tie(self.node, a, b, left_index, right_index))

    def _lonely(self, a: int | None, b: int | None, index: Index | None) -> None:
        """One side has a single element, which may not go: pin its partner."""
        axis = a if a is not None else b
        assert axis is not None
        self.space.add(Pin(self.node, axis, f"{self.name} ties it to a dimension of a single element", index))

    def ties(self, left: fx.Node, right: fx.Node, pairs: Iterable[tuple[int, int]]) -> None:
        """Tie several pairs of dimensions."""
        for a, b in pairs:
            self.tie((left, a), (right, b))

    def junction(self, flat: Place, factors: Iterable[int]) -> None:
        """The dimension ``flat`` is the product of factor axes (those of a single element left out)."""
        axis, kept = self.axis(flat), tuple(factors)
        if axis is None:
            return
        self._spoken |= set(kept)
        if len(kept) == 1:
            self.space.add(Tie(self.node, axis, kept[0]))
        else:
            self.space.add(Junction(self.node, axis, kept))

    def pin(self, place: Place, reason: str, index: Index | None = None) -> None:
        """Elements of a dimension may not be removed."""
        axis = self.axis(place)
        if axis is not None and (index is None or len(index)):
            self.space.add(Pin(self.node, axis, reason, index))

    def count(self, place: Place, reason: str) -> None:
        """The result depends on the number of elements."""
        axis = self.axis(place)
        if axis is not None:
            self.space.add(Count(self.node, axis, reason))

    def sum(self, place: Place, *operands: fx.Node) -> None:
        """The dimension is summed away in a product of ``operands``."""
        axis = self.axis(place)
        if axis is not None:
            self.space.add(Sum(self.node, axis, operands))

    def role(self, place: Place, role: str) -> None:
        """What the dimension is to this operator."""
        axis = self.axis(place)
        if axis is not None:
            self.space.add(Role(self.node, axis, role))

    def pin_of(self, axis: int, reason: str) -> None:
        """`pin` of an axis that may belong to no value."""
        self.space.add(Pin(self.node, axis, reason))

    def count_of(self, axis: int, reason: str) -> None:
        """`count` of an axis that belongs to no value."""
        self.space.add(Count(self.node, axis, reason))

    def sum_of(self, axis: int, *operands: fx.Node) -> None:
        """`sum` of an axis that belongs to no value."""
        self.space.add(Sum(self.node, axis, operands))

    def role_of(self, axis: int, role: str) -> None:
        """`role` of an axis that belongs to no value."""
        self.space.add(Role(self.node, axis, role))

    def free(self, place: Place) -> None:
        """Elements may go without anything else changing (they are dropped, or made by repeating)."""
        self.axis(place)

    def free_all(self, node: fx.Node) -> None:
        """`free` for all dimensions: the operator reads nothing but the shape's symbolic sizes."""
        for dim in range(self.rank(node)):
            self.free((node, dim))

    def pin_all(self, reason: str) -> None:
        """Pin everything that the operator touches."""
        for node in (*self.tensors(), *self.results.values()):
            for dim in range(len(tensor_shape(node) or ())):
                self.pin((node, dim), reason)

    def pin_rest(self) -> None:
        """Pin the axes that the rule said nothing about."""
        for node in (*self.tensors(), *self.results.values()):
            for dim in range(len(tensor_shape(node) or ())):
                axis = self.space.axis(node, dim)
                if axis is not None and axis not in self._spoken:
                    self.pin((node, dim), f"blocked by {self.name}")
