"""Give every unit that is left a factor, so that together they come as near as they can to the old output.

    y = sum_u W_u x_u   ->   y' = sum_{u kept} m_u W_u x_u (+ b')   with the m, b' that minimise  E ||y - y'||^2

A unit is a head, say, with all its columns: fewer numbers to fit than by `least_squares`, hence fewer samples needed.
The factors are folded into the columns. The normal equations are those of the products ``W_u x_u``:

    A m = b,   A_uv = sum_{i in u, j in v} G_ij (W^T W)_ij,   b_u = sum_v A_uv over all units, removed ones too

The damping pulls towards 1. A solution with a factor beyond ``limit`` is not used, and a note says so: it balances
units against each other that are nearly equal on the calibration data.

Source: mask tuning of Kwon et al. 2022 (arXiv 2204.09656), in closed form instead of by iteration.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ....ir.errors import PreconditionError
from .base import Compensated, check_damping, check_shape, kept_columns, scattered, statistic
from .least_squares import intercept
from .normal_equations import solve

_ROWS = 1024  # Rows of the [in, in] product that are in memory at a time.


def mask_tuning(
    weight: Tensor,
    kept: Sequence[int] | Tensor,
    gram: Tensor,
    groups: Tensor | None = None,
    mean: Tensor | None = None,
    *,
    damping: float = 0.01,
    limit: float = 10.0,
    target: Tensor | None = None,
    target_mean: Tensor | None = None,
) -> Compensated:
    """Scale the columns of each kept unit by the unit's factor.

    Args:
        weight: [out, in] of ``y = W x``.
        kept: the columns that stay: all columns of a unit, or none.
        gram: [in, in], as for `least_squares`: with ``mean``, of the centred inputs.
        groups: int64 [in], the unit of each column, -1 for a column that always stays as it is; None: each column is a
            unit.
        mean: [in], ``E[x]``: fit an intercept as well.
        damping: share of the mean diagonal of the normal equations that is added to it.
        limit: the largest factor that is believed.
        target: [in, out], as for `least_squares`.
        target_mean: [out], as for `least_squares`.

    Raises:
        PreconditionError: see `kept_columns`; or a statistic does not fit the weight, is not finite or is missing, or
            only part of a unit is kept.
    """
    columns = kept_columns(weight, kept)
    check_damping(damping)
    outputs, inputs = weight.shape
    labels = (torch.arange(inputs) if groups is None else groups).to(weight.device)
    stays = _whole_units(labels, columns, inputs)
    old, moments = weight.double(), statistic("gram", gram, (inputs, inputs), weight.device)
    products = _unit_products(old, moments, labels)
    tuned = stays[:-1].nonzero().flatten()  # the last row is that of the columns without a unit, whose factor is 1
    units = _rows(labels, len(products))
    # What is left over when all that stay have the factor 1.
    if target is None:
        missing = products[tuned][:, ~stays].sum(1)
    else:
        cross = (old.T * statistic("target", target, (inputs, outputs), weight.device)).sum(1)
        wanted = products.new_zeros(len(products)).index_add_(0, units, cross)
        missing = (wanted - products[:, stays].sum(1))[tuned]
    factors = products.new_ones(len(products))
    factors[tuned] += solve(products[tuned][:, tuned], missing[:, None], damping)[:, 0]
    notes: tuple[str, ...] = ()
    largest = float(factors.abs().max())
    if largest > limit:
        notes = (f"mask tuning left out: a factor of {largest:.3g} is beyond {limit:g}",)
        factors = torch.ones_like(factors)
    result = scattered(weight, columns, old[:, columns] * factors[units[columns]])
    return Compensated(result, intercept(weight, result, mean, target is not None, target_mean), notes=notes)


def _whole_units(labels: Tensor, columns: Tensor, inputs: int) -> Tensor:
    """Whether each unit stays; a last entry, for the columns without a unit, is always true."""
    check_shape("groups", labels, (inputs,))
    if labels.is_floating_point() or labels.dtype is torch.bool or (inputs and int(labels.min()) < -1):
        raise PreconditionError("'groups' names units by something else than numbers", expected="integers from -1 on")
    count = int(labels.max()) + 2 if inputs else 1
    rows = _rows(labels, count)
    here = torch.zeros_like(rows)
    here[columns] = 1
    total, left = rows.bincount(minlength=count), rows.new_zeros(count).index_add_(0, rows, here)
    partial = ((left != 0) & (left != total)).nonzero().flatten().tolist()
    if left[-1] != total[-1]:
        raise PreconditionError(
            "a column that belongs to no unit is removed", expected="only columns with a unit are removed"
        )
    if partial:
        raise PreconditionError(
            f"only {int(left[partial[0]])} of {int(total[partial[0]])} columns of unit {partial[0]} are kept",
            expected="all columns of a unit, or none",
        )
    stays = left > 0
    stays[-1] = True
    return stays


def _rows(labels: Tensor, count: int) -> Tensor:
    """The row of each column's unit; columns without a unit share the last."""
    return torch.where(labels < 0, count - 1, labels).long()


def _unit_products(weight: Tensor, gram: Tensor, labels: Tensor) -> Tensor:
    """``E[<W_u x_u, W_v x_v>]`` for all pairs of units, and of the columns without a unit: float64 [units + 1] * 2."""
    count = int(labels.max()) + 2 if len(labels) else 1
    rows = _rows(labels, count)
    products = gram.new_zeros(count, count)
    for start in range(0, len(labels), _ROWS):
        part = slice(start, start + _ROWS)
        pairs = gram[part] * (weight[:, part].T @ weight)
        summed = gram.new_zeros(len(pairs), count).index_add_(1, rows, pairs)
        products.index_add_(0, rows[part], summed)
    return products
