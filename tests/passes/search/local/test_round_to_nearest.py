"""Integer grids against a search over all codes, and their size against codes that are really packed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphlathe.ir.errors import InputError, PreconditionError
from graphlathe.passes.search.local.round_to_nearest import quantize_groups
from tests.passes.search.local.random_layers import layer


@given(
    out=st.integers(1, 4),
    width=st.integers(1, 11),
    bits=st.integers(2, 8),
    group=st.none() | st.integers(1, 12),
    symmetric=st.booleans(),
    shift=st.sampled_from([-5.0, 0.0, 5.0]),
    seed=st.integers(0, 99),
)
def test_every_weight_gets_the_nearest_of_all_codes(
    out: int, width: int, bits: int, group: int | None, symmetric: bool, shift: float, seed: int
) -> None:
    weight = layer(out, width, seed=seed)[0] + shift
    found = quantize_groups(weight, bits, group, symmetric)
    values, size = found.dequantize(), group or width
    every = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).double()
    assert found.codes.dtype == torch.int8
    assert found.scale.shape == (out, -(-width // size))
    assert (found.zero is None) == symmetric
    for row in range(out):
        for column in range(width):
            scale = found.scale[row, column // size]
            zero = 0 if found.zero is None else found.zero[row, column // size].double()
            code = found.codes[row, column].double()
            assert code in every
            assert values[row, column] == scale * (code - zero)
            nearest = (scale * (every - zero) - weight[row, column]).abs().min()
            error = (values[row, column] - weight[row, column]).abs()
            assert error == pytest.approx(float(nearest), abs=1e-12)
            assert error <= scale / 2 + 1e-12
            part = weight[row, column // size * size : (column // size + 1) * size]
            span = 2 * part.abs().max() if symmetric else part.clamp(min=0).max() - part.clamp(max=0).min()
            assert scale == pytest.approx(float(span) / (2**bits - 1), rel=1e-12)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_zero_stays_zero_and_nothing_is_lost_in_groups_of_zeros(dtype: torch.dtype, symmetric: bool) -> None:
    weight = torch.tensor([[0.0, 0.0, 3.0, 0.0], [1e-30, -1e-42, -7.0, 0.0]]).to(dtype)
    values = quantize_groups(weight, 4, 2, symmetric).dequantize()
    assert values.dtype == dtype
    assert bool(values.isfinite().all())
    assert not values[weight == 0].any()
    assert float((values - weight).abs().max()) < 0.5


@given(bits=st.integers(2, 8), seed=st.integers(0, 50), symmetric=st.booleans())
def test_a_weight_on_a_full_grid_stays(bits: int, seed: int, symmetric: bool) -> None:
    source = torch.Generator().manual_seed(seed)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = torch.randint(low, high + 1, (3, 6), generator=source).double()
    if symmetric:  # the largest magnitude lies half a step beyond the last code, so that it alone cannot stay
        codes = codes.clamp(min=low + 1)
        codes[:, 0] = (2**bits - 1) / 2
    else:
        codes[:, 0], codes[:, 1] = low, high
    values = quantize_groups(codes * 0.25, bits, None, symmetric).dequantize()
    torch.testing.assert_close(values[:, 1:], codes[:, 1:] * 0.25, rtol=1e-12, atol=0)


@given(width=st.integers(1, 20), bits=st.integers(2, 8), group=st.integers(1, 20), symmetric=st.booleans())
def test_bytes_are_those_of_packed_codes_scales_and_zeros(width: int, bits: int, group: int, symmetric: bool) -> None:
    found = quantize_groups(layer(3, width, seed=0)[0].half(), bits, group, symmetric)

    def packed(codes: torch.Tensor) -> int:
        unsigned = codes.numpy().astype(np.int16) + 2 ** (bits - 1)
        rows = ((unsigned[:, :, None] >> np.arange(bits)) & 1).reshape(len(unsigned), -1)
        return np.packbits(rows, axis=1).nbytes

    expected = packed(found.codes) + found.scale.numpy().nbytes
    assert found.nbytes == expected + (0 if found.zero is None else packed(found.zero))


def test_bad_arguments_are_errors() -> None:
    weight = torch.ones(2, 4)
    for bits in (1, 9):
        with pytest.raises(InputError, match="bits"):
            quantize_groups(weight, bits)
    with pytest.raises(InputError, match="groups of 0 columns"):
        quantize_groups(weight, 4, 0)
    for wrong in (torch.ones(2), torch.ones(2, 0), torch.ones(2, 2, dtype=torch.int64)):
        with pytest.raises(InputError, match="weight of shape"):
            quantize_groups(wrong, 4)
    with pytest.raises(PreconditionError, match="NaN or infinity"):
        quantize_groups(torch.tensor([[float("inf")]]), 4)
