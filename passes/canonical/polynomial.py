"""A chain of sums, products and powers as a polynomial in chosen values, whatever its order and its brackets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ...ir.program import Program
from ...ir.rewrite import is_op
from .arguments import argument
from .constants import scalar_of

aten = torch.ops.aten

Polynomial = dict[tuple[int, ...], float]
"""Coefficients by the exponents of each variable: ``{(1, 0): 0.5, (1, 1): 0.5}`` is ``0.5 x + 0.5 x e``."""

_DEPTH = 8
_DEGREE = 4

# How far constants may be from their exact value: what they lose when they are written with the digits of their type.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


class Expansion:
    """Polynomials in some variables.

    Args:
        program: whose constants are read.
        variables: nodes that are not looked into.

    Attributes:
        inside: the operators that were looked into.
    """

    def __init__(self, program: Program, variables: Sequence[fx.Node]) -> None:
        self.program = program
        self.variables = {node: index for index, node in enumerate(variables)}
        self.inside: set[fx.Node] = set()

    def of(self, value: Any, depth: int = _DEPTH) -> Polynomial | None:
        """The polynomial of a value; None if it is none of degree four or less."""
        index = self.variables.get(value) if isinstance(value, fx.Node) else None
        if index is not None:
            return {tuple(int(i == index) for i in range(len(self.variables))): 1.0}
        number = scalar_of(self.program, value)
        if number is not None:
            return {(0,) * len(self.variables): number}
        if depth == 0 or not isinstance(value, fx.Node):
            return None
        result = self._operator(value, depth - 1)
        if result is not None:
            self.inside.add(value)
        return result

    def _operator(self, node: fx.Node, depth: int) -> Polynomial | None:
        if is_op(node, aten.neg):
            return _scaled(self.of(node.args[0], depth), -1.0)
        if is_op(node, aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor):
            return self._power(node, depth)
        if not is_op(node, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor):
            return None
        left, right = self.of(node.args[0], depth), self.of(node.args[1], depth)
        if left is None or right is None:
            return None
        if is_op(node, aten.mul):
            return _product(left, right)
        if is_op(node, aten.div):
            divisor = _constant(right)
            return _scaled(left, 1 / divisor) if divisor else None
        sign = -1 if is_op(node, aten.sub) else 1
        return _sum(left, _scaled(right, sign * argument(node, "alpha")))

    def _power(self, node: fx.Node, depth: int) -> Polynomial | None:
        base, exponent = self.of(node.args[0], depth), scalar_of(self.program, node.args[1])
        if base is None or exponent is None or exponent not in range(1, _DEGREE + 1):
            return None
        result: Polynomial | None = base
        for _ in range(int(exponent) - 1):
            result = _product(result, base)
        return result


def close(actual: Polynomial | None, wanted: Polynomial, dtype: torch.dtype) -> bool:
    """Whether two polynomials have the same terms, with coefficients equal up to the rounding of a type."""
    if actual is None or dtype not in ROUNDING:
        return False
    terms = {powers: factor for powers, factor in actual.items() if factor}
    if terms.keys() != wanted.keys():
        return False
    return all(abs(terms[powers] - factor) <= ROUNDING[dtype] * abs(factor) for powers, factor in wanted.items())


def _constant(polynomial: Polynomial) -> float | None:
    return next(iter(polynomial.values())) if all(not any(powers) for powers in polynomial) else None


def _sum(a: Polynomial | None, b: Polynomial | None) -> Polynomial | None:
    if a is None or b is None:
        return None
    return {powers: a.get(powers, 0.0) + b.get(powers, 0.0) for powers in {**a, **b}}


def _scaled(a: Polynomial | None, factor: float) -> Polynomial | None:
    return None if a is None else {powers: value * factor for powers, value in a.items()}


def _product(a: Polynomial | None, b: Polynomial | None) -> Polynomial | None:
    if a is None or b is None:
        return None
    result: Polynomial = {}
    for p, x in a.items():
        for q, y in b.items():
            powers = tuple(i + j for i, j in zip(p, q, strict=True))
            if sum(powers) > _DEGREE:
                return None
            result[powers] = result.get(powers, 0.0) + x * y
    return result
