"""GPTQ against the algorithm written as plain loops, and against rounding to nearest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphlathe.ir.errors import InputError, PreconditionError
from graphlathe.passes.search.local.gptq import gptq
from graphlathe.passes.search.local.layer_error import layer_error
from graphlathe.passes.search.local.round_to_nearest import quantize_groups
from tests.passes.search.local.random_layers import layer


def _grid(part: np.ndarray, bits: int, symmetric: bool) -> tuple[float, float]:
    if symmetric:
        return 2 * np.abs(part).max() / (2**bits - 1), 0.0
    low, high = min(part.min(), 0.0), max(part.max(), 0.0)
    scale = (high - low) / (2**bits - 1)
    return scale, -(2 ** (bits - 1)) - np.round(low / scale)


def _by_loops(
    weight: np.ndarray, gram: np.ndarray, bits: int, size: int, symmetric: bool, act_order: bool, damping: float
) -> np.ndarray:
    """GPTQ in its original form: one row at a time, a fresh inverse of what is left before every column."""
    out, width = weight.shape
    order = np.argsort(-np.diag(gram), kind="stable") if act_order else np.arange(width)
    gram = gram + damping * np.diag(gram).mean() * np.eye(width)
    result = np.zeros_like(weight)
    for row in range(out):
        values, grids = weight[row].copy(), {}
        for step, column in enumerate(order):
            group = column // size
            if group not in grids:
                fitted = weight[row] if act_order else values
                grids[group] = _grid(fitted[group * size : (group + 1) * size], bits, symmetric)
            scale, zero = grids[group]
            code = np.clip(np.round(values[column] / scale) + zero, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            result[row, column] = scale * (code - zero)
            left = order[step:]
            inverse = np.linalg.inv(gram[np.ix_(left, left)])
            values[left] -= (values[column] - result[row, column]) / inverse[0, 0] * inverse[0]
    return result


@given(
    out=st.integers(1, 3),
    width=st.integers(1, 9),
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.none() | st.integers(1, 10),
    symmetric=st.booleans(),
    act_order=st.booleans(),
    block=st.integers(1, 10),
    dead=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_same_as_plain_loops(
    out: int,
    width: int,
    bits: int,
    group: int | None,
    symmetric: bool,
    act_order: bool,
    block: int,
    dead: int,
    seed: int,
) -> None:
    weight, inputs = layer(out, width, seed=seed, dead=min(dead, width - 1))
    gram = inputs.T @ inputs
    found = gptq(weight, gram, bits, group, symmetric, act_order=act_order, damping=0.05, block=block)
    expected = _by_loops(weight.numpy(), gram.numpy(), bits, group or width, symmetric, act_order, 0.05)
    torch.testing.assert_close(found.dequantize(), torch.from_numpy(expected), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(2, None), (3, 16), (4, 32), (8, 64)])
def test_loses_less_than_rounding_to_nearest(bits: int, group: int | None, symmetric: bool, act_order: bool) -> None:
    pairs = []
    for seed in range(4):
        weight, inputs = layer(16, 64, seed=seed)
        weight, gram = weight.float(), inputs.T @ inputs
        found = gptq(weight, gram, bits, group, symmetric, act_order=act_order)
        plain = quantize_groups(weight, bits, group, symmetric)
        assert found.nbytes == plain.nbytes
        pairs.append([layer_error(weight, q.dequantize(), gram) for q in (found, plain)])
    assert all(found < plain for found, plain in pairs)
    assert np.mean(pairs, axis=0)[0] < 0.8 * np.mean(pairs, axis=0)[1]


def test_uncorrelated_inputs_leave_nothing_to_correct() -> None:
    weight = layer(5, 12, seed=3)[0]
    gram = torch.diag(torch.linspace(9, 1, 12))
    for act_order in (False, True):
        found, plain = gptq(weight, gram, 3, 4, act_order=act_order), quantize_groups(weight, 3, 4)
        assert torch.equal(found.codes, plain.codes)
        assert torch.equal(found.dequantize(), plain.dequantize())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_have_the_type_of_the_weight_and_dead_columns_do_no_harm(dtype: torch.dtype) -> None:
    weight, inputs = layer(4, 16, seed=2, dead=5)
    weight = weight.to(dtype)
    found = gptq(weight, (inputs.T @ inputs).float(), 8, 8)
    assert found.scale.dtype == found.dequantize().dtype == dtype
    assert layer_error(weight, found.dequantize(), inputs.T @ inputs) < 1e-3
    # No error of a dead column is anyone's concern, and no error of others is corrected in it.
    dead = inputs.abs().sum(0) == 0
    assert bool((found.dequantize() - weight)[:, dead].abs().max() < 0.05)


def test_bad_arguments_are_errors() -> None:
    weight, gram = torch.ones(2, 4), torch.eye(4)
    with pytest.raises(InputError, match="block of 0"):
        gptq(weight, gram, 4, block=0)
    with pytest.raises(InputError, match="bits"):
        gptq(weight, gram, 1)
    with pytest.raises(InputError, match="gram matrix of shape"):
        gptq(weight, torch.eye(3), 4)
    with pytest.raises(PreconditionError, match="NaN or infinite"):
        gptq(weight, gram / 0, 4)
