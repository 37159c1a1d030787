"""How much an error in a stream counts: as much as the norms that read the stream let through.

Positions and channels of a stream differ in size by orders of magnitude (the first token of many language models and
the separators of encoders are a hundred times as large as the others; a few channels are, too). A norm divides each
position by its size and multiplies each channel by its weight. Least squares without these weights serve the few large
numbers, at the expense of all others.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import fx

from ...ir.axes.relate import bind
from ...ir.flow import keeps_value, op_name
from ...ir.program import Program
from ..canonical.norm_spelling import is_root_of_statistic, norms_at
from ..canonical.refusal import Refused

_NORMS = ("layer_norm", "rms_norm")
_EPSILON = 1e-6
_LEAST = 1e-3
"""Least weight of a channel, as a share of the largest."""


class Norms:
    """The norms over the last axis of a program, as operators or spelled out, by what they read.

    Args:
        program: the program; norms that are added to it later are not known.
    """

    def __init__(self, program: Program) -> None:
        self._weights: dict[fx.Node, list[torch.Tensor | None]] = {}
        for node in program.graph.nodes:
            if op_name(node) in _NORMS:
                found = bind(node)
                self._add(program, found["input"], found.get("weight"))
            elif is_root_of_statistic(program, node):
                try:
                    spelled = norms_at(program, node)
                except Refused:
                    continue
                for norm in spelled:
                    self._add(program, norm.x, norm.weight)

    def _add(self, program: Program, x: fx.Node, weight: fx.Node | None) -> None:
        stored = program.weights.get(str(weight.target)) if weight is not None and weight.op == "get_attr" else None
        width = x.meta["val"].shape[-1]
        if not isinstance(width, int):
            return
        known = stored is not None and stored.numel == width and not stored.is_meta
        self._weights.setdefault(x, []).append(stored.tensor().double().reshape(-1) if stored and known else None)

    def channel_weights(self, stream: fx.Node) -> torch.Tensor | None:
        """Float64 [channels]: how much the norms that read a value multiply each channel by; None where none reads it.

        A norm without a weight counts every channel alike.
        """
        width = stream.meta["val"].shape[-1]
        total = torch.zeros(width, dtype=torch.float64)
        for weight in self._weights.get(stream, []):
            total += torch.ones(width, dtype=torch.float64) if weight is None else weight.square()
        if not bool(total.isfinite().all()) or not bool(total.any()):
            return None
        return total.sqrt().clamp_min(_LEAST * float(total.max()) ** 0.5)

    def after(self, node: fx.Node) -> fx.Node | None:
        """What the first norm after a node reads, through sums alone; None where something else comes first.

        With norms before the sums, after them, or around each branch, this is the next value that a norm evens out.
        """
        seen, queue = {node}, deque([node])
        while queue:
            value = queue.popleft()
            if value in self._weights and len(value.meta["val"].shape) in (2, 3):
                return value
            sums = [user for user in value.users if op_name(user) == "add" or keeps_value(user)]
            queue.extend(user for user in sums if user not in seen)
            seen.update(sums)
        return None


def position_weights(stream: torch.Tensor) -> torch.Tensor:
    """Float64 [positions]: the inverse mean square of each row of a stream [positions, channels]."""
    return 1 / (stream.double().square().mean(-1) + _EPSILON)
