"""What a compensation gives back, and the checks that all of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ....ir.errors import PreconditionError


@dataclass(frozen=True, eq=False)
class Compensated:
    """A consumer after some of its input columns went.

    Attributes:
        weight: [out, in] of the old element type; removed columns are zero.
        bias: [out], to be added to the output; None where nothing is added.
        factors: ``(B [out, rank], A [rank, in])`` of a further term ``B A x``; None where there is none.
        notes: what the method could not do, for the report.
    """

    weight: Tensor
    bias: Tensor | None = None
    factors: tuple[Tensor, Tensor] | None = None
    notes: tuple[str, ...] = ()


Compensation = Callable[..., Compensated]
"""``(weight, kept, *, statistics and options) -> Compensated``; pure, the arguments are never written to."""


def kept_columns(weight: Tensor, kept: Sequence[int] | Tensor) -> Tensor:
    """The kept columns in ascending order, each once.

    Args:
        weight: [out, in].
        kept: column numbers in any order, or a boolean mask [in].

    Returns:
        int64 [kept].

    Raises:
        PreconditionError: the weight is no matrix of finite numbers, or ``kept`` names no choice of its columns.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise PreconditionError(
            f"cannot compensate a weight of shape {list(weight.shape)} and type {weight.dtype}",
            expected="a matrix [out, in] of floating-point numbers",
        )
    check_finite("weight", weight)
    columns = weight.shape[1]
    chosen = kept if isinstance(kept, Tensor) else torch.tensor(list(kept), dtype=torch.int64)
    if chosen.dtype is torch.bool:
        check_shape("kept", chosen, (columns,))
        return chosen.nonzero().flatten().to(weight.device)
    if chosen.dim() != 1 or chosen.is_floating_point():
        raise PreconditionError(
            f"the kept columns are a {chosen.dtype} tensor of shape {list(chosen.shape)}",
            expected="a list of integers, or a boolean for each column",
        )
    ordered = chosen.to(weight.device, torch.int64).unique()
    if len(ordered) != len(chosen):
        raise PreconditionError("a kept column is named twice", expected="each kept column once")
    if len(ordered) and (int(ordered[0]) < 0 or int(ordered[-1]) >= columns):
        raise PreconditionError(
            f"kept column {int(ordered[0]) if int(ordered[0]) < 0 else int(ordered[-1])} does not exist",
            expected=f"columns 0 to {columns - 1}",
        )
    return ordered


def scattered(weight: Tensor, kept: Tensor, values: Tensor) -> Tensor:
    """A matrix like ``weight`` with ``values`` [out, kept] in the kept columns, and zero elsewhere."""
    result = torch.zeros_like(weight)
    result[:, kept] = values.to(weight.dtype)
    return result


def check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a statistic of another shape.

    Raises:
        PreconditionError: the shape differs.
    """
    if tuple(value.shape) != shape:
        raise PreconditionError(f"'{name}' has shape {list(value.shape)}", expected=str(list(shape)))


def statistic(name: str, value: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """A statistic in float64, on the device of what is computed with it.

    Raises:
        PreconditionError: its shape differs from ``shape``, or it is not finite.
    """
    check_shape(name, value, shape)
    check_finite(name, value)
    return value.to(device, torch.float64)


def check_finite(name: str, value: Tensor) -> None:
    """Refuse NaN and infinity.

    Raises:
        PreconditionError: there is one.
    """
    if not bool(value.isfinite().all()):
        raise PreconditionError(
            f"'{name}' holds NaN or infinity", remedy="look for them in the calibration data and in the weights"
        )


def check_damping(damping: float) -> None:
    """Refuse a negative or infinite damping.

    Raises:
        PreconditionError: it is one.
    """
    if not 0 <= damping < float("inf"):
        raise PreconditionError(f"the damping is {damping}", expected="a number from 0 on")
