"""Views: how the dimensions before and after a reshape are built from common digits.

Every row-major reshape cuts the flat index into digits of a mixed radix number. Where the digits of both sides are the
same, ``[B, 12] -> [B, 3, 4]`` has the digits B, 3 and 4: the flat 12 is a `Junction` of 3 and 4. ``[4, 3] -> [2, 6]``
has the digits 2, 2 and 3 and two junctions; ``[2, 6] -> [3, 4]`` has no common digits, and is pinned.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import sympy

from ..types import expr_of
from .relate import Relate, rule
from .space import static_size


@dataclass(frozen=True)
class Digit:
    """A common factor of dimension ``before`` of the one shape and ``after`` of the other."""

    size: Any
    before: int
    after: int


@cache
def quotient(large: Any, small: Any) -> Any:
    """``large / small`` when that is a whole number whatever the symbols are, else None."""
    if isinstance(large, int) and isinstance(small, int):
        return large // small if small and large % small == 0 else None
    ratio: Any = sympy.sympify(large) / sympy.sympify(small)
    if ratio.as_numer_denom()[1] != 1:
        ratio = sympy.cancel(ratio)
        if ratio.as_numer_denom()[1] != 1:
            return None
    return int(ratio) if ratio.is_Integer else ratio


def digits(before: tuple[Any, ...], after: tuple[Any, ...]) -> list[Digit]:
    """The common digits of two shapes, innermost first; dimensions without common digits are left out."""
    found: list[Digit] = []
    i, j = len(before), len(after)
    a: Any = 1
    b: Any = 1
    while True:
        while a == 1 and i:
            i -= 1
            a = expr_of(before[i])
        while b == 1 and j:
            j -= 1
            b = expr_of(after[j])
        if a == 1 and b == 1:
            return found
        if a == b:
            found.append(Digit(a, i, j))
            a = b = 1
        elif b != 1 and (rest := quotient(a, b)) is not None:
            found.append(Digit(b, i, j))
            a, b = rest, 1
        elif a != 1 and (rest := quotient(b, a)) is not None:
            found.append(Digit(a, i, j))
            a, b = 1, rest
        else:
            break
    # From where the sides part, leading dimensions of equal size are still the same.
    outer: list[Digit] = []
    for dim in range(min(i, j) + 1):
        same = dim < len(before) and dim < len(after) and expr_of(before[dim]) == expr_of(after[dim])
        if not same or any(d.before == dim or d.after == dim for d in found):
            break
        outer.append(Digit(expr_of(before[dim]), dim, dim))
    return _complete([*found, *(d for d in reversed(outer) if d.size != 1)], before, after)


def _complete(found: list[Digit], before: tuple[Any, ...], after: tuple[Any, ...]) -> list[Digit]:
    """The digits of dimensions that have all of their digits."""
    while True:
        left = [1] * len(before), [1] * len(after)
        for digit in found:
            left[0][digit.before] *= digit.size
            left[1][digit.after] *= digit.size
        whole = [
            digit
            for digit in found
            if quotient(expr_of(before[digit.before]), left[0][digit.before]) == 1
            and quotient(expr_of(after[digit.after]), left[1][digit.after]) == 1
        ]
        if len(whole) == len(found):
            return whole
        found = whole


@rule(
    "view", "reshape", "_unsafe_view", "_reshape_alias", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as",
    "reshape_as",
)  # fmt: skip
def _reshape(r: Relate) -> None:
    source, result = r.args["self"], r.results[0]
    if r.name in ("view", "_reshape_alias") and "size" not in r.args:
        r.pin_all(f"{r.name} reads other bytes")
        return
    if r.name in ("view_as", "reshape_as"):
        r.free_all(r.args["other"])
    shapes = r.shape(source), r.shape(result)
    if any(expr_of(size) == 0 for shape in shapes for size in shape):
        r.pin_all("it has no elements")
        return
    found = digits(*shapes)
    sides = (source, result)
    for side, node in enumerate(sides):
        known = {(d.before, d.after)[side] for d in found}
        for dim in range(r.rank(node)):
            if dim not in known:
                r.pin((node, dim), f"{r.name} mixes it with other dimensions")
    alone = [
        {dim: sum((d.before, d.after)[side] == dim for d in found) == 1 for dim in range(len(shapes[side]))}
        for side in (0, 1)
    ]
    axes: dict[Digit, int | None] = {}
    for digit in found:
        if alone[0][digit.before]:
            axes[digit] = r.axis((source, digit.before))
        elif alone[1][digit.after]:
            axes[digit] = r.axis((result, digit.after))
        else:
            size = static_size(digit.size)
            axes[digit] = r.space.inner(size) if size > 1 else None
    for side, node in enumerate(sides):
        for dim in range(r.rank(node)):
            parts = [d for d in reversed(found) if (d.before, d.after)[side] == dim]
            if parts:
                _join(r, (node, dim), parts, axes)


def _join(r: Relate, place: tuple[Any, int], parts: list[Digit], axes: dict[Digit, int | None]) -> None:
    """State how one dimension is made of its digits, outermost first."""
    axis = r.axis(place)
    if axis is None:
        return
    # Of a symbolic size the elements are positions modulo its integer factor: nothing static may stand outside it.
    symbolic = [i for i, d in enumerate(parts) if not isinstance(d.size, int)]
    inner = parts[symbolic[-1] :] if symbolic else parts
    factors = [axes[d] for d in inner]
    product = 1
    for digit in inner:
        product *= static_size(digit.size)
    if product != r.space.size[axis]:
        reason = f"{r.name} puts it outside a dimension of symbolic size"
        r.pin(place, reason)
        for factor in dict.fromkeys(axes[d] for d in parts):
            if factor is not None:
                r.pin_of(factor, reason)
        return
    kept = [f for f in factors if f is not None]
    if kept != [axis]:
        r.junction(place, kept)
