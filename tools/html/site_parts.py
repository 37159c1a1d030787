"""The sites of an entry as nested parts, and what each operator is in its site.

`..sites.find_parts` gives streams, blocks and branches. Here embeddings and heads are told from what is around a
stream, blocks of one resolution become stages, and attention and MLP parts say what was found in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from torch import fx

from ...ir.flow import tensor_of
from ...ir.layer_sites import ConvStage
from ...ir.program import Program
from ...ir.structure import Structure
from ..sites import Part, find_parts, is_operator, module_parts


def site_parts(program: Program, name: str, found: Structure) -> list[Part]:
    """An entry's parts in execution order, nothing collapsed; every operator is in exactly one.

    Args:
        program: the program.
        name: which of its entries.
        found: that entry's structure.
    """
    parts = find_parts(program, name, found)
    if found.streams:
        parts = _by_resolution(parts, found.stages)
    elif len(found.stages) > 1:
        parts = _stage_parts(program.entries[name].graph, found.stages)
    kinds = {site.node: "embedding" for site in found.embeddings} | {s.projection.node: "head" for s in found.heads}
    notes = {site.node: str(site) for site in found.embeddings} | {s.projection.node: str(s) for s in found.heads}
    sites = {site.node: str(site) for site in found.attention} | {site.output: str(site) for site in found.mlps}
    sites |= {missing.node: str(missing) for missing in found.missing}
    for part in _all(parts):
        if part.kind in ("attention", "mlp"):
            part.note = "; ".join(dict.fromkeys(sites[n] for n in part.nodes() if n in sites)) or part.note
    return _split(map(_joined, parts), kinds, notes)


def roles(found: Structure) -> dict[fx.Node, str]:
    """What operators are in their sites: ``query``, ``gate``, ``router``; several for one that is fused."""
    named: dict[fx.Node, list[str]] = {}
    for site in found.attention:
        for name in ("query", "key", "value", "output"):
            if (projection := getattr(site, name)) is not None:
                named.setdefault(projection.node, []).append(name)
    for mlp in found.mlps:
        for projection, name in zip(mlp.up, ("gate", "up") if mlp.gated and len(mlp.up) > 1 else ("up",), strict=False):
            named.setdefault(projection.node, []).append(name)
        if mlp.down is not None:
            named.setdefault(mlp.down.node, []).append("down")
        if mlp.experts is not None:
            named |= {node: ["experts"] for node in (*mlp.experts.gate_up, mlp.experts.down)}
            if mlp.experts.router is not None:
                named[mlp.experts.router.node] = ["router"]
    for site in found.embeddings:
        named.setdefault(site.node, []).append("input embedding" if site.tokens else "position embedding")
    for head in found.heads:
        named.setdefault(head.projection.node, []).append("head")
    return {node: ", ".join(dict.fromkeys(names)) for node, names in named.items()}


def _joined(part: Part) -> Part:
    """A module that holds nothing but another one is shown as one with it: ``stem.0``."""
    part.children = [_joined(child) for child in part.children]
    if part.kind == "module" and len(part.children) == 1 and not part.own:
        inner = part.children[0]
        inner.label = f"{part.label}.{inner.label}"
        return inner
    return part


def _all(parts: Iterable[Part]) -> Iterable[Part]:
    for part in parts:
        yield part
        yield from _all(part.children)


def _split(parts: Iterable[Part], kinds: Mapping[fx.Node, str], notes: Mapping[fx.Node, str]) -> list[Part]:
    """Embeddings and heads as parts of their own, out of the leftovers that they stand in."""
    found: list[Part] = []
    for part in parts:
        part.children = _split(part.children, kinds, notes)
        own = {kind: [n for n in part.own if kinds.get(n, "") == kind] for kind in ("embedding", "", "head")}
        if part.kind != "rest" or len(own[""]) == len(part.own):
            found.append(part)
            continue
        for kind, nodes in own.items():
            if kind and nodes:
                found.append(Part(kind, kind, own=nodes, note="; ".join(notes[node] for node in nodes)))
            elif nodes or (not kind and part.children):
                part.own = nodes
                found.append(part)
    return found


def _by_resolution(parts: Sequence[Part], stages: Sequence[ConvStage]) -> list[Part]:
    """Blocks whose last convolutions are of one stage as one part, where there are several stages of blocks."""
    number = {node: i for i, stage in enumerate(stages) for node in stage.convolutions}

    def stage_of(part: Part) -> int:
        if part.kind != "block":
            return -1
        return max((number[node] for node in part.all_nodes() if node in number), default=-1)

    if len({stage_of(part) for part in parts} - {-1}) < 2:
        return list(parts)
    found: list[Part] = []
    for index, run in groupby(parts, stage_of):
        members = list(run)
        found += members if index < 0 else [_stage(stages[index], members)]
    return found


def _stage(stage: ConvStage, members: list[Part]) -> Part:
    size = "x".join(map(str, stage.resolution))
    at = f" at {size}" if all(isinstance(extent, int) for extent in stage.resolution) else ""
    return Part(f"stage{at}, {stage.channels} channels", "stage", children=members, note=str(stage))


def _stage_parts(graph: fx.Graph, stages: Sequence[ConvStage]) -> list[Part]:
    """A network of convolutions without a stream: what is before, in and after each stage, inside by module."""
    number = {node: i for i, stage in enumerate(stages) for node in stage.convolutions}
    last = len(stages) - 1
    size = tuple(map(str, stages[last].resolution))
    reach: dict[fx.Node, int] = {}
    members: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        place = number.get(node, max((reach[a] for a in node.all_input_nodes), default=-1))
        value = tensor_of(node)
        if place == last and (value is None or tuple(map(str, value.shape[2:])) != size):
            place += 1
        reach[node] = place
        if is_operator(node):
            members.setdefault(place, []).append(node)
    found: list[Part] = []
    for place in sorted(members):
        if 0 <= place <= last:
            inside = module_parts(members[place])
            while len(inside) == 1 and not inside[0].own:
                inside = inside[0].children
            found.append(_stage(stages[place], inside))
        else:
            where = "before" if place < 0 else "after"
            found.append(Part(f"{where} the stages", "rest", own=members[place]))
    return found
