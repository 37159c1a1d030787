"""Element-wise operators: arithmetic, comparison, logic, activations, casts.

ONNX asks for equal element types, and torch agrees with it then. Where one operand is a known number, it is passed as
a Python number: an epsilon or an exponent stays a literal in the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import operator
from .values import Host


def _floating(value: Any) -> bool:
    return value.is_floating_point() if isinstance(value, Tensor) else isinstance(value, float | torch.SymFloat)


@operator("Add", scalars=True)
def add(a: Tensor, b: Tensor) -> Tensor:
    return a + b


@operator("Sub", scalars=True)
def sub(a: Tensor, b: Tensor) -> Tensor:
    return a - b


@operator("Mul", scalars=True)
def mul(a: Tensor, b: Tensor) -> Tensor:
    return a * b


@operator("Div", scalars=True)
def div(a: Tensor, b: Tensor) -> Tensor:
    """Integers divide toward zero."""
    return a / b if _floating(a) else torch.div(a, b, rounding_mode="trunc")


@operator("Pow", known=("base", "exponent"))
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
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


@operator("Max")
def maximum(*values: Tensor) -> Tensor:
    return reduce(torch.maximum, values)


@operator("Min")
def minimum(*values: Tensor) -> Tensor:
    return reduce(torch.minimum, values)


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
    "BitwiseNot": torch.bitwise_not,
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
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
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


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        return function(x)

    return call


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def call(a: Tensor, b: Tensor) -> Tensor:
        return function(a, b)

    return call


def _comparison(name: str) -> Callable[[Any, Any], Tensor]:
    def call(a: Any, b: Any) -> Tensor:
        # torch wants the tensor first: 3 < x is x > 3.
        return _COMPARISONS[name](a, b) if isinstance(a, Tensor) else _COMPARISONS[_MIRRORED[name]](b, a)

    return call


for _name, _function in _UNARY.items():
    operator(_name)(_unary(_function))
for _name, _function_2 in _BINARY.items():
    operator(_name)(_binary(_function_2))
for _name in _COMPARISONS:
    operator(_name, scalars=True)(_comparison(_name))


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
def clip(x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        low, high = (
            torch.full((), v, dtype=x.dtype) if v is not None and not isinstance(v, Tensor) else v for v in (low, high)
        )
    return x if low is None and high is None else torch.clamp(x, low, high)


@operator("Cast")
def cast(x: Tensor, *, to: torch.dtype, saturate: int = 1) -> Tensor:
    return x.to(to)


@operator("CastLike")
def cast_like(x: Tensor, like: Tensor, *, saturate: int = 1) -> Tensor:
    return x.to(like.dtype)


@operator("Identity")
def identity(x: Tensor) -> Tensor:
    return x


@operator("Dropout")
def dropout(
    x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None, *, seed: int = 0, n_used: int
) -> Any:
    """In inference, which is what is imported, dropout keeps everything."""
    return x if n_used == 1 else (x, torch.ones_like(x, dtype=torch.bool))


@operator("Gelu")
def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


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


@operator("PRelu")
def prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)
