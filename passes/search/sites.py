"""Where channels can be cut: coupled groups with what they are in the model, and who reads them.

A *site* is one group of channels (`ir.axes`) with a kind: the hidden width of one MLP, the heads of one attention, a
residual stream. Its *atoms* are what can be removed one by one. Nothing here reads a name: the kind follows from the
group's unit and from the operators that read its channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torch import fx

from ...ir.axes import KERNEL, ChannelGroup, find_groups
from ...ir.program import Program
from ...ir.structure import Structure
from .consumers import Consumer, read_consumers

KINDS: dict[str, str] = {
    "mlp": "hidden channels of one MLP",
    "heads": "heads of one attention; a key and value head goes with all query heads that share it",
    "query-heads": "the j-th query head of every key and value head of one attention",
    "value-channels": "channels of the value heads of one attention",
    "qk-channels": "channels (rotary pairs) of query and key heads",
    "stream": "channels of a residual stream",
    "channels": "channels between other layers: convolutions, pooling heads",
    "groups": "whole groups of grouped convolutions or normalizations",
}
"""What a site may be."""

_UNITS = {
    "head": "heads",
    "KV group": "heads",
    "query head of every KV group": "query-heads",
    "value channel": "value-channels",
    "query and key channel": "qk-channels",
    "convolution group": "groups",
    "normalization group": "groups",
}


@dataclass(frozen=True, eq=False)
class ChannelSite:
    """One group of channels that may be cut.

    Attributes:
        index: its number among all sites of the program whose channels can be cut, in graph order.
        group: the channels.
        kind: one of `KINDS`.
        label: what it is, for reports: ``mlp of block 3``.
        consumers: the linear maps and convolutions that sum over the channels.
        unread: why other readers cannot be looked into; scores and compensation that need all readers refuse then.
        block: the number of the block it lies in, counted over all streams; None outside.
        first: position in the graph of the first operator that a cut changes.
    """

    index: int
    group: ChannelGroup
    kind: str
    label: str
    consumers: tuple[Consumer, ...]
    unread: tuple[str, ...]
    block: int | None
    first: int

    @property
    def size(self) -> int:
        """How many atoms there are."""
        return self.group.size

    def __str__(self) -> str:
        return f"{self.label}: {self.size} x {self.group.unit}"


def channel_sites(
    program: Program, found: Structure, kinds: Collection[str], entry: str = "main"
) -> tuple[list[ChannelSite], dict[str, int]]:
    """The sites of some kinds, in graph order, and what was left out.

    Args:
        program: a program; it is not changed.
        found: its structure.
        kinds: names out of `KINDS`.
        entry: the entry to look at.

    Returns:
        The sites whose channels can be cut, and for those whose cannot the reasons with their counts: those that hold
        the most weights first.
    """
    graph = program.entries[entry].graph
    position = {node: i for i, node in enumerate(graph.nodes)}
    names = {node.name: node for node in graph.nodes}
    home = _Home(found)
    blocked = Counter[str]()
    held = Counter[str]()
    drafts: list[tuple[int, str, ChannelGroup, tuple[Consumer, ...], tuple[str, ...]]] = []
    for group in find_groups(program, entry):
        if not group.prunable:
            if KERNEL not in group.reason:
                blocked[group.reason] += 1
                held[group.reason] += sum(program.weights[member.weight].numel for member in group.members)
            continue
        consumers, unread = read_consumers(program, group)
        kind = _kind(group, consumers, home)
        touched = [names[name] for name, _ in group.places if names[name].op == "call_function"]
        first = min((position[node] for node in touched), default=len(position))
        drafts.append((first, kind, group, consumers, unread))
    drafts.sort(key=lambda draft: (draft[0], str(draft[2])))
    sites: list[ChannelSite] = []
    for index, (first, kind, group, consumers, unread) in enumerate(drafts):
        if kind not in kinds:
            continue
        block = home.block_of(c.node for c in consumers)
        sites.append(ChannelSite(index, group, kind, _label(kind, index, block), consumers, unread, block, first))
    return sites, {reason: blocked[reason] for reason, _ in held.most_common()}


class _Home:
    """Which block an operator lies in, and what is an MLP or a stream."""

    def __init__(self, found: Structure) -> None:
        self.blocks: dict[fx.Node, int] = {}
        for number, block in enumerate(b for stream in found.streams for b in stream.blocks):
            for node in block.nodes:
                self.blocks.setdefault(node, number)
            for branch in block.branches:
                for node in branch.nodes:
                    self.blocks.setdefault(node, number)
        self.downs = {site.down.node for site in found.mlps if site.down is not None}
        self.downs |= {site.experts.down for site in found.mlps if site.experts is not None}
        self.points = {point.name for stream in found.streams for point in stream.points}

    def block_of(self, nodes: Iterable[fx.Node]) -> int | None:
        """The one block that all of these operators lie in."""
        found = {self.blocks.get(node) for node in nodes}
        return found.pop() if len(found) == 1 else None


def _kind(group: ChannelGroup, consumers: Sequence[Consumer], home: _Home) -> str:
    if group.unit in _UNITS:
        return _UNITS[group.unit]
    if any(name in home.points for name, _ in group.places):
        return "stream"
    if consumers and all(c.node in home.downs for c in consumers):
        return "mlp"
    return "channels"


def _label(kind: str, index: int, block: int | None) -> str:
    return f"{kind} {index}" if block is None else f"{kind} of block {block}"
