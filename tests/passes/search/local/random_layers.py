"""Random linear layers for the tests of this folder."""

from __future__ import annotations

import torch
from torch import Tensor


def layer(
    out: int, width: int, rows: int = 0, *, seed: int, correlated: bool = True, scaled: bool = False, dead: int = 0
) -> tuple[Tensor, Tensor]:
    """A weight [out, width] and inputs [rows, width], in float64.

    Args:
        out, width, rows: sizes; by default four rows per column.
        seed: of the random numbers.
        correlated: whether the inputs lie close to a space of a quarter of the dimensions.
        scaled: whether the columns of the inputs differ in size by orders of magnitude.
        dead: how many columns of the inputs are zero, spread over the layer.
    """
    source = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    rows = rows or 4 * width
    inputs = random(rows, width)
    if correlated:
        few = max(width // 4, 1)
        inputs = 0.3 * inputs + random(rows, few) @ random(few, width)
    if scaled:
        inputs = inputs * random(width).exp()
    inputs[:, torch.randperm(width, generator=source)[:dead]] = 0
    return random(out, width), inputs


def outputs_error(inputs: Tensor, changed: Tensor, wanted: Tensor) -> float:
    """``‖inputs @ changed.T - wanted‖²``."""
    return float((inputs @ changed.T - wanted).square().sum())
