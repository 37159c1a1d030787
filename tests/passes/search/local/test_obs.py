"""Structured removal against brute force: every choice tried, every rest fitted by least squares."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphlathe.ir.errors import InputError, PreconditionError
from graphlathe.passes.search.local.obs import remove_groups
from tests.passes.search.local.random_layers import layer, outputs_error


def _refit(inputs: torch.Tensor, wanted: torch.Tensor, removed: list[int]) -> torch.Tensor:
    """The least-squares weight [out, in] without some columns."""
    kept = [i for i in range(inputs.shape[1]) if i not in removed]
    weight = torch.zeros(wanted.shape[1], inputs.shape[1]).double()
    if kept:
        weight[:, kept] = torch.linalg.lstsq(inputs[:, kept], wanted, driver="gelsd").solution.T
    return weight


def _greedy(inputs: torch.Tensor, wanted: torch.Tensor, groups: list[list[int]], count: int) -> list[int]:
    """One group at a time, always the one without which the best fit is best."""
    removed: list[int] = []
    for _ in range(count):
        errors = {}
        for group in set(range(len(groups))) - set(removed):
            columns = [c for g in (*removed, group) for c in groups[g]]
            errors[group] = outputs_error(inputs, _refit(inputs, wanted, columns), wanted)
        removed.append(min(errors, key=errors.__getitem__))
    return removed


@given(
    out=st.integers(1, 4),
    size=st.integers(1, 3),
    groups=st.integers(1, 4),
    extra=st.integers(0, 2),
    moved=st.booleans(),
    damping=st.sampled_from([0.0, 0.03]),
    seed=st.integers(0, 99),
)
def test_one_group_a_round_is_greedy_brute_force(
    out: int, size: int, groups: int, extra: int, moved: bool, damping: float, seed: int
) -> None:
    width = size * groups + extra
    weight, dense = layer(out, width, seed=seed)
    # What the compressed flow reads instead: other inputs, close to the dense ones.
    inputs = dense + 0.2 * layer(out, width, seed=seed + 100)[1] if moved else dense
    gram, outputs = inputs.T @ inputs, dense @ weight.T
    members = torch.randperm(width, generator=torch.Generator().manual_seed(seed))[: size * groups].view(groups, size)
    target = inputs.T @ outputs if moved else None
    counts = list(range(groups + 1))
    found = remove_groups(weight, gram, members, counts, target=target, rounds=groups, damping=damping)

    # Damping is a row per column that asks for the weight as it was.
    rows = (damping * gram.diagonal().mean()).sqrt() * torch.eye(width).double()
    inputs, wanted = torch.cat([inputs, rows]), torch.cat([outputs, rows @ weight.T])
    assert list(found[-1].removed) == _greedy(inputs, wanted, members.tolist(), groups)
    for count, removal in zip(counts, found, strict=True):
        assert removal.removed == found[-1].removed[:count]
        columns = members[list(removal.removed)].flatten().tolist()
        torch.testing.assert_close(removal.weight, _refit(inputs, wanted, columns), rtol=1e-7, atol=1e-9)
        assert not removal.weight[:, columns].any()


def test_nothing_removed_is_the_layer_itself() -> None:
    weight, inputs = layer(4, 6, seed=0)
    weight = weight.float()
    (found,) = remove_groups(weight, inputs.T @ inputs, torch.arange(6)[:, None], [0])
    assert found.removed == ()
    assert torch.equal(found.weight, weight)
    assert found.weight.data_ptr() != weight.data_ptr()
    assert found.weight.dtype == torch.float32


def test_fitting_to_the_dense_outputs_makes_up_for_earlier_layers() -> None:
    better = []
    for seed in range(5):
        weight, dense = layer(6, 12, 200, seed=seed)
        inputs = dense * (torch.arange(12) % 5 > 0) + 0.1 * layer(6, 12, 200, seed=seed + 50)[1]
        gram, wanted, groups = inputs.T @ inputs, dense @ weight.T, torch.arange(12).view(6, 2)
        aware = remove_groups(weight, gram, groups, [0, 2], target=inputs.T @ wanted, damping=1e-6)
        blind = remove_groups(weight, gram, groups, [0, 2], damping=1e-6)
        for one, other in zip(aware, blind, strict=True):
            better.append(outputs_error(inputs, one.weight, wanted) / outputs_error(inputs, other.weight, wanted))
    assert max(better) < 0.9


def test_rounds_see_that_a_twin_is_needed_once_the_other_is_gone() -> None:
    weight, inputs = layer(3, 6, 50, seed=2, correlated=False)
    inputs[:, 4] = inputs[:, 1]
    weight = weight + 3 * torch.eye(3, 6)
    gram, groups = inputs.T @ inputs, torch.arange(6)[:, None]
    (once,) = remove_groups(weight, gram, groups, [2], rounds=1, damping=1e-6)
    (twice,) = remove_groups(weight, gram, groups, [2], rounds=2, damping=1e-6)
    wanted = inputs @ weight.T
    assert set(once.removed) == {1, 4}
    assert len({1, 4} & set(twice.removed)) == 1
    assert outputs_error(inputs, twice.weight, wanted) < 0.7 * outputs_error(inputs, once.weight, wanted)


@given(count=st.integers(1, 7), rounds=st.integers(1, 20), seed=st.integers(0, 20))
def test_dead_and_repeated_columns_go_first_whatever_the_rounds(count: int, rounds: int, seed: int) -> None:
    weight, inputs = layer(3, 10, seed=seed, correlated=False)
    inputs[:, :4] = 0
    (found,) = remove_groups(weight, inputs.T @ inputs, torch.arange(10)[:, None], [count], rounds=rounds)
    assert len(set(found.removed)) == count
    assert set(found.removed[:4]) <= {0, 1, 2, 3} if count <= 4 else {0, 1, 2, 3} <= set(found.removed)
    if count <= 4:
        assert outputs_error(inputs, found.weight, inputs @ weight.T) < 1e-18


def test_columns_outside_all_groups_stay_and_every_group_may_go() -> None:
    weight, inputs = layer(3, 7, seed=3)
    groups = torch.tensor([[0, 5], [2, 3]])
    found = remove_groups(weight, inputs.T @ inputs, groups, [1, 2], damping=0.0)
    kept = [1, 4, 6]
    assert bool((found[-1].weight[:, kept] != 0).all())
    (gone,) = remove_groups(weight, inputs.T @ inputs, torch.arange(7)[:, None], [7])
    assert not gone.weight.any()


def test_averaging_over_rows_changes_nothing() -> None:
    weight, inputs = layer(4, 8, seed=6)
    gram, groups = inputs.T @ inputs, torch.arange(8).view(4, 2)
    goal = gram @ weight.T * 1.1
    summed = remove_groups(weight, gram, groups, [1, 3], target=goal)
    mean = remove_groups(weight, gram / len(inputs), groups, [1, 3], target=goal / len(inputs))
    for one, other in zip(summed, mean, strict=True):
        assert one.removed == other.removed
        torch.testing.assert_close(one.weight, other.weight, rtol=1e-9, atol=1e-12)


def test_bad_arguments_are_errors() -> None:
    weight, gram, groups = torch.ones(2, 4), torch.eye(4), torch.arange(4)[:, None]
    for counts in ([], [2, 1], [1, 1], [-1], [5]):
        with pytest.raises(InputError, match="increasing numbers from 0 to 4"):
            remove_groups(weight, gram, groups, counts)
    with pytest.raises(InputError, match="0 rounds"):
        remove_groups(weight, gram, groups, [1], rounds=0)
    with pytest.raises(InputError, match="every column at most once"):
        remove_groups(weight, gram, groups % 2, [1])
    with pytest.raises(InputError, match=r"target of shape \[2, 4\]"):
        remove_groups(weight, gram, groups, [1], target=torch.ones(2, 4))
    with pytest.raises(PreconditionError, match="target"):
        remove_groups(weight, gram, groups, [1], target=torch.full((4, 2), float("nan")))
