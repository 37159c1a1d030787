"""Structured pruning of one layer's input columns by the optimal brain surgeon, in rounds.

The core of Týr-the-Pruner (2025): groups of columns (a head, a neuron) are removed a few at a time; after every
round the rest of the weight makes up for the loss, and the groups that are left are scored again.

The layer may read inputs ``X̂`` that differ from the ``X`` of the dense model, because earlier layers are compressed
already. What it should still give are the dense outputs, so with ``Ĥ = X̂ᵀX̂ + λI`` the weight minimizes

    ‖X̂ Wᵀ - X W₀ᵀ‖² + λ ‖W - W₀‖²   =>   Ĥ Wᵀ = G,   G = X̂ᵀX W₀ᵀ + λ W₀ᵀ

The second term is the damping, pulling toward the weight as it was: with ``X̂ = X`` nothing changes until something is
removed. At the optimum for the columns left, removing group ``g`` raises the minimum by exactly

    tr(W_g ([Ĥ⁻¹]_gg)⁻¹ W_gᵀ)

and the new optimum and inverse follow without solving again:

    W -= W_g ([Ĥ⁻¹]_gg)⁻¹ [Ĥ⁻¹]_g:        Ĥ⁻¹ -= [Ĥ⁻¹]_:g ([Ĥ⁻¹]_gg)⁻¹ [Ĥ⁻¹]_g:

Weights that are handed out are solved once more on the columns kept, so that no rounding adds up over the rounds.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ....ir.errors import InputError, PreconditionError
from .columns import checked_groups, removal_errors
from .damping import checked_layer, factored


@dataclass(frozen=True)
class Removal:
    """A layer without some groups of its input columns.

    Attributes:
        removed: indices of the removed groups, in the order of their removal.
        weight: [out, in], refitted, with zeros in the removed columns; in the type of the weight it came from.
    """

    removed: tuple[int, ...]
    weight: Tensor


def remove_groups(
    weight: Tensor,
    gram: Tensor,
    groups: Tensor,
    counts: Sequence[int],
    *,
    target: Tensor | None = None,
    rounds: int = 16,
    damping: float = 0.01,
) -> list[Removal]:
    """Remove the groups of input columns that can best be made up for.

    Args:
        weight: [out, in].
        gram: [in, in], ``X̂ᵀX̂`` of the inputs that the layer will read, summed or averaged over calibration rows.
        groups: [n, size], column indices; columns in no group always stay.
        counts: how many groups to remove, increasing; one result for each.
        target: [in, out], ``X̂ᵀ Y`` for the outputs ``Y`` that the layer should have (``X W₀ᵀ`` of the dense model),
            summed or averaged like ``gram``. None if the inputs are the dense ones.
        rounds: the largest count is reached in this many rounds; more are more exact and slower. Every count in
            ``counts`` ends a round, too.
        damping: share of the mean diagonal added to the gram matrix.

    Returns:
        A removal for every count. Each removed set begins with the one before.

    Raises:
        InputError: shapes that do not belong together, counts that are out of range or do not increase.
        PreconditionError: weight, gram matrix or target is not finite, or the damping is too small to compute with.
    """
    start, matrix = checked_layer(weight, gram)
    members = checked_groups(groups, len(matrix)).to(matrix.device)
    _check_counts(counts, len(members), rounds)
    found = factored(matrix, damping)
    goal = found.matrix @ start.T if target is None else _checked_target(target, start) + found.level * start.T
    current = start.clone() if target is None else found.solve(goal).T.contiguous()
    inverse = found.inverse()
    left = torch.ones(len(members), dtype=torch.bool, device=matrix.device)
    removed: list[int] = []
    results: list[Removal] = []
    for stop in _stops(counts, rounds):
        if stop > len(removed):
            candidates = left.nonzero()[:, 0]
            scores = removal_errors(current, inverse, members[candidates])
            chosen = candidates[scores.argsort(stable=True)[: stop - len(removed)]]
            left[chosen] = False
            removed += chosen.tolist()
            _downdate(current, inverse, members[chosen].flatten())
        if stop in counts:
            kept = torch.ones(len(matrix), dtype=torch.bool, device=matrix.device)
            kept[members[removed].flatten()] = False
            unchanged = target is None and not removed
            fitted = start if unchanged else _refit(found.matrix, goal, kept)
            results.append(Removal(tuple(removed), fitted.to(weight.dtype, copy=True)))
    return results


def _check_counts(counts: Sequence[int], groups: int, rounds: int) -> None:
    if rounds < 1:
        raise InputError(f"{rounds} rounds", expected="1 or more")
    increasing = all(a < b for a, b in itertools.pairwise(counts))
    if not counts or not increasing or counts[0] < 0 or counts[-1] > groups:
        raise InputError(
            f"counts of groups to remove: {list(counts)}", expected=f"increasing numbers from 0 to {groups}"
        )


def _checked_target(target: Tensor, weight: Tensor) -> Tensor:
    if target.shape != weight.T.shape:
        raise InputError(
            f"a target of shape {list(target.shape)} for a weight of shape {list(weight.shape)}", expected="[in, out]"
        )
    if not bool(target.isfinite().all()):
        raise PreconditionError("the target of a layer holds NaN or infinity", expected="finite activations")
    return target.to(weight)


def _stops(counts: Sequence[int], rounds: int) -> list[int]:
    """Numbers of removed groups at which rounds end, increasing."""
    return sorted({*counts, *(counts[-1] * r // rounds for r in range(1, rounds + 1))})


def _downdate(weight: Tensor, inverse: Tensor, columns: Tensor) -> None:
    """Remove columns from the optimal weight and from the inverse, in place."""
    rows = inverse[columns]
    answer = torch.linalg.solve(rows[:, columns], rows)
    weight -= weight[:, columns] @ answer
    inverse -= rows.T @ answer
    # What is left there is rounding, and nothing may read it.
    weight[:, columns], inverse[columns], inverse[:, columns] = 0, 0, 0


def _refit(matrix: Tensor, goal: Tensor, kept: Tensor) -> Tensor:
    """The least-squares weight on the columns kept, [out, in]."""
    fitted = torch.zeros_like(goal)
    if bool(kept.any()):
        lower = torch.linalg.cholesky(matrix[kept][:, kept])
        fitted[kept] = torch.cholesky_solve(goal[kept], lower)
    return fitted.T.contiguous()
