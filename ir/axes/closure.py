"""Everything that must be cut along with one axis, solved by connected components.

From a seed axis the closure follows ties to whatever else is cut with it. At a `Junction` only one factor, the
*carrier*, can be cut: coupling every factor would couple everything. A closure that arrives from a factor has no
choice; one that arrives at the flat side decides late, when all else is known, for the outermost factor along which
something is left to cut. Other choices are found from other seeds: one choice is one *mode* of cutting.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import fx

from .space import Index, Junction, Pin, Space, Tie, factor_index


@dataclass
class Closure:
    """The axes that are cut together with ``seed``.

    Attributes:
        start: for each axis of the closure, where its elements start.
        carriers: the factor chosen at each junction (by the place of its relation).
        blame: why elements are pinned: their numbers, the reason, the node.
        labels: for each element, its class: what can only be cut together.
    """

    space: Space
    seed: int
    start: dict[int, int] = field(default_factory=dict)
    carriers: dict[int, int] = field(default_factory=dict)
    blame: list[tuple[Index, str, fx.Node]] = field(default_factory=list)
    labels: Index = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def __post_init__(self) -> None:
        self._total = 0
        self._queue: list[int] = []
        self._edges: list[tuple[Index, Index]] = []
        self._done: set[int] = set()
        self._pending: dict[int, None] = {}
        self._activate(self.seed)
        self._spread()
        while self._pending:
            junction = next(iter(self._pending))
            self._carry(junction, self._choose(junction))
            self._spread()
        self.labels = self._components()

    def elements(self, axis: int) -> Index:
        """The numbers of an axis's elements."""
        return np.arange(self.space.size[axis], dtype=np.int64) + self.start[axis]

    def classes(self, axis: int) -> Index:
        """The class of each element of an axis."""
        return self.labels[self.elements(axis)]

    def pinned(self) -> Index:
        """The classes that may not be cut."""
        numbers = [numbers for numbers, _, _ in self.blame]
        return np.unique(self.labels[np.concatenate(numbers)]) if numbers else np.zeros(0, dtype=np.int64)

    def _activate(self, axis: int) -> None:
        if axis not in self.start:
            self.start[axis] = self._total
            self._total += self.space.size[axis]
            self._queue.append(axis)

    def _spread(self) -> None:
        while self._queue:
            axis = self._queue.pop()
            for place in self.space.of_axis[axis]:
                relation = self.space.relations[place]
                if isinstance(relation, Junction):
                    self._arrive(place, relation, axis)
                elif place not in self._done:
                    self._done.add(place)
                    if isinstance(relation, Tie):
                        self._follow(relation)
                    elif isinstance(relation, Pin):
                        elements = self.elements(axis)
                        chosen = elements if relation.index is None else elements[relation.index]
                        self.blame.append((chosen, relation.reason, relation.node))

    def _follow(self, tie: Tie) -> None:
        for axis in (tie.left, tie.right):
            self._activate(axis)
        left, right = self.elements(tie.left), self.elements(tie.right)
        self._edges.append(
            (
                left if tie.left_index is None else left[tie.left_index],
                right if tie.right_index is None else right[tie.right_index],
            )
        )

    def _arrive(self, place: int, junction: Junction, axis: int) -> None:
        if axis == junction.flat:
            if place not in self.carriers:
                self._pending[place] = None
            return
        factor = junction.factors.index(axis)
        if place not in self.carriers:
            self._carry(place, factor)
        elif self.carriers[place] != factor:
            self.blame.append((self.elements(axis), "it is merged with a dimension that is cut", junction.node))

    def _carry(self, place: int, factor: int) -> None:
        junction = self.space.relations[place]
        assert isinstance(junction, Junction)
        self.carriers[place] = factor
        self._pending.pop(place, None)
        for axis in (junction.flat, junction.factors[factor]):
            self._activate(axis)
        sizes = tuple(self.space.size[f] for f in junction.factors)
        along = self.elements(junction.factors[factor])[factor_index(sizes, factor)]
        self._edges.append((self.elements(junction.flat), along))
        for other, axis in enumerate(junction.factors):
            if other != factor and axis in self.start:
                self.blame.append((self.elements(axis), "it is merged with a dimension that is cut", junction.node))

    def _choose(self, place: int) -> int:
        junction = self.space.relations[place]
        assert isinstance(junction, Junction)
        sizes = tuple(self.space.size[f] for f in junction.factors)
        open_factors = [f for f, axis in enumerate(junction.factors) if self.space.pinned(axis) is None]
        if len(open_factors) < 2:
            return open_factors[0] if open_factors else 0
        labels = self._components()
        flat = labels[self.elements(junction.flat)]
        for factor in open_factors:
            along = factor_index(sizes, factor)
            if _merged(flat, along) > 1:
                return factor
        return open_factors[0]

    def _components(self) -> Index:
        if not self._edges:
            return np.arange(self._total, dtype=np.int64)
        return components(self._total, self._edges)


def components(count: int, edges: list[tuple[Index, Index]]) -> Index:
    """The class of each of ``count`` elements when the pairs in ``edges`` are joined."""
    left = np.concatenate([a for a, _ in edges])
    right = np.concatenate([b for _, b in edges])
    graph = coo_array((np.ones(len(left), dtype=np.int8), (left, right)), shape=(count, count))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def _merged(classes: Index, along: Index) -> int:
    """How many classes are left when those that meet in one coordinate are joined."""
    _, compact = np.unique(classes, return_inverse=True)
    first = int(compact.max()) + 1
    labels = components(first + int(along.max()) + 1, [(compact, along + first)])
    return len(np.unique(labels))
