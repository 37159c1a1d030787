"""Chains of residual units: which units follow each other in one stream.

Units nest (a bottleneck with residual units inside; a skip over half a network). A unit inside a branch of another is
its child; a unit that merely bridges a run of units is a long skip, and is dissolved: if it stands alone, or if
the other units of its chain have no children. Units follow each other in a chain when the next one's start is reached
from the last one's end along immediate dominators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import sympy
from torch import fx

from .flow import Flow, op_name
from .residual import Unit

_RESHAPES = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"}


def top_level(units: Sequence[Unit], flow: Flow) -> list[Unit]:
    """The units that are in no other's branches, in graph order; the others become their children."""
    owner: dict[fx.Node, Unit] = {}
    outer: list[Unit] = []
    for unit in units:
        unit.children = []
    for unit in sorted(units, key=lambda u: (-u.size, flow.position[u.end])):
        container = owner.get(unit.end)
        if container is not None:
            container.children.append(unit)
        else:
            outer.append(unit)
        for nodes in unit.nodes:
            owner.update((node, unit) for node in nodes)
        owner.update((add, unit) for add, _ in unit.leaves if add is not unit.end)
    for unit in units:
        unit.children.sort(key=lambda u: flow.position[u.end])
    # A projection is a block of a network that has identity units in a row with it, never a container.
    kept = [u for u in outer if not (u.kind == "projection" and u.children)]
    freed = [c for u in outer if u.kind == "projection" and u.children for c in top_level(_descend(u), flow)]
    return sorted(kept + freed, key=lambda u: flow.position[u.end])


def _descend(unit: Unit) -> list[Unit]:
    found: list[Unit] = []
    stack = list(unit.children)
    while stack:
        child = stack.pop()
        found.append(child)
        stack.extend(child.children)
    return found


@dataclass(eq=False)
class Chain:
    """Units in a row.

    Attributes:
        units: the units.
        before: dominators between the first unit's start (included) and the unit before or the root, nearest first.
        follows: the unit, of another chain, that the first one is reached from.
    """

    units: list[Unit]
    before: list[fx.Node] = field(default_factory=list)
    follows: Unit | None = None


def find_chains(units: Sequence[Unit], flow: Flow) -> list[Chain]:
    """Link top-level units into chains, dissolving long skips until none is left."""
    units = top_level(units, flow)
    dissolved: dict[fx.Node, fx.Node] = {}
    while True:
        chains = _link(units, flow, dissolved)
        skips = [u for chain in chains for u in _long_skips(chain)]
        if not skips:
            return [c for c in chains if any(u.kind == "identity" for u in c.units)]
        for skip in skips:
            dissolved[skip.end] = skip.leaves[-1][1]
        inner = [c for skip in skips for c in skip.children]
        units = sorted([u for u in units if u not in skips] + inner, key=lambda u: flow.position[u.end])


def _long_skips(chain: Chain) -> list[Unit]:
    containers = [u for u in chain.units if len(u.children) > 1]
    if len(chain.units) == 1 or len(containers) < len(chain.units):
        # Children must follow each other from the container's own start: a spine, not an aside in a branch.
        return [u for u in containers if _is_spine(u)]
    return []


def _is_spine(unit: Unit) -> bool:
    return sum(child.kind == "identity" for child in unit.children) > 1


def _link(units: Sequence[Unit], flow: Flow, dissolved: dict[fx.Node, fx.Node]) -> list[Chain]:
    ends = {unit.end: unit for unit in units}
    previous: dict[Unit, Unit] = {}
    paths: dict[Unit, list[fx.Node]] = {}
    for unit in units:
        path: list[fx.Node] = []
        node: fx.Node | None = unit.start
        while node is not None and node not in ends:
            path.append(node)
            node = dissolved[node] if node in dissolved else flow.dominators.parent[node]
        paths[unit] = path
        if node is not None and ends[node] is not unit:
            previous[unit] = ends[node]
    following: dict[Unit, list[Unit]] = {}
    for unit, before in previous.items():
        following.setdefault(before, []).append(unit)
    length: dict[Unit, int] = {}
    chosen: dict[Unit, Unit] = {}
    for unit in sorted(units, key=lambda u: flow.position[u.end], reverse=True):
        options = [u for u in following.get(unit, []) if _continues(flow, unit, u, paths[u])]
        if options:
            chosen[unit] = max(options, key=lambda u: (length[u], -flow.position[u.end]))
        length[unit] = 1 + (length[chosen[unit]] if unit in chosen else 0)
    continued = set(chosen.values())
    chains: list[Chain] = []
    for unit in units:
        if unit in continued:
            continue
        chain = Chain([unit], paths[unit], previous.get(unit))
        while chain.units[-1] in chosen:
            last = chain.units[-1]
            last.tail = paths[chosen[last]][::-1]
            chain.units.append(chosen[last])
        chain.units[-1].tail = []
        chains.append(chain)
    return chains


def _continues(flow: Flow, unit: Unit, following: Unit, path: Sequence[fx.Node]) -> bool:
    """Whether the stream goes on: its shape stays the same between the two."""
    before, after = flow.shape(unit.end), flow.shape(following.start)
    if before == after:
        return True
    # A stream may be flattened to two dimensions and back; anything else that changes its shape ends it.
    changing = [n for n in path if n.args and isinstance(n.args[0], fx.Node) and flow.shape(n) != flow.shape(n.args[0])]
    if before[-1:] != after[-1:] or not all(op_name(n) in _RESHAPES for n in changing):
        return False
    return sympy.expand(sympy.Mul(*before) - sympy.Mul(*after)) == 0
