"""Clean up what capture leaves behind: metadata assertions, casts and moves that change nothing, detached aliases.

`torch.export` records ``aten.to`` for every ``.to()`` in the model's source, most of which change nothing; a second
full trace would remove them, at twice the cost of the first. Here it is one walk over the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .program import Program
from .rewrite import Rewriter, is_op

aten = torch.ops.aten

_ASSERTIONS = (aten._assert_tensor_metadata, aten.sym_constrain_range, aten.sym_constrain_range_for_size)
_IDENTITIES = (aten.alias, aten.detach, aten.detach_, aten.lift_fresh, aten.lift_fresh_copy)
_CASTS = (aten.to, aten._to_copy, aten.type_as)


def clean_capture(program: Program) -> None:
    """Remove from every graph what has no effect on its results; linear in the number of nodes."""
    for name in program.graphs:
        rewriter = Rewriter(program, "capture", name)
        for node in list(rewriter.graph.nodes):
            if is_op(node, *_ASSERTIONS):
                rewriter.erase(node)
            elif is_op(node, *_IDENTITIES):
                rewriter.replace(node, node.args[0])  # type: ignore[arg-type]
            elif is_op(node, *_CASTS):
                _clean_cast(rewriter, node)
        rewriter.erase_dead()


def _clean_cast(rewriter: Rewriter, node: fx.Node) -> None:
    """Drop a cast to the type that the value already has; write any other one as ``_to_copy`` of a dtype alone."""
    source: Any = node.args[0]
    before, after = source.meta["val"], node.meta["val"]
    if node.kwargs.get("memory_format") in (torch.channels_last, torch.channels_last_3d):
        return  # views may rely on the new strides
    if before.dtype == after.dtype:
        rewriter.replace(node, source)
    elif node.target is not aten._to_copy.default or set(node.kwargs) != {"dtype"}:
        with rewriter.before(node):
            cast = rewriter.call(aten._to_copy.default, source, dtype=after.dtype, like=node)
        cast.meta.pop("made_by", None)
        rewriter.replace(node, cast)
