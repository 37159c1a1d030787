"""Make weights that are copies of one another one weight again.

Exporters write a tied matrix twice: byte by byte for the embedding and for the output layer, or transposed for the
second (constant folding does that). The copies compute the same, but cutting slices both, and nothing keeps them equal
once one is trained. Two matrices that merely happen to be equal (two that are all zeros) become one as well: therefore
this is an offer, and no pass does it unasked.
"""

from __future__ import annotations

import torch
from torch import fx

from .hub_model import same_bytes
from .program import Program
from .rewrite import Rewriter
from .weights import Weight

aten = torch.ops.aten

_TURNED = (1, 0)


def retie(program: Program, *, min_bytes: int = 4096, made_by: str = "retie") -> dict[str, str]:
    """Let every reader of a copy read the original: exact, and fewer bytes.

    Args:
        program: changed in place.
        min_bytes: weights below this size are left alone, and so are vectors: small tensors are often equal by chance.
        made_by: the pass's name, stamped on new nodes.

    Returns:
        The names that are gone, each with the weight that is read instead: the one that is read first, and read through
        a transpose where the copy was a transposed one. Copies that were not transposed also go to ``program.tied``.
    """
    started = {pair.initial for entry in program.entries.values() for pair in entry.state}
    by_content: dict[tuple[tuple[int, ...], torch.dtype, str], list[str]] = {}
    found: dict[str, tuple[str, bool]] = {}
    for name in _in_order(program):
        weight = program.weights[name]
        fits = len(weight.shape) >= 2 and weight.nbytes >= min_bytes and weight.dtype.is_floating_point
        if not fits or weight.is_meta or name in started:
            continue
        match = _find(program, weight, by_content, turned=False) or _find(program, weight, by_content, turned=True)
        if match is None:
            by_content.setdefault((weight.shape, weight.dtype, weight.digest()), []).append(name)
        else:
            found[name] = match
    for graph in program.graphs:
        rewriter = Rewriter(program, made_by, graph)
        for node in list(rewriter.graph.find_nodes(op="get_attr")):
            if str(node.target) in found:
                _read_instead(rewriter, node, *found[str(node.target)])
    for name, (kept, turned) in found.items():
        del program.weights[name]
        aliases = {alias for alias, of in program.tied.items() if of == name}
        for alias in aliases:
            del program.tied[alias]
        if not turned:
            program.tied |= dict.fromkeys({name, *aliases}, kept)
    return {name: kept for name, (kept, _) in found.items()}


def _in_order(program: Program) -> list[str]:
    """The weights that are read, in the order in which they are."""
    first: dict[str, None] = {}
    for graph in program.graphs.values():
        for node in graph.nodes:
            first |= {str(n.target): None for n in node.all_input_nodes if n.op == "get_attr"}
    return [name for name in first if name in program.weights]


def _find(
    program: Program,
    weight: Weight,
    known: dict[tuple[tuple[int, ...], torch.dtype, str], list[str]],
    *,
    turned: bool,
) -> tuple[str, bool] | None:
    """A weight that holds the same bytes, and whether it has to be transposed."""
    if turned:
        if len(weight.shape) != 2 or not any(shape == weight.shape[::-1] for shape, _, _ in known):
            return None
        weight = weight.permute(_TURNED)
    for name in known.get((weight.shape, weight.dtype, weight.digest()), []):
        if same_bytes(program.weights[name], weight):
            return name, turned
    return None


def _read_instead(rewriter: Rewriter, node: fx.Node, kept: str, turned: bool) -> None:
    new = rewriter.weight(kept)
    first = min(node.users, default=node)
    if turned:
        with rewriter.before(first):
            new = rewriter.call(aten.permute.default, new, list(_TURNED), like=node)
    rewriter.replace(node, new)


__all__ = ["retie"]
