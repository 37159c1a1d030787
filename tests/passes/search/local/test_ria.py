"""Relative importance and activations: the choice and the correction against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphlathe.ir.errors import InputError, PreconditionError
from graphlathe.passes.search.local.layer_error import layer_error
from graphlathe.passes.search.local.ria import SHARE, ria_corrected, ria_sparse
from tests.passes.search.local.random_layers import layer


def scores_by_loops(weight: np.ndarray, inputs: np.ndarray) -> dict[tuple[int, int], float]:
    out, width = weight.shape
    size = np.abs(weight)
    return {
        (o, i): (size[o, i] / sum(size[k, i] for k in range(out)) + size[o, i] / sum(size[o, k] for k in range(width)))
        * np.sqrt(np.linalg.norm(inputs[:, i]))
        for o in range(out)
        for i in range(width)
    }


@given(out=st.integers(1, 6), width=st.integers(1, 9), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_same_as_plain_loops(out: int, width: int, share: float, seed: int) -> None:
    weight, inputs = layer(out, width, seed=seed, scaled=True)
    nonzeros, gram = round(share * out * width), inputs.T @ inputs
    scores = scores_by_loops(weight.numpy(), inputs.numpy())
    keep = set(sorted(scores, key=scores.__getitem__, reverse=True)[:nonzeros])
    chosen = torch.zeros_like(weight)
    for place in keep:
        chosen[place] = weight[place]
    assert torch.equal(ria_sparse(weight, gram, nonzeros), chosen)

    # The correction: one column after the other, with the inverse of the gram matrix of the columns from it on.
    best = weight.numpy().copy()
    damped = gram.numpy() + 0.01 * np.diag(gram.numpy()).mean() * np.eye(width)
    for i in range(width):
        inverse = np.linalg.inv(damped[i:, i:])
        for o in range(out):
            if (o, i) not in keep:
                best[o, i:] -= best[o, i] / inverse[0, 0] * inverse[0]
                best[o, i] = 0
    expected = np.where(chosen.numpy() != 0, (1 - SHARE) * weight.numpy() + SHARE * best, 0)
    torch.testing.assert_close(ria_corrected(weight, gram, nonzeros), torch.from_numpy(expected), rtol=1e-7, atol=1e-9)


def test_all_weights_are_the_layer_and_none_are_nothing() -> None:
    weight, inputs = layer(5, 8, seed=0, dead=2)
    weight, gram = weight.float(), inputs.T @ inputs
    weight[3] = 0
    for prune in (ria_sparse, ria_corrected):
        assert torch.equal(prune(weight, gram, weight.numel()), weight)
        assert torch.equal(prune(weight, gram, 0), torch.zeros_like(weight))
        kept = prune(weight, gram, 4 * 6)
        assert not kept[:, (gram.diagonal() == 0)].any(), "dead inputs go first"
        assert kept.dtype == weight.dtype and bool(kept.isfinite().all())


def test_correcting_helps_on_correlated_inputs() -> None:
    errors = []
    for seed in range(8):
        weight, inputs = layer(24, 64, seed=seed, scaled=True)
        gram, half = inputs.T @ inputs, weight.numel() // 2
        errors.append([layer_error(weight, prune(weight, gram, half), gram) for prune in (ria_corrected, ria_sparse)])
    corrected, chosen = np.mean(errors, axis=0)
    assert corrected < 0.8 * chosen


def test_bad_arguments_are_errors() -> None:
    weight, inputs = layer(3, 4, seed=1)
    gram = inputs.T @ inputs
    for prune in (ria_sparse, ria_corrected):
        with pytest.raises(InputError, match="13 nonzero weights of a layer that has 12"):
            prune(weight, gram, 13)
        with pytest.raises(PreconditionError, match="finite"):
            prune(weight, gram * torch.nan, 3)
