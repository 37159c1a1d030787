"""Scores of columns against removing them by brute force and fitting the others by least squares."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphlathe.ir.errors import InputError, PreconditionError
from graphlathe.passes.search.local.columns import (
    condition,
    group_compensation_scores,
    optimal_compensation_scores,
    removal_errors,
)
from tests.passes.search.local.random_layers import layer


def _error_without(weight: torch.Tensor, inputs: torch.Tensor, removed: list[int], level: float) -> float:
    """The least squared error of the outputs, plus ``level`` times that of the weight, with some columns removed."""
    width = weight.shape[1]
    rows = torch.cat([inputs, level**0.5 * torch.eye(width).double()])
    wanted = rows @ weight.T
    kept = [i for i in range(width) if i not in removed]
    if not kept:
        return float(wanted.square().sum())
    fitted = torch.linalg.lstsq(rows[:, kept], wanted, driver="gelsd").solution
    return float((rows[:, kept] @ fitted - wanted).square().sum())


@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_every_column_of_eight_and_every_pair(damping: float) -> None:
    weight, inputs = layer(5, 8, seed=0)
    gram = inputs.T @ inputs
    level = damping * float(gram.diagonal().mean())
    single = optimal_compensation_scores(weight, gram, damping)
    expected = torch.tensor([_error_without(weight, inputs, [i], level) for i in range(8)], dtype=torch.float64)
    torch.testing.assert_close(single, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(group_compensation_scores(weight, gram, torch.arange(8)[:, None], damping), single)
    for pair in itertools.combinations(range(8), 2):
        score = group_compensation_scores(weight, gram, torch.tensor([pair]), damping)
        assert float(score) == pytest.approx(_error_without(weight, inputs, list(pair), level), rel=1e-9)


@given(
    out=st.integers(1, 4),
    size=st.integers(1, 3),
    groups=st.integers(1, 3),
    extra=st.integers(0, 2),
    dead=st.integers(0, 2),
)
def test_groups_of_any_size_with_dead_columns(out: int, size: int, groups: int, extra: int, dead: int) -> None:
    width = size * groups + extra
    weight, inputs = layer(out, width, seed=width + out, dead=min(dead, width - 1))
    order = torch.randperm(width, generator=torch.Generator().manual_seed(width))
    members = order[: size * groups].view(groups, size)
    gram = inputs.T @ inputs
    scores = group_compensation_scores(weight, gram, members, 0.02)
    level = 0.02 * float(gram.diagonal().mean())
    for group, score in zip(members.tolist(), scores.tolist(), strict=True):
        assert score == pytest.approx(_error_without(weight, inputs, group, level), rel=1e-8)


def test_a_copy_of_another_column_costs_nothing_and_is_badly_conditioned() -> None:
    weight, inputs = layer(3, 6, seed=1, correlated=False)
    inputs[:, 4] = 2 * inputs[:, 1] + 1e-4 * inputs[:, 4]
    gram = inputs.T @ inputs
    scores, kappa = optimal_compensation_scores(weight, gram, 0.0), condition(gram, 0.0)
    assert set(scores.argsort()[:2].tolist()) == {1, 4}
    assert set(kappa.argsort()[-2:].tolist()) == {1, 4}
    assert float(kappa.min()) >= 1


@given(width=st.integers(1, 8), seed=st.integers(0, 50), dead=st.integers(0, 2))
def test_condition_is_one_over_the_share_that_the_others_leave_unexplained(width: int, seed: int, dead: int) -> None:
    inputs = layer(1, width, seed=seed, dead=min(dead, width - 1))[1]
    gram = inputs.T @ inputs
    kappa = condition(gram, 0.01)
    rows = torch.cat([inputs, (0.01 * gram.diagonal().mean()).sqrt() * torch.eye(width).double()])
    for column in range(width):
        others = [i for i in range(width) if i != column]
        wanted = rows[:, column]
        rest = wanted
        if others:
            fitted = torch.linalg.lstsq(rows[:, others], wanted[:, None], driver="gelsd").solution
            rest = wanted - (rows[:, others] @ fitted)[:, 0]
        assert float(kappa[column]) == pytest.approx(float(wanted.square().sum() / rest.square().sum()), rel=1e-8)
        assert float(kappa[column]) >= 1 - 1e-12


def test_orthogonal_and_dead_columns_are_perfectly_conditioned() -> None:
    torch.testing.assert_close(condition(torch.diag(torch.tensor([4.0, 0.0, 1.0]))), torch.ones(3).double())


def test_bad_groups_are_errors() -> None:
    weight, gram = torch.ones(2, 4), torch.eye(4)
    for wrong in (torch.tensor([0, 1]), torch.zeros(2, 0, dtype=torch.int64), torch.ones(2, 1), torch.ones(1, 1) > 0):
        with pytest.raises(InputError, match="groups of columns of shape"):
            group_compensation_scores(weight, gram, wrong)
    for wrong in ([[0, 4]], [[-1, 0]]):
        with pytest.raises(InputError, match="expected: 0 to 3"):
            group_compensation_scores(weight, gram, torch.tensor(wrong))
    for wrong in ([[0, 1], [1, 2]], [[3, 3]]):
        with pytest.raises(InputError, match="every column at most once"):
            group_compensation_scores(weight, gram, torch.tensor(wrong))
    with pytest.raises(PreconditionError, match="raise the damping"):
        removal_errors(weight, -torch.eye(4), torch.tensor([[0, 1]]))
