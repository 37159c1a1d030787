"""Low-rank maps that are best on the data, not on the numbers of a matrix.

    what an approximation lost    (W - W') x ~ B A x        low_rank_residual
    a branch that was dropped     f(x) ~ B A x              low_rank_map (reduced-rank regression)

Both are one problem: of all matrices of rank r, the one nearest to ``M`` in ``||X (M - B A)^T||``. With ``G = S S^T``
and the left singular vectors ``U`` of ``M S``, that is ``B = U_r`` and ``A = U_r^T M``. The metric is never inverted:
dead and dependent channels do no harm.

Source: Eckart and Young 1936 in the metric of the inputs; reduced-rank regression, Izenman 1975.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....ir.errors import PreconditionError
from .base import check_damping, check_finite, check_shape, statistic
from .normal_equations import solve


def metric_root(gram: Tensor) -> Tensor:
    """``S`` [in, in] in float64 with ``S S^T = gram``; one serves all approximations of a weight.

    Args:
        gram: [in, in], ``X^T X`` or any positive multiple of it.

    Raises:
        PreconditionError: it is not square, or a number is not finite.
    """
    values, vectors = torch.linalg.eigh(statistic("gram", gram, (len(gram), len(gram)), gram.device))
    return vectors * values.clamp(min=0).sqrt()


def low_rank_residual(weight: Tensor, approximation: Tensor, root: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of what an approximation of a weight lost.

    Args:
        weight: [out, in] of ``y = W x``.
        approximation: [out, in], what takes its place.
        root: [in, in], `metric_root` of the inputs' gram matrix.
        rank: at least 1, at most the smaller size of the weight.

    Returns:
        ``(B [out, rank], A [rank, in])`` in the weight's element type, which minimise ``||X (W - W' - B A)^T||``. The
        columns of B are orthonormal.

    Raises:
        PreconditionError: shapes or rank do not fit, or a number is not finite.
    """
    if weight.dim() != 2:
        raise PreconditionError(f"the weight has shape {list(weight.shape)}", expected="a matrix [out, in]")
    check_shape("approximation", approximation, tuple(weight.shape))
    lost = weight.double() - approximation.double()
    check_finite("weight - approximation", lost)
    metric = statistic("root", root, (weight.shape[1], weight.shape[1]), weight.device)
    left, right = _truncated(lost, metric, rank)
    return left.to(weight.dtype), right.to(weight.dtype)


def low_rank_map(gram_xx: Tensor, cross_xy: Tensor, rank: int, *, damping: float = 0.0) -> tuple[Tensor, Tensor]:
    """Reduced-rank regression: the map of a given rank that predicts ``y`` best from ``x``.

    With centred statistics the prediction is ``y ~ E[y] + B A (x - E[x])``.

    Args:
        gram_xx: [in, in], ``X^T X`` or any positive multiple of it.
        cross_xy: [in, out], ``X^T Y`` in the same scale.
        rank: at least 1, at most the smaller of in and out.
        damping: share of the mean diagonal of ``gram_xx`` that is added to it (ridge regression).

    Returns:
        ``(B [out, rank], A [rank, in])`` in the element type of ``cross_xy``, which minimise ``E ||y - B A x||^2``. The
        columns of B are orthonormal.

    Raises:
        PreconditionError: shapes or rank do not fit, or a number is not finite.
    """
    check_damping(damping)
    if cross_xy.dim() != 2:
        raise PreconditionError(f"'cross_xy' has shape {list(cross_xy.shape)}", expected="a matrix [in, out]")
    inputs = cross_xy.shape[0]
    moments = statistic("gram_xx", gram_xx, (inputs, inputs), cross_xy.device)
    cross = statistic("cross_xy", cross_xy, tuple(cross_xy.shape), cross_xy.device)
    full = solve(moments, cross, damping).T
    damped = moments + damping * moments.diagonal().mean() * torch.eye(
        inputs, dtype=torch.float64, device=moments.device
    )
    left, right = _truncated(full, metric_root(damped), rank)
    return left.to(cross_xy.dtype), right.to(cross_xy.dtype)


def _truncated(matrix: Tensor, root: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors of rank ``rank`` nearest to ``matrix`` [out, in] in the metric of ``root root^T``."""
    largest = min(matrix.shape)
    if not 1 <= rank <= largest:
        raise PreconditionError(f"the rank is {rank}", expected=f"1 to {largest}")
    left = torch.linalg.svd(matrix @ root, full_matrices=False).U[:, :rank]
    return left, left.T @ matrix
