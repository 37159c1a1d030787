"""Tensors that are functions of their own coordinates: positions, causal masks, windows, ALiBi slopes.

Models build masks from ``arange`` and comparisons, in many ways. Here such a tensor is read back as an expression over
its coordinates: ``le(arange(S)[None, :], arange(S)[:, None])`` is ``x1 <= x0``. What is no function of coordinates (an
input, a computed value) stays as an unknown function of its own coordinates, so that a mask of padding and causality
reads ``(x3 <= x2) & (mask(x0, x3) != 0)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx

from .coordinates import coordinate, literal, number, zero_if_one
from .dims import size_expr
from .flow import op_name
from .index_rules import RULES
from .program import Program

_LARGEST_BAND = 8192
_LIMIT = 400  # operators in one expression; a mask needs a few dozen


class IndexFunctions:
    """Reads values of one graph as functions of coordinates; each node once.

    Args:
        program: where weights are looked up, so that a stored triangle or band is read as well; None: they are unknown.

    Attributes:
        leaves: the node behind each unknown function.
    """

    def __init__(self, program: Program | None = None) -> None:
        self.program = program
        self.leaves: dict[Any, fx.Node] = {}
        self._known: dict[fx.Node, Any] = {}

    def read(self, node: fx.Node) -> Any:
        """The value of ``node`` at coordinates ``x0, x1...``: a number's expression, or a condition for booleans."""
        stack = [node]
        while stack:
            current = stack[-1]
            if current in self._known:
                stack.pop()
                continue
            rule = RULES.get(op_name(current))
            operands = [] if rule is None else [a for a in current.all_input_nodes if _is_tensor(a)]
            waiting = [a for a in operands if a not in self._known]
            if waiting:
                stack.extend(waiting)
                continue
            stack.pop()
            found = None
            if rule is not None and _is_tensor(current):
                try:
                    found = rule(self, current)
                except (TypeError, ValueError, IndexError, AttributeError):
                    found = None  # arguments in a form that the rule does not know: an unknown function, then
            if found is None or found.count_ops() > _LIMIT:
                found = self._leaf(current)
            self._known[current] = found
        return self._known[node]

    def at(self, node: Any, coordinates: Sequence[Any]) -> Any:
        """A tensor's value at other coordinates, or a plain number as it is."""
        if not isinstance(node, fx.Node):
            return literal(node)
        if not _is_tensor(node):
            return size_expr(node.meta["val"])
        return self.read(node).xreplace({coordinate(i): c for i, c in enumerate(coordinates)})

    def broadcast(self, node: fx.Node, operand: Any) -> Any:
        """An operand's value at the coordinates of ``node``, to whose shape it is broadcast."""
        if not isinstance(operand, fx.Node) or not _is_tensor(operand):
            return self.at(operand, ())
        rank, shape = node.meta["val"].dim(), operand.meta["val"].shape
        lead = rank - len(shape)
        return self.at(operand, [zero_if_one(s, coordinate(lead + i)) for i, s in enumerate(shape)])

    def within(self, value: Any, shape: Sequence[Any]) -> Any:
        """An expression, knowing that each coordinate is below the size of its axis."""
        sizes = {coordinate(i): size_expr(s) for i, s in enumerate(shape)}

        def whole(fraction: Any) -> Any:
            terms = sympy.Add.make_args(sympy.expand(fraction))
            small = [t for t in terms if any(t == x / size for x, size in sizes.items())]
            rest = sympy.Add(*(t for t in terms if t not in small))
            return rest if len(small) == 1 and rest.is_integer else sympy.floor(fraction)

        def remainder(number: Any, size: Any) -> Any:
            terms: Any = sympy.Add.make_args(sympy.expand(number))
            small = [t for t in terms if sizes.get(t) == size]
            others = all((t / size).is_integer for t in terms if t not in small)
            return small[0] if len(small) == 1 and others else sympy.Mod(number, size)

        return value.replace(sympy.floor, whole).replace(sympy.Mod, remainder)

    def _leaf(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return sympy.Symbol(f"n_{node.name}")
        if node.op == "get_attr" and (constant := self._constant(node)) is not None:
            return constant
        if node.op == "get_attr" and (band := self._band(node)) is not None:
            return band if value.dtype is torch.bool else number(band)
        if node.op == "get_attr" and (ramp := self._ramp(node)) is not None:
            return ramp
        function: Any = sympy.Function(f"v_{node.name}", real=True)
        self.leaves[function] = node
        applied = function(*(zero_if_one(s, coordinate(i)) for i, s in enumerate(value.shape)))
        return sympy.Ne(applied, 0) if value.dtype is torch.bool else applied

    def _constant(self, node: fx.Node) -> Any | None:
        """A stored table of one number."""
        weight = None if self.program is None else self.program.weights.get(str(node.target))
        size = 0 if weight is None else math.prod(weight.shape)
        if weight is None or weight.is_meta or not 0 < size <= _LARGEST_BAND**2 or weight.dtype.is_complex:
            return None
        values = weight.tensor().flatten()
        return literal(values[0].item()) if size == 1 or bool((values == values[0]).all()) else None

    def _band(self, node: fx.Node) -> Any | None:
        """A stored mask [..., N, N] of zeros and ones: ones below the diagonal, perhaps only so far below it."""
        weight = None if self.program is None else self.program.weights.get(str(node.target))
        if weight is None or weight.is_meta or len(weight.shape) < 2 or weight.shape[-1] != weight.shape[-2]:
            return None
        size, rank = weight.shape[-1], len(weight.shape)
        if size < 2 or math.prod(weight.shape) != size * size or size > _LARGEST_BAND:
            return None
        values = weight.tensor().reshape(size, size)
        seen = values != 0
        if not bool((values == seen.to(values.dtype)).all()):
            return None
        width = int(seen[-1].sum())
        ones = torch.ones(size, size, dtype=torch.bool).tril()
        if not torch.equal(seen, ones & ~ones.tril(-width)):
            return None
        row, column = coordinate(rank - 2), coordinate(rank - 1)
        return column <= row if width == size else sympy.And(column <= row, column > row - width)

    def _ramp(self, node: fx.Node) -> Any | None:
        """A stored table whose rows rise evenly along the last axis (ALiBi slopes times positions)."""
        weight = None if self.program is None else self.program.weights.get(str(node.target))
        if weight is None or weight.is_meta or not weight.dtype.is_floating_point or not weight.shape:
            return None
        size = weight.shape[-1]
        if size < 3 or math.prod(weight.shape) > _LARGEST_BAND * 64:
            return None
        steps = weight.tensor().double().diff(dim=-1)
        if not bool(steps.any()) or float((steps - steps[..., :1]).abs().max()) > 1e-6 * float(steps.abs().max()):
            return None
        rows = [zero_if_one(s, coordinate(i)) for i, s in enumerate(weight.shape[:-1])]
        slope, base = (sympy.Function(f"{kind}_{node.name}", real=True)(*rows) for kind in ("slope", "base"))
        return slope * coordinate(len(weight.shape) - 1) + base


def _is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)
