"""Size guards as text (``S % 8 == 0``), from an ONNX file's metadata: checked without running code from the file."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "max": max,
    "min": min,
    "floor": math.floor,
    "ceil": math.ceil,
    "ceiling": math.ceil,
    "abs": abs,
    "float": float,
    "round": round,
    "trunc": math.trunc,
    "sqrt": math.sqrt,
}


class UnreadableGuardError(Exception):
    """A guard uses something other than arithmetic and comparisons of known sizes."""


def holds(text: str, sizes: Mapping[str, int]) -> bool:
    """Whether a guard is true at given sizes.

    Raises:
        UnreadableGuardError: it cannot be evaluated.
    """
    try:
        return bool(_value(ast.parse(text, mode="eval").body, sizes))
    except (SyntaxError, ArithmeticError, TypeError, RecursionError) as error:
        raise UnreadableGuardError(text) from error


def _value(node: ast.expr, sizes: Mapping[str, int]) -> Any:
    match node:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.Name(id=name) if name in sizes:
            return sizes[name]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_value(left, sizes), _value(right, sizes))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, sizes)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _value(operand, sizes)
        case ast.BoolOp(op=op, values=values):
            results = [bool(_value(v, sizes)) for v in values]
            return all(results) if isinstance(op, ast.And) else any(results)
        case ast.Compare(left=left, ops=ops, comparators=rest) if all(type(op) in _COMPARE for op in ops):
            values = [_value(v, sizes) for v in (left, *rest)]
            return all(_COMPARE[type(op)](a, b) for op, a, b in zip(ops, values, values[1:], strict=False))
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=args, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*[_value(a, sizes) for a in args])
        case _:
            raise UnreadableGuardError(ast.unparse(node))
