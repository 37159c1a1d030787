"""Axis elements and the relations between them.

An *axis* is one dimension of one value (weights included) with a static size above one; an *element* is one index of an
axis. Every operator states relations between axes:

=========== ===========================================================================================
`Tie`       elements of two axes live and die together (a weight's rows and the channels they make)
`Junction`  a flat axis is the row-major product of factor axes (a view that splits heads from channels)
`Pin`       elements that may not be removed, and why
`Count`     the operator's result depends on how many elements the axis has (a mean, a norm): removing
            elements then is not the same as zeroing them
`Sum`       the axis is summed away in a product of two values
`Role`      what the axis is to an operator (a head, a group of a convolution)
=========== ===========================================================================================

A symbolic size ``c * rest`` with an integer c > 1 has c elements, the positions modulo c: batch and heads merged into
one dimension, heads innermost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy
import torch
from torch import fx

from ..types import expr_of

Index = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True, eq=False)
class Tie:
    """Elements ``left_index`` of one axis and ``right_index`` of another, pairwise (all of them when None)."""

    node: fx.Node
    left: int
    right: int
    left_index: Index | None = None
    right_index: Index | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Junction:
    """The axis ``flat`` is the row-major product of ``factors``."""

    node: fx.Node
    flat: int
    factors: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Pin:
    """Elements (all of them when ``index`` is None) that may not be removed."""

    node: fx.Node
    axis: int
    reason: str
    index: Index | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Count:
    """The operator depends on how many elements the axis has."""

    node: fx.Node
    axis: int
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Sum:
    """The axis is summed away in a product; a zero on either side drops out of the sum."""

    node: fx.Node
    axis: int
    operands: tuple[fx.Node, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Role:
    """What an axis is to an operator."""

    node: fx.Node
    axis: int
    role: str


Relation = Tie | Junction | Pin | Count | Sum | Role


def static_size(size: Any) -> int:
    """How many elements a dimension of this size has: the size, or the integer factor of a symbolic one."""
    expr = expr_of(size)
    if isinstance(expr, int):
        return expr
    factor = sympy.sympify(expr).as_coeff_Mul()[0]
    return int(factor) if factor.is_Integer and factor > 0 else 1


def tensor_shape(node: fx.Node) -> tuple[Any, ...] | None:
    """The (symbolic) shape of a node's value, None when it is no tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


class Space:
    """The axes of one graph and the relations between them.

    Attributes:
        size: elements of each axis.
        place: the value and dimension of each axis, None for an axis inside an operator (half of a reshape).
        relations: all relations.
        of_axis: for each axis, the places of its relations in that list.
    """

    def __init__(self) -> None:
        self.size: list[int] = []
        self.place: list[tuple[fx.Node, int] | None] = []
        self.relations: list[Relation] = []
        self.of_axis: list[list[int]] = []
        self.known: dict[tuple[fx.Node, int], int | None] = {}

    def axis(self, node: fx.Node, dim: int) -> int | None:
        """The axis of a value's dimension; None when it has a single element, or none that is known."""
        key = node, dim
        if key not in self.known:
            shape = tensor_shape(node)
            size = 1 if shape is None or dim >= len(shape) else static_size(shape[dim])
            self.known[key] = self._new(size, key) if size > 1 else None
        return self.known[key]

    def inner(self, size: int) -> int:
        """A new axis that belongs to no value."""
        return self._new(size, None)

    def _new(self, size: int, place: tuple[fx.Node, int] | None) -> int:
        self.size.append(size)
        self.place.append(place)
        self.of_axis.append([])
        return len(self.size) - 1

    def add(self, relation: Relation) -> None:
        """Add one relation."""
        match relation:
            case Tie(_, left, right):
                axes = (left, right)
            case Junction(_, flat, factors):
                axes = (flat, *factors)
            case _:
                axes = (relation.axis,)
        self.relations.append(relation)
        for axis in axes:
            self.of_axis[axis].append(len(self.relations) - 1)

    def pinned(self, axis: int) -> str | None:
        """Why the whole axis is pinned by an operator itself, if it is."""
        for place in self.of_axis[axis]:
            relation = self.relations[place]
            if isinstance(relation, Pin) and relation.index is None:
                return relation.reason
        return None


def factor_index(sizes: tuple[int, ...], factor: int) -> Index:
    """For each flat position of a row-major product, its coordinate in one factor."""
    inner = int(np.prod(sizes[factor + 1 :], dtype=np.int64))
    return (np.arange(int(np.prod(sizes, dtype=np.int64)), dtype=np.int64) // inner) % sizes[factor]
