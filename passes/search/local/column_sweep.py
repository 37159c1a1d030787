"""The loop that SparseGPT and GPTQ share: fix one column after the other, let the later ones make up for it.

Let ``UᵀU`` be the inverse of the gram matrix, ``U`` upper triangular (`damping.inverse_upper`). Replacing column ``i``
of the weight, ``w``, by an allowed ``q`` leaves an error ``e = (w - q) / U_ii``; the best answer of the columns
``j > i`` is

    W_:j -= e U_ij

(Frantar et al., *GPTQ*, 2022, eq. 2 and 3 in their Cholesky form). Inside a block the corrections are collected just
before a column is fixed, and the columns after the block get theirs at once, in one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Begin = Callable[[int, int], None]
Project = Callable[[int, Tensor], Tensor]


def sweep(columns: Tensor, upper: Tensor, starts: Sequence[int], begin: Begin, project: Project) -> None:
    """Replace all columns by allowed ones, in order and in place.

    Args:
        columns: [in, out], the transposed weight, in the working type.
        upper: [in, in], upper triangular, ``upper.T @ upper`` is the inverse of the damped gram matrix.
        starts: where blocks begin, increasing from 0.
        begin: called with the start and end of every block; from its start on, ``columns`` are up to date then.
        project: called with a column's index and its current values [out]; returns the allowed values [out].
    """
    diagonal = upper.diagonal().tolist()
    for start, stop in zip(starts, [*starts[1:], len(columns)], strict=True):
        begin(start, stop)
        errors = torch.empty_like(columns[start:stop])
        for index in range(start, stop):
            done = index - start
            column = torch.addmv(columns[index], errors[:done].T, upper[start:index, index], alpha=-1)
            allowed = project(index, column)
            torch.sub(column, allowed, out=errors[done])
            errors[done] /= diagonal[index]
            columns[index] = allowed
        columns[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
