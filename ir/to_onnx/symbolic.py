"""Arithmetic on symbolic sizes: Python's own functions on ints, floats and booleans, as ONNX scalars.

Sizes are int64; floats are double, as in Python, until a tensor operator reads them. Integer division and remainder
round down, as in Python (ONNX's integer ``Div`` rounds towards zero).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch

from ..errors import ExportError
from .recorder import Recorder

INT, FLOAT, BOOL = ir.DataType.INT64, ir.DataType.DOUBLE, ir.DataType.BOOL


def scalar_type(value: Any) -> ir.DataType | None:
    """The ONNX type of a symbolic or plain number; None for anything else."""
    if isinstance(value, (bool, torch.SymBool)):
        return BOOL
    if isinstance(value, (int, torch.SymInt)):
        return INT
    return FLOAT if isinstance(value, (float, torch.SymFloat)) else None


class Numbers:
    """Translates functions on numbers."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def supports(self, target: Any) -> bool:
        """Whether this translates ``target``."""
        return target in _SAME_TYPE or target in _COMPARE or target in _OTHER

    def translate(self, target: Any, args: tuple[Any, ...], result: Any) -> ir.Value:
        """The ONNX value of ``target(*args)``; arguments are ONNX scalars or Python numbers."""
        op = self.recorder.op
        values = [self.scalar(a) for a in (args[0] if target is torch.sym_sum else args)]
        kind = scalar_type(result)
        if target in _SAME_TYPE:
            values = [self.cast(v, kind) for v in values]
            return op(_SAME_TYPE[target], *values)
        if target in _COMPARE:
            common = FLOAT if any(v.dtype == FLOAT for v in values) else INT
            answer = op(_COMPARE[target], *[self.cast(v, common) for v in values])
            return op("Not", answer) if target is operator.ne else answer
        return _OTHER[target](self, kind, *values)

    def scalar(self, value: Any) -> ir.Value:
        """A number as an ONNX scalar."""
        if isinstance(value, ir.Value):
            return value
        kind = scalar_type(value)
        if kind is None:
            raise ExportError(f"ONNX has no value for {value!r}", remedy="leave it out of the outputs")
        return self.recorder.constant(value, kind)

    def cast(self, value: ir.Value, kind: ir.DataType | None) -> ir.Value:
        """A scalar in another type."""
        return value if value.dtype == kind or kind is None else self.recorder.op("Cast", value, to=int(kind))

    def _floordiv(self, kind: ir.DataType | None, a: ir.Value, b: ir.Value) -> ir.Value:
        op = self.recorder.op
        if kind == FLOAT:
            return op("Floor", op("Div", self.cast(a, FLOAT), self.cast(b, FLOAT)))
        return op("Div", op("Sub", a, op("Mod", a, b)), b)

    def _mod(self, kind: ir.DataType | None, a: ir.Value, b: ir.Value) -> ir.Value:
        if kind != FLOAT:
            return self.recorder.op("Mod", a, b)
        floor = self._floordiv(FLOAT, a, b)
        return self.recorder.op("Sub", self.cast(a, FLOAT), self.recorder.op("Mul", floor, self.cast(b, FLOAT)))

    def _truediv(self, kind: ir.DataType | None, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.recorder.op("Div", self.cast(a, FLOAT), self.cast(b, FLOAT))

    def _rounded(self, name: str | None, a: ir.Value) -> ir.Value:
        value = self.cast(a, FLOAT)
        return self.cast(self.recorder.op(name, value) if name else value, INT)

    def _sum(self, kind: ir.DataType | None, *values: ir.Value) -> ir.Value:
        total, *rest = [self.cast(v, kind) for v in values]
        for value in rest:
            total = self.recorder.op("Add", total, value)
        return total


_SAME_TYPE: dict[Any, str] = {
    operator.add: "Add",
    operator.sub: "Sub",
    operator.mul: "Mul",
    operator.neg: "Neg",
    operator.pos: "Identity",
    operator.abs: "Abs",
    operator.pow: "Pow",
    operator.and_: "And",
    operator.or_: "Or",
    operator.not_: "Not",
    torch.sym_max: "Max",
    torch.sym_min: "Min",
    torch.sym_not: "Not",
}

_COMPARE: dict[Any, str] = {
    operator.eq: "Equal",
    operator.ne: "Equal",
    operator.lt: "Less",
    operator.le: "LessOrEqual",
    operator.gt: "Greater",
    operator.ge: "GreaterOrEqual",
}

_OTHER: dict[Any, Callable[..., ir.Value]] = {
    operator.floordiv: Numbers._floordiv,
    operator.mod: Numbers._mod,
    operator.truediv: Numbers._truediv,
    torch.sym_sum: Numbers._sum,
    torch.sym_float: lambda self, kind, a: self.cast(a, FLOAT),
    torch.sym_int: lambda self, kind, a: self._rounded(None, a),
    torch.sym_ite: lambda self, kind, b, t, f: self.recorder.op("Where", b, self.cast(t, kind), self.cast(f, kind)),
    math.floor: lambda self, kind, a: self._rounded("Floor", a),
    math.ceil: lambda self, kind, a: self._rounded("Ceil", a),
    math.trunc: lambda self, kind, a: self._rounded(None, a),
    round: lambda self, kind, a: self._rounded("Round", a),
    math.sqrt: lambda self, kind, a: self.recorder.op("Sqrt", self.cast(a, FLOAT)),
    torch._sym_sqrt: lambda self, kind, a: self.recorder.op(  # pyright: ignore[reportAttributeAccessIssue]
        "Sqrt", self.cast(a, FLOAT)
    ),
}
