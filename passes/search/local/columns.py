"""What a column of inputs is worth once the others have made up for its loss.

This stands in for COMP (arXiv 2501.15255), whose own formulas were not available when it was written: nothing here
claims to follow that paper. It is the optimal brain surgeon's answer (Hassibi & Stork 1993) for a whole column: if
column ``j`` of the weight becomes zero and the others are refitted by least squares, the squared error of the outputs
grows by

    ‖W_:j‖² / [H⁻¹]_jj,   and for a group g of columns by   tr(W_g ([H⁻¹]_gg)⁻¹ W_gᵀ)

with ``H = XᵀX + damping``. The damping counts as part of the error: it is what moving the weights themselves costs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....ir.errors import InputError, PreconditionError
from .damping import checked_gram, checked_layer, factored


def checked_groups(groups: Tensor, width: int) -> Tensor:
    """Groups of columns as int64.

    Args:
        groups: [n, size], column indices, each at most once.
        width: number of columns.

    Raises:
        InputError: wrong shape, an index out of range, or a column in two groups.
    """
    if groups.dim() != 2 or not groups.shape[1] or groups.is_floating_point() or groups.dtype == torch.bool:
        raise InputError(
            f"groups of columns of shape {list(groups.shape)} and {groups.dtype}", expected="integers [n, size]"
        )
    found = groups.to(torch.int64)
    if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < width:
        raise InputError(
            f"groups with columns from {int(found.min())} to {int(found.max())} of a layer with {width}",
            expected=f"0 to {width - 1}",
        )
    if found.unique().numel() != found.numel():
        raise InputError("a column that is in two groups, or twice in one", expected="every column at most once")
    return found


def removal_errors(weight: Tensor, inverse: Tensor, groups: Tensor) -> Tensor:
    """``tr(W_g ([H⁻¹]_gg)⁻¹ W_gᵀ)`` for every group, [n].

    Args:
        weight: [out, in], the least-squares optimum for the columns that are left.
        inverse: [in, in], inverse of the damped gram matrix of those columns.
        groups: [n, size], checked.

    Raises:
        PreconditionError: rounding has made a part of the inverse indefinite.
    """
    parts = inverse[groups[:, :, None], groups[:, None, :]]
    lower, failed = torch.linalg.cholesky_ex(parts)
    if bool(failed.any()):
        raise PreconditionError(
            "the inverse of a layer's gram matrix is lost in rounding",
            expected="columns that are independent of each other up to the damping",
            remedy="raise the damping",
        )
    halves = torch.linalg.solve_triangular(lower, weight.T[groups], upper=False)
    return halves.square().sum((1, 2))


def group_compensation_scores(weight: Tensor, gram: Tensor, groups: Tensor, damping: float = 0.01) -> Tensor:
    """The error that removing each group of columns causes after optimal compensation.

    Args:
        weight: [out, in].
        gram: [in, in], ``XᵀX``; the errors are sums or means over rows as it is.
        groups: [n, size], column indices.
        damping: share of the mean diagonal added to the gram matrix.

    Returns:
        [n], in the working type; lower matters less.

    Raises:
        InputError: shapes or indices that do not belong together.
        PreconditionError: weight or gram matrix is not finite.
    """
    values, matrix = checked_layer(weight, gram)
    members = checked_groups(groups, len(matrix)).to(matrix.device)
    return removal_errors(values, factored(matrix, damping).inverse(), members)


def optimal_compensation_scores(weight: Tensor, gram: Tensor, damping: float = 0.01) -> Tensor:
    """The error that removing each single column causes after optimal compensation: ``‖W_:j‖² / [H⁻¹]_jj``.

    Args:
        weight, gram, damping: as `group_compensation_scores`.

    Returns:
        [in], in the working type; lower matters less.

    Raises:
        InputError, PreconditionError: as `group_compensation_scores`.
    """
    values, matrix = checked_layer(weight, gram)
    return values.square().sum(0) / factored(matrix, damping).inverse().diagonal()


def condition(gram: Tensor, damping: float = 0.01) -> Tensor:
    """How well each column is predicted by the others: ``H_jj [H⁻¹]_jj``.

    This is the variance inflation factor without centering.

    Args:
        gram: [in, in].
        damping: share of the mean diagonal added to it.

    Returns:
        [in], in the working type: 1 for a column orthogonal to all others (and a dead one), large for a redundant one.

    Raises:
        InputError, PreconditionError: as `damping.checked_gram`.
    """
    found = factored(checked_gram(gram), damping)
    return found.matrix.diagonal() * found.inverse().diagonal()
