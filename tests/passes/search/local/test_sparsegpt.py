"""Unstructured sparsity against the algorithm written as plain loops, and the methods against each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphlathe.ir.errors import InputError, PreconditionError
from graphlathe.passes.search.local.layer_error import layer_error
from graphlathe.passes.search.local.sparsegpt import magnitude_sparse, sparsegpt, wanda_sparse
from tests.passes.search.local.random_layers import layer


def _floor(value: float) -> int:
    return int(np.floor(value + 1e-9))


def _obs_by_loops(weight: np.ndarray, gram: np.ndarray, nonzeros: int, damping: float, block: int) -> np.ndarray:
    """SparseGPT in its original form: for every column the inverse of the gram matrix of the columns from it on."""
    weight, (out, width) = weight.copy(), weight.shape
    dead = np.diag(gram) == 0
    live = out * int((~dead).sum())
    shares = np.where(dead, max(nonzeros - live, 0) / max(dead.sum(), 1), min(nonzeros, live) / max((~dead).sum(), 1))
    gram = gram + damping * np.diag(gram).mean() * np.eye(width)
    inverses = [np.linalg.inv(gram[i:, i:]) for i in range(width)]
    for start in range(0, width, block):
        stop = min(start + block, width)
        scores = {
            (o, i): (not dead[i], weight[o, i] ** 2 / inverses[i][0, 0]) for o in range(out) for i in range(start, stop)
        }
        # The share of this block, what rounding left over of blocks before included.
        count = sum(
            _floor(shares[:end][dead[:end] == d].sum()) * s
            for d in (True, False)
            for end, s in ((stop, 1), (start, -1))
        )
        keep = set(sorted(scores, key=scores.__getitem__, reverse=True)[:count])
        for i in range(start, stop):
            for o in range(out):
                if (o, i) not in keep:
                    weight[o, i:] -= weight[o, i] / inverses[i][0, 0] * inverses[i][0]
                    weight[o, i] = 0
    return weight


@given(
    out=st.integers(1, 6),
    width=st.integers(1, 9),
    share=st.floats(0, 1),
    block=st.integers(1, 10),
    dead=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_same_as_plain_loops(out: int, width: int, share: float, block: int, dead: int, seed: int) -> None:
    weight, inputs = layer(out, width, seed=seed, dead=min(dead, width))
    gram, nonzeros = inputs.T @ inputs, round(share * out * width)
    got = sparsegpt(weight, gram, nonzeros, damping=0.02, block=block)
    assert int((got != 0).sum()) == nonzeros
    if gram.any():
        expected = _obs_by_loops(weight.numpy(), gram.numpy(), nonzeros, 0.02, block)
        torch.testing.assert_close(got, torch.from_numpy(expected), rtol=1e-8, atol=1e-10)


@given(
    out=st.integers(1, 6),
    width=st.integers(1, 9),
    share=st.floats(0, 1),
    dead=st.integers(0, 9),
    seed=st.integers(0, 9),
)
def test_cheap_methods_keep_the_best_weights_as_they_are(
    out: int, width: int, share: float, dead: int, seed: int
) -> None:
    weight, inputs = layer(out, width, seed=seed, scaled=True, dead=min(dead, width))
    nonzeros = round(share * out * width)
    for got, scores, per_row in (
        (magnitude_sparse(weight, nonzeros), weight.abs(), False),
        (wanda_sparse(weight, inputs.T @ inputs, nonzeros), weight.abs() * inputs.norm(dim=0), True),
    ):
        kept = got != 0
        assert int(kept.sum()) == nonzeros
        assert torch.equal(got[kept], weight[kept])
        for some, where in zip(scores, kept, strict=True) if per_row else [(scores, kept)]:
            assert not where.any() or where.all() or some[where].min() >= some[~where].max()
        counts = kept.sum(1)
        assert not per_row or int(counts.max() - counts.min()) <= 1


def test_what_does_not_divide_goes_to_the_rows_whose_next_weight_scores_highest() -> None:
    weight = torch.tensor([[5.0, 1.0, 0.5], [4.0, 3.0, 0.1], [2.0, 0.9, 0.8]])
    expected = torch.tensor([[5.0, 1.0, 0.0], [4.0, 3.0, 0.0], [2.0, 0.0, 0.0]])
    assert torch.equal(wanda_sparse(weight, torch.eye(3), 5), expected)


def test_all_weights_are_the_layer_and_none_are_nothing() -> None:
    weight, inputs = layer(5, 8, seed=0, dead=2)
    weight, gram = weight.float(), inputs.T @ inputs
    size = weight.numel()
    for prune in (
        lambda count: sparsegpt(weight, gram, count, block=3),
        lambda count: wanda_sparse(weight, gram, count),
        lambda count: magnitude_sparse(weight, count),
    ):
        assert torch.equal(prune(size), weight)
        assert torch.equal(prune(0), torch.zeros_like(weight))


def test_dead_columns_go_first_and_change_nothing() -> None:
    weight, inputs = layer(4, 8, seed=5, dead=3)
    gram = inputs.T @ inputs
    live = inputs.abs().sum(0) > 0
    for block in (1, 3, 8):
        torch.testing.assert_close(sparsegpt(weight, gram, 4 * 5, block=block), weight * live, rtol=1e-12, atol=0)
        fewer, more = (sparsegpt(weight, gram, count, block=block) for count in (13, 23))
        assert not fewer[:, ~live].any()
        assert int((fewer != 0).sum()) == 13
        assert bool((more[:, live] != 0).all())
        assert int((more != 0).sum()) == 23
    torch.testing.assert_close(wanda_sparse(weight, gram, 4 * 5), weight * live, rtol=1e-12, atol=0)


def test_correcting_beats_choosing_beats_magnitude_on_correlated_inputs() -> None:
    errors = []
    for seed in range(8):
        weight, inputs = layer(24, 64, seed=seed, scaled=True)
        gram, half = inputs.T @ inputs, weight.numel() // 2
        found = sparsegpt(weight, gram, half), wanda_sparse(weight, gram, half), magnitude_sparse(weight, half)
        errors.append([layer_error(weight, changed, gram) for changed in found])
    corrected, chosen, magnitude = np.mean(errors, axis=0)
    assert corrected < 0.8 * chosen
    assert chosen < 0.8 * magnitude


def test_uncorrelated_inputs_leave_nothing_to_correct() -> None:
    weight, _ = layer(6, 10, seed=4)
    scale = torch.linspace(1, 9, 10, dtype=torch.float64)
    got = sparsegpt(weight, torch.diag(scale), 30, damping=0.0, block=10)
    kept = got != 0
    torch.testing.assert_close(got[kept], weight[kept], rtol=1e-12, atol=0)
    scores = weight.square() * scale
    assert scores[kept].min() > scores[~kept].max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_type_of_the_weight_is_that_of_the_result(dtype: torch.dtype) -> None:
    weight, inputs = layer(4, 6, seed=1)
    gram, weight = (inputs.T @ inputs).float(), weight.to(dtype)
    for got in (sparsegpt(weight, gram, 11), wanda_sparse(weight, gram, 11), magnitude_sparse(weight, 11)):
        assert got.dtype == dtype
        assert int((got != 0).sum()) == 11


def test_bad_arguments_are_errors() -> None:
    weight, gram = torch.ones(2, 3), torch.eye(3)
    for count in (-1, 7):
        with pytest.raises(InputError, match="nonzero weights of a layer that has 6"):
            sparsegpt(weight, gram, count)
        with pytest.raises(InputError, match="expected: a number from 0 to 6"):
            wanda_sparse(weight, gram, count)
        with pytest.raises(InputError, match="nonzero"):
            magnitude_sparse(weight, count)
    with pytest.raises(InputError, match="block of 0"):
        sparsegpt(weight, gram, 3, block=0)
    with pytest.raises(PreconditionError, match="NaN or infinite"):
        sparsegpt(weight, gram * float("nan"), 3)
