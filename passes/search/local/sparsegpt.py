"""Unstructured sparsity of one layer, to an exact number of weights.

`sparsegpt` prunes column by column and lets the columns that follow make up for what is lost: Frantar & Alistarh,
*SparseGPT* (2023), algorithm 1. In every block of columns the same share of weights stays, those with the largest

    s_ij = w_ij² / U_jj²,   UᵀU = (XᵀX + damping)⁻¹

(eq. 3 there, in its Cholesky form). `magnitude_sparse` and `wanda_sparse` (Sun et al., *Wanda*, 2023) change no weight
that stays, and take a fraction of the time.

The number of weights that stay is an argument, not a ratio, so that a level database can have a constant step in
it (Sieberling et al., *EvoPress*, 2024). A weight that stays and is zero by itself counts as one that stays.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ....ir.errors import InputError
from .column_sweep import sweep
from .damping import checked_layer, inverse_upper


def largest(scores: Tensor, count: int) -> Tensor:
    """A mask of the shape of ``scores`` with exactly ``count`` entries set, at the largest scores."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.flatten().topk(count, sorted=False).indices] = True
    return mask.view(scores.shape)


def check_count(weight: Tensor, nonzeros: int) -> None:
    """Refuse a number of weights that a layer has not."""
    if not 0 <= nonzeros <= weight.numel():
        raise InputError(
            f"{nonzeros} nonzero weights of a layer that has {weight.numel()}",
            expected=f"a number from 0 to {weight.numel()}",
        )


def _running_counts(dead: list[bool], rows: int, nonzeros: int) -> list[int]:
    """How many weights stay before column 0, 1, ...

    It is the same share of every live column, and what is left of every dead one. Rounded-down running totals are
    exact at the end, and no difference of two is more than the columns between hold.
    """
    gone = [0, *itertools.accumulate(dead)]
    live = [column - lost for column, lost in enumerate(gone)]
    useful = min(nonzeros, rows * live[-1])
    rest = nonzeros - useful
    return [useful * a // max(live[-1], 1) + rest * b // max(gone[-1], 1) for a, b in zip(live, gone, strict=True)]


def sparsegpt(weight: Tensor, gram: Tensor, nonzeros: int, *, damping: float = 0.01, block: int = 128) -> Tensor:
    """Prune one layer and correct the weights that stay.

    Args:
        weight: [out, in].
        gram: [in, in], ``XᵀX``, summed or averaged over calibration rows.
        nonzeros: how many weights stay, 0 to ``out * in``. With all of them, the weight is returned as it was.
        damping: share of the mean diagonal added to the gram matrix.
        block: columns among which the weights that stay are chosen at a time. The share that stays is the same in
            every block, up to one weight, where no column is dead. Weights of dead columns go first.

    Returns:
        [out, in] in the type of ``weight``, with zeros where weights are pruned.

    Raises:
        InputError: shapes that do not belong together, a count or block out of range.
        PreconditionError: weight or gram matrix is not finite.
    """
    check_count(weight, nonzeros)
    if block < 1:
        raise InputError(f"a block of {block} columns", expected="1 or more")
    start_weight, matrix = checked_layer(weight, gram)
    upper = inverse_upper(matrix, damping)
    columns = start_weight.T.contiguous().clone()
    width, pivots = len(columns), upper.diagonal().square()[:, None]
    dead = matrix.diagonal() == 0
    stays = _running_counts(dead.tolist(), len(weight), nonzeros)
    keep = torch.zeros_like(columns, dtype=torch.bool)
    zero = torch.zeros((), dtype=columns.dtype, device=columns.device)

    def choose(start: int, stop: int) -> None:
        scores = columns[start:stop].square() / pivots[start:stop]
        # Below all others, and in the same order among themselves.
        scores = torch.where(dead[start:stop, None], -1 / (1 + scores), scores)
        keep[start:stop] = largest(scores, stays[stop] - stays[start])

    sweep(columns, upper, range(0, width, block), choose, lambda i, column: torch.where(keep[i], column, zero))
    return columns.T.to(weight.dtype).contiguous()


def magnitude_sparse(weight: Tensor, nonzeros: int) -> Tensor:
    """Keep the ``nonzeros`` weights of largest magnitude in the layer.

    Args:
        weight: [out, in].
        nonzeros: how many weights stay.

    Raises:
        InputError: a count out of range.
    """
    check_count(weight, nonzeros)
    return weight.detach().masked_fill(~largest(weight.detach().abs(), nonzeros), 0)


def wanda_sparse(weight: Tensor, gram: Tensor, nonzeros: int) -> Tensor:
    """Keep in every output row the weights of largest ``|w_ij| ‖X_:j‖`` (Sun et al. 2023, eq. 1).

    Every row keeps the same number; what does not divide goes, one each, to the rows whose next weight scores highest.

    Args:
        weight: [out, in].
        gram: [in, in]; only its diagonal is used.
        nonzeros: how many weights of the layer stay.

    Raises:
        InputError, PreconditionError: as `sparsegpt`.
    """
    check_count(weight, nonzeros)
    values, matrix = checked_layer(weight, gram)
    scores = values.abs() * matrix.diagonal().sqrt()
    rows, width = scores.shape
    each, rest = divmod(nonzeros, rows)
    ordered = scores.sort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(ordered.indices)
    rank.scatter_(1, ordered.indices, torch.arange(width, device=rank.device).expand(rows, width))
    allowed = torch.full((rows,), each, device=rank.device)
    if rest:
        allowed[ordered.values[:, each].topk(rest).indices] += 1
    return weight.detach().masked_fill(rank >= allowed[:, None], 0)
