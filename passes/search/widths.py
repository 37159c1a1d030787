"""Places with widths: channel sites whose least important atoms go first, and branches that may go whole."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from torch import fx

from ...ir.program import Program
from ...ir.structure import Structure
from .budget import Meter
from .levels import Level, Place
from .sites import ChannelSite
from .units import Unit, removable_units

_NAMED = 3
"""How many of the operators that stay in any case are named."""


def width_place(
    program: Program,
    site: ChannelSite,
    scores: np.ndarray,
    meter: Meter,
    *,
    steps: int | None,
    floor: float = 0.0,
    multiple: int = 1,
    weighted: bool = False,
    least_score: float = 0.0,
    drop: Unit | None = None,
    rank: int = 0,
) -> Place:
    """A channel site as a place: each level removes more of its least important atoms.

    Args:
        program: the program.
        site: the site.
        scores: float64 [atoms]; the lowest go first, of equals the last.
        meter: counts what a level saves.
        steps: how many levels besides the untouched one, evenly spaced from one atom to all that may go; None: one for
            each number of atoms.
        floor: the share of the atoms that stays at least (at least one does).
        multiple: how many channels stay is a multiple of this, where anything is cut (`in_atoms`, `at_multiples`).
        weighted: whether an atom's harm is its score times what it saves, so that scores alone decide under an
            allocator that compares harm per saving.
        least_score: what all scores are counted from: no harm is negative if it is the lowest of all sites.
        drop: the branch that the site lies in, as a further and last level that drops it.
        rank: of the map in its place; 0 for none.
    """
    size = site.size
    order = np.lexsort((-np.arange(size), scores))
    most = size - max(1, math.ceil(floor * size - 1e-9))
    counts = (
        range(1, most + 1) if steps is None else sorted({round(most * i / steps) for i in range(1, steps + 1)} - {0})
    )
    counts = at_multiples(counts, size, most, in_atoms(site, multiple))
    whole = meter.cut(site, range(size))
    # All atoms consist of the same elements, so savings grow evenly, unless one weight is cut along two dimensions.
    names = [member.weight for member in site.group.members]
    each = whole / size if len(set(names)) == len(names) else None
    harms = np.concatenate([[0.0], np.cumsum(scores[order] - least_score)])
    levels = [Level("untouched", round(whole), 0.0)]
    for count in counts:
        saved = each * count if each is not None else meter.cut(site, order[:count].tolist())
        harm = float(harms[count]) * (saved / count if weighted else 1.0)
        label = f"{count} of {size} cut"
        levels.append(Level(label, round(whole - saved), harm, site=site, order=order, count=count))
    first = site.first
    if drop is not None:
        positions = {node: i for i, node in enumerate(program.graph.nodes)}
        whole_branch = meter.drop([drop])
        # What only a drop saves (norms) belongs to every other level.
        levels = [_dearer(level, whole_branch - whole) for level in levels]
        levels.append(Level("dropped", meter.correction(drop, rank), drop=drop))
        first = min(first, positions[drop.replaced])
    return Place(site.kind, site.label, site.block, tuple(levels), first, site.index, tuple(float(s) for s in scores))


def in_atoms(site: ChannelSite, multiple: int) -> int:
    """Of how many atoms the number that stays must be a multiple, so that no dimension has another number of channels.

    Kernels run at full speed only at round sizes; a head of 64 channels has one already.
    """
    channels = math.gcd(*(member.index.shape[1] for member in site.group.members))
    return multiple // math.gcd(multiple, channels)


def about_widths(program: Program, sites: Iterable[ChannelSite], multiple: int) -> list[str]:
    """A line for the report where convolutions may end up at widths that ONNX Runtime's fast kernels do not take."""
    images = any(len(program.weights[member.weight].shape) == 4 for site in sites for member in site.group.members)
    if multiple > 1 or not images:
        return []
    return ["convolutions of odd widths run slower in ONNX Runtime than wider ones: multiple=16 keeps round widths"]


def at_multiples(counts: Iterable[int], size: int, most: int, multiple: int) -> list[int]:
    """Numbers of atoms to remove after which a multiple stays, increasing; rounded up.

    Args:
        counts: numbers to remove, which may be rounded.
        size: how many atoms there are.
        most: how many may go.
        multiple: of what stays. A site that cannot get narrower and have a multiple gives no number.
    """
    least = -(-(size - most) // multiple) * multiple
    kept = {max(least, (size - count) // multiple * multiple) for count in counts if count}
    return sorted({size - each for each in kept if each < size})


def drop_places(
    program: Program, found: Structure, granularity: str, meter: Meter, rank: int = 0
) -> tuple[list[Place], dict[str, int]]:
    """Units of a stream as places with two levels, and why others cannot be dropped, with counts."""
    positions = {node: i for i, node in enumerate(program.graph.nodes)}
    homes = _blocks(found)
    places: list[Place] = []
    blocked: dict[str, int] = {}
    for unit in removable_units(found, granularity):
        if unit.blocked:
            blocked[unit.blocked] = blocked.get(unit.blocked, 0) + 1
            continue
        dropped = Level("dropped", meter.correction(unit, rank), drop=unit)
        levels = (Level("untouched", round(meter.drop([unit]))), dropped)
        block = unit.index if granularity == "block" else homes.get(unit.replaced)
        places.append(Place(f"drop-{granularity}", unit.label, block, levels, positions[unit.replaced], unit.index))
    return places, blocked


def outside_of_blocks(program: Program, found: Structure) -> tuple[str, ...]:
    """The operators with the largest weights outside of all branches, which dropping branches leaves."""
    branches = [branch for stream in found.streams for block in stream.blocks for branch in block.branches]
    inside = {node for branch in branches for node in branch.nodes}
    sizes: dict[fx.Node, int] = {}
    for weight in program.graph.find_nodes(op="get_attr"):
        held = program.weights.get(str(weight.target))
        if held is None or weight in inside:
            continue
        for user in weight.users:
            if user not in inside:
                sizes[user] = sizes.get(user, 0) + math.prod(held.shape)
    largest = sorted(sizes, key=lambda node: -sizes[node])[:_NAMED]
    return tuple(f"%{node.name}" for node in largest)


def branch_of(site: ChannelSite, found: Structure, granularity: str) -> Unit | None:
    """The droppable branch that holds all consumers of a site, if there is one."""
    units = [unit for unit in removable_units(found, granularity) if not unit.blocked]
    inside = {
        branch.add: {*branch.nodes, branch.output}
        for stream in found.streams
        for block in stream.blocks
        for branch in block.branches
    }
    for unit in units:
        nodes = inside.get(unit.replaced, set[fx.Node]())
        if site.consumers and all(consumer.node in nodes for consumer in site.consumers):
            return unit
    return None


def _blocks(found: Structure) -> dict[fx.Node, int]:
    numbered = enumerate(block for stream in found.streams for block in stream.blocks)
    return {branch.add: number for number, block in numbered for branch in block.branches}


def _dearer(level: Level, more: float) -> Level:
    return replace(level, cost=max(level.cost + round(more), 0))
