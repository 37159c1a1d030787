"""Damped normal equations over a Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def solve(matrix: Tensor, right: Tensor, damping: float) -> Tensor:
    """The ``z`` of ``(M + d I) z = r`` with ``d = damping * mean(diag(M))``.

    The damping is relative, so that neither the number of samples behind ``M`` nor their scale matters. Where the
    matrix is singular all the same (dead channels, fewer samples than channels), the least-squares solution of smallest
    norm is returned: a channel that never moved gets nothing.

    Args:
        matrix: float64 [n, n], symmetric and positive semidefinite.
        right: float64 [n, m].
        damping: at least 0.

    Returns:
        float64 [n, m].
    """
    if not len(matrix):
        return right.clone()
    damped = matrix + damping * matrix.diagonal().mean() * torch.eye(
        len(matrix), dtype=matrix.dtype, device=matrix.device
    )
    factor, failed = torch.linalg.cholesky_ex(damped)
    pivots = factor.diagonal().square()
    smallest = len(matrix) * torch.finfo(matrix.dtype).eps * damped.diagonal().max()
    # A tiny pivot is rounding error, and dividing by it would make up numbers; a failed factorisation holds no pivots.
    if int(failed) == 0 and bool((pivots > smallest).all()):
        return torch.cholesky_solve(right, factor)
    values, vectors = torch.linalg.eigh(damped)
    inverse = torch.where(values > len(matrix) * torch.finfo(matrix.dtype).eps * values[-1], 1 / values, 0.0)
    return vectors @ (inverse[:, None] * (vectors.T @ right))
