"""The blocks that SHRP can rewrite: a self-attention, then a position-wise feed-forward layer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import fx

from ...ir.axes import find_groups
from ...ir.program import Program
from ...ir.structure import BlockSite, BranchSite, MlpSite, Structure
from ..base import Stats
from ..search.consumers import Consumer, other_readers
from ..search.sites import ChannelSite, channel_sites
from ..search.units import Unit, removable_units
from .positions import Steps, steps_between


@dataclass(frozen=True, eq=False)
class HeadBlock:
    """One block.

    Attributes:
        index: its number, counted over all streams.
        block: the block.
        heads: its attention's heads.
        output: the attention's output projection.
        attention, mlp: its branches as units that can be taken out of the stream's sums.
        branch: the feed-forward branch.
        layer: the feed-forward layer.
        hidden: the layer's hidden channels; None where they cannot be cut.
        to_sum, to_mlp: how positions are rearranged from the heads' outputs to the sum that takes the attention, and
            to the feed-forward branch's output.
        in_layer: the same from the feed-forward layer's hidden units to the sum that takes it.
    """

    index: int
    block: BlockSite
    heads: ChannelSite
    output: Consumer
    attention: Unit
    mlp: Unit
    branch: BranchSite
    layer: MlpSite
    hidden: ChannelSite | None
    to_sum: Steps
    to_mlp: Steps
    in_layer: Steps


@dataclass(frozen=True)
class Sites:
    """What can be cut in the blocks of a program.

    Attributes:
        heads: of attentions whose output projections can be read.
        hidden: hidden channels of feed-forward layers.
        reasons: why the heads of other attentions cannot be cut, with counts.
    """

    heads: tuple[ChannelSite, ...]
    hidden: tuple[ChannelSite, ...]
    reasons: dict[str, int]


def find_sites(program: Program, found: Structure) -> Sites:
    """What can be cut, and why not the rest.

    Args:
        program: the program.
        found: its structure.
    """
    sites, _ = channel_sites(program, found, ("heads", "mlp"))
    heads = [site for site in sites if site.kind == "heads"]
    good = tuple(site for site in heads if site.consumers and not site.unread)
    readers = {c.node for site in good for c in site.consumers}
    reasons: dict[str, int] = {}
    left = [a for a in found.attention if a.output is None or a.output.node not in readers]
    groups = find_groups(program) if left else []
    for attention in left:
        reason = "no output projection was found"
        if attention.kv_heads == 1:
            reason = "it has one head, or one that all query heads share"
        elif attention.output is not None:
            name = str(attention.output.weight.target)
            own = [g for g in groups if g.reason and any(m.weight == name for m in g.members)]
            unread = [
                site.unread[0] for site in heads if site.unread and name in {m.weight for m in site.group.members}
            ]
            reason = next((g.reason for g in own), "no group of heads was found") if not unread else unread[0]
        reasons[reason] = reasons.get(reason, 0) + 1
    return Sites(good, tuple(site for site in sites if site.kind == "mlp"), reasons)


def head_blocks(
    program: Program, found: Structure, sites: Sites, stats: Stats, chosen: Collection[int] | None
) -> list[HeadBlock]:
    """The blocks that fit the form; the others are counted as misses.

    Args:
        program: the program.
        found: its structure.
        sites: what can be cut in it.
        stats: where attempts and misses are counted.
        chosen: numbers of the blocks to look at; None for all.
    """
    attentions = {unit.replaced: unit for unit in removable_units(found, "attention")}
    mlps = {unit.replaced: unit for unit in removable_units(found, "mlp")}
    result: list[HeadBlock] = []
    blocks = [block for stream in found.streams for block in stream.blocks]
    for index, block in enumerate(blocks):
        if chosen is not None and index not in chosen:
            continue
        stats.attempts += 1
        read = _read(program, found, index, block, sites, attentions, mlps)
        if isinstance(read, str):
            stats.miss(read, block.end)
        else:
            result.append(read)
    return result


def _read(
    program: Program,
    found: Structure,
    index: int,
    block: BlockSite,
    sites: Sites,
    attentions: dict[fx.Node, Unit],
    mlps: dict[fx.Node, Unit],
) -> HeadBlock | str:
    """A block in the form that is needed, or why it has another one."""
    kinds = [branch.kind for branch in block.branches]
    if kinds != ["attention", "mlp"]:
        return f"its branches are {', '.join(kinds) or 'none'}, not attention and then mlp"
    first, second = block.branches
    if first.add is second.add:
        return "attention and mlp are side by side"
    if first.cross:
        return "its attention reads another stack"
    inside = {*first.nodes, first.output}
    own = [s for s in sites.heads if any(c.node in inside for c in s.consumers)]
    if len(own) != 1 or len(own[0].consumers) != 1:
        return "its heads are cut together with those of other blocks" if own else "its heads cannot be cut"
    output = own[0].consumers[0]
    layer = next((m for m in found.mlps if m.output is second.output and m.down is not None), None)
    if layer is None or layer.experts is not None or not layer.up:
        return "its feed-forward layer is no plain one"
    attention, mlp = attentions[first.add], mlps[second.add]
    if attention.blocked or mlp.blocked:
        return attention.blocked or mlp.blocked
    to_sum, to_mlp = (steps_between(output.node, end) for end in (attention.replaced, second.output))
    in_layer = steps_between(layer.up[0].node, mlp.replaced)
    if to_sum is None or to_mlp is None or in_layer is None:
        return "positions are mixed between its heads and its feed-forward layer"
    if bool((output.labels < 0).any()):
        return "its output projection reads more than its heads"
    if other_readers(program, output):
        return "its output projection is shared with another operator"
    down = layer.down.node if layer.down is not None else None
    units = next((h for h in sites.hidden if [c.node for c in h.consumers] == [down]), None)
    return HeadBlock(index, block, own[0], output, attention, mlp, second, layer, units, to_sum, to_mlp, in_layer)
