"""What columns that stay can do for those that go, against least squares on the samples themselves (numpy, float64)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphlathe.ir.errors import PreconditionError
from graphlathe.passes.search.compensation import COMPENSATIONS, NEEDS, Compensated
from graphlathe.passes.search.compensation.bias import bias
from graphlathe.passes.search.compensation.least_squares import least_squares
from graphlathe.passes.search.compensation.mask_tuning import mask_tuning
from graphlathe.passes.search.compensation.none import none
from graphlathe.passes.search.compensation.normal_equations import solve

SAMPLES, INPUTS, OUTPUTS = 64, 8, 5
KEPT = [0, 2, 3, 6]
REMOVED = [1, 4, 5, 7]


def sample(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Correlated inputs [samples, in] that are not centred, and a weight [out, in]."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(SAMPLES, INPUTS, generator=generator) @ torch.randn(INPUTS, INPUTS, generator=generator)
    shift = 3 * torch.randn(INPUTS, generator=generator)
    return (mixed + shift).to(dtype), torch.randn(OUTPUTS, INPUTS, generator=generator).to(dtype)


def statistics(x: Tensor, y: Tensor | None = None, *, centred: bool) -> dict[str, Tensor]:
    """Gram matrix and means, in mean form when centred and as sums otherwise: the scale must not matter."""
    if not centred:
        return {"gram": x.T @ x} | ({"target": x.T @ y} if y is not None else {})
    moved, mean = x - x.mean(0), x.mean(0)
    found = {"gram": moved.T @ moved / len(x), "mean": mean}
    if y is not None:
        found |= {"target": moved.T @ (y - y.mean(0)) / len(x), "target_mean": y.mean(0)}
    return found


def applied(result: Compensated, x: Tensor) -> Tensor:
    y = x @ result.weight.T
    return y if result.bias is None else y + result.bias


def assert_near(actual: Tensor, expected: Any, tolerance: float = 1e-10) -> None:
    wanted = torch.as_tensor(expected)
    assert actual.shape == wanted.shape
    assert float((actual - wanted).abs().max()) <= tolerance * max(1.0, float(wanted.abs().max()))


def calls(weight: Tensor, x: Tensor) -> dict[str, Callable[[Any], Compensated]]:
    """Every registered method with the statistics that it needs."""
    known = {"gram": x.T @ x, "mean": x.mean(0)}
    return {
        name: lambda kept, method=method, name=name: method(weight, kept, **{n: known[n] for n in NEEDS[name]})
        for name, method in COMPENSATIONS.items()
    }


def test_needs_are_the_required_arguments() -> None:
    assert NEEDS.keys() == COMPENSATIONS.keys()
    for name, method in COMPENSATIONS.items():
        required = [p.name for p in inspect.signature(method).parameters.values() if p.default is p.empty]
        assert required == ["weight", "kept", *NEEDS[name]]


@pytest.mark.parametrize("name", COMPENSATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_removing_nothing_changes_nothing(name: str, dtype: torch.dtype) -> None:
    x, weight = sample(dtype=dtype)
    result = calls(weight, x)[name](range(INPUTS))
    assert torch.equal(result.weight, weight)
    assert result.weight.dtype == dtype
    assert result.bias is None or bool((result.bias == 0).all())


@pytest.mark.parametrize("name", COMPENSATIONS)
def test_removed_columns_are_zero_and_arguments_stay(name: str) -> None:
    x, weight = sample(dtype=torch.float32)
    before = weight.clone()
    result = calls(weight, x)[name](KEPT)
    assert bool((result.weight[:, REMOVED] == 0).all())
    assert torch.equal(weight, before)
    assert result.weight.dtype is torch.float32


@pytest.mark.parametrize("name", COMPENSATIONS)
def test_kept_columns_in_any_order_or_as_a_mask(name: str) -> None:
    x, weight = sample()
    call = calls(weight, x)[name]
    mask = torch.zeros(INPUTS, dtype=torch.bool)
    mask[KEPT] = True
    for kept in (KEPT[::-1], torch.tensor(KEPT), mask):
        assert torch.equal(call(kept).weight, call(KEPT).weight)


@pytest.mark.parametrize("name", COMPENSATIONS)
def test_everything_removed(name: str) -> None:
    x, weight = sample()
    result = calls(weight, x)[name]([])
    assert bool((result.weight == 0).all())
    if name == "bias":
        assert_near(applied(result, x).mean(0), (x @ weight.T).mean(0))


def test_none() -> None:
    _, weight = sample()
    expected = weight.clone()
    expected[:, REMOVED] = 0
    result = none(weight, KEPT)
    assert torch.equal(result.weight, expected)
    assert result.bias is None


def test_bias_is_exact_for_constant_channels() -> None:
    x, weight = sample()
    x[:, REMOVED] = torch.tensor([0.5, -2.0, 0.0, 7.0], dtype=x.dtype)
    assert_near(applied(bias(weight, KEPT, x.mean(0)), x), x @ weight.T)
    assert float((applied(none(weight, KEPT), x) - x @ weight.T).abs().max()) > 0.1


def test_bias_keeps_the_mean_and_the_kept_columns() -> None:
    x, weight = sample()
    result = bias(weight, KEPT, x.mean(0))
    assert torch.equal(result.weight, none(weight, KEPT).weight)
    assert_near(applied(result, x).mean(0), (x @ weight.T).mean(0))


@given(seed=st.integers(0, 1000), kept=st.sets(st.integers(0, INPUTS - 1), min_size=1), centred=st.booleans())
def test_least_squares_is_numpy_lstsq(seed: int, kept: set[int], centred: bool) -> None:
    x, weight = sample(seed)
    chosen = sorted(kept)
    result = least_squares(weight, chosen, **statistics(x, centred=centred), damping=0)
    design = x[:, chosen].numpy()
    design = np.hstack([design, np.ones((SAMPLES, 1))]) if centred else design
    best = np.linalg.lstsq(design, (x @ weight.T).numpy(), rcond=None)[0]
    assert_near(result.weight[:, chosen], best[: len(chosen)].T, 1e-7)
    assert_near(applied(result, x), design @ best, 1e-8)


@pytest.mark.parametrize("centred", [False, True])
def test_least_squares_fits_another_target(centred: bool) -> None:
    x, weight = sample()
    y = torch.tanh(x) @ weight.T + 4
    result = least_squares(weight, KEPT, **statistics(x, y, centred=centred), damping=0)
    design = x[:, KEPT].numpy()
    design = np.hstack([design, np.ones((SAMPLES, 1))]) if centred else design
    best = np.linalg.lstsq(design, y.numpy(), rcond=None)[0]
    assert_near(applied(result, x), design @ best)


def test_least_squares_is_exact_for_duplicated_columns() -> None:
    x, weight = sample()
    x[:, REMOVED] = x[:, KEPT]
    result = least_squares(weight, KEPT, x.T @ x, damping=0)
    assert_near(applied(result, x), x @ weight.T)
    assert_near(result.weight[:, KEPT], weight[:, KEPT] + weight[:, REMOVED])


def test_damping_is_ridge_regression_towards_the_old_columns() -> None:
    x, weight = sample()
    gram = x.T @ x
    strength = 0.3 * float(gram.diagonal()[KEPT].mean())
    rows = np.vstack([x[:, KEPT].numpy(), np.sqrt(strength) * np.eye(len(KEPT))])
    wanted = np.vstack([(x @ weight.T).numpy(), np.sqrt(strength) * weight[:, KEPT].T.numpy()])
    best = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    for scale in (1.0, 1 / SAMPLES):
        assert_near(least_squares(weight, KEPT, scale * gram, damping=0.3).weight[:, KEPT], best.T)


def test_dead_and_dependent_channels_do_no_harm() -> None:
    x, weight = sample()
    x[:, 2], x[:, 3] = 0, x[:, 0]  # three of the four kept ones
    result = least_squares(weight, KEPT, x.T @ x, damping=0)
    best = np.linalg.lstsq(x[:, KEPT].numpy(), (x @ weight.T).numpy(), rcond=None)[0]
    assert_near(applied(result, x), x[:, KEPT].numpy() @ best, 1e-8)
    assert_near(result.weight[:, 2], weight[:, 2])


def test_solve_takes_the_smallest_norm() -> None:
    x, _ = sample()
    x[:, 5] = x[:, 1] - x[:, 2]
    gram, right = x.T @ x, x.T @ x[:, :2]
    assert_near(solve(gram, right, 0.0), np.linalg.pinv(x.numpy()) @ x[:, :2].numpy(), 1e-7)
    assert_near(solve(torch.zeros(3, 3).double(), torch.ones(3, 1).double(), 0.1), torch.zeros(3, 1).double())


LABELS = torch.tensor([0, 1, 0, 2, 1, 3, -1, 3], dtype=torch.int32)
UNITS_KEPT = [0, 2, 3, 6]  # units 0 and 2, and the column that belongs to none


def brute_mask(x: Tensor, weight: Tensor, y: Tensor, centred: bool, damping: float) -> np.ndarray:
    """The mask from the samples: one regressor for each unit, all outputs and samples stacked."""
    parts = [(x[:, u == LABELS] @ weight[:, u == LABELS].T) for u in (0, 2)]
    parts = [p - p.mean(0) if centred else p for p in parts]
    fixed = x[:, LABELS == -1] @ weight[:, LABELS == -1].T
    rest = y - fixed - sum(x[:, u == LABELS] @ weight[:, u == LABELS].T for u in (0, 2))
    rest = rest - rest.mean(0) if centred else rest
    design = torch.stack([p.flatten() for p in parts], 1).numpy()
    # By Tikhonov rows, around 1.
    scale = np.sqrt(damping * (design**2).sum() / 2)
    design, wanted = np.vstack([design, scale * np.eye(2)]), np.concatenate([rest.flatten().numpy(), np.zeros(2)])
    return 1 + np.linalg.lstsq(design, wanted, rcond=None)[0]


@pytest.mark.parametrize("damping", [0.0, 0.2])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("targeted", [False, True])
def test_mask_tuning_is_least_squares_over_units(centred: bool, targeted: bool, damping: float) -> None:
    x, weight = sample(3)
    y = torch.tanh(x) @ weight.T + 2 if targeted else x @ weight.T
    given_statistics = statistics(x, y if targeted else None, centred=centred)
    result = mask_tuning(weight, UNITS_KEPT, groups=LABELS, **given_statistics, damping=damping, limit=100)
    assert result.notes == ()
    mask = brute_mask(x, weight, y, centred, damping)
    expected = torch.zeros_like(weight)
    expected[:, 6] = weight[:, 6]
    for factor, unit in zip(mask, (0, 2), strict=True):
        expected[:, unit == LABELS] = factor * weight[:, unit == LABELS]
    assert_near(result.weight, expected, 1e-9)
    if centred:
        assert_near(applied(result, x).mean(0), y.mean(0))
    else:
        assert result.bias is None


def test_mask_tuning_of_single_columns() -> None:
    x, weight = sample(5)
    result = mask_tuning(weight, KEPT, x.T @ x, damping=0, limit=100)
    design = torch.stack([torch.outer(x[:, j], weight[:, j]).flatten() for j in KEPT], 1).numpy()
    mask = np.linalg.lstsq(design, (x @ weight.T).flatten().numpy(), rcond=None)[0]
    assert_near(result.weight[:, KEPT], weight[:, KEPT] * torch.as_tensor(mask), 1e-9)


def test_mask_tuning_beats_no_tuning_and_loses_to_least_squares() -> None:
    x, weight = sample(7)
    gram = x.T @ x
    results = [
        none(weight, KEPT),
        mask_tuning(weight, KEPT, gram, damping=0, limit=100),
        least_squares(weight, KEPT, gram, damping=0),
    ]
    errors = [float((applied(r, x) - x @ weight.T).square().sum()) for r in results]
    assert errors[0] > errors[1] > errors[2]


def test_mask_tuning_leaves_wild_factors_out_and_says_so() -> None:
    x, weight = sample()
    x[:, 1] = 50 * x[:, 0]
    weight[:, 1] = weight[:, 0]
    result = mask_tuning(weight, [0], x.T @ x, damping=0)
    assert torch.equal(result.weight, none(weight, [0]).weight)
    assert len(result.notes) == 1
    assert "beyond 10" in result.notes[0]
    assert mask_tuning(weight, [0], x.T @ x, damping=0, limit=1000).notes == ()


def test_many_columns_are_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = sample(3)
    whole = mask_tuning(weight, UNITS_KEPT, x.T @ x, LABELS, limit=100)
    monkeypatch.setattr("graphlathe.passes.search.compensation.mask_tuning._ROWS", 3)
    assert_near(mask_tuning(weight, UNITS_KEPT, x.T @ x, LABELS, limit=100).weight, whole.weight, 1e-12)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([0, 0], "named twice"),
        ([0, 8], "column 8 does not exist"),
        ([-1], "column -1 does not exist"),
        (torch.ones(3, dtype=torch.bool), r"has shape \[3\]"),
        (torch.tensor([0.5]), "list of integers"),
    ],
)
@pytest.mark.parametrize("name", COMPENSATIONS)
def test_wrong_columns_are_an_error(name: str, kept: Any, message: str) -> None:
    x, weight = sample()
    with pytest.raises(PreconditionError, match=message):
        calls(weight, x)[name](kept)


@pytest.mark.parametrize("name", COMPENSATIONS)
def test_a_kernel_is_no_matrix(name: str) -> None:
    x, weight = sample()
    with pytest.raises(PreconditionError, match=r"a matrix \[out, in\]"):
        calls(weight[:, :, None], x)[name](KEPT)


@pytest.mark.parametrize("name", [name for name in COMPENSATIONS if NEEDS[name]])
def test_statistics_that_are_not_finite_are_an_error(name: str) -> None:
    x, weight = sample()
    x[3, 2] = float("nan")
    with pytest.raises(PreconditionError, match="NaN or infinity"):
        calls(weight, x)[name](KEPT)


def test_other_wrong_statistics_are_errors() -> None:
    x, weight = sample()
    gram = x.T @ x
    with pytest.raises(PreconditionError, match=r"'gram' has shape \[4, 4\]"):
        least_squares(weight, KEPT, gram[:4, :4])
    with pytest.raises(PreconditionError, match="damping"):
        least_squares(weight, KEPT, gram, damping=-1)
    with pytest.raises(PreconditionError, match="needs 'target_mean'"):
        least_squares(weight, KEPT, gram, x.mean(0), target=gram @ weight.T)
    with pytest.raises(PreconditionError, match="needs 'mean'"):
        mask_tuning(weight, KEPT, gram, target=gram @ weight.T, target_mean=weight.mean(1))
    with pytest.raises(PreconditionError, match="without 'target'"):
        least_squares(weight, KEPT, gram, x.mean(0), target_mean=weight.mean(1))


def test_parts_of_units_are_an_error() -> None:
    x, weight = sample()
    with pytest.raises(PreconditionError, match="only 1 of 2 columns of unit 1"):
        mask_tuning(weight, [0, 1, 2, 6], x.T @ x, LABELS)
    with pytest.raises(PreconditionError, match="belongs to no unit"):
        mask_tuning(weight, [0, 2], x.T @ x, LABELS)
    with pytest.raises(PreconditionError, match="integers from -1 on"):
        mask_tuning(weight, UNITS_KEPT, x.T @ x, LABELS - 1)
