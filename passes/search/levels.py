"""Levels: what can be done at one place of a model, from nothing to everything, and what each step costs.

A `Place` is where a search chooses: an MLP's hidden width, the heads of an attention, a whole branch, the weight of a
linear layer. Each of its levels says what is changed (channels that are cut, a unit of the stream that is dropped,
weights that are replaced), so that one engine searches over all of them. Level 0 is the place as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ...ir.axes.space import Index
from ...ir.program import Program
from ...ir.weights import Weight
from .sites import ChannelSite
from .units import Unit

TOO_NARROW = "too few atoms"
"""Why a site is no place: with what is to stay of it, it has no level but the untouched one."""


@dataclass(frozen=True, eq=False)
class Level:
    """One thing that can be done at a place.

    Attributes:
        label: for reports: ``384 of 1536 cut``, ``dropped``, ``bits=4``.
        cost: what is left of the place, in the unit of the budget.
        error: estimated harm; None where only a run tells.
        site: the channel site that is cut.
        order: its atoms in the order in which they go, shared by all levels of a place.
        count: how many of them go.
        drop: the unit of the stream that is dropped.
        replaced: weights that are replaced, of unchanged shape, by name. Those of a cut site hold zeros where it is
            cut, and what makes up for it elsewhere.
    """

    label: str
    cost: float
    error: float | None = None
    site: ChannelSite | None = None
    order: Index | None = None
    count: int = 0
    drop: Unit | None = None
    replaced: Mapping[str, Weight] = field(default_factory=dict[str, Weight])

    @property
    def removed(self) -> tuple[int, ...]:
        """The atoms of the site that go, in increasing order."""
        return () if self.order is None else tuple(sorted(self.order[: self.count].tolist()))

    def weights(self, program: Program) -> Mapping[str, Weight]:
        """The weights with which the uncut program computes what the level does."""
        if self.replaced or self.site is None or not self.count:
            return self.replaced
        return zeroed(program, self.site, self.removed)


@dataclass(frozen=True, eq=False)
class Place:
    """A place with its levels.

    Attributes:
        kind: what it is; levels of places of one kind are alike.
        label: for reports.
        block: the number of the block it lies in, over all streams; None outside.
        levels: level 0 is the place as it is.
        first: position in the graph of the first operator that any level changes.
        index: the number of its site or unit among those of its kind.
        scores: the score of each atom, for reports.
    """

    kind: str
    label: str
    block: int | None
    levels: tuple[Level, ...]
    first: int
    index: int
    scores: Sequence[float] | None = None


@dataclass(frozen=True, eq=False)
class ZeroedSource:
    """A weight with some elements of some dimensions set to zero, made when needed.

    Attributes:
        weight: the weight as it is.
        index: for each dimension, the elements that are zero there.
    """

    weight: Weight
    index: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        """The weight's element type."""
        return self.weight.dtype

    def load(self) -> torch.Tensor:
        """The numbers: a new tensor at every call."""
        value = self.weight.tensor().clone()
        for dim, index in self.index:
            value.index_fill_(dim, torch.tensor(index, dtype=torch.int64), 0)
        return value


def zeroed(program: Program, site: ChannelSite, removed: Sequence[int]) -> dict[str, Weight]:
    """The weights that make some atoms of a site nothing, of unchanged shape.

    Where all readers of the channels are known it is their columns, else every part of the atoms.
    """
    gone = np.asarray(removed, dtype=np.int64)
    by_weight: dict[str, list[tuple[int, tuple[int, ...]]]] = {}
    if site.consumers and not site.unread and site.kind != "qk-channels":
        for consumer in site.consumers:
            index = np.flatnonzero(np.isin(consumer.labels, gone))
            entry = consumer.weight_dim, tuple(index.tolist())
            known = by_weight.setdefault(consumer.weight, [])
            if len(index) and entry not in known:
                known.append(entry)
    else:
        for member in site.group.members:
            index = np.unique(member.index[gone].reshape(-1))
            by_weight.setdefault(member.weight, []).append((member.dim, tuple(index.tolist())))
    return {
        name: Weight(ZeroedSource(program.weights[name], tuple(index))) for name, index in by_weight.items() if index
    }


def combined(program: Program, changes: Iterable[Mapping[str, Weight]]) -> dict[str, Weight]:
    """Changes of several places together: of a weight that several of them zero, all of that is zero.

    A weight whose columns are channels of two sites (a layer that reads a concatenation, heads and channels inside
    heads) is changed by both.

    Args:
        program: the program.
        changes: weights that are replaced, by name, for each place.
    """
    replaced: dict[str, Weight] = {}
    zeros: dict[str, list[tuple[int, tuple[int, ...]]]] = {}
    for change in changes:
        for name, weight in change.items():
            if isinstance(weight.source, ZeroedSource) and not weight.steps:
                zeros.setdefault(name, []).extend(weight.source.index)
            else:
                replaced[name] = weight
    for name, index in zeros.items():
        replaced[name] = Weight(ZeroedSource(replaced.get(name, program.weights[name]), tuple(index)))
    return replaced


class Trial:
    """The changes of a state, a choice of one level for every place, as a run sees them: nothing is rewritten.

    Args:
        program: the program whose places they are.
        places: the places.
        state: a level for each.

    Attributes:
        levels: the chosen levels.
        alias: values that are replaced by earlier ones.
        weights: weights that are replaced.
    """

    def __init__(self, program: Program, places: Sequence[Place], state: Sequence[int]) -> None:
        self.levels = [place.levels[level] for place, level in zip(places, state, strict=True)]
        self.alias = {level.drop.replaced: level.drop.by for level in self.levels if level.drop is not None}
        self.weights = combined(program, (level.weights(program) for level in self.levels))
