"""Low-rank maps against numpy: the whitened truncated SVD, and reduced-rank regression in closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphlathe.ir.errors import PreconditionError
from graphlathe.passes.search.compensation.low_rank import low_rank_map, low_rank_residual, metric_root


def sample(seed: int, samples: int = 80, inputs: int = 7, outputs: int = 5) -> tuple[Tensor, Tensor]:
    """Inputs [samples, in] of very different scales, and a weight [out, in]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, inputs, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(inputs, inputs, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, inputs)
    return x, torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)


def error(x: Tensor, lost: Tensor, factors: tuple[Tensor, Tensor]) -> float:
    left, right = factors
    return float((x @ (lost - left @ right).T).square().sum())


@given(seed=st.integers(0, 1000), rank=st.integers(1, 5))
def test_residual_is_the_whitened_svd(seed: int, rank: int) -> None:
    x, weight = sample(seed)
    approximation = weight.round()
    left, right = low_rank_residual(weight, approximation, metric_root(x.T @ x), rank)
    assert left.shape == (5, rank)
    assert right.shape == (rank, 7)
    lost = (weight - approximation).numpy()
    root = np.linalg.cholesky((x.T @ x).numpy())
    u, s, vt = np.linalg.svd(lost @ root)
    best = (u[:, :rank] * s[:rank]) @ vt[:rank] @ np.linalg.inv(root)
    assert np.abs((left @ right).numpy() - best).max() <= 1e-8 * np.abs(lost).max()
    optimum = float((s[rank:] ** 2).sum())
    assert abs(error(x, torch.as_tensor(lost), (left, right)) - optimum) <= 1e-9 * float((s**2).sum())


def test_residual_heeds_the_data() -> None:
    x, weight = sample(1)
    best = low_rank_residual(weight, torch.zeros_like(weight), metric_root(x.T @ x), 2)
    plain = low_rank_residual(weight, torch.zeros_like(weight), torch.eye(7, dtype=torch.float64), 2)
    assert error(x, weight, best) < 0.99 * error(x, weight, plain)


def test_residual_of_full_rank_is_exact_and_dead_channels_do_no_harm() -> None:
    x, weight = sample(2)
    x[:, 3] = 0
    factors = low_rank_residual(weight, weight.round(), metric_root(x.T @ x), 5)
    assert error(x, weight - weight.round(), factors) <= 1e-20 * float(x.square().sum())
    assert torch.allclose(factors[0].T @ factors[0], torch.eye(5, dtype=torch.float64), atol=1e-12)


def test_residual_has_the_type_of_the_weight() -> None:
    x, weight = sample(2)
    factors = low_rank_residual(weight.float(), weight.round().float(), metric_root(x.T @ x), 2)
    assert {f.dtype for f in factors} == {torch.float32}


@given(seed=st.integers(0, 1000), rank=st.integers(1, 5))
def test_map_is_reduced_rank_regression(seed: int, rank: int) -> None:
    x, weight = sample(seed)
    y = torch.tanh(x @ weight.T)
    left, right = low_rank_map(x.T @ x, x.T @ y, rank)
    # Least squares first, then the principal directions of its predictions.
    full = np.linalg.lstsq(x.numpy(), y.numpy(), rcond=None)[0]
    _, _, vt = np.linalg.svd(x.numpy() @ full, full_matrices=False)
    best = full @ vt[:rank].T @ vt[:rank]
    predicted, wanted = x.numpy() @ (left @ right).T.numpy(), x.numpy() @ best
    assert np.abs(predicted - wanted).max() <= 1e-7 * np.abs(y.numpy()).max()


def test_map_finds_a_planted_map_of_low_rank() -> None:
    x, weight = sample(4)
    planted = weight[:, :2] @ torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left, right = low_rank_map(x.T @ x / len(x), x.T @ (x @ planted.T) / len(x), 2)
    assert float((left @ right - planted).abs().max()) <= 1e-9 * float(planted.abs().max())


def test_map_with_damping_is_ridge_regression_of_reduced_rank() -> None:
    x, weight = sample(5)
    y = torch.tanh(x @ weight.T)
    gram = x.T @ x
    strength = 0.1 * float(gram.diagonal().mean())
    rows = np.vstack([x.numpy(), np.sqrt(strength) * np.eye(7)])
    full = np.linalg.lstsq(rows, np.vstack([y.numpy(), np.zeros((7, 5))]), rcond=None)[0]
    _, _, vt = np.linalg.svd(rows @ full, full_matrices=False)
    left, right = low_rank_map(gram, x.T @ y, 2, damping=0.1)
    best = (full @ vt[:2].T @ vt[:2]).T
    assert np.abs((left @ right).numpy() - best).max() <= 1e-9 * np.abs(best).max()


def test_wrong_arguments_are_errors() -> None:
    x, weight = sample(0)
    gram, root = x.T @ x, metric_root(x.T @ x)
    for rank in (0, 6):
        with pytest.raises(PreconditionError, match=f"the rank is {rank}\n  expected: 1 to 5"):
            low_rank_residual(weight, weight, root, rank)
    with pytest.raises(PreconditionError, match="'approximation' has shape"):
        low_rank_residual(weight, weight.T, root, 1)
    with pytest.raises(PreconditionError, match="'gram' has shape"):
        metric_root(gram[:5])
    with pytest.raises(PreconditionError, match="'root' has shape"):
        low_rank_residual(weight, weight, root[:5, :5], 1)
    with pytest.raises(PreconditionError, match="NaN or infinity"):
        low_rank_residual(weight * float("inf"), weight, root, 1)
    with pytest.raises(PreconditionError, match="'gram_xx' has shape"):
        low_rank_map(gram, (x.T @ x @ weight.T).T, 1)
    with pytest.raises(PreconditionError, match=r"matrix \[in, out\]"):
        low_rank_map(gram, gram[0], 1)
    with pytest.raises(PreconditionError, match="damping"):
        low_rank_map(gram, gram, 1, damping=float("nan"))
