"""How far the outputs move when a unit alone is removed.

One partial forward pass per unit, each started from the recorded stream, so that only what comes after the unit runs
again.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ....ir.program import Program
from ...base import Batch, Context
from ...fidelity import output_distance, seeded
from ..units import Unit, replacements


def removal_loss(program: Program, units: Sequence[Unit], dropped: Collection[Unit], ctx: Context) -> dict[int, float]:
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
