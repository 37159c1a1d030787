"""A folder from which other processes evaluate candidates: the program, the data, and what every level changes.

An executor with workers elsewhere (a pool of processes, a cluster) gets a `Remote` with every question, which holds no
more than the folder's path; a worker reads the folder once. Workers on other machines must see it under the same path.
The folder is for the workers of one search and is not a format: it holds pickled data and is not read by anything else.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import fx

from ...ir.axes import ChannelGroup
from ...ir.errors import GraphlatheError
from ...ir.program import Program
from ...ir.structure import structure
from ...ir.weights import Weight
from ..base import Batch
from .candidates import Candidates
from .levels import Level, Place, ZeroedSource
from .sites import ChannelSite
from .units import Unit

_PROGRAM, _PLACES, _WEIGHTS = "program", "places.pickle", "levels.safetensors"
_loaded: dict[str, Candidates] = {}
_one_at_a_time = threading.Lock()
"""Candidates share a cache: workers that are threads take turns."""


@dataclass(frozen=True)
class _Shipped:
    """A level without nodes.

    Attributes:
        label, cost, error: as in `Level`.
        drop: the names of the value that is replaced and of the one that replaces it.
        zero: weights with what is zero of them.
        stored: weights by their keys in the file of weights.
        cut: the group, and the atoms that go, where zeroing is not cutting.
    """

    label: str
    cost: float
    error: float | None
    drop: tuple[str, str] | None
    zero: dict[str, tuple[tuple[int, tuple[int, ...]], ...]]
    stored: dict[str, str]
    cut: tuple[ChannelGroup, tuple[int, ...]] | None


@dataclass(frozen=True)
class Remote:
    """``(state, batch) -> distance`` in any process that can read the folder."""

    folder: str

    def __call__(self, state: Sequence[int], batch: int) -> float:
        """The distance, see `Candidates`."""
        with _one_at_a_time:
            if self.folder not in _loaded:
                _loaded.clear()  # a worker serves one search at a time
                _loaded[self.folder] = _read(Path(self.folder))
            return _loaded[self.folder](state, batch)


def write_workspace(folder: Path, program: Program, places: Sequence[Place], batches: Sequence[Batch]) -> Remote:
    """Write everything that workers need.

    Args:
        folder: an empty or new folder.
        program: the program.
        places: places of this program.
        batches: named inputs.

    Raises:
        GraphlatheError: the program does not come back from its saved form node by node.
    """
    folder.mkdir(parents=True, exist_ok=True)
    program.save(folder / _PROGRAM)
    again = Program.load(folder / _PROGRAM)
    names = _same_nodes(program, again)
    position = {node.name: i for i, node in enumerate(again.graph.nodes)}
    # Where the nodes of the program as it is are in the one that workers read.
    moved = [position[names[node.name]] for node in program.graph.nodes] + [len(position)]
    weights: dict[str, torch.Tensor] = {}
    shipped: list[tuple[Place, list[_Shipped]]] = []
    for number, place in enumerate(places):
        levels = [_ship(program, level, f"{number}.{i}", names, weights) for i, level in enumerate(place.levels)]
        shipped.append((replace(place, levels=(), first=moved[place.first]), levels))
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / _WEIGHTS)
    for number, batch in enumerate(batches):
        save_file({k: v.contiguous() for k, v in batch.items()}, folder / f"batch{number}.safetensors")
    (folder / _PLACES).write_bytes(pickle.dumps((shipped, len(batches))))
    return Remote(str(folder.absolute()))


def _same_nodes(program: Program, again: Program) -> dict[str, str]:
    """From the names of nodes to those of the same program after it was saved and loaded.

    Inputs and operators stay in their order; weights come in that of their first use, and are told by their targets.
    """
    old, new = (sorted(p.graph.nodes, key=_order) for p in (program, again))
    if [_what(node) for node in old] != [_what(node) for node in new]:
        raise GraphlatheError(
            "the program's nodes are in another order after it was saved, so workers cannot take part",
            remedy="evaluate in this process (executor=None)",
        )
    return {a.name: b.name for a, b in zip(old, new, strict=True)}


def _order(node: fx.Node) -> tuple[bool, str]:
    return node.op != "placeholder", str(node.target) if node.op == "get_attr" else ""


def _what(node: fx.Node) -> tuple[str, str]:
    return node.op, "" if node.op == "placeholder" else str(node.target)


def _ship(
    program: Program,
    level: Level,
    key: str,
    names: dict[str, str],
    weights: dict[str, torch.Tensor],
) -> _Shipped:
    zero: dict[str, tuple[tuple[int, tuple[int, ...]], ...]] = {}
    stored: dict[str, str] = {}
    for name, weight in level.weights(program).items():
        if isinstance(weight.source, ZeroedSource) and not weight.steps:
            zero[name] = weight.source.index
        else:
            stored[name] = f"{key}.{name}"
            weights[stored[name]] = weight.tensor()
    drop = None if level.drop is None else (names[level.drop.replaced.name], names[level.drop.by.name])
    cut = None
    if level.site is not None and level.count and not level.site.group.zeroable:
        group = level.site.group
        cut = replace(group, places={(names[n], dim): label for (n, dim), label in group.places.items()}), level.removed
    return _Shipped(level.label, level.cost, level.error, drop, zero, stored, cut)


def _read(folder: Path) -> Candidates:
    program = Program.load(folder / _PROGRAM)
    nodes = {node.name: node for node in program.graph.nodes}
    stored = load_file(folder / _WEIGHTS)
    shipped, count = pickle.loads((folder / _PLACES).read_bytes())
    places = [
        replace(place, levels=tuple(_unpack(program, level, nodes, stored, place) for level in levels))
        for place, levels in shipped
    ]
    batches = [load_file(folder / f"batch{number}.safetensors") for number in range(count)]
    return Candidates(program, places, structure(program), batches)


def _unpack(
    program: Program, level: _Shipped, nodes: dict[str, fx.Node], stored: dict[str, torch.Tensor], place: Place
) -> Level:
    replaced = {name: Weight(ZeroedSource(program.weights[name], index)) for name, index in level.zero.items()} | {
        name: Weight.from_tensor(stored[key]) for name, key in level.stored.items()
    }
    drop = None
    if level.drop is not None:
        drop = Unit(place.index, 0, nodes[level.drop[0]], nodes[level.drop[1]], place.label)
    if level.cut is None:
        return Level(level.label, level.cost, level.error, drop=drop, replaced=replaced)
    group, removed = level.cut
    site = ChannelSite(place.index, group, place.kind, place.label, (), (), place.block, place.first)
    order = torch.tensor(removed, dtype=torch.int64).numpy()
    return Level(level.label, level.cost, level.error, site, order, len(removed), drop, replaced)
