"""Values inside a program on one batch, up to where they are needed, from as late a start as possible.

Compensation walks over a model's layers in order and needs, at each, what the layer reads when the layers before it are
already changed. A `Walk` runs only the part between the last value that it knows and the one that is asked for.
"""

from __future__ import annotations

import bisect
import contextlib
import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx

from ...ir.program import Program
from ...ir.structure import Structure
from ...ir.weights import Weight
from ..base import Batch
from ..fidelity import seeded


class _Reached(Exception):
    """All values that were asked for are there."""


class Walk:
    """One batch on its way through a program.

    Args:
        program: the program; it is not changed.
        found: its structure; runs start from values of its streams.
        batch: named inputs.
        alias: values that are replaced by earlier ones throughout.
    """

    def __init__(
        self, program: Program, found: Structure, batch: Batch, alias: Mapping[fx.Node, fx.Node] | None = None
    ) -> None:
        self.program = program
        self.feeds = program.feeds(**batch)
        self.alias = dict(alias or {})
        self._position = {node: i for i, node in enumerate(program.graph.nodes)}
        self._points = {p for stream in found.streams for p in stream.points if p.op == "call_function"}
        self._streams = [[p for p in stream.points if p in self._points] for stream in found.streams]
        self._known: dict[fx.Node, torch.Tensor] = {}

    def values(
        self, wanted: Collection[fx.Node], weights: Mapping[str, Weight], settled: int
    ) -> dict[fx.Node, torch.Tensor]:
        """The values of some nodes.

        Args:
            wanted: the nodes.
            weights: weights that are replaced.
            settled: position of the first operator that may still change: values of streams before it are kept for
                later calls, so ``weights`` must not change any more what comes before it.
        """
        given: dict[fx.Node, torch.Tensor] = {}
        first = min(self._position[node] for node in wanted)
        for points in self._streams:
            before = bisect.bisect_left([self._position[p] for p in points], first)
            known = [p for p in points[:before] if p in self._known]
            if known:
                given[known[-1]] = self._known[known[-1]]
        found: dict[fx.Node, torch.Tensor] = {}
        left = set(wanted)

        def observe(node: fx.Node, value: Any) -> None:
            if node in self._points and self._position[node] < settled:
                self._known[node] = value
            if node in left:
                found[node] = value
                left.discard(node)
                if not left:
                    raise _Reached

        view = copy.copy(self.program)
        view.weights = {**self.program.weights, **weights}
        with contextlib.suppress(_Reached):
            seeded(lambda: view.run(self.feeds, observe=observe, given=given, alias=self.alias))
        self._forget()
        return found

    def _forget(self) -> None:
        """Only the latest value of each stream is of use."""
        for points in self._streams:
            known = [p for p in points if p in self._known]
            for old in known[:-1]:
                del self._known[old]
