"""``1 - E[cos(x_before, x_after)]`` over tokens: how much a unit turns its stream.

Source: ShortGPT (Men et al. 2024, arXiv 2403.03853), eq. 1.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from ....ir.program import Program
from ...base import Context
from ..units import Unit
from .stream_change import stream_change


def cosine(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """The cosine of the angle between both, over the last dimension."""
    return torch.nn.functional.cosine_similarity(before, after, dim=-1)


def block_influence(
    program: Program, units: Sequence[Unit], dropped: Collection[Unit], ctx: Context
) -> dict[int, float]:
    """Score units by how much they turn the stream. One forward pass scores every unit.

    Args:
        program: the program.
        units: the units to score.
        dropped: units that are already removed (their values are read from before them).
        ctx: calibration batches.

    Returns:
        A score by unit index; lower matters less.
    """
    pairs = [(unit.by, unit.replaced) for unit in units]
    found = stream_change(program, pairs, dropped, ctx, cosine, "block influence")
    return {unit.index: 1.0 - value for unit, value in zip(units, found, strict=True)}
