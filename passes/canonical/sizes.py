"""Comparing symbolic sizes without adding guards: 'equal' means equal at every size that the signature allows."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...ir.dims import Size, size_expr


def same_size(a: Size, b: Size) -> bool:
    """Whether two sizes are equal for certain."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    left, right = size_expr(a), size_expr(b)
    if left == right:
        return True
    # Different constants against a symbol's range, or two forms of one expression: ask the shape environment.
    return bool(left.free_symbols & right.free_symbols) and statically_known_true(a == b)


def same_shape(a: Any, b: Any) -> bool:
    """Whether two values are tensors of equal rank and certainly equal sizes."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or a.dim() != b.dim():
        return False
    return all(same_size(x, y) for x, y in zip(a.shape, b.shape, strict=True))


def same_type(a: Any, b: Any) -> bool:
    """Whether two values are tensors of equal shape and dtype."""
    return same_shape(a, b) and a.dtype == b.dtype
