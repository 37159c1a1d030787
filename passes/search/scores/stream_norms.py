"""How far a unit moves its stream, as a length.

- ``norm-ratio``: ``E[|x_after - x_before| / |x_after|]``, what the unit adds relative to what comes out (the relative
  magnitude of Samragh et al. 2023, arXiv 2312.09299);
- ``l2``: ``E[|x_after - x_before|]``, not relative: in models whose stream grows, later units score higher.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from ....ir.program import Program
from ...base import Context
from ..units import Unit
from .stream_change import Measure, stream_change


def _length(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    return (after - before).norm(dim=-1)


def _ratio(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    added, whole = _length(before, after), after.norm(dim=-1)
    # A unit that changes nothing has no influence, on a stream of zeros as well.
    return torch.where(added == 0, 0.0, added / whole)


def norm_ratio(program: Program, units: Sequence[Unit], dropped: Collection[Unit], ctx: Context) -> dict[int, float]:
    """Score units by the length of what they add, relative to the stream after them.

    Args, returns: as `block_influence.block_influence`.
    """
    return _scores(program, units, dropped, ctx, _ratio, "norm ratio")


def l2(program: Program, units: Sequence[Unit], dropped: Collection[Unit], ctx: Context) -> dict[int, float]:
    """Score units by the length of what they add.

    Args, returns: as `block_influence.block_influence`.
    """
    return _scores(program, units, dropped, ctx, _length, "l2")


def _scores(
    program: Program, units: Sequence[Unit], dropped: Collection[Unit], ctx: Context, measure: Measure, label: str
) -> dict[int, float]:
    pairs = [(unit.by, unit.replaced) for unit in units]
    found = stream_change(program, pairs, dropped, ctx, measure, label)
    return {unit.index: value for unit, value in zip(units, found, strict=True)}
