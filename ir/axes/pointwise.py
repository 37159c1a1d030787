"""Operators that compute each element from the elements at the same place, and what makes tensors of one value."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from torch import fx

from ..types import expr_of
from .relate import Relate, rule, same_size


def broadcast(r: Relate, operands: Iterable[fx.Node], result: fx.Node, *, last: int = 0) -> None:
    """Tie dimensions that are aligned from the end, but for the ``last`` ones; repeated dimensions are free."""
    for operand in operands:
        offset = r.rank(result) - r.rank(operand)
        for dim in range(r.rank(operand) - last):
            if dim + offset < 0:
                r.pin((operand, dim), f"{r.name} does not align it with its result")
            elif same_size(r.shape(operand)[dim], r.shape(result)[dim + offset]):
                r.tie((operand, dim), (result, dim + offset))
            elif expr_of(r.shape(operand)[dim]) != 1:
                r.pin((operand, dim), f"{r.name} relates sizes that differ")
                r.pin((result, dim + offset), f"{r.name} relates sizes that differ")


@rule(
    "dropout", "native_dropout", "feature_dropout", "alpha_dropout", "clone", "contiguous", "to", "_to_copy", "type_as",
    "alias", "detach", "lift_fresh", "lift_fresh_copy", "copy", "real", "imag", "zeros_like", "ones_like", "full_like",
    "empty_like", "fill", "logical_not", "bitwise_not", "where", "masked_fill", "minimum", "maximum", "float",
)  # fmt: skip
def pointwise(r: Relate) -> None:
    """Every operand and every result is aligned with the first result."""
    if not r.results:
        return r.pin_all(f"blocked by {r.name}, whose result is not read")
    result = next(iter(r.results.values()))
    return broadcast(r, (*r.tensors(), *(n for n in r.results.values() if n is not result)), result)


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty")
def _made(r: Relate) -> None:
    for node in r.tensors():
        r.free_all(node)
    r.free_all(r.results[0])


@rule("sym_size", "sym_stride")
def _size(r: Relate) -> None:
    source = r.args["self"]
    read = r.args.get("dim")
    for dim in range(r.rank(source)):
        if isinstance(read, int) and dim == r.dim(source, read):
            r.pin((source, dim), "its size is read")
        else:
            r.free((source, dim))


@rule("glu")
def _glu(r: Relate) -> None:
    source, result = r.args["self"], r.results[0]
    dim = r.dim(source, r.args["dim"])
    for other in range(r.rank(source)):
        if other != dim:
            r.tie((source, other), (result, other))
    half = r.space.axis(result, dim)
    if half is not None:
        place = np.arange(r.space.size[half], dtype=np.int64)
        r.tie((source, dim), (result, dim), place, place)
        r.tie((source, dim), (result, dim), place + len(place), place)
