"""The algebra of `ir.index_functions`: coordinates, conditions, choices, and comparisons of them."""

from __future__ import annotations

from typing import Any

import sympy
from sympy.logic.boolalg import Boolean


def coordinate(axis: int) -> sympy.Symbol:
    """The symbol of the coordinate along an axis."""
    return sympy.Symbol(f"x{axis}", integer=True, nonnegative=True)


def is_condition(value: Any) -> bool:
    """Whether an expression is a condition, and no number (a sympy symbol may be both)."""
    return isinstance(value, Boolean) and not isinstance(value, sympy.Symbol)


def zero_if_one(size: Any, symbol: Any) -> Any:
    """The coordinate along an axis, which is 0 along one of size 1."""
    return sympy.Integer(0) if isinstance(size, int) and size == 1 else symbol


def literal(value: Any) -> Any:
    """A number or truth value; whole floats as integers, which sympy would not call equal."""
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    return sympy.Integer(int(value)) if isinstance(value, float) and value.is_integer() else sympy.sympify(value)


def number(value: Any) -> Any:
    """A condition as the number 0 or 1; a number as it is."""
    return sympy.Piecewise((1, value), (0, True)) if is_condition(value) else value


def as_condition(value: Any) -> Any:
    """A number as the condition that it is not 0; a condition as it is."""
    return value if is_condition(value) else compare(sympy.Ne, value, sympy.Integer(0))


def choice_of(value: Any) -> tuple[Any, Any, Any] | None:
    """A choice between two values: the first, its condition, and the other one; None for anything else."""
    if not isinstance(value, sympy.Piecewise) or len(value.args) != 2:
        return None
    branches: Any = value.args
    (yes, condition), (no, _) = branches
    return yes, condition, no


def compare(relation: Any, a: Any, b: Any) -> Any:
    """A comparison; of a choice between numbers, it is the condition of the choice or its opposite."""
    a, b = number(a), number(b)
    for side, other, swapped in ((a, b, False), (b, a, True)):
        if (choice := choice_of(side)) is not None:
            yes, condition, no = choice
            first, second = (relation(other, v) if swapped else relation(v, other) for v in (yes, no))
            if all(v in (sympy.true, sympy.false) for v in (first, second)):
                if first == second:
                    return first
                return condition if first == sympy.true else sympy.Not(condition)
    return relation(a, b)
