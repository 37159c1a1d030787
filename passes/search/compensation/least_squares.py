"""Fit the kept columns anew, so that they do the work of the removed ones.

    y = W x   ->   y' = W' x_kept (+ b')   with the W', b' that minimise  E ||y - y'||^2

In terms of the Gram matrix ``G = X^T X``, with kept columns K and removed columns R:

    W' = W_K + W_R G_RK (G_KK + d I)^-1

The damping ``d`` pulls towards the old columns, not towards zero: where nothing is removed, nothing changes.

Source: the optimal update of Optimal Brain Surgeon (Hassibi and Stork 1993) for a set of columns, in closed form as in
the local pruner of Týr; with a mean, the same with an intercept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ....ir.errors import PreconditionError
from .base import Compensated, check_damping, kept_columns, scattered, statistic
from .normal_equations import solve


def least_squares(
    weight: Tensor,
    kept: Sequence[int] | Tensor,
    gram: Tensor,
    mean: Tensor | None = None,
    *,
    damping: float = 0.01,
    target: Tensor | None = None,
    target_mean: Tensor | None = None,
) -> Compensated:
    """Refit the kept columns on the statistics of the inputs.

    Args:
        weight: [out, in] of ``y = W x``.
        kept: the columns that stay.
        gram: [in, in], ``X^T X`` or any positive multiple of it, such as the mean ``E[x x^T]``. With ``mean``, that of
            the centred inputs (their covariance, or a multiple of it).
        mean: [in], ``E[x]``: fit an intercept as well.
        damping: share of the mean diagonal of ``G_KK`` that is added to it.
        target: [in, out], ``X^T Y`` in the scale of ``gram`` (centred like it): fit ``Y`` instead of ``W x``, such as
            what the layer gave before earlier layers were pruned. ``Y`` is without the layer's own bias.
        target_mean: [out], ``E[y]``; needed with ``target`` and ``mean``.

    Raises:
        PreconditionError: see `kept_columns`; or a statistic does not fit the weight, is not finite, or is missing.
    """
    columns = kept_columns(weight, kept)
    check_damping(damping)
    outputs, inputs = weight.shape
    old, moments = weight.double(), statistic("gram", gram, (inputs, inputs), weight.device)
    inner, start = moments[columns][:, columns], old[:, columns]
    # What the kept columns as they are leave over, [kept, out].
    if target is None:
        removed = torch.ones(inputs, dtype=torch.bool, device=weight.device).index_fill(0, columns, False)
        missing = moments[columns][:, removed] @ old[:, removed].T
    else:
        missing = statistic("target", target, (inputs, outputs), weight.device)[columns] - inner @ start.T
    new = start + solve(inner, missing, damping).T
    result = scattered(weight, columns, new)
    return Compensated(result, intercept(weight, result, mean, target is not None, target_mean))


def intercept(
    weight: Tensor, result: Tensor, mean: Tensor | None, fitted: bool, target_mean: Tensor | None
) -> Tensor | None:
    """What moves the mean output to where it belongs; None without a mean.

    Args:
        weight: [out, in], before.
        result: [out, in], after.
        mean: [in], ``E[x]``.
        fitted: whether a target was fitted, which then has a mean of its own.
        target_mean: [out].

    Raises:
        PreconditionError: one of the two means is missing, or does not fit.
    """
    if fitted and (mean is None) != (target_mean is None):
        missing = "target_mean" if target_mean is None else "mean"
        raise PreconditionError(f"an intercept for a target needs '{missing}'", expected="'mean' and 'target_mean'")
    if not fitted and target_mean is not None:
        raise PreconditionError("'target_mean' was given without 'target'", expected="both, or neither")
    if mean is None:
        return None
    outputs, inputs = weight.shape
    average = statistic("mean", mean, (inputs,), weight.device)
    wanted = (
        weight.double() @ average
        if target_mean is None
        else statistic("target_mean", target_mean, (outputs,), weight.device)
    )
    return (wanted - result.double() @ average).to(weight.dtype)
