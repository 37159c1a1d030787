"""Element-wise operators: arithmetic, comparison, logic, activations, casts.

ONNX asks for equal element types, and torch agrees with it then. Where one operand is a known number, it is passed as
a Python number: an epsilon or an exponent stays a literal in the graph.
"""

from __future__ import annotations

import operator as py
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ImportModelError
from .host import cast as cast_known
from .registry import operator
from .unsigned import divide, is_unsigned, ordered, wrapping
from .values import Host


def _floating(value: Any) -> bool:
    return value.is_floating_point() if isinstance(value, Tensor) else isinstance(value, float | torch.SymFloat)


@operator("Add", since=7, scalars=True)
def add(a: Tensor, b: Tensor) -> Tensor:
    return wrapping(py.add)(a, b)


@operator("Sub", since=7, scalars=True)
def sub(a: Tensor, b: Tensor) -> Tensor:
    return wrapping(py.sub)(a, b)


@operator("Mul", since=7, scalars=True)
def mul(a: Tensor, b: Tensor) -> Tensor:
    return wrapping(py.mul)(a, b)


@operator("Div", since=7, scalars=True)
def div(a: Tensor, b: Tensor) -> Tensor:
    """Integers divide toward zero."""
    if is_unsigned(a) or is_unsigned(b):
        return divide(a, b)[0]
    return a / b if _floating(a) else torch.div(a, b, rounding_mode="trunc")


@operator("Pow", since=7, known=("base", "exponent"))
def pow_(base: Tensor | Host, exponent: Tensor | Host) -> Tensor:
    """The result has the base's type, whatever the exponent's is."""
    base = _as_tensor(base)
    literal = isinstance(exponent, Host) and len(exponent.items) == 1 and len(exponent.shape) <= base.dim()
    power: Any = exponent.item if isinstance(exponent, Host) and literal else _as_tensor(exponent)
    result = torch.pow(base, power)
    return result if result.dtype == base.dtype else result.to(base.dtype)


def _as_tensor(value: Tensor | Host) -> Tensor:
    """A known value as a tensor of its own type."""
    return value if isinstance(value, Tensor) else value.to_tensor()


@operator("Mod", scalars=True)
def mod(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    """With ``fmod`` the sign of the dividend, else that of the divisor."""
    if is_unsigned(a) or is_unsigned(b):
        return divide(a, b)[1]
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


@operator("Max")
def maximum(*values: Tensor) -> Tensor:
    return reduce(ordered(torch.maximum), values)


@operator("Min")
def minimum(*values: Tensor) -> Tensor:
    return reduce(ordered(torch.minimum), values)


@operator("Sum")
def total(*values: Tensor) -> Tensor:
    return reduce(torch.add, values)


@operator("Mean")
def mean(*values: Tensor) -> Tensor:
    return reduce(torch.add, values) / len(values)


_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitwiseNot": wrapping(torch.bitwise_not),
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "HardSwish": F.hardswish,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Mish": F.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
}

_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "And": torch.logical_and,
    "BitwiseAnd": wrapping(torch.bitwise_and),
    "BitwiseOr": wrapping(torch.bitwise_or),
    "BitwiseXor": wrapping(torch.bitwise_xor),
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
}

_COMPARISONS: dict[str, Callable[[Any, Any], Tensor]] = {
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
}

_MIRRORED = {
    "Equal": "Equal",
    "Greater": "Less",
    "GreaterOrEqual": "LessOrEqual",
    "Less": "Greater",
    "LessOrEqual": "GreaterOrEqual",
}


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def call(x: Tensor, *, consumed_inputs: Any = None) -> Tensor:
        return function(x)

    return call


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def call(a: Tensor, b: Tensor) -> Tensor:
        return function(a, b)

    return call


def _comparison(name: str) -> Callable[[Any, Any], Tensor]:
    def call(a: Any, b: Any) -> Tensor:
        # torch wants the tensor first: 3 < x is x > 3.
        if isinstance(a, Tensor):
            return ordered(_COMPARISONS[name])(a, b)
        return ordered(_COMPARISONS[_MIRRORED[name]])(b, a)

    return call


for _name, _function in _UNARY.items():
    operator(_name)(_unary(_function))
for _name, _function_2 in _BINARY.items():
    operator(_name, since=7)(_binary(_function_2))
for _name in _COMPARISONS:
    operator(_name, since=7, scalars=True)(_comparison(_name))


@operator("IsInf")
def is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    if detect_negative and detect_positive:
        return torch.isinf(x)
    return (
        torch.isposinf(x)
        if detect_positive
        else torch.isneginf(x)
        if detect_negative
        else torch.zeros_like(x, dtype=torch.bool)
    )


@operator("Where", known=("condition", "a", "b"))
def where(condition: Tensor | Host, a: Tensor | Host, b: Tensor | Host) -> Tensor:
    """Known numbers keep their types."""
    return torch.where(*map(_as_tensor, (condition, a, b)))


@operator("Clip", scalars=True)
def clip(x: Tensor, low: Any = None, high: Any = None, *, min: float | None = None, max: float | None = None) -> Tensor:
    """The bounds are inputs, or attributes before opset 11."""
    low, high = min if low is None else low, max if high is None else high
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        low, high = (
            torch.full((), v, dtype=x.dtype) if v is not None and not isinstance(v, Tensor) else v for v in (low, high)
        )
    return x if low is None and high is None else torch.clamp(x, low, high)


@operator("Cast")
def cast(x: Tensor, *, to: torch.dtype, saturate: int = 1) -> Tensor:
    return x.to(to)


@operator("CastLike", known=("x",))
def cast_like(x: Tensor | Host, like: Tensor, *, saturate: int = 1) -> Any:
    """Known numbers stay known: of ``like``, only the type counts."""
    if isinstance(x, Host):
        known = cast_known(x, to=like.dtype)
        if known is not NotImplemented:
            return known
    return _as_tensor(x).to(like.dtype)


@operator("Identity")
def identity(x: Tensor) -> Tensor:
    return x


@operator("Dropout", known=("training", "ratio"))
def dropout(
    x: Tensor,
    ratio_input: Tensor | None = None,
    training: Tensor | Host | None = None,
    *,
    ratio: float = 0.5,
    seed: int = 0,
    is_test: int = 1,
    n_used: int,
) -> Any:
    """In inference, which is what is imported, dropout keeps everything."""
    off = training is None or (isinstance(training, Host) and not training.item)
    if not off or not is_test:
        raise ImportModelError(
            "Dropout in training mode cannot be imported", expected="a constant False", remedy="export in eval mode"
        )
    return x if n_used == 1 else (x, torch.ones_like(x, dtype=torch.bool))


@operator("Gelu")
def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


@operator("Swish")
def swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


@operator("Shrink")
def shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    wide = x if x.is_floating_point() else x.float()
    result = torch.where(wide < -lambd, wide + bias, torch.where(wide > lambd, wide - bias, 0.0))
    return result.to(x.dtype)


@operator("BitShift")
def bit_shift(x: Tensor, by: Tensor, *, direction: str) -> Tensor:
    """A shift by the width of the type or more leaves nothing but the sign; right shifts copy the sign."""
    width = x.dtype.itemsize * 8
    bits, count = x.to(torch.int64), by.to(torch.int64)
    inside = (count >= 0) & (count < width)
    if direction == "LEFT":
        shifted, rest = torch.bitwise_left_shift(bits, count), 0
    elif x.dtype == torch.uint64:
        # The top bit is the sign of the int64 that holds it: the first step must not copy it.
        half = torch.bitwise_right_shift(bits, 1) & (2**63 - 1)
        shifted = torch.where(count == 0, bits, torch.bitwise_right_shift(half, (count - 1).clamp(min=0)))
        rest = 0
    else:
        shifted, rest = torch.bitwise_right_shift(bits, count), torch.where(bits < 0, -1, 0)
    return torch.where(inside, shifted, rest).to(x.dtype)


@operator("BitCast")
def bit_cast(x: Tensor, *, to: torch.dtype) -> Tensor:
    return x.view(to)


@operator("LeakyRelu")
def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    return F.leaky_relu(x, alpha)


@operator("Elu")
def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.elu(x, alpha)


@operator("Celu")
def celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.celu(x, alpha)


@operator("Selu")
def selu(x: Tensor, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Tensor:
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(x))


@operator("HardSigmoid")
def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    return torch.clamp(alpha * x + beta, 0, 1)


@operator("ThresholdedRelu")
def thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return torch.where(x > alpha, x, 0.0)


@operator("PRelu", since=7)
def prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


@operator("PRelu")
def prelu_by_channel(x: Tensor, slope: Tensor, *, consumed_inputs: Any = None) -> Tensor:
    """Before opset 7: one slope for each channel, or for all."""
    return prelu(x, slope.reshape([-1] + [1] * (x.dim() - 2)))


def _aligned(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Before opset 7, the second operand broadcasts from the axis given, and only if asked to."""

    def call(
        a: Tensor, b: Tensor, *, axis: int | None = None, broadcast: int = 0, consumed_inputs: Any = None
    ) -> Tensor:
        if broadcast and axis is not None:
            b = b.reshape([*b.shape, *[1] * (a.dim() - axis % a.dim() - b.dim())])
        return function(a, b)

    return call


for _name, _function_3 in {
    "Add": add,
    "And": torch.logical_and,
    "Div": div,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "Less": torch.lt,
    "Mul": mul,
    "Or": torch.logical_or,
    "Pow": torch.pow,
    "Sub": sub,
    "Xor": torch.logical_xor,
}.items():
    operator(_name)(_aligned(_function_3))
