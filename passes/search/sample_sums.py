"""Sums over what a consumer reads, in two flows and in two halves of the data.

How much a fit is damped decides whether it holds on other data: with as many rows as columns an undamped fit is perfect
on its own data and useless elsewhere. So each half of the data judges fits on the other half (`chosen_damping`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from .compensation.base import Compensated

DAMPINGS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Shares of the mean diagonal of a Gram matrix among which is chosen."""


@dataclass
class Sums:
    """What is known of a consumer's inputs, in float64; sums over rows, so that batches (and workers) add up.

    Attributes:
        count: rows, or the sum of their weights.
        now, before: [in], sums of ``z`` and of ``x``.
        gram: [in, in], sum of ``z^T z``; None where only means are needed.
        cross: [in, in], sum of ``z^T x``.
    """

    count: float = 0
    now: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    before: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    gram: torch.Tensor | None = None
    cross: torch.Tensor | None = None

    def add(self, z: torch.Tensor, x: torch.Tensor, products: bool, weights: torch.Tensor | None = None) -> None:
        """Add rows [rows, in] of both flows, each counting once, or as much as its weight says."""
        z, x = z.double(), x.double()
        counted = torch.ones(len(z), dtype=torch.float64) if weights is None else weights.double()
        self.count += float(counted.sum())
        self.now, self.before = self.now + counted @ z, self.before + counted @ x
        if products:
            weighted = z if weights is None else z * counted[:, None]
            gram, cross = weighted.T @ z, weighted.T @ x
            self.gram = gram if self.gram is None else self.gram + gram
            self.cross = cross if self.cross is None else self.cross + cross

    def __add__(self, other: Sums) -> Sums:
        """The sums over the rows of both."""
        if not self.count or not other.count:
            return other if not self.count else self
        products = self.gram is not None and self.cross is not None
        assert other.gram is not None or not products
        return Sums(
            self.count + other.count,
            self.now + other.now,
            self.before + other.before,
            self.gram + other.gram if self.gram is not None and other.gram is not None else None,
            self.cross + other.cross if self.cross is not None and other.cross is not None else None,
        )


@dataclass
class Samples:
    """Sums over two halves of the data: batches in turn, or the rows of a single batch.

    Attributes:
        halves: the two.
    """

    halves: tuple[Sums, Sums] = field(default_factory=lambda: (Sums(), Sums()))

    def add(
        self,
        number: int,
        batches: int,
        z: torch.Tensor,
        x: torch.Tensor,
        products: bool,
        weights: torch.Tensor | None = None,
    ) -> None:
        """Add rows [rows, in] of both flows of batch ``number`` out of ``batches``; see `Sums.add`."""
        if batches > 1:
            self.halves[number % 2].add(z, x, products, weights)
            return
        middle = len(z) // 2
        for half, part in zip(self.halves, (slice(None, middle), slice(middle, None)), strict=True):
            half.add(z[part], x[part], products, None if weights is None else weights[part])

    @property
    def all(self) -> Sums:
        """Both halves together."""
        return self.halves[0] + self.halves[1]


def chosen_damping(
    samples: Samples,
    weight: torch.Tensor,
    fit: Callable[[Sums, float], Compensated],
    dampings: Sequence[float] = DAMPINGS,
) -> float:
    """The damping whose fits on each half do best on the other.

    Args:
        samples: sums with products.
        weight: [out, in] of the unchanged layer, whose output ``W x`` is wanted.
        fit: the fit on some sums with some damping.
        dampings: what is tried, ascending.
    """
    if not all(half.count for half in samples.halves):
        return dampings[min(1, len(dampings) - 1)]
    errors = {
        damping: sum(_error(fit(one, damping), weight, other) for one, other in (samples.halves, samples.halves[::-1]))
        for damping in dampings
    }
    return min(dampings, key=lambda damping: (errors[damping], damping))


def _error(fitted: Compensated, weight: torch.Tensor, sums: Sums) -> float:
    """``E |W' z + b' - W x|^2``, but for a term that is the same for all fits."""
    assert sums.gram is not None and sums.cross is not None
    new, old = fitted.weight.double(), weight.double()
    value = (new @ (sums.gram / sums.count) * new).sum() - 2 * (new @ (sums.cross / sums.count) * old).sum()
    if fitted.bias is not None:
        shift = fitted.bias.double()
        value += shift @ shift + 2 * shift @ (new @ (sums.now / sums.count) - old @ (sums.before / sums.count))
    return float(value)
