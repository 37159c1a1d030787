"""How far the outputs move when an atom alone is removed: the most expensive score, and the only one that sees the end.

One run per atom and batch, started from the last values of the residual streams before the site, so that only what
comes after them runs again. Those values are held for the sites of one batch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from ....ir.axes import cut
from ....ir.program import Program
from ...base import Context
from ...fidelity import output_distance, seeded
from ..levels import zeroed
from ..sites import ChannelSite
from ..statistics import calibration
from .base import AtomScores


def removal(program: Program, sites: Sequence[ChannelSite], ctx: Context) -> AtomScores:
    """The mean over batches of `fidelity.output_distance` between the program with and without an atom: KL divergence
    in nats where an output looks like logits, else the squared relative error.

    Atoms are zeroed where that is the same as cutting them, else cut out of a copy. An atom without which a sound model
    gives no numbers is worth more than all others.

    Args, returns: as `base.ChannelScore`.
    """
    streams = [[p for p in stream.points if p.op == "call_function"] for stream in ctx.structure(program).streams]
    watched = {point for points in streams for point in points}
    position = {node: place for place, node in enumerate(program.graph.nodes)}
    totals: AtomScores = {site.index: np.zeros(site.size) for site in sites}
    batches = calibration(ctx)
    work = [(batch, site, atom) for batch in batches for site in sites for atom in range(site.size)]
    current: Any = None
    reference: Mapping[str, Any] = {}
    values: dict[fx.Node, torch.Tensor] = {}
    sound = True
    for batch, site, atom in ctx.progress(work, len(work), "removal"):
        feeds = program.feeds(**batch)
        if batch is not current:
            current, values = batch, {}

            def observe(node: fx.Node, value: Any, values: dict[fx.Node, torch.Tensor] = values) -> None:
                if node in watched and isinstance(value, torch.Tensor):
                    values[node] = value

            reference = seeded(lambda f=feeds, o=observe: program.run(f, observe=o))
            sound = not any(isinstance(v, torch.Tensor) and bool(v.isnan().any()) for v in reference.values())
        given: dict[fx.Node, torch.Tensor] = {}
        for points in streams:
            before = [p for p in points if position[p] < site.first]
            if before:
                given[before[-1]] = values[before[-1]]
        outputs = _without(program, site, atom, feeds, given)
        distance = output_distance(outputs, reference, batch)
        totals[site.index][atom] += math.inf if sound and math.isnan(distance) else distance
    return {index: _finite(total / len(batches)) for index, total in totals.items()}


def _without(
    program: Program, site: ChannelSite, atom: int, feeds: Mapping[str, Any], given: Mapping[fx.Node, torch.Tensor]
) -> dict[str, Any]:
    if site.group.zeroable:
        view = copy.copy(program)
        view.weights = {**program.weights, **zeroed(program, site, [atom])}
        return seeded(lambda: view.run(feeds, given=given))
    smaller = program.clone()
    cut(smaller, site.group, [other for other in range(site.size) if other != atom])
    return seeded(lambda: smaller.run(feeds))


def _finite(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Infinities as twice the largest number, so that sums of scores stay numbers."""
    known = values[np.isfinite(values)]
    return np.where(np.isposinf(values), 2 * max(float(known.max()) if len(known) else 0.0, 1.0), values)
