"""No compensation: the removed columns go, and that is all."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .base import Compensated, kept_columns, scattered


def none(weight: Tensor, kept: Sequence[int] | Tensor) -> Compensated:
    """Zero the removed columns.

    Args:
        weight: [out, in] of ``y = W x``.
        kept: the columns that stay.

    Raises:
        PreconditionError: see `kept_columns`.
    """
    columns = kept_columns(weight, kept)
    return Compensated(scattered(weight, columns, weight[:, columns]))
