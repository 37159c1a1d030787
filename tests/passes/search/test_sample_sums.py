"""The damping that is chosen is the one that does best on rows that were not fitted to."""

from __future__ import annotations

import pytest
import torch

from graphlathe.passes.search.compensation.base import Compensated
from graphlathe.passes.search.compensation.least_squares import least_squares
from graphlathe.passes.search.sample_sums import DAMPINGS, Samples, Sums, chosen_damping

KEPT = torch.tensor([True] * 9 + [False] * 3)


def rows(count: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 12, generator=generator, dtype=torch.float64) @ torch.randn(
        12, 12, generator=generator, dtype=torch.float64
    )
    return x + noise * torch.randn(count, 12, generator=generator, dtype=torch.float64), x


def fit_of(weight: torch.Tensor):
    def fit(sums: Sums, damping: float) -> Compensated:
        assert sums.gram is not None and sums.cross is not None
        z, x = sums.now / sums.count, sums.before / sums.count
        gram = sums.gram / sums.count - torch.outer(z, z)
        target = (sums.cross / sums.count - torch.outer(z, x)) @ weight.T
        return least_squares(weight, KEPT, gram=gram, mean=z, target=target, target_mean=weight @ x, damping=damping)

    return fit


@pytest.mark.parametrize(("count", "noise"), [(24, 0.5), (24, 3.0), (4000, 0.1)])
def test_the_choice_is_that_of_the_errors_on_the_other_half(count: int, noise: float) -> None:
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z, x = rows(count, noise)
    samples = Samples()
    half = count // 2
    samples.add(0, 2, z[:half], x[:half], True)
    samples.add(1, 2, z[half:], x[half:], True)
    errors = {}
    for damping in DAMPINGS:
        errors[damping] = 0.0
        for here, there in ((slice(half), slice(half, None)), (slice(half, None), slice(half))):
            one = Sums()
            one.add(z[here], x[here], True)
            fitted = fit_of(weight)(one, damping)
            assert fitted.bias is not None
            lost = z[there] @ fitted.weight.T + fitted.bias - x[there] @ weight.T
            errors[damping] += float(lost.square().sum(1).mean())
    assert chosen_damping(samples, weight, fit_of(weight)) == min(errors, key=lambda d: errors[d])


def test_little_data_is_damped_more() -> None:
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    chosen = []
    for count in (24, 20_000):
        samples = Samples()
        samples.add(0, 1, *rows(count, 1.0), True)  # one batch: its rows are halved
        chosen.append(chosen_damping(samples, weight, fit_of(weight)))
    assert chosen[0] > chosen[1]


def test_halves_add_up() -> None:
    z, x = rows(40, 0.5)
    whole, samples = Sums(), Samples()
    whole.add(z, x, True)
    for number in range(4):
        part = slice(10 * number, 10 * number + 10)
        samples.add(number, 4, z[part], x[part], True)
    both = samples.all
    assert both.count == 40
    assert both.gram is not None and both.cross is not None and whole.gram is not None and whole.cross is not None
    for a, b in (
        (both.gram, whole.gram),
        (both.cross, whole.cross),
        (both.now, whole.now),
        (both.before, whole.before),
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_without_a_second_half_a_usual_damping_is_taken() -> None:
    weight = torch.randn(5, 12, dtype=torch.float64)
    samples = Samples()
    samples.add(0, 2, *rows(30, 0.5), True)
    assert chosen_damping(samples, weight, fit_of(weight)) == 0.01
