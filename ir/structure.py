"""Structure without names: residual streams, their blocks, and the branches of each.

A program imported from ONNX has no module names, so nothing here reads one. The steps, each linear in the graph:

1. `ir.flow`: which values depend on the inputs' contents, ancestry, dominators.
2. `ir.residual`: residual units (an addition one operand of which is an ancestor of others). `ir.chains`: the chains
   that they form along immediate dominators. Everything that enters from outside (another stack's output, masks,
   positions) is free, so each stack of an encoder-decoder, or tower of a multimodal model, is a chain of its own.
3. `ir.sequential`: in convolutional networks, the blocks between them that have no addition.
4. `ir.branches`: what each branch is.
5. `ir.blocks`: which units make a block.
6. `ir.isomorphism`: which blocks are equal up to weights' values.

Figure: a pre-norm decoder layer. The stream goes down on the left; its values are the stream's points.

    p0 ──┬─ norm, attention ─ + = p1      one block of two units: start p0, end p2,
         └────────────────────┘           branches attention (p0 to p1) and mlp (p1 to p2)
    p1 ──┬─ norm, mlp ─────── + = p2
         └────────────────────┘
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import fx

from .attention_sites import AttentionSite, Missing, find_attention
from .blocks import Labelled, group, letter_of, settle_tails
from .branches import Verdict, classify
from .chains import find_chains
from .dims import Dims
from .errors import GraphlatheError, suggest
from .flow import Flow, tensor_of
from .index_functions import IndexFunctions
from .isomorphism import Hasher
from .layer_sites import (
    ConvStage,
    EmbeddingSite,
    HeadSite,
    find_embeddings,
    find_heads,
    find_linear,
    find_stages,
)
from .mlp_sites import MlpSite, find_inner_mlps, find_mlp
from .program import Program, check_program
from .projections import Projection
from .residual import Candidate, Unit, find_units
from .sequential import join


@dataclass(frozen=True, eq=False)
class BranchSite:
    """One residual branch: ``end = start + branch(start)``, up to a post-norm.

    Attributes:
        kind: attention, mlp, conv, mixer or other.
        start: the stream value that it reads.
        end: the stream value after it was added (after the post-norm, if there is one).
        add: the addition that takes it.
        output: its result, an operand of ``add``.
        nodes: its operators in graph order, with those that only prepare weights or constants for it. What two
            branches share belongs to the first.
        why: the operators that decided the kind.
        cross: whether it attends to another stack.
    """

    kind: str
    start: fx.Node
    end: fx.Node
    add: fx.Node
    output: fx.Node
    nodes: tuple[fx.Node, ...]
    why: str = ""
    cross: bool = False

    def __str__(self) -> str:
        cross = " (reads another stack)" if self.cross else ""
        return f"{self.kind}{cross} %{self.start.name} -> %{self.end.name}, added by %{self.add.name}: {self.why}"


@dataclass(frozen=True, eq=False)
class BlockSite:
    """One block (layer) of a stream.

    Attributes:
        index: its number in the stream.
        start, end: the stream's values before and after it.
        branches: its residual branches, in order; none for a sequential block.
        shape_class: equal for blocks that are the same up to weights' values.
        droppable: whether ``start`` may take the place of ``end``.
        reason: why it may not; empty if it may.
        nodes: its values in graph order.
    """

    index: int
    start: fx.Node
    end: fx.Node
    branches: tuple[BranchSite, ...]
    shape_class: str
    droppable: bool
    reason: str = ""
    nodes: tuple[fx.Node, ...] = ()

    def __str__(self) -> str:
        kinds = ", ".join(branch.kind for branch in self.branches) or "no residual branch"
        blocked = "" if self.droppable else f"; cannot be dropped: {self.reason}"
        return f"block {self.index} [{kinds}] %{self.start.name} -> %{self.end.name}, class {self.shape_class}{blocked}"


@dataclass(frozen=True, eq=False)
class Stream:
    """One residual stream: a stack of blocks over values of one type.

    Attributes:
        points: the stream's values in order: before the first unit, and after each.
        blocks: its blocks.
        stem: branches before the first block that are no block (a convolution that encodes positions).
    """

    points: tuple[fx.Node, ...]
    blocks: tuple[BlockSite, ...]
    stem: tuple[BranchSite, ...] = ()

    def __str__(self) -> str:
        classes = {block.shape_class for block in self.blocks}
        return f"stream of {len(self.blocks)} blocks in {len(classes)} classes, {len(self.points)} points"


@dataclass(frozen=True)
class Structure:
    """What was found in a graph.

    Attributes:
        streams: the residual streams; one that another starts from comes before it, else in the order of the inputs
            that they read.
        candidates: additions that looked residual but are no part of a stream, with the reason.
        attention: attention operators with their heads and projections, in graph order.
        mlps: the position-wise branches, read as MLPs.
        embeddings, heads, linears, stages: tables that are looked up, maps to outputs, all linear maps of activations,
            and runs of convolutions at one resolution.
        missing: what looks like attention or an MLP but was not recognised, and why.
    """

    streams: tuple[Stream, ...]
    candidates: tuple[Candidate, ...] = ()
    attention: tuple[AttentionSite, ...] = ()
    mlps: tuple[MlpSite, ...] = ()
    embeddings: tuple[EmbeddingSite, ...] = ()
    heads: tuple[HeadSite, ...] = ()
    linears: tuple[Projection, ...] = ()
    stages: tuple[ConvStage, ...] = ()
    missing: tuple[Missing, ...] = ()
    dims: Dims = field(default_factory=Dims, repr=False)

    def sites_in(self, nodes: Iterable[fx.Node]) -> list[AttentionSite | MlpSite]:
        """The attention and MLP sites whose operator (or result) is among these nodes."""
        inside = set(nodes)
        found: list[AttentionSite | MlpSite] = [a for a in self.attention if a.node in inside]
        return found + [m for m in self.mlps if m.output in inside]

    def lines(self) -> Iterator[str]:
        """The tree, line by line."""
        if not self.streams:
            yield "no residual stream"
        for number, stream in enumerate(self.streams):
            value = tensor_of(stream.points[0])
            shape = ", ".join(self.dims.format(s) for s in value.shape) if value is not None else ""
            yield f"stream {number} [{shape}]: {stream}"
            yield from (f"  stem {branch}" for branch in stream.stem)
            for block in stream.blocks:
                yield f"  {block}"
                for branch in block.branches:
                    yield f"    {branch}"
                    yield from (f"      {site}" for site in self.sites_in((*branch.nodes, branch.output)))
        yield from map(str, self.embeddings)
        yield from map(str, self.heads)
        yield from map(str, self.stages)
        if self.missing:
            yield f"not recognised: {len(self.missing)}"
            yield from (f"  {missing}" for missing in self.missing)
        if self.candidates:
            yield f"not part of a stream: {len(self.candidates)}"
            yield from (f"  {candidate}" for candidate in self.candidates)

    def __str__(self) -> str:
        return "\n".join(self.lines())


def structure(program: Program, entry: str = "main") -> Structure:
    """Find the residual streams, blocks and branches of a graph.

    Args:
        program: the program; it is not changed.
        entry: which of its entries.

    Raises:
        GraphlatheError: there is no such entry, or it is no program.
    """
    check_program(program)
    if entry not in program.entries:
        known = list(program.entries)
        raise GraphlatheError(f"no entry '{entry}'{suggest(entry, known)}", expected=f"one of: {', '.join(known)}")
    flow = Flow(program.entries[entry])
    units, rejected = find_units(flow)
    chains = [c.units for c in join(flow, find_chains(units, flow))]
    labelled = [[_label(flow, unit) for unit in chain] for chain in chains]
    stacks, heads = _without_heads(labelled)
    dims = program.entries[entry].dims
    hasher = Hasher(flow.entry.placeholders, dims, program.subgraphs)
    streams = _in_order(flow, [_stream(flow, hasher, stack) for stack in stacks])
    inside = {node for stream in streams for block in stream.blocks for node in block.nodes}
    inside |= {node for stream in streams for branch in stream.stem for node in branch.nodes}
    candidates = [c for c in rejected if c.node not in inside] + heads
    branches = [
        b for stream in streams for b in (*stream.stem, *(b for block in stream.blocks for b in block.branches))
    ]
    crossing = [node for branch in branches if branch.cross for node in branch.nodes]
    found: list[AttentionSite | MlpSite | Missing] = []
    found += find_attention(flow, IndexFunctions(program), crossing)
    for branch in branches:
        if branch.kind == "mlp":
            found += find_mlp(flow, branch.start, branch.output, branch.nodes)
    known = {s.down.node for s in found if isinstance(s, MlpSite) and s.down is not None}
    found += find_inner_mlps(flow, known)
    embeddings = tuple(find_embeddings(flow))
    return Structure(
        streams=tuple(streams),
        candidates=tuple(sorted(candidates, key=lambda c: flow.position[c.node])),
        attention=tuple(s for s in found if isinstance(s, AttentionSite)),
        mlps=tuple(s for s in found if isinstance(s, MlpSite)),
        embeddings=embeddings,
        heads=tuple(find_heads(flow, embeddings)),
        linears=tuple(find_linear(flow)),
        stages=tuple(find_stages(flow)),
        missing=tuple(s for s in found if isinstance(s, Missing)),
        dims=dims,
    )


def _label(flow: Flow, unit: Unit) -> Labelled:
    verdicts = [
        classify(flow, unit.start, nodes) if unit.kind != "sequential" else Verdict("conv", "") for nodes in unit.nodes
    ]
    if unit.kind == "identity":
        verdicts = _merge(flow, unit, verdicts)
    if unit.kind == "projection":
        return Labelled(unit, tuple(verdicts), "a" if any(v.kind == "attention" for v in verdicts) else "c")
    return Labelled(unit, tuple(verdicts), letter_of(verdicts))


def _merge(flow: Flow, unit: Unit, verdicts: list[Verdict]) -> list[Verdict]:
    """Take branches of one kind that are added to each other before the stream for one (shared and routed experts)."""
    while True:
        places = [i for i, (add, _) in enumerate(unit.leaves) if add is not unit.end]
        pairs = [(i, j) for i in places for j in places if i < j and unit.leaves[i][0] is unit.leaves[j][0]]
        same = next(((i, j) for i, j in pairs if verdicts[i].kind == verdicts[j].kind), None)
        if same is None:
            return verdicts
        i, j = same
        inner = unit.leaves[i][0]
        add, output = flow.addition_of(inner)
        nodes = sorted({*unit.nodes[i], *unit.nodes[j], inner, output}, key=flow.position.__getitem__)
        why = f"{verdicts[i].why}, plus {verdicts[j].why}"
        merged = Verdict(verdicts[i].kind, why, verdicts[i].cross and verdicts[j].cross)
        unit.leaves[i], unit.nodes[i], verdicts[i] = (add, output), nodes, merged
        del unit.leaves[j], unit.nodes[j], verdicts[j]


def _without_heads(chains: Sequence[list[Labelled]]) -> tuple[list[list[Labelled]], list[Candidate]]:
    """Set aside a lone position-wise unit beside stacks that mix positions: part of a head, not a stack."""
    lone = [c for c in chains if len(c) == 1 and c[0].letter == "p"]
    if len(lone) == len(chains):
        return list(chains), []
    reason = "a single position-wise unit beside stacks that mix positions: part of a head"
    return [c for c in chains if c not in lone], [Candidate(c[0].unit.end, reason) for c in lone]


def _stream(flow: Flow, hasher: Hasher, chain: Sequence[Labelled]) -> Stream:
    units = [u.unit for u in chain]
    groups, stem = group(chain)
    settle_tails(flow, groups)
    points = tuple(dict.fromkeys(point for unit in units for point in (unit.start, unit.after)))
    blocks = tuple(_block(flow, hasher, i, labelled) for i, labelled in enumerate(groups))
    return Stream(points, blocks, tuple(site for u in stem for site in _branches(flow, u)))


def _block(flow: Flow, hasher: Hasher, index: int, labelled: Sequence[Labelled]) -> BlockSite:
    units = [u.unit for u in labelled]
    start, end = units[0].start, units[-1].after
    nodes = {node for unit in units for node in _values(flow, unit)}
    branches = tuple(site for u in labelled for site in _branches(flow, u))
    reason = _blocked(flow, units, start, end)
    ordered = tuple(sorted(nodes, key=flow.position.__getitem__))
    return BlockSite(index, start, end, branches, hasher.part(start, end, nodes), not reason, reason, ordered)


def _values(flow: Flow, unit: Unit) -> set[fx.Node]:
    """All values of a unit: its branches, the way of the stream through casts and factors, its additions, its tail."""
    nodes = {node for nodes in unit.nodes for node in nodes} | {add for add, _ in unit.leaves} | {unit.end, *unit.tail}
    low = flow.position[unit.start]
    stack = [unit.end, *unit.tail]
    if unit.kind == "sequential":
        stack = [a for node in nodes for a in node.all_input_nodes]
    while stack:
        node = stack.pop()
        for operand in (node, *node.all_input_nodes):
            local = flow.position[operand] > low and flow.is_float(operand) and operand is not unit.start
            if local and operand not in nodes and (unit.kind == "sequential" or flow.depends(operand, unit.start)):
                nodes.add(operand)
                stack.append(operand)
    return nodes


def _branches(flow: Flow, labelled: Labelled) -> list[BranchSite]:
    unit = labelled.unit
    sites: list[BranchSite] = []
    for (add, output), nodes, verdict in zip(unit.leaves, unit.nodes, labelled.verdicts, strict=False):
        kind, why = verdict.kind, verdict.why
        if unit.kind == "projection" and kind == "mlp":
            kind, why = "other", "projection shortcut"
        own = _with_constants(flow, nodes)
        sites.append(BranchSite(kind, unit.start, unit.after, add, output, own, why, verdict.cross))
    return sites


def _with_constants(flow: Flow, nodes: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
    """Add the operators on weights and constants that only these values read."""
    own = set(nodes)
    stack = list(nodes)
    while stack:
        for operand in stack.pop().all_input_nodes:
            if operand in own or operand.op != "call_function" or flow.data.get(operand):
                continue
            if all(user in own for user in flow.users(operand)):
                own.add(operand)
                stack.append(operand)
    return tuple(sorted(own, key=flow.position.__getitem__))


def _blocked(flow: Flow, units: Sequence[Unit], start: fx.Node, end: fx.Node) -> str:
    if any(unit.kind == "sequential" for unit in units):
        return "it has no residual addition"
    a, b = tensor_of(start), tensor_of(end)
    if a is None or b is None:
        return "the stream is no tensor"
    if flow.shape(start) != flow.shape(end):
        dims = flow.entry.dims
        before, after = (", ".join(dims.format(s) for s in t.shape) for t in (a, b))
        return f"the stream changes from [{before}] to [{after}]"
    if any(unit.kind == "projection" for unit in units):
        return "its shortcut is a projection"
    return f"the stream changes from {a.dtype} to {b.dtype}" if a.dtype != b.dtype else ""


def _in_order(flow: Flow, streams: Sequence[Stream]) -> list[Stream]:
    """A stream that another starts from comes first; else by the inputs that they start from, and by place."""
    bits = {stream.points[-1]: 1 << i for i, stream in enumerate(streams)}
    above: dict[fx.Node, int] = {}
    for node in flow.nodes:
        seen = bits.get(node, 0)
        for operand in node.all_input_nodes:
            seen |= above.get(operand, 0)
        if seen and flow.data[node]:
            above[node] = seen

    def key(stream: Stream) -> tuple[int, int, int]:
        inputs = flow.data[stream.points[0]]
        return above.get(stream.points[0], 0).bit_count(), inputs & -inputs, flow.position[stream.points[0]]

    return sorted(streams, key=key)
