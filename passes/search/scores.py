"""How much a unit of the residual stream matters.

- ``block-influence``: ``1 - E[cos(x_before, x_after)]`` over tokens (ShortGPT, Men et al. 2024, eq. 1): one forward
  pass scores every unit.
- ``loss``: how far the outputs move when the unit alone is removed: one partial forward pass per unit, each started
  from the recorded stream, so that only what comes after the unit runs again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ...ir.program import Program
from ..base import Batch, Context
from ..fidelity import output_distance, position_mask, seeded
from .units import Unit, replacements

Scores = dict[int, float]
Score = Callable[[Program, Sequence[Unit], Collection[Unit], Context], Scores]


def _cosine(before: torch.Tensor, after: torch.Tensor, batch: Batch) -> tuple[float, int]:
    """Sum and count of cosine similarities in float64: per token that no mask hides for [batch, tokens, width], per
    example otherwise (a stream without a batch dimension is one example).
    """
    if before.dim() < 2:
        before, after = before.reshape(1, -1), after.reshape(1, -1)
    mask = position_mask(batch, before.shape[:2], inside=True) if before.dim() == 3 else None
    a, b = (v.double() if v.dim() == 3 else v.double().flatten(1) for v in (before, after))
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1)
    cosine = cosine if mask is None else cosine[mask != 0]
    return float(cosine.sum()), cosine.numel()


def block_influence(program: Program, units: Sequence[Unit], dropped: Collection[Unit], ctx: Context) -> Scores:
    """Score units by how much they turn the stream.

    Args:
        program: the program.
        units: the units to score.
        dropped: units that are already removed (their values are read from before them).
        ctx: calibration batches.

    Returns:
        A score by unit index; lower matters less.
    """
    watched = {node for unit in units for node in (unit.by, unit.replaced)}
    sums = dict.fromkeys((unit.index for unit in units), 0.0)
    counts = dict.fromkeys((unit.index for unit in units), 0)
    by_end: dict[fx.Node, list[Unit]] = {}
    for unit in units:
        by_end.setdefault(unit.replaced, []).append(unit)
    batches = ctx.calibration or ()
    for batch in ctx.progress(batches, len(batches), "block influence"):
        stream: dict[fx.Node, torch.Tensor] = {}

        def observe(
            node: fx.Node, value: Any, stream: dict[fx.Node, torch.Tensor] = stream, batch: Batch = batch
        ) -> None:
            if node in watched:
                stream[node] = value
            for unit in by_end.get(node, ()):
                total, count = _cosine(stream[unit.by], value, batch)
                sums[unit.index] += total
                counts[unit.index] += count

        feeds = program.feeds(**batch)
        seeded(lambda feeds=feeds, observe=observe: program.run(feeds, observe=observe, alias=replacements(dropped)))
    return {index: 1.0 - sums[index] / max(counts[index], 1) for index in sums}


def removal_loss(program: Program, units: Sequence[Unit], dropped: Collection[Unit], ctx: Context) -> Scores:
    """Score units by how far the outputs move, from those of the whole model, when one more unit is removed.

    The distance is the mean KL divergence of the output distribution where an output looks like logits, else the
    relative squared error (`passes.fidelity.output_distance`).

    Returns:
        A score by unit index; lower matters less.
    """
    alias = replacements(dropped)
    watched = {unit.by for unit in units}
    totals = dict.fromkeys((unit.index for unit in units), 0.0)
    batches = ctx.calibration or ()
    work = [(batch, unit) for batch in batches for unit in units]
    current: Batch | None = None
    reference: Mapping[str, Any] = {}
    sound = True
    stream: dict[fx.Node, torch.Tensor] = {}
    for batch, unit in ctx.progress(work, len(work), "removal loss"):
        feeds = program.feeds(**batch)
        if batch is not current:
            current, stream = batch, {}
            reference = seeded(lambda feeds=feeds: program.run(feeds))
            sound = not any(isinstance(v, torch.Tensor) and bool(v.isnan().any()) for v in reference.values())

            def observe(node: fx.Node, value: Any, stream: dict[fx.Node, torch.Tensor] = stream) -> None:
                if node in watched:
                    stream[node] = value

            seeded(lambda feeds=feeds, observe=observe: program.run(feeds, observe=observe, alias=alias))
        given, others = {unit.replaced: stream[unit.by]}, _without(alias, unit.replaced)
        outputs = seeded(lambda f=feeds, g=given, a=others: program.run(f, given=g, alias=a))
        distance = output_distance(outputs, reference, batch)
        # A removal that breaks a sound model is the worst of all; without a sound model no distance means anything.
        totals[unit.index] += math.inf if sound and math.isnan(distance) else distance
    return {index: total / max(len(batches), 1) for index, total in totals.items()}


def _without(alias: Mapping[fx.Node, fx.Node], node: fx.Node) -> dict[fx.Node, fx.Node]:
    return {a: b for a, b in alias.items() if a is not node}


SCORES: dict[str, Score] = {"block-influence": block_influence, "loss": removal_loss}
