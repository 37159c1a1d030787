"""How a residual stream changes between two of its values, over calibration data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ....ir.program import Program
from ...base import Batch, Context
from ...fidelity import position_mask, seeded
from ..units import Unit, replacements

Measure = Callable[[Tensor, Tensor], Tensor]
"""``(before, after)``, both float64 [..., width], to one number per position [...]."""


def positions(before: Tensor, after: Tensor, batch: Batch, measure: Measure) -> tuple[float, int]:
    """Sum and count of a measure in float64: per token that no mask hides for [batch, tokens, width], per example
    otherwise (a stream without a batch dimension is one example).
    """
    if before.dim() < 2:
        before, after = before.reshape(1, -1), after.reshape(1, -1)
    mask = position_mask(batch, before.shape[:2], inside=True) if before.dim() == 3 else None
    a, b = (v.double() if v.dim() == 3 else v.double().flatten(1) for v in (before, after))
    found = measure(a, b)
    found = found if mask is None else found[mask != 0]
    return float(found.sum()), found.numel()


def stream_change(
    program: Program,
    pairs: Sequence[tuple[fx.Node, fx.Node]],
    dropped: Collection[Unit],
    ctx: Context,
    measure: Measure,
    label: str,
) -> list[float]:
    """The mean of a measure over positions, for each pair of an earlier and a later value of a stream.

    One run per batch serves all pairs.

    Args:
        program: the program.
        pairs: values, the earlier one first.
        dropped: units that are already removed (their values are read from before them).
        ctx: calibration batches.
        measure: what to measure.
        label: for the progress bar.
    """
    watched = {node for pair in pairs for node in pair}
    by_end: dict[fx.Node, list[int]] = {}
    for place, (_, after) in enumerate(pairs):
        by_end.setdefault(after, []).append(place)
    sums, counts = [0.0] * len(pairs), [0] * len(pairs)
    batches = ctx.calibration or ()
    for batch in ctx.progress(batches, len(batches), label):
        stream: dict[fx.Node, torch.Tensor] = {}

        def observe(
            node: fx.Node, value: Any, stream: dict[fx.Node, torch.Tensor] = stream, batch: Batch = batch
        ) -> None:
            if node in watched:
                stream[node] = value
            for place in by_end.get(node, ()):
                total, count = positions(stream[pairs[place][0]], value, batch, measure)
                sums[place] += total
                counts[place] += count

        feeds = program.feeds(**batch)
        seeded(lambda feeds=feeds, observe=observe: program.run(feeds, observe=observe, alias=replacements(dropped)))
    return [total / max(count, 1) for total, count in zip(sums, counts, strict=True)]
