"""Factorizations against NumPy's singular values, plain loops and other optimizers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from graphlathe.ir.errors import InputError, PreconditionError
from graphlathe.passes.search.local.damping import damped
from graphlathe.passes.search.local.factorize import RESTORED, factorize, rank_for, whiten
from graphlathe.passes.search.local.layer_error import layer_error
from graphlathe.passes.search.local.storage import sparse_bytes
from tests.passes.search.local.random_layers import layer


def _whitened(weight: torch.Tensor, gram: torch.Tensor, damping: float) -> tuple[np.ndarray, np.ndarray]:
    """``S`` with ``SᵀS`` the damped gram matrix, a symmetric one unlike the triangular one tested, and ``S Wᵀ``."""
    values, vectors = np.linalg.eigh(damped(gram, damping).numpy())
    root = (vectors * np.sqrt(values)) @ vectors.T
    return root, root @ weight.numpy().T


@given(
    out=st.integers(1, 7),
    width=st.integers(1, 7),
    rank=st.integers(1, 7),
    dead=st.integers(0, 2),
    seed=st.integers(0, 50),
)
def test_dense_factors_are_the_truncated_whitened_singular_values(
    out: int, width: int, rank: int, dead: int, seed: int
) -> None:
    assume(rank <= min(out, width))
    weight, inputs = layer(out, width, seed=seed, dead=min(dead, width - 1))
    gram = inputs.T @ inputs
    found = factorize(weight, gram, rank, damping=0.01)
    assert found.left.shape == (out, rank)
    assert found.right.shape == (rank, width)
    assert found.nonzeros is None
    root, whitened = _whitened(weight, gram, 0.01)
    left, values, right = np.linalg.svd(whitened, full_matrices=False)
    expected = np.linalg.solve(root, (left[:, :rank] * values[:rank]) @ right[:rank]).T
    np.testing.assert_allclose(found.product().numpy(), expected, rtol=1e-7, atol=1e-9)
    lost = np.square(root @ (found.product().numpy() - weight.numpy()).T).sum()
    assert lost == pytest.approx(np.square(values[rank:]).sum(), rel=1e-8, abs=1e-10)


def test_no_other_factors_of_that_rank_found_by_descent_lose_less() -> None:
    weight, inputs = layer(6, 7, seed=4)
    gram = inputs.T @ inputs / len(inputs)
    root = torch.from_numpy(_whitened(weight, gram, 0.01)[0])
    ours = factorize(weight, gram, 2, damping=0.01)
    best = float((root @ (ours.product() - weight).T).square().sum())
    source = torch.Generator().manual_seed(0)
    reached = []
    for start in range(4):
        factors = [
            (0.1 * f + torch.randn(f.shape, generator=source, dtype=torch.float64)) if start else f + 0.01
            for f in (ours.left, ours.right)
        ]
        left, right = (f.clone().requires_grad_() for f in factors)
        optimizer = torch.optim.Adam([left, right], lr=0.03)
        for _ in range(800):
            optimizer.zero_grad()
            loss = (root @ (left @ right - weight).T).square().sum()
            loss.backward()
            optimizer.step()
        reached.append(float(loss.detach()))
    assert min(reached) >= best * (1 - 1e-9)
    assert min(reached) < best * 1.01, "descent came nowhere near, so that it proves nothing"


def _kept_by_loops(coefficients: np.ndarray, sizes: np.ndarray, count: int) -> np.ndarray:
    """Which coefficients [r, out] stay, by sorting lists."""
    rank, out = coefficients.shape
    weight = {
        (i, o): math.sqrt(abs(coefficients[i, o]) * abs(coefficients[i, o]) * sizes[i])
        for i in range(rank)
        for o in range(out)
    }
    kept = {p for o in range(out) for p in sorted(((i, o) for i in range(rank)), key=lambda p: -weight[p])[:count]}
    dropped = sorted(set(weight) - kept, key=lambda p: -weight[p])[: int(RESTORED * rank * out)]
    weakest = sorted(kept, key=lambda p: weight[p])
    for new, old in zip(dropped, weakest, strict=False):
        if weight[new] > weight[old]:
            kept = (kept - {old}) | {new}
    return np.array([[(i, o) in kept for o in range(out)] for i in range(rank)])


@pytest.mark.parametrize("count", [1, 4, 9, 11])
@pytest.mark.parametrize("seed", range(3))
def test_sparse_factors_keep_what_loops_keep_and_fit_the_rest(count: int, seed: int) -> None:
    out, width, rank = 40, 16, 12
    weight, inputs = layer(out, width, seed=seed, scaled=True)
    gram = inputs.T @ inputs
    prepared = whiten(weight, gram, 0.01)
    found = prepared.factors(rank, count)
    assert found.nonzeros == count * out == int((found.left != 0).sum())

    dense = factorize(weight, gram, rank, damping=0.01)
    sizes = dense.right.norm(dim=1).numpy()
    kept = _kept_by_loops(dense.left.T.numpy(), sizes, count)
    assert np.array_equal((found.left != 0).T.numpy(), kept)
    assert kept.sum(0).min() < kept.sum(0).max(), "nothing moved between outputs, so that it is not tested"
    torch.testing.assert_close(found.left, dense.left * torch.from_numpy(kept.T), rtol=1e-9, atol=1e-9)

    # The second layer given, the first is the best there is: in whitened terms, a least-squares problem per input.
    root, whitened = _whitened(weight, gram, 0.01)
    fitted = np.linalg.lstsq(found.left.numpy(), whitened.T, rcond=None)[0]
    best = np.square(fitted.T @ found.left.numpy().T - whitened).sum()
    lost = np.square(root @ found.product().numpy().T - whitened).sum()
    assert lost == pytest.approx(best, rel=1e-7)
    unfitted = np.square(root @ (dense.left.numpy() * kept.T @ dense.right.numpy()).T - whitened).sum()
    assert lost < unfitted


def test_finds_directions_that_outputs_use_one_each_where_no_dense_factors_can() -> None:
    weight, inputs = layer(24, 12, seed=3)
    gram = inputs.T @ inputs
    source = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(12, 8, generator=source, dtype=torch.float64)).Q
    root = torch.from_numpy(_whitened(weight, gram, 0.0)[0])
    used = torch.zeros(8, 24).double()
    used[torch.arange(24) % 8, torch.arange(24)] = torch.linspace(1, 4, 24).double()
    planted = torch.linalg.solve(root, directions @ used).T
    found = factorize(planted, gram, 8, 1, damping=0.0)
    assert layer_error(planted, found.product(), gram) < 1e-16
    values = found.right.numel() + int((found.left != 0).sum())
    dense = factorize(planted, gram, 4, damping=0.0)
    assert dense.right.numel() + dense.left.numel() > values
    assert layer_error(planted, dense.product(), gram) > 0.1


def test_full_rank_is_the_layer() -> None:
    weight, inputs = layer(5, 9, seed=0, dead=2)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        found = factorize(weight.to(dtype), inputs.T @ inputs, 5)
        assert found.left.dtype == found.right.dtype == dtype
        torch.testing.assert_close(found.product(), weight.to(dtype), rtol=tolerance, atol=tolerance)


def test_a_coefficient_that_nobody_keeps_does_no_harm() -> None:
    weight = torch.diag(torch.tensor([4.0, 3.0, 0.0, 0.0]))
    found = factorize(weight, torch.eye(4), 4, 1)
    assert bool(found.product().isfinite().all())
    torch.testing.assert_close(found.product()[:2], weight[:2], rtol=1e-5, atol=1e-6)


@given(
    removed=st.floats(0, 0.95),
    kappa=st.sampled_from([1.0, 1.5, 2.0, 3.0]),
    inputs=st.integers(1, 200),
    outputs=st.integers(1, 200),
    cost=st.sampled_from([1.0, 1.125, 1.5]),
)
def test_rank_and_nonzeros_fill_the_budget_and_never_exceed_it(
    removed: float, kappa: float, inputs: int, outputs: int, cost: float
) -> None:
    budget = (1 - removed) * inputs * outputs
    formula = budget / (inputs + (cost if kappa > 1 else 1) * outputs / kappa)
    try:
        rank, nonzeros = rank_for(removed, kappa, inputs, outputs, sparse_cost=cost)
    except InputError:
        assert inputs + (cost if kappa > 1 else 1) * outputs > budget * (1 - 1e-9)
        return
    used = rank * inputs + (rank if nonzeros is None else nonzeros * cost) * outputs
    assert used <= budget * (1 + 1e-9)
    assert rank <= min(formula + 1e-6, inputs, outputs)
    if formula >= kappa + 1 and formula <= min(inputs, outputs):
        assert rank == math.floor(formula + 1e-9)
        assert (rank if nonzeros is None else nonzeros) >= math.floor(rank / kappa)
    if kappa == 1:
        assert nonzeros is None


def test_sparse_on_disk_is_not_sparse_when_it_runs() -> None:
    width = 60
    weight, inputs = layer(width, width, seed=1)
    rank, nonzeros = rank_for(0.2, 2.0, width, width)
    assert (rank, nonzeros) == (32, 16)
    found = factorize(weight.float(), inputs.T @ inputs, rank, nonzeros)
    # A fifth less to store, and a fifteenth more to compute than the layer itself.
    assert found.macs == pytest.approx(16 / 15 * width**2)
    values = 4 * (rank * width + nonzeros * width)
    assert values == pytest.approx(0.8 * 4 * width**2)
    assert found.nbytes == values + rank * width // 8
    dense = factorize(weight.float(), inputs.T @ inputs, 24)
    assert dense.nbytes == 4 * dense.macs == 4 * 24 * 2 * width


@given(rows=st.integers(1, 40), columns=st.integers(1, 300), share=st.floats(0, 1), each=st.sampled_from([1, 2, 4]))
def test_sparse_bytes_are_those_of_the_best_of_three_layouts(rows: int, columns: int, share: float, each: int) -> None:
    nonzeros = round(share * rows * columns)
    got = sparse_bytes(rows, columns, nonzeros, each)
    names_of_columns = max(math.ceil(math.log2(columns)), 1)
    names_of_counts = math.ceil(math.log2(columns + 1))
    layouts = (
        rows * columns * each,
        nonzeros * each + math.ceil(rows * columns / 8),
        nonzeros * each + math.ceil((nonzeros * names_of_columns + rows * names_of_counts) / 8),
    )
    assert got == min(layouts)
    assert got >= nonzeros * each


def test_bad_arguments_are_errors() -> None:
    weight, gram = torch.ones(3, 4), torch.eye(4)
    for rank in (0, 4):
        with pytest.raises(InputError, match="expected: 1 to 3"):
            factorize(weight, gram, rank)
    for nonzeros in (0, 3):
        with pytest.raises(InputError, match="nonzeros for each output of a factorization of rank 2"):
            factorize(weight, gram, 2, nonzeros)
    with pytest.raises(PreconditionError, match="NaN or infinite"):
        factorize(weight, gram * float("nan"), 1)
    for arguments in (
        (-0.1, 1.0, 8, 8),
        (1.0, 1.0, 8, 8),
        (0.1, 0.5, 8, 8),
        (0.1, 1.0, 0, 8),
        (float("nan"), 1.0, 8, 8),
    ):
        with pytest.raises(InputError, match="kappa"):
            rank_for(*arguments)
    with pytest.raises(InputError, match="leaves no rank"):
        rank_for(0.9, 2.0, 4, 4)
