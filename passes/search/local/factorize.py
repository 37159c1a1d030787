"""One linear layer as two: a small dense one and a sparse one (ROCKET, 2026), or the best low rank.

With ``S`` such that ``SᵀS = XᵀX + damping``, errors of the layer's outputs are plain errors of the whitened weight
``Y = S Wᵀ`` [in, out]. Its ``r`` leading left singular vectors ``U`` give

    Y ≈ U V,   V = UᵀY        =>        W ≈ left @ right,   left = Vᵀ [out, r],   right = (S⁻¹U)ᵀ [r, in]

which is the best approximation of that rank (Eckart & Young 1936). To afford a larger rank, every output then keeps
only some of its ``r`` coefficients in ``V``: those of largest

    |V_io| * sqrt(‖(S⁻¹U)_:i‖)

(the geometric mean of a coefficient's size in whitened and in plain weights). The most important 0.5 % of those dropped
come back, here in exchange for the least important that stayed, so that the budget holds. Last, ``U`` is refitted to
the coefficients left: ``U = Y Vᵀ (V Vᵀ + ε)⁻¹``. The paper writes its matrices transposed to ours.

The two ways to count are kept apart: on disk the zeros cost only their positions; when it runs, ``left`` is dense, and
a factorization may take *more* multiplications than the layer it replaces.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ....ir.errors import InputError
from .damping import checked_layer, factored
from .storage import sparse_bytes

RESTORED = 0.005
"""Share of all coefficients that may move to another output after each has chosen its own."""

_REFIT_RIDGE = 1e-12  # of the mean diagonal; only keeps coefficients that nobody uses from dividing by zero


@dataclass(frozen=True)
class Factors:
    """``W ≈ left @ right``.

    Attributes:
        left: [out, r]; sparse if ``nonzeros`` says so.
        right: [r, in].
        nonzeros: how many entries of ``left`` are used; None if all are.
    """

    left: Tensor
    right: Tensor
    nonzeros: int | None = None

    @property
    def rank(self) -> int:
        """Width between the two layers."""
        return self.right.shape[0]

    def product(self) -> Tensor:
        """The weight [out, in] that the two stand for."""
        return self.left @ self.right

    @property
    def nbytes(self) -> int:
        """Bytes on disk, with the positions of the nonzero entries (`storage.sparse_bytes`)."""
        each = self.left.element_size()
        used = self.left.numel() if self.nonzeros is None else self.nonzeros
        return self.right.numel() * each + sparse_bytes(len(self.left), self.rank, used, each)

    @property
    def macs(self) -> int:
        """Multiply-adds per row of inputs when both layers run dense, as runtimes do."""
        return self.left.numel() + self.right.numel()


@dataclass(frozen=True)
class Whitened:
    """A whitened weight and its singular vectors, from which factors of any rank can be cut.

    Attributes:
        upper: [in, in], ``S``, upper triangular.
        weight: [in, out], ``Y = S Wᵀ``.
        vectors: [in, min(in, out)], left singular vectors of ``Y``, the leading ones first.
        values: [min(in, out)], its singular values.
        dtype: the type of the layer's weight.
    """

    upper: Tensor
    weight: Tensor
    vectors: Tensor
    values: Tensor
    dtype: torch.dtype

    def factors(self, rank: int, nonzeros_per_column: int | None = None) -> Factors:
        """As `factorize`, for one more rank of the same layer.

        Raises:
            InputError: rank or nonzeros out of range.
        """
        if not 1 <= rank <= len(self.values):
            raise InputError(f"a factorization of rank {rank}", expected=f"1 to {len(self.values)}")
        count = rank if nonzeros_per_column is None else nonzeros_per_column
        if not 1 <= count <= rank:
            raise InputError(
                f"{count} nonzeros for each output of a factorization of rank {rank}", expected=f"1 to {rank}"
            )
        vectors = self.vectors[:, :rank]
        coefficients = vectors.T @ self.weight
        if count < rank:
            sizes = self._plain(vectors).norm(dim=0)
            kept = _kept(coefficients.abs() * sizes.sqrt()[:, None], count)
            coefficients = torch.where(kept, coefficients, 0.0)
            vectors = _refit(self.weight, coefficients)
        left, right = coefficients.T.to(self.dtype).contiguous(), self._plain(vectors).T.to(self.dtype).contiguous()
        return Factors(left, right, None if count == rank else count * len(left))

    def _plain(self, vectors: Tensor) -> Tensor:
        """``S⁻¹ vectors``."""
        return torch.linalg.solve_triangular(self.upper, vectors, upper=True)


def _kept(importance: Tensor, count: int) -> Tensor:
    """Mask of the coefficients [r, out] that stay: ``count`` per output, then the best exchanges between outputs."""
    kept = torch.zeros_like(importance, dtype=torch.bool)
    kept.scatter_(0, importance.topk(count, dim=0).indices, True)
    moves = min(int(RESTORED * kept.numel()), count * kept.shape[1], int((~kept).sum()))
    best = importance.masked_fill(kept, -1).flatten().topk(moves)
    worst = importance.masked_fill(~kept, math.inf).flatten().topk(moves, largest=False)
    better = best.values > worst.values
    flat = kept.view(-1)
    flat[worst.indices[better]] = False
    flat[best.indices[better]] = True
    return kept


def _refit(weight: Tensor, coefficients: Tensor) -> Tensor:
    """The vectors [in, r] that fit the weight [in, out] best with these coefficients [r, out]."""
    found = factored(coefficients @ coefficients.T, _REFIT_RIDGE)
    return found.solve((coefficients @ weight.T).to(found.lower)).T.to(weight)


def whiten(weight: Tensor, gram: Tensor, damping: float = 0.01) -> Whitened:
    """The work that all ranks of one layer share.

    Args:
        weight, gram, damping: as `factorize`.

    Raises:
        InputError, PreconditionError: as `factorize`.
    """
    values, matrix = checked_layer(weight, gram)
    upper = factored(matrix, damping).lower.T.contiguous()
    whitened = upper @ values.T
    vectors, singular, _ = torch.linalg.svd(whitened, full_matrices=False)
    return Whitened(upper, whitened, vectors, singular, weight.dtype)


def factorize(
    weight: Tensor, gram: Tensor, rank: int, nonzeros_per_column: int | None = None, *, damping: float = 0.01
) -> Factors:
    """Replace one layer by two.

    Args:
        weight: [out, in].
        gram: [in, in], ``XᵀX``, summed or averaged over calibration rows.
        rank: width between the two layers, 1 to ``min(out, in)``.
        nonzeros_per_column: how many of its ``rank`` coefficients every output keeps (a column of the paper's second
            factor is a row of ``left``), on average over the outputs; None for all.
        damping: share of the mean diagonal added to the gram matrix.

    Returns:
        The factors, in the type of ``weight``.

    Raises:
        InputError: shapes that do not belong together, rank or nonzeros out of range.
        PreconditionError: weight or gram matrix is not finite.
    """
    return whiten(weight, gram, damping).factors(rank, nonzeros_per_column)


def rank_for(
    removed: float, kappa: float, inputs: int, outputs: int, *, sparse_cost: float = 1.0
) -> tuple[int, int | None]:
    """The rank, and the nonzeros for each output, that leave a share of a layer's size.

    The rank is ``r`` in ``r inputs + (r / kappa) outputs sparse_cost = (1 - removed) inputs outputs``, rounded down and
    no more than ``min(inputs, outputs)``. What that leaves of the budget goes into nonzeros, so that there are at least
    ``r / kappa``, rounded down.

    Args:
        removed: share of the layer's size to remove, 0 or more and less than 1.
        kappa: rank over nonzeros of an output, 1 (dense) or more.
        inputs, outputs: widths of the layer.
        sparse_cost: what a nonzero costs on disk, in values: 1 as in the paper, which leaves positions uncounted; 1.125
            for 16-bit values and two bits each for the position.

    Returns:
        ``(rank, nonzeros_per_column)`` for `factorize`; None if they are all of them.

    Raises:
        InputError: an argument out of range, or so much to remove that no rank is left.
    """
    if not 0 <= removed < 1 or kappa < 1 or inputs < 1 or outputs < 1 or sparse_cost < 1:
        raise InputError(
            f"removing {removed:g} of a layer of {inputs} inputs and {outputs} outputs, "
            f"with kappa {kappa:g} and sparse cost {sparse_cost:g}",
            expected="a share from 0 to less than 1; kappa, cost and widths of at least 1",
        )
    budget = (1 - removed) * inputs * outputs
    cost = 1.0 if kappa == 1 else sparse_cost
    # The small number keeps a budget that divides exactly from being rounded down by one.
    rank = min(math.floor(budget / (inputs + cost * outputs / kappa) + 1e-9), inputs, outputs)
    # Every output needs one coefficient; a rank below kappa does not see to that by itself.
    rank = min(rank, math.floor((budget - cost * outputs) / inputs + 1e-9))
    if rank < 1:
        raise InputError(
            f"removing {removed:g} of a layer of {inputs} inputs and {outputs} outputs leaves no rank",
            expected="room for a rank of 1",
            remedy="remove less, or nothing at all from a layer this small",
        )
    if kappa == 1:
        return rank, None
    nonzeros = min(math.floor((budget - rank * inputs) / (cost * outputs) + 1e-9), rank)
    return rank, None if nonzeros == rank else nonzeros
