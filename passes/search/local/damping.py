"""The curvature of one linear layer's squared error, checked and made invertible.

For ``y = x Wᵀ`` and calibration rows ``X``, changing the weight by ``D`` changes the outputs by ``tr(D H Dᵀ)`` in
squared norm, where ``H = XᵀX`` is the gram matrix. Every method in this folder needs ``H`` or its inverse, but ``H`` is
singular when a column is dead or there are fewer rows than columns, so a share of its mean diagonal is added:

    H' = H + ratio * mean(diag H) * I

The formula and its default are those of Frantar et al., *GPTQ* (2022), section 3.3. Solving is done in float64 up to
`FLOAT64_WIDTH` columns, and in float32 beyond, where float64 would take too much memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ....ir.errors import InputError, PreconditionError

FLOAT64_WIDTH = 4096
"""Widest layer (input columns) that is solved in float64."""

_FIRST_RAISE = {torch.float64: 1e-8, torch.float32: 1e-4}  # the least damping that helps where the asked one does not
_MOST_DAMPING = 1.0


@dataclass(frozen=True)
class Factored:
    """A damped gram matrix and its Cholesky factor.

    Attributes:
        matrix: [in, in], the damped gram matrix.
        lower: [in, in], lower triangular, ``lower @ lower.T == matrix``.
        level: what was added to the diagonal.
        ratio: the same as a share of the mean diagonal; above the one asked for if that left the matrix singular.
    """

    matrix: Tensor
    lower: Tensor
    level: float
    ratio: float

    def inverse(self) -> Tensor:
        """The inverse of the damped gram matrix, [in, in]."""
        return torch.cholesky_inverse(self.lower)

    def solve(self, goal: Tensor) -> Tensor:
        """``matrix⁻¹ goal`` for a goal of [in, n]."""
        return torch.cholesky_solve(goal, self.lower)


def working_dtype(width: int) -> torch.dtype:
    """The type that a layer with ``width`` input columns is solved in."""
    return torch.float64 if width <= FLOAT64_WIDTH else torch.float32


def checked_gram(gram: Tensor) -> Tensor:
    """The gram matrix in the working type, exactly symmetric.

    Args:
        gram: [in, in].

    Raises:
        InputError: it is not square, or a diagonal entry is negative.
        PreconditionError: it holds NaN or infinity.
    """
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or not len(gram):
        raise InputError(
            f"a gram matrix of shape {list(gram.shape)}",
            expected="[in, in], the product of the layer's inputs with themselves",
        )
    matrix = gram.to(working_dtype(len(gram)))
    bad = int((~matrix.isfinite()).sum())
    if bad:
        raise PreconditionError(
            f"{bad} of {matrix.numel()} entries of the gram matrix of a layer's inputs are NaN or infinite",
            expected="finite activations at the layer's input",
            remedy="look for calibration batches whose activations overflow, and gather in float32",
        )
    if bool((matrix.diagonal() < 0).any()):
        raise InputError("a gram matrix with a negative diagonal entry", expected="sums of squares on the diagonal")
    return (matrix + matrix.T) / 2


def checked_layer(weight: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and gram matrix of one layer in the working type.

    Args:
        weight: [out, in].
        gram: [in, in].

    Raises:
        InputError: the shapes do not belong together.
        PreconditionError: one of them holds NaN or infinity.
    """
    checked = checked_gram(gram)
    if weight.dim() != 2 or weight.shape[1] != len(checked):
        raise InputError(
            f"a weight of shape {list(weight.shape)} with a gram matrix of shape {list(gram.shape)}",
            expected="[out, in] and [in, in]",
        )
    if not bool(weight.isfinite().all()):
        raise PreconditionError("the weight of a layer holds NaN or infinity", expected="finite weights")
    return weight.detach().to(checked), checked


def damping_level(gram: Tensor, ratio: float) -> float:
    """What ``ratio`` adds to the diagonal: a share of its mean, or of one where the matrix is all zero."""
    if not 0 <= ratio < float("inf"):
        raise InputError(f"a damping of {ratio}", expected="a share of the mean diagonal, 0 or more")
    mean = float(gram.diagonal().mean())
    return ratio * (mean if mean > 0 else 1.0)


def damped(gram: Tensor, ratio: float = 0.01) -> Tensor:
    """``gram + ratio * mean(diag) * I`` in the working type.

    Args:
        gram: [in, in], symmetric, summed or averaged over rows.
        ratio: share of the mean diagonal to add. An all-zero matrix counts as one with mean 1, so that it is damped,
            too.

    Raises:
        InputError, PreconditionError: as `checked_gram`.
    """
    matrix = checked_gram(gram)
    matrix.diagonal().add_(damping_level(matrix, ratio))
    return matrix


def factored(gram: Tensor, ratio: float = 0.01) -> Factored:
    """The damped gram matrix with its Cholesky factor.

    If the matrix is singular in spite of its damping, ten times as much is tried, and so on; the result says how much
    it was. Singular means that the part of a column that earlier columns do not explain drowns in rounding.

    Args:
        gram: [in, in].
        ratio: share of the mean diagonal to add, at least.

    Raises:
        InputError: as `checked_gram`.
        PreconditionError: it is not finite, or not even damping with its whole mean diagonal makes it positive definite
            (so it is no gram matrix).
    """
    plain = checked_gram(gram)
    tiny = 10 * math.sqrt(len(plain)) * torch.finfo(plain.dtype).eps
    tried = ratio
    while True:
        level = damping_level(plain, tried)
        matrix = plain.clone()
        matrix.diagonal().add_(level)
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not int(failed) and bool((lower.diagonal().square() > tiny * matrix.diagonal()).all()):
            return Factored(matrix, lower, level, tried)
        if tried >= _MOST_DAMPING:
            raise PreconditionError(
                "the gram matrix of a layer's inputs is not positive definite, "
                f"even with {tried:g} of its mean diagonal added",
                expected="a sum of outer products",
                remedy="gather it in float32 or float64, as the product of the inputs with themselves",
            )
        tried = max(10 * tried, _FIRST_RAISE[plain.dtype])


def inverse_upper(gram: Tensor, ratio: float = 0.01) -> Tensor:
    """Upper triangular ``U`` [in, in] with ``UᵀU = H'⁻¹``.

    Row ``i`` says how the columns after ``i`` make up for an error in ``i``. It comes from one Cholesky factorization,
    without forming the inverse: if the matrix with its columns in reverse order is ``L Lᵀ``, then the matrix itself is
    ``R Rᵀ`` with ``R`` upper triangular, and ``U = R⁻¹``.

    Args:
        gram, ratio: as `factored`.

    Raises:
        InputError, PreconditionError: as `factored`.
    """
    lower = factored(gram.flip(0, 1), ratio).lower
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1).contiguous()
