"""Coupled-channel groups: which slices of which weights can only be cut together.

An *atom* is the smallest removable unit: one channel, one head, one group of key and value head with its query heads.
Atoms that consist of the same parts of the same weights form a *group*, and any of them can be cut by `cut`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import fx

from ..flow import op_name
from ..program import Program
from .closure import Closure
from .rules import relate
from .space import Index, Junction, Pin, Relation, Role, Space, Sum, Tie
from .zero import why_not_zero

Place = tuple[str, int]


@dataclass(frozen=True, eq=False)
class Member:
    """A weight's dimension in a group.

    Attributes:
        weight: the weight's name.
        dim: which of its dimensions.
        index: [atoms, elements]: the elements of the dimension that each atom consists of.
        reads: whether the channels are summed over there (a consumer); else they are made or scaled there.
    """

    weight: str
    dim: int
    index: Index
    reads: bool


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that can only be cut together, in units.

    Attributes:
        entry: the entry of the program that it was found in.
        unit: what one atom is: ``channel``, ``head``, ``KV group``...
        size: how many atoms there are.
        members: the dimensions of weights that the atoms consist of.
        places: for each dimension of each value that is cut, the atom of each element, or -1 where it stays.
        reason: why nothing of it can be cut; empty if it can.
        zero_reason: why zeroing an atom's weights is not the same as cutting them; empty if it is.
        why: what couples the weights.
    """

    entry: str
    unit: str
    size: int
    members: tuple[Member, ...]
    places: dict[Place, Index] = field(repr=False)
    reason: str = ""
    zero_reason: str = ""
    why: str = ""

    @property
    def prunable(self) -> bool:
        """Whether atoms can be cut."""
        return not self.reason

    @property
    def zeroable(self) -> bool:
        """Whether a program with an atom's weights zeroed computes what one without the atom does."""
        return self.prunable and not self.zero_reason

    @property
    def producers(self) -> tuple[Member, ...]:
        """The weights' dimensions along which the channels are made (or scaled)."""
        return tuple(m for m in self.members if not m.reads)

    @property
    def consumers(self) -> tuple[Member, ...]:
        """The weights' dimensions along which they are summed over."""
        return tuple(m for m in self.members if m.reads)

    def __str__(self) -> str:
        head = f"{self.size} x {self.unit}: " + ", ".join(f"{m.weight}[{m.dim}]" for m in self.members)
        return head + (f" (not prunable: {self.reason})" if self.reason else "")


def find_groups(program: Program, entry: str = "main") -> list[ChannelGroup]:
    """All groups of one entry, those that can be cut and those that cannot, in the order of their first weight.

    A weight's dimension may be in several groups: the same rows can be cut by heads, or by channels inside heads.
    Every weight's dimension above size one is in at least one, if only to say why it cannot be cut.

    Args:
        program: a program; it is not changed.
        entry: the callable graph to look at. Weights that other entries or nested graphs read as well are pinned.
    """
    graph = program.entries[entry].graph
    space = Space()
    shared = _shared(program, entry)
    for node in graph.nodes:
        if node.op == "get_attr":
            for dim in range(
                len(program.weights[str(node.target)].shape) if str(node.target) in program.weights else 0
            ):
                axis = space.axis(node, dim)
                if axis is not None and str(node.target) in shared:
                    space.add(Pin(node, axis, shared[str(node.target)]))
        else:
            relate(space, node)
    return _Finder(program, entry, space).find()


def _shared(program: Program, entry: str) -> dict[str, str]:
    """Weights that are read elsewhere, and where."""
    found: dict[str, str] = {}
    for name, graph in program.graphs.items():
        if name != entry:
            found |= {str(n.target): f"'{name}' reads it as well" for n in graph.find_nodes(op="get_attr")}
    for other in program.entries.values():
        found |= {pair.initial: "it is the first value of a state" for pair in other.state if pair.initial}
    return found


class _Finder:
    def __init__(self, program: Program, entry: str, space: Space) -> None:
        self.program, self.entry, self.space = program, entry, space
        self.groups: list[ChannelGroup] = []
        self.blocked: list[tuple[set[int], ChannelGroup]] = []
        self.seen: set[bytes] = set()
        self.covered: set[int] = set()
        self.cut: set[int] = set()
        self.carried: set[tuple[int, int]] = set()
        self.reached: dict[int, None] = {}

    def find(self) -> list[ChannelGroup]:
        weights = [
            axis
            for axis, place in enumerate(self.space.place)
            if place is not None and place[0].op == "get_attr" and place[0].users
        ]
        for axis in weights:
            if axis not in self.covered:
                self._solve(axis)
        while self.reached:
            junction = next(iter(self.reached))
            del self.reached[junction]
            relation = self.space.relations[junction]
            assert isinstance(relation, Junction)
            for factor, axis in enumerate(relation.factors):
                if (junction, factor) not in self.carried and self.space.pinned(axis) is None:
                    self._solve(axis)
        for axes, group in self.blocked:
            if not axes <= self.cut:
                self.cut |= axes
                self.groups.append(group)
        return self.groups

    def _solve(self, seed: int) -> None:
        closure = Closure(self.space, seed)
        for junction, factor in closure.carriers.items():
            self.carried.add((junction, factor))
            self.reached[junction] = None
        weights = [a for a in closure.start if (p := self.space.place[a]) is not None and p[0].op == "get_attr"]
        self.covered |= set(weights)
        if not weights:
            return
        count = int(closure.labels.max()) + 1
        free = np.zeros(count, dtype=bool)
        for axis in weights:
            free[closure.classes(axis)] = True
        if free.sum() > 1:
            free[closure.pinned()] = False
        else:
            closure.blame.append(
                (closure.elements(seed), "all of it is coupled into one unit", _node(self.space, seed))
            )
            free[:] = False
        if not free.any():
            self.blocked.append((set(weights), self._blocked(closure, weights)))
            return
        stuck = [axis for axis in weights if not free[closure.classes(axis)].any()]
        if stuck:  # parts of a dimension that was put together from what can be cut and what cannot
            self.blocked.append((set(stuck), self._blocked(closure, stuck)))
        random = np.random.default_rng(0)
        signature = np.zeros(count, dtype=np.uint64)
        for axis in sorted(closure.start):
            times = np.bincount(closure.classes(axis), minlength=count).astype(np.uint64)
            signature += times * random.integers(1, 1 << 63, dtype=np.uint64)
        for value in dict.fromkeys(signature[free].tolist()):
            self._group(closure, weights, np.flatnonzero(free & (signature == value)))

    def _group(self, closure: Closure, weights: list[int], classes: Index) -> None:
        # Atoms in the order of the first weight's elements.
        first = next(a for a in weights if np.isin(closure.classes(a), classes).any())
        ordered = closure.classes(first)
        ordered = ordered[np.isin(ordered, classes)]
        _, where = np.unique(ordered, return_index=True)
        classes = ordered[np.sort(where)]
        number = np.full(int(closure.labels.max()) + 1, -1, dtype=np.int64)
        number[classes] = np.arange(len(classes))
        atoms = {a: number[closure.classes(a)] for a in sorted(closure.start)}
        atoms = {a: label for a, label in atoms.items() if (label >= 0).any()}
        own = [a for a in weights if a in atoms]
        key = b"".join(f"{a}:".encode() + atoms[a].tobytes() for a in sorted(own))
        self.cut |= set(own)
        if key in self.seen:
            return
        self.seen.add(key)
        relations = [self.space.relations[i] for a in atoms for i in self.space.of_axis[a]]
        sums = {r.axis for r in relations if isinstance(r, Sum)}
        members = tuple(self._member(a, atoms[a], a in self._summed(atoms, sums)) for a in own)
        places = {(p[0].name, p[1]): label for a, label in atoms.items() if (p := self.space.place[a]) is not None}
        self.groups.append(
            ChannelGroup(
                self.entry,
                _unit(self.space, atoms),
                len(classes),
                members,
                places,
                reason="it is a single unit, and one has to stay" if len(classes) == 1 else "",
                zero_reason=why_not_zero(self.space, atoms, relations),
                why=_why(relations, members),
            )
        )

    def _summed(self, atoms: dict[int, Index], sums: set[int]) -> set[int]:
        """Axes that are summed over, as a whole or in a factor of theirs."""
        found = set(sums)
        for axis in atoms:
            for place in self.space.of_axis[axis]:
                relation = self.space.relations[place]
                if isinstance(relation, Junction) and set(relation.factors) & sums:
                    found.add(relation.flat)
        return found

    def _member(self, axis: int, label: Index, reads: bool) -> Member:
        place = self.space.place[axis]
        assert place is not None
        order = np.argsort(label, kind="stable")
        order = order[label[order] >= 0]
        return Member(str(place[0].target), place[1], order.reshape(int(label.max()) + 1, -1), reads)

    def _blocked(self, closure: Closure, weights: list[int]) -> ChannelGroup:
        own = np.unique(np.concatenate([closure.classes(axis) for axis in weights]))
        blame = [b for b in closure.blame if np.isin(closure.labels[b[0]], own).any()] or closure.blame
        reasons = Counter(f"{reason} (%{node.name})" for _, reason, node in blame)
        members = []
        for axis in weights:
            members.append(self._member(axis, np.arange(self.space.size[axis]), reads=False))
        shown = "; ".join(reason for reason, _ in reasons.most_common(3))
        return ChannelGroup(self.entry, "channel", 0, tuple(members), {}, reason=shown)


def _node(space: Space, axis: int) -> fx.Node:
    """A node that the axis belongs to."""
    place = space.place[axis]
    return place[0] if place is not None else space.relations[space.of_axis[axis][0]].node


def _unit(space: Space, atoms: dict[int, Index]) -> str:
    """What one atom is, by the roles that its axes have for operators."""
    roles: dict[str, int] = {}
    blocks = True
    for axis, label in atoms.items():
        for place in space.of_axis[axis]:
            relation = space.relations[place]
            if isinstance(relation, Role):
                kept = np.flatnonzero(label == 0)
                roles[relation.role] = max(roles.get(relation.role, 0), len(kept))
                if relation.role == "head":
                    blocks = blocks and bool((np.diff(kept) == 1).all())
    if "head" in roles:
        if roles["head"] == 1:
            return "head"
        return "KV group" if blocks else "query head of every KV group"
    for role in (
        "query and key channel",
        "value channel",
        "convolution group",
        "normalization group",
        "channel of every convolution group",
    ):
        if role in roles:
            return role
    return "channel"


def _why(relations: Sequence[Relation], members: tuple[Member, ...]) -> str:

    names = Counter(op_name(r.node) for r in relations if isinstance(r, (Tie, Junction)))
    made = ", ".join(f"{m.weight}[{m.dim}]" for m in members if not m.reads)
    read = ", ".join(f"{m.weight}[{m.dim}]" for m in members if m.reads)
    through = ", ".join(name for name, _ in names.most_common(6))
    return f"made by {made or 'no weight'}; read by {read or 'no weight'}; coupled by {through}"


__all__ = ["ChannelGroup", "Member", "find_groups"]
