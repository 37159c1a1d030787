"""Recognises activations that are spelled out, by the function in their middle.

| middle | activation |
|---|---|
| ``erf(x / sqrt(2))`` | GELU: ``x (1 + erf) / 2`` (arXiv 1606.08415, eq. 1) |
| ``tanh(sqrt(2 / pi) (x + 0.044715 x^3))`` | its approximation: ``x (1 + tanh) / 2`` (sec. 2) |
| ``sigmoid(x)``, ``1 / (1 + exp(-x))`` | SiLU: ``x sigmoid`` (sec. 4 there) |
| ``tanh(softplus(x))`` | Mish: ``x tanh`` (arXiv 1908.08681, eq. 1) |
| ``clamp(x + 3, 0, 6)``, ``hardsigmoid(x)`` | hard swish: ``x clamp / 6`` (arXiv 1905.02244, sec. 5.2) |

Sums and products around and inside the middle are compared as polynomials, so that their order does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ...ir.program import Program
from ...ir.rewrite import is_op
from .arguments import argument
from .constants import scalar_of
from .polynomial import Expansion, Polynomial, close
from .refusal import Refused, readers_inside
from .sizes import same_type

aten = torch.ops.aten

_REACH = 6
"""How many operators may lie between a middle and the activation's result, or its input."""

_HALF_OF_BOTH: Polynomial = {(1, 0): 0.5, (1, 1): 0.5}
_PRODUCT: Polynomial = {(1, 1): 1.0}
_TANH_SCALE = math.sqrt(2 / math.pi)


@dataclass(frozen=True)
class SpelledActivation:
    """An activation that was spelled out.

    Attributes:
        result: the node that holds its value.
        x: its argument.
        target: the operator that computes it.
        options: further arguments of the operator.
    """

    result: fx.Node
    x: fx.Node
    target: Any
    options: dict[str, Any] = field(default_factory=dict)


def activation_at(program: Program, middle: fx.Node) -> SpelledActivation | None:
    """The activation with ``middle`` in its middle; None where nothing suggests one.

    Raises:
        Refused: something looks like an activation and is none.
    """
    for known, read in _READERS:
        if is_op(middle, *known):
            return read(program, middle)
    return None


def _erf(program: Program, middle: fx.Node) -> SpelledActivation | None:
    inner = _argument_of(program, middle, {(1,): math.sqrt(0.5)})
    if inner is None:
        raise Refused("the argument of erf is not x / sqrt(2)", middle)
    return _around(program, middle, *inner, _HALF_OF_BOTH, aten.gelu.default)


def _tanh(program: Program, middle: fx.Node) -> SpelledActivation | None:
    if (found := _softplus(program, middle.args[0])) is not None:
        return _around(program, middle, *found, _PRODUCT, aten.mish.default)
    wanted = {(1,): _TANH_SCALE, (3,): _TANH_SCALE * 0.044715}
    inner = _argument_of(program, middle, wanted)
    if inner is not None:
        return _around(program, middle, *inner, _HALF_OF_BOTH, aten.gelu.default, approximate="tanh")
    if any(is_op(user, aten.add) and 1.0 in (scalar_of(program, a) for a in user.args) for user in middle.users):
        raise Refused("the argument of tanh is not that of GELU", middle)
    return None


def _softplus(program: Program, node: Any) -> tuple[Any, set[fx.Node]] | None:
    """For ``softplus(x)``, ``log1p(exp(x))`` or ``log(1 + exp(x))``: x, and the nodes after it."""
    if is_op(node, aten.softplus):
        plain = scalar_of(program, argument(node, "beta")) == 1 and argument(node, "threshold") >= 15
        return (node.args[0], {node}) if plain else None
    if not is_op(node, aten.log, aten.log1p):
        return None
    inside = {node}
    below: Any = node.args[0]
    if is_op(node, aten.log) and is_op(below, aten.add):
        inside.add(below)
        below = _other_than_one(program, below)
    x: Any = below.args[0] if is_op(below, aten.exp) else None
    return None if x is None else (x, inside | {below})


def _other_than_one(program: Program, node: Any) -> Any:
    """For ``1 + a``: a."""
    if not is_op(node, aten.add.Tensor) or argument(node, "alpha") != 1:
        return None
    return next((a for a, b in (node.args, node.args[::-1]) if scalar_of(program, b) == 1), None)


def _sigmoid(program: Program, middle: fx.Node) -> SpelledActivation | None:
    x: Any = middle.args[0]
    for user in middle.users:
        factors = user.args if is_op(user, aten.mul.Tensor) else ()
        if x in factors:
            return _around(program, middle, x, set(), _PRODUCT, aten.silu.default)
        if is_op(x, aten.mul.Tensor) and any(isinstance(a, fx.Node) and a in factors for a in x.args):
            raise Refused("the sigmoid is of a multiple of what it scales (a quick GELU)", middle)
    return None


def _exp(program: Program, middle: fx.Node) -> SpelledActivation | None:
    """``x / (1 + exp(-x))``, or ``x`` times the reciprocal of that sum."""
    total: Any = next(iter(middle.users), None)
    inner = _argument_of(program, middle, {(1,): -1.0}) if _other_than_one(program, total) is middle else None
    if inner is None:
        return None
    x, inside = inner
    user: Any = next(iter(total.users), None)
    if is_op(user, aten.div.Tensor) and user.args == (x, total) and same_type(user.meta["val"], x.meta["val"]):
        readers_inside({middle, total, *inside}, {user})
        return SpelledActivation(user, x, aten.silu.default)
    inverts = is_op(user, aten.div.Tensor) and user.args[1] is total and scalar_of(program, user.args[0]) == 1
    if (inverts or is_op(user, aten.reciprocal)) and any(x in product.args for product in user.users):
        return _around(program, user, x, {middle, total, *inside}, _PRODUCT, aten.silu.default)
    return None


def _bounded(program: Program, middle: fx.Node) -> SpelledActivation | None:
    """``clamp(x h / 6 + h / 2, 0, h)`` times ``x / h``."""
    x = middle.args[0]
    if is_op(middle, aten.hardsigmoid) and isinstance(x, fx.Node):
        used = any(is_op(user, aten.mul.Tensor) and x in user.args for user in middle.users)
        return _around(program, middle, x, set(), _PRODUCT, aten.hardswish.default) if used else None
    low, high = (0, 6) if is_op(middle, aten.relu6) else _bounds(program, middle)
    if low != 0 or not high:
        return None
    inner = _argument_of(program, middle, {(1,): high / 6, (0,): high / 2})
    # Without the product it is a hard sigmoid, which is an activation as well.
    if inner is None or not _meets(program, middle, inner[0]):
        return None
    return _around(program, middle, *inner, {(1, 1): 1 / high}, aten.hardswish.default)


def _bounds(program: Program, node: fx.Node) -> tuple[float | None, float | None]:
    names = ("min_val", "max_val") if is_op(node, aten.hardtanh) else ("min", "max")
    low, high = (scalar_of(program, argument(node, name)) for name in names)
    return low, high


_Reader = Callable[[Program, fx.Node], SpelledActivation | None]
_READERS: tuple[tuple[tuple[Any, ...], _Reader], ...] = (
    ((aten.erf,), _erf),
    ((aten.tanh,), _tanh),
    ((aten.sigmoid,), _sigmoid),
    ((aten.exp,), _exp),
    ((aten.clamp.default, aten.clamp.Tensor, aten.hardtanh, aten.relu6, aten.hardsigmoid), _bounded),
)


def _argument_of(program: Program, middle: fx.Node, wanted: Polynomial) -> tuple[fx.Node, set[fx.Node]] | None:
    """The value in which a function's argument is the wanted polynomial, and the nodes between them."""
    layer: list[Any] = [middle.args[0]]
    for _ in range(_REACH):
        for candidate in layer:
            expansion = Expansion(program, [candidate])
            if close(expansion.of(middle.args[0]), wanted, middle.meta["val"].dtype):
                return candidate, expansion.inside
        layer = [
            operand
            for node in layer
            if is_op(node, aten.add, aten.sub, aten.mul, aten.div, aten.pow, aten.neg)
            for operand in dict.fromkeys(node.all_input_nodes)
        ]
    return None


def _above(middle: fx.Node) -> Iterator[fx.Node]:
    """What is computed from a value, as long as one node alone reads it."""
    for _ in range(_REACH):
        if len(middle.users) != 1:
            return
        middle = next(iter(middle.users))
        if middle.op != "call_function":
            return
        yield middle


def _meets(program: Program, middle: fx.Node, x: fx.Node) -> bool:
    """Whether a function's value is multiplied with its argument somewhere above."""
    polynomials = (Expansion(program, [x, middle]).of(node) for node in _above(middle))
    return any(polynomial is not None and polynomial.keys() == {(1, 1)} for polynomial in polynomials)


def _around(
    program: Program,
    middle: fx.Node,
    x: fx.Node,
    inside: set[fx.Node],
    wanted: Polynomial,
    target: Any,
    **options: Any,
) -> SpelledActivation:
    """The activation whose result is the wanted polynomial in ``x`` and the function in the middle."""
    for node in _above(middle):
        expansion = Expansion(program, [x, middle])
        polynomial = expansion.of(node)
        if polynomial is None:
            break
        if close(polynomial, wanted, middle.meta["val"].dtype) and same_type(node.meta["val"], x.meta["val"]):
            readers_inside({middle, *inside, *expansion.inside} - {node}, {node})
            return SpelledActivation(node, x, target, options)
    if len(middle.users) > 1:
        readers_inside({middle}, set())
    name = str(middle.target).removeprefix("aten.").partition(".")[0]
    raise Refused(f"'{name}' is not scaled by its argument as in {target.overloadpacket.__name__}", middle)
