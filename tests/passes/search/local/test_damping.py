"""Damping and factors of a gram matrix against NumPy and against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphlathe.ir.errors import InputError, PreconditionError
from graphlathe.passes.search.local.damping import (
    FLOAT64_WIDTH,
    checked_layer,
    damped,
    factored,
    inverse_upper,
    working_dtype,
)
from graphlathe.passes.search.local.layer_error import layer_error
from tests.passes.search.local.random_layers import layer


def _gram(width: int, *, seed: int, dead: int = 0, rows: int = 0) -> torch.Tensor:
    inputs = layer(1, width, rows, seed=seed, dead=dead)[1]
    return inputs.T @ inputs


def test_damped_adds_a_share_of_the_mean_diagonal_and_leaves_its_argument_alone() -> None:
    gram = _gram(5, seed=0).float()
    before = gram.clone()
    got = damped(gram, 0.5)
    exact = gram.double().numpy()
    exact = (exact + exact.T) / 2
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), exact + 0.5 * np.diag(exact).mean() * np.eye(5), rtol=1e-14)
    assert torch.equal(gram, before)


def test_layers_too_wide_for_float64_are_solved_in_float32() -> None:
    assert working_dtype(FLOAT64_WIDTH) == torch.float64
    assert working_dtype(FLOAT64_WIDTH + 1) == torch.float32


@given(width=st.integers(1, 9), seed=st.integers(0, 99), dead=st.integers(0, 9), ratio=st.sampled_from([0.01, 0.3]))
def test_factors_multiply_to_the_damped_matrix_and_its_inverse(width: int, seed: int, dead: int, ratio: float) -> None:
    gram = _gram(width, seed=seed, dead=min(dead, width))
    found = factored(gram, ratio)
    matrix = damped(gram, ratio)
    assert found.ratio == ratio
    torch.testing.assert_close(found.matrix, matrix, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.lower @ found.lower.T, matrix, rtol=1e-12, atol=1e-12 * float(matrix.max()))
    inverse = torch.from_numpy(np.linalg.inv(matrix.numpy()))
    torch.testing.assert_close(found.inverse(), inverse, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.solve(matrix), torch.eye(width).double(), rtol=0, atol=1e-9)


@given(width=st.integers(1, 9), seed=st.integers(0, 99), dead=st.integers(0, 9))
def test_upper_factor_holds_the_inverses_of_all_trailing_parts(width: int, seed: int, dead: int) -> None:
    gram = _gram(width, seed=seed, dead=min(dead, width))
    upper, matrix = inverse_upper(gram, 0.01), damped(gram, 0.01)
    assert torch.equal(upper, upper.triu())
    for start in range(width):
        part = upper[start:, start:]
        inverse = torch.from_numpy(np.linalg.inv(matrix[start:, start:].numpy()))
        torch.testing.assert_close(part.T @ part, inverse, rtol=1e-9, atol=1e-12)


def test_a_singular_matrix_gets_more_damping_than_asked_and_says_how_much() -> None:
    gram = _gram(6, seed=1, rows=3)
    found = factored(gram, 0.0)
    assert found.ratio == 1e-8
    assert found.level == pytest.approx(1e-8 * float(gram.diagonal().mean()))
    assert factored(gram, 0.02).ratio == 0.02


def test_damping_that_is_raised_again_and_again_is_added_once() -> None:
    gram = _gram(6, seed=1, rows=3)
    gram.diagonal().sub_(2e-6 * gram.diagonal().mean())  # what rounding does to a gram matrix of low precision
    found = factored(gram, 1e-7)
    assert found.ratio == pytest.approx(1e-5)
    torch.testing.assert_close(found.matrix, gram + found.level * torch.eye(6).double(), rtol=1e-13, atol=0)


def test_badly_scaled_columns_are_not_taken_for_singular() -> None:
    inputs = layer(1, 4, seed=2, correlated=False)[1] * torch.tensor([1.0, 1e-9, 1e-5, 1e9], dtype=torch.float64)
    found = factored(inputs.T @ inputs, 0.0)
    assert found.ratio == 0
    assert found.level == 0


def test_no_data_at_all_counts_as_unit_columns() -> None:
    found = factored(torch.zeros(3, 3), 0.25)
    torch.testing.assert_close(found.matrix, 0.25 * torch.eye(3).double())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gram_matrix_that_is_not_finite_is_an_error_with_its_count(bad: float) -> None:
    gram = _gram(4, seed=0)
    gram[1, 2] = bad
    for call in (damped, factored, inverse_upper):
        with pytest.raises(PreconditionError, match=r"1 of 16 entries .* NaN or infinite"):
            call(gram)


def test_what_is_no_gram_matrix_is_an_error() -> None:
    with pytest.raises(PreconditionError, match="not positive definite"):
        factored(torch.tensor([[1.0, 3.0], [3.0, 1.0]]))
    with pytest.raises(InputError, match="negative diagonal"):
        factored(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
    for shape in ((2, 3), (4,), (0, 0)):
        with pytest.raises(InputError, match="shape"):
            factored(torch.ones(shape))
    for ratio in (-0.1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="damping"):
            damped(torch.eye(2), ratio)


def test_weight_and_gram_matrix_have_to_fit() -> None:
    with pytest.raises(InputError, match=r"\[3, 5\] with a gram matrix of shape \[4, 4\]"):
        checked_layer(torch.ones(3, 5), torch.eye(4))
    with pytest.raises(PreconditionError, match="weight"):
        checked_layer(torch.tensor([[1.0, float("nan")]]), torch.eye(2))


def test_layer_error_is_that_of_the_outputs() -> None:
    weight, inputs = layer(4, 6, seed=3)
    changed = weight + 0.1 * torch.roll(weight, 1, 0)
    exact = (inputs @ (changed - weight).T).square().sum() / (inputs @ weight.T).square().sum()
    assert layer_error(weight, changed, inputs.T @ inputs) == pytest.approx(float(exact), rel=1e-12)
    assert layer_error(weight, weight, inputs.T @ inputs) == 0
    assert layer_error(torch.zeros(4, 6), changed, inputs.T @ inputs) == float("inf")
    with pytest.raises(InputError, match="equal shapes"):
        layer_error(weight, changed[1:], inputs.T @ inputs)
