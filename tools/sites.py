"""A program as nested parts, for printing: the streams' blocks with their branches, and honestly everything else.

Every operator belongs to exactly one leaf: what a reader adds up is the whole program. A weight belongs to the part
that reads it first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import fx

from ..ir.program import ORIGIN, Program

if TYPE_CHECKING:
    from ..ir.structure import BlockSite, Stream, Structure


@dataclass
class Part:
    """A named set of operators.

    Attributes:
        label: what it is (``block``, ``attention``, ``before the stream``).
        kind: for colors and clusters: ``block``, ``attention``, ``mlp``, ``stream``, ``rest``...
        own: operators that are in none of the children.
        children: parts inside it.
        signature: equal for parts that are the same up to names and weights' values; empty if never.
        note: why it was recognised, or what is known of it; may be empty.
        times: how many equal parts this one stands for; then `copies` holds the others.
        copies: the parts that were collapsed into this one.
    """

    label: str
    kind: str
    own: list[fx.Node] = field(default_factory=list)
    children: list[Part] = field(default_factory=list)
    signature: str = ""
    copies: list[Part] = field(default_factory=list)
    note: str = ""

    @property
    def times(self) -> int:
        """How many equal parts this one stands for."""
        return 1 + len(self.copies)

    def nodes(self) -> Iterator[fx.Node]:
        """All operators in it and its children (of one copy)."""
        yield from self.own
        for child in self.children:
            yield from child.all_nodes()

    def all_nodes(self) -> Iterator[fx.Node]:
        """All operators in it, its children and its copies."""
        yield from self.nodes()
        for copy in self.copies:
            yield from copy.all_nodes()


def is_operator(node: fx.Node) -> bool:
    """Whether a node computes something (it is no input, weight or output)."""
    return node.op == "call_function"


def find_parts(program: Program, entry: str = "main", found: Structure | None = None) -> list[Part]:
    """An entry's parts in execution order, nothing collapsed. Without a residual stream: by module.

    Args:
        program: the program.
        entry: which of its entries.
        found: that entry's structure, if it is known.
    """
    from ..ir.structure import structure

    streams = (found if found is not None else structure(program, entry)).streams
    graph = program.entries[entry].graph
    return _stream_parts(graph, streams) if streams else module_parts(graph.nodes)


def _stream_parts(graph: fx.Graph, streams: Sequence[Stream]) -> list[Part]:
    """The streams' own operators go to their branch or block; the others by the last stream value they depend on."""
    place, parts, regions = _skeleton(streams)
    points = {point: (k, i) for k, stream in enumerate(streams) for i, point in enumerate(stream.points)}
    leads_to = _ancestors([stream.points[0] for stream in streams])
    beside = Part("beside the stream" if len(streams) == 1 else "beside the streams", "rest")
    nowhere = (-1, -1)
    reach: dict[fx.Node, tuple[int, int]] = {}
    for node in graph.nodes:
        before = max((reach[a] for a in node.all_input_nodes), default=nowhere)
        reach[node] = points.get(node, before)
        if not is_operator(node):
            continue
        if node in place:
            part = place[node]
        elif (node in points and points[node][1] == 0) or (before == nowhere and node in leads_to):
            part = parts[points.get(node, (leads_to.get(node, 0), 0))[0]].children[0]
        else:
            part = beside if before == nowhere else regions[before]
        part.own.append(node)
    shown = parts[0].children if len(streams) == 1 else parts
    return _without_empty([*shown, beside])


def _skeleton(
    streams: Sequence[Stream],
) -> tuple[dict[fx.Node, Part], list[Part], dict[tuple[int, int], Part]]:
    """The parts without their leftovers, the part of each operator of a site, and that after each stream point."""
    place: dict[fx.Node, Part] = {}
    parts: list[Part] = []
    regions: dict[tuple[int, int], Part] = {}
    for number, stream in enumerate(streams):
        first, last = Part("before the stream", "rest"), Part("after the stream", "rest")
        place.update((node, first) for branch in stream.stem for node in branch.nodes)
        sites = [_block(block, place) for block in stream.blocks]
        label = "stream" if len(streams) == 1 else f"stream {number}"
        parts.append(Part(label, "stream", children=[first, *sites, last]))
        position = {point: i for i, point in enumerate(stream.points)}
        begin = position[stream.blocks[0].start] if stream.blocks else 0
        regions.update({(number, i): first if i < begin else last for i in range(len(stream.points))})
        for block, site in zip(stream.blocks, sites, strict=True):
            regions.update({(number, i): site for i in range(position[block.start], position[block.end])})
    return place, parts, regions


def _block(block: BlockSite, place: dict[fx.Node, Part]) -> Part:
    blocked = "" if block.droppable else f"cannot be dropped: {block.reason}"
    site = Part("block", "block", signature=block.shape_class, note=blocked)
    for branch in block.branches:
        leaf = Part(f"cross-{branch.kind}" if branch.cross else branch.kind, branch.kind, note=branch.why)
        site.children.append(leaf)
        for node in branch.nodes:
            place.setdefault(node, leaf)
    for node in block.nodes:
        place.setdefault(node, site)
    return site


def _ancestors(targets: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """Everything that a target is computed from, with the number of the first such target."""
    found: dict[fx.Node, int] = {}
    for number, target in enumerate(targets):
        stack = [target]
        while stack:
            node = stack.pop()
            if node not in found:
                found[node] = number
                stack.extend(node.all_input_nodes)
    return found


def _without_empty(parts: Iterable[Part]) -> list[Part]:
    kept: list[Part] = []
    for part in parts:
        part.children = _without_empty(part.children)
        if part.own or part.children:
            kept.append(part)
    return kept


def origin_tokens(origin: str) -> list[str]:
    """A module path or ONNX node name as its components."""
    return [token for token in re.split(r"[./]", origin) if token]


def module_parts(nodes: Iterable[fx.Node], depth: int = 3) -> list[Part]:
    """Operators by module path, ``depth`` levels deep; for programs without a residual stream."""
    root = Part("program", "rest")
    index: dict[tuple[str, ...], Part] = {(): root}
    for node in filter(is_operator, nodes):
        path: tuple[str, ...] = ()
        for token in origin_tokens(str(node.meta.get(ORIGIN) or ""))[:depth]:
            parent, path = index[path], (*path, token)
            if path not in index:
                index[path] = Part(token, "module")
                parent.children.append(index[path])
        index[path].own.append(node)
    for part in index.values():
        part.signature = _signature(part)
    top = root.children
    if root.own:
        top.append(Part("without a module", "rest", own=root.own))
    return top


def _signature(part: Part) -> str:
    def one(node: fx.Node) -> str:
        return f"{node.target}{getattr(node.meta.get('val'), 'shape', '')}"

    return ";".join(one(node) for node in part.nodes())


def collapse(parts: Sequence[Part], longest: int = 8) -> list[Part]:
    """Replace runs of equal parts, or of equal groups of up to ``longest`` parts, by one that stands for all."""
    result: list[Part] = []
    position = 0
    while position < len(parts):
        period, repeats = _best_run(parts, position, longest)
        if repeats < 2:
            part = parts[position]
            part.children = collapse(part.children)
            result.append(part)
            position += 1
            continue
        groups = [_group(parts[position + i * period : position + (i + 1) * period]) for i in range(repeats)]
        head = groups[0]
        head.copies = groups[1:]
        head.children = collapse(head.children) if period == 1 else head.children
        result.append(head)
        position += period * repeats
    return result


def _best_run(parts: Sequence[Part], start: int, longest: int) -> tuple[int, int]:
    """The period and number of repetitions that cover most parts from ``start``; the shortest period among equals."""
    best = (1, 1)
    for period in range(1, longest + 1):
        if start + 2 * period > len(parts) or not all(p.signature for p in parts[start : start + period]):
            break
        repeats = 1
        while _equal(parts, start, start + repeats * period, period):
            repeats += 1
        if repeats > 1 and repeats * period > best[0] * best[1]:
            best = (period, repeats)
    return best


def _equal(parts: Sequence[Part], first: int, second: int, length: int) -> bool:
    if second + length > len(parts):
        return False
    return all(parts[first + i].signature == parts[second + i].signature for i in range(length))


def _group(parts: Sequence[Part]) -> Part:
    return parts[0] if len(parts) == 1 else Part("group", "group", children=list(parts))


def common_origin(nodes: Iterable[fx.Node]) -> str:
    """The longest module path that all operators of a part share."""
    return shared_origin(str(node.meta.get(ORIGIN) or "") for node in nodes)


def shared_origin(origins: Iterable[str]) -> str:
    """The longest path that all of them share; unknown ones (empty) do not count."""
    shared: list[str] | None = None
    for origin in origins:
        if not origin:
            continue
        tokens = origin_tokens(origin)
        if shared is None:
            shared = tokens
            continue
        same = 0
        while same < min(len(shared), len(tokens)) and shared[same] == tokens[same]:
            same += 1
        shared = shared[:same]
    return ".".join(shared or [])


def join_origins(origins: Sequence[str]) -> str:
    """Several module paths that differ in one number as one: ``model.layers.{0-3,5}``; else the first and the last."""
    if len(set(origins)) == 1:
        return origins[0]
    split = [origin_tokens(origin) for origin in origins]
    if len({len(tokens) for tokens in split}) == 1:
        differ = [i for i in range(len(split[0])) if len({tokens[i] for tokens in split}) > 1]
        if len(differ) == 1 and all(tokens[differ[0]].isdigit() for tokens in split):
            numbers = _ranges([int(tokens[differ[0]]) for tokens in split])
            braces = numbers if numbers.isdigit() or re.fullmatch(r"\d+-\d+", numbers) else "{" + numbers + "}"
            return ".".join(braces if i == differ[0] else token for i, token in enumerate(split[0]))
    return f"{origins[0]} ... {origins[-1]}"


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
