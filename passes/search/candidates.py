"""Candidates: what a choice of levels does to the outputs, on real data, without rewriting the program.

Runs are shortened by a *prefix cache*: a candidate that leaves the first blocks as another one had them starts from
that one's stream, so that only what comes after the first change runs. Results do not depend on what is in the cache.
"""

from __future__ import annotations

import bisect
import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ...ir.program import Program
from ...ir.rewrite import is_random
from ...ir.structure import Structure
from ..base import Batch, Context
from ..fidelity import seeded
from .apply import cut_sites
from .levels import Level, Place, Trial
from .objective import Reference, distance, keep

CACHE_BYTES = 1 << 30

State = tuple[int, ...]
_Key = tuple[int, int, State]


class Candidates:
    """Evaluates states of a table of places: ``candidates(state, batch)`` is the distance from the unchanged program.

    Args:
        program: the program; it is not changed.
        places: the places, whose levels refer to nodes of this program.
        found: its structure; its streams' values are where runs may start.
        batches: named inputs.
        cache_bytes: memory for streams of earlier candidates; 0 switches the prefix cache off.

    Attributes:
        tokens: positions evaluated so far, each counted by the share of the operators that were run for it.
        runs: how many candidates were run on a batch.
    """

    def __init__(
        self,
        program: Program,
        places: Sequence[Place],
        found: Structure,
        batches: Sequence[Batch],
        *,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.program = program
        self.places = tuple(places)
        self.batches = tuple(batches)
        self.tokens = 0.0
        self.runs = 0
        self._order = sorted(range(len(self.places)), key=lambda i: self.places[i].first)
        self._firsts = [self.places[i].first for i in self._order]
        self._position = {node: i for i, node in enumerate(program.graph.nodes)}
        self._points = [[p for p in stream.points if p.op == "call_function"] for stream in found.streams]
        self._operators = sum(node.op == "call_function" for node in program.graph.nodes)
        self._cache: OrderedDict[_Key, torch.Tensor] = OrderedDict()
        # Where only a part is run, random operators would draw other numbers.
        random = any(is_random(node) for graph in program.graphs.values() for node in graph.nodes)
        self._limit, self._held = 0 if random else cache_bytes, 0
        self._references: dict[int, Reference] = {}

    def __call__(self, state: Sequence[int], batch: int) -> float:
        """The distance of a state's outputs from those of the unchanged program, on one batch; lower is better."""
        if batch not in self._references:
            untouched = (0,) * len(self.places)
            self._references[batch] = keep(self.outputs(untouched, batch), self.batches[batch])
        state = tuple(state)
        return distance(self.outputs(state, batch), self._references[batch])

    def outputs(self, state: State, batch: int) -> Mapping[str, Any]:
        """The outputs of a state on one batch, by name."""
        trial = Trial(self.program, self.places, state)
        feeds = self.program.feeds(**self.batches[batch])
        self.runs += 1
        counted = [level for level in trial.levels if _must_be_cut(level)]
        if counted:
            return self._cut_and_run(trial, counted, feeds)
        view = copy.copy(self.program)
        view.weights = {**self.program.weights, **trial.weights}
        watched = {point for points in self._points for point in points} if self._limit else set[fx.Node]()
        given = self._start(state, batch)
        ran = 0

        def observe(node: fx.Node, value: Any) -> None:
            nonlocal ran
            if node.op == "call_function" and node not in given:
                ran += 1
                if node in watched and isinstance(value, torch.Tensor):
                    self._put((batch, self._position[node], self._prefix(state, node)), value)

        outputs = seeded(lambda: view.run(feeds, observe=observe, given=given, alias=trial.alias))
        self.tokens += positions(feeds) * ran / max(self._operators, 1)
        return outputs

    def _cut_and_run(self, trial: Trial, counted: Sequence[Level], feeds: Batch) -> Mapping[str, Any]:
        """Zeroing would not be cutting (a norm counts its channels): cut a copy."""
        program = self.program.clone()
        names = {node.name: node for node in program.graph.nodes}
        program.weights = {**program.weights, **trial.weights}
        alias = {names[a.name]: names[b.name] for a, b in trial.alias.items()}
        cut_sites(program, [(level.site, level.removed) for level in counted if level.site], Context(), "candidate")
        self.tokens += positions(feeds)
        return seeded(lambda: program.run(feeds, alias=alias))

    def _prefix(self, state: State, node: fx.Node) -> State:
        """The levels of the places that come before a value."""
        count = bisect.bisect_left(self._firsts, self._position[node] + 1)
        return tuple(state[i] for i in self._order[:count])

    def _start(self, state: State, batch: int) -> dict[fx.Node, torch.Tensor]:
        """The last known value of each stream under the same choices before it."""
        given: dict[fx.Node, torch.Tensor] = {}
        for points in self._points:
            for point in reversed(points):
                key = batch, self._position[point], self._prefix(state, point)
                value = self._cache.get(key)
                if value is not None:
                    self._cache.move_to_end(key)
                    given[point] = value
                    break
        return given

    def _put(self, key: _Key, value: torch.Tensor) -> None:
        if key in self._cache:
            self._cache.move_to_end(key)
            return
        size = value.numel() * value.element_size()
        if size > self._limit:
            return
        self._cache[key] = value
        self._held += size
        while self._held > self._limit:
            _, old = self._cache.popitem(last=False)
            self._held -= old.numel() * old.element_size()


def _must_be_cut(level: Level) -> bool:
    return level.site is not None and bool(level.count) and not level.site.group.zeroable


def positions(feeds: Batch) -> int:
    """How many positions a batch has: [batch, tokens] ids, else the number of examples."""
    sizes = [v for v in feeds.values() if isinstance(v, torch.Tensor) and v.dim()]
    tokens = [v.numel() for v in sizes if v.dim() == 2 and not v.is_floating_point()]
    return max(tokens) if tokens else max((v.shape[0] for v in sizes), default=1)
