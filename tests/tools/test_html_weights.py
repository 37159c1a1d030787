"""Statistics of weights: exact ones against NumPy on the materialised weight, samples within their bound."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphlathe.ir.weights import MetaSource, Weight
from graphlathe.tools.html.weights import BINS, all_statistics, quotas, statistics


@st.composite
def expressions(draw: st.DrawFn) -> Weight:
    """A small weight with any steps, over a contiguous or transposed tensor."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    source = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))
    weight = Weight.from_tensor(source.transpose(0, -1) if draw(st.booleans()) else source)
    for _ in range(draw(st.integers(0, 4))):
        dim = draw(st.integers(0, len(weight.shape) - 1))
        extent = weight.shape[dim]
        match draw(st.sampled_from(["slice", "select", "permute", "reshape", "cast", "scale"])):
            case "slice":
                start = draw(st.integers(0, extent - 1))
                weight = weight.slice(dim, start, draw(st.integers(start + 1, extent)), draw(st.integers(1, 3)))
            case "select":
                weight = weight.select(dim, draw(st.lists(st.integers(0, extent - 1), min_size=1, max_size=6)))
            case "permute":
                weight = weight.permute(draw(st.permutations(range(len(weight.shape)))))
            case "reshape":
                weight = weight.reshape([weight.numel, 1] if draw(st.booleans()) else [1, *weight.shape])
            case "cast":
                weight = weight.cast(draw(st.sampled_from([torch.float64, torch.bfloat16, torch.float32])))
            case _:
                weight = weight.scale(draw(st.sampled_from([0.0, -2.0, 0.5])))
    return weight


@given(expressions())
def test_of_any_expression_they_are_those_of_the_materialised_weight(weight: Weight) -> None:
    found = statistics(weight, weight.numel)
    values = weight.tensor().double().numpy().reshape(-1)
    assert found is not None and found.read == found.finite == values.size
    assert (found.min, found.max) == (values.min(), values.max())
    assert found.zeros == (values == 0).sum()
    np.testing.assert_allclose((found.mean, found.std), (values.mean(), values.std()), rtol=1e-12, atol=1e-12)
    assert sum(found.counts) == values.size and len(found.counts) == BINS


@given(expressions(), st.integers(1, 20))
def test_a_sample_is_made_of_the_weights_numbers(weight: Weight, limit: int) -> None:
    found = statistics(weight, limit)
    values = weight.tensor().double()
    assert found is not None and 0 < found.read <= min(limit, weight.numel)
    assert found.min in values and found.max in values


def test_the_histogram_is_numpys() -> None:
    values = torch.linspace(-1, 3, 4001, dtype=torch.float64)
    found = statistics(Weight.from_tensor(values), 5000)
    assert found is not None
    assert list(found.counts) == list(np.histogram(values.numpy(), BINS)[0])


def test_samples_cover_the_whole_weight() -> None:
    ramp = torch.arange(10_000_000, dtype=torch.float32)
    found = statistics(Weight.from_tensor(ramp), 100_000)
    assert found is not None and found.read <= 100_000
    assert (found.min, found.max) == (0.0, 9_999_999.0)
    assert found.mean == pytest.approx(ramp.double().mean().item(), rel=1e-3)
    assert found.std == pytest.approx(ramp.double().std().item(), rel=2e-2)


def test_a_sample_does_not_read_the_whole_file(tmp_path: Path) -> None:
    """A file of 8 GiB with a number at either end; what is read of a mapped file shows in the process's memory."""
    path, count = tmp_path / "sparse.bin", 1 << 31
    with open(path, "wb") as file:
        file.write(np.float32(7).tobytes())
        file.truncate(4 * count)
        file.seek(-4, os.SEEK_END)
        file.write(np.float32(-3).tobytes())
    weight = Weight.from_file(path, 0, (1 << 14, 1 << 17), torch.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = statistics(weight, 50_000)
    assert found is not None and found.read <= 50_000
    assert (found.min, found.max) == (-3.0, 7.0)
    turned = statistics(weight.permute((1, 0)).slice(0, 0, 1 << 17, 2).cast(torch.float64).scale(2.0), 500)
    assert turned is not None and turned.max == 14.0 and turned.zeros == turned.read - 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 19, "in KiB"


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.uint8])
def test_of_every_type(dtype: torch.dtype) -> None:
    found = statistics(Weight.from_tensor(torch.tensor([0, 1, 1, 0, 1]).to(dtype)), 5)
    assert found is not None
    assert (found.zeros, found.min, found.max, found.mean) == (2, 0.0, 1.0, pytest.approx(0.6))


def test_what_is_not_finite_is_counted_apart() -> None:
    found = statistics(Weight.from_tensor(torch.tensor([float("nan"), 1.0, float("inf"), 3.0])), 4)
    assert found is not None and (found.read, found.finite, found.mean, sum(found.counts)) == (4, 2, 2.0, 2)
    nothing = statistics(Weight.from_tensor(torch.full((3,), float("nan"))), 4)
    assert nothing is not None and nothing.finite == 0 and nothing.counts == ()


@pytest.mark.parametrize(
    "weight",
    [
        Weight(MetaSource((3,), torch.float32)),
        Weight.from_tensor(torch.zeros(0, 4)),
        Weight.from_tensor(torch.zeros(2, dtype=torch.complex64)),
    ],
)
def test_none_without_numbers(weight: Weight) -> None:
    assert statistics(weight, 100) is None


@pytest.mark.parametrize("value", [3e38, -3e38, 1e-40, 1.0])
def test_nearly_equal_numbers_have_a_histogram(value: float) -> None:
    pair = torch.tensor([value, np.nextafter(np.float32(value), np.float32(0))])
    found = statistics(Weight.from_tensor(pair), 2)
    assert found is not None and sum(found.counts) == 2 and found.mean == pytest.approx(value)


def test_numbers_at_the_ends_of_the_range() -> None:
    ends = torch.tensor([-1.7e308, 1.7e308, 1.7e308], dtype=torch.float64)
    found = statistics(Weight.from_tensor(ends), 3)
    assert found is not None and (found.min, found.max, found.counts) == (-1.7e308, 1.7e308, ())


def test_one_value_falls_into_the_middle() -> None:
    found = statistics(Weight.from_tensor(torch.ones(6)), 6)
    assert found is not None and found.counts[BINS // 2] == 6 and found.std == 0


@given(st.lists(st.integers(0, 1000), max_size=12), st.integers(0, 3000))
def test_the_budget_is_kept_and_spent_on_small_weights_first(sizes: list[int], budget: int) -> None:
    found = quotas(sizes, budget)
    assert sum(found) <= budget and all(0 <= q <= size for q, size in zip(found, sizes, strict=True))
    if sum(sizes) <= budget:
        assert found == sizes
    cut = [q for q, size in zip(found, sizes, strict=True) if q < size]
    assert all(q >= size or q <= min(cut) + len(sizes) for q, size in zip(found, sizes, strict=True) if cut)


def test_equal_objects_are_read_once_and_equal_numbers_have_equal_digests() -> None:
    a, b, c = (Weight.from_tensor(t) for t in (torch.arange(5.0), torch.arange(5.0), torch.arange(1.0, 6.0)))
    found = all_statistics([a, b, a, c], 100)
    assert list(found) == [a, b, c]
    digests = [found[weight].digest for weight in (a, b, c)]  # type: ignore[union-attr]
    assert digests[0] == digests[1] != digests[2]
