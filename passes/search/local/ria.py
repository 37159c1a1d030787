"""Unstructured sparsity of one layer by relative importance and activations (RIA).

    s_ij = (|w_ij| / sum_k |w_kj| + |w_ij| / sum_k |w_ik|) * ||X_:j||^(1/2)

(Zhang et al., *Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models*, 2024, with its
exponent.) A weight counts by what it is to its input and to its output, so that no channel is cut off altogether, and
large inputs weigh less than for Wanda. Of a layer the largest scores stay.

`ria_corrected` then moves the weights that stay towards what makes up best for those that went. That is the best
answer on the calibration rows only: the way is gone by `SHARE`, which costs little there and keeps more elsewhere.
This second step is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .column_sweep import sweep
from .damping import checked_layer, inverse_upper
from .sparsegpt import check_count, largest

EXPONENT = 0.5
SHARE = 0.75
"""How far weights go from what they were to what is best on the calibration rows: of 0, 1/2 and 3/4 the best on the
two texts of the suite ``compress-width``, one of which was not calibrated on."""
_BLOCK = 128


def ria_sparse(weight: Tensor, gram: Tensor, nonzeros: int) -> Tensor:
    """Keep the weights of largest relative importance, as they are.

    Args:
        weight: [out, in].
        gram: [in, in]; only its diagonal is used.
        nonzeros: how many weights of the layer stay.

    Raises:
        InputError, PreconditionError: as `sparsegpt.sparsegpt`.
    """
    check_count(weight, nonzeros)
    return weight.detach().masked_fill(~_chosen(*checked_layer(weight, gram), nonzeros), 0)


def ria_corrected(weight: Tensor, gram: Tensor, nonzeros: int, *, damping: float = 0.01) -> Tensor:
    """Keep the same weights, and correct them.

    Args:
        weight: [out, in].
        gram: [in, in], ``XᵀX``.
        nonzeros: how many weights of the layer stay.
        damping: share of the mean diagonal added to the gram matrix.

    Raises:
        InputError, PreconditionError: as `sparsegpt.sparsegpt`.
    """
    check_count(weight, nonzeros)
    values, matrix = checked_layer(weight, gram)
    keep = _chosen(values, matrix, nonzeros).T
    columns = values.T.contiguous().clone()
    zero = torch.zeros((), dtype=columns.dtype, device=columns.device)
    starts = range(0, len(columns), _BLOCK)
    upper = inverse_upper(matrix, damping)
    sweep(columns, upper, starts, lambda start, stop: None, lambda i, column: torch.where(keep[i], column, zero))
    return torch.where(keep.T, values + SHARE * (columns.T - values), zero).to(weight.dtype).contiguous()


def _chosen(values: Tensor, matrix: Tensor, nonzeros: int) -> Tensor:
    size = values.abs()
    # A channel of zeros has no relative importance; it must not become a NaN.
    tiny = torch.finfo(size.dtype).tiny
    relative = size / size.sum(0).clamp_min(tiny) + size / size.sum(1, keepdim=True).clamp_min(tiny)
    return largest(relative * matrix.diagonal().clamp_min(0).pow(EXPONENT / 2), nonzeros)
