"""What views do to the order of elements, and who looks at strides.

A program's values are arrays: no operator but those named here may depend on strides, so that copies made only to
change strides can go.
"""

from __future__ import annotations

import torch
from torch import fx

from ...ir.rewrite import is_op

aten = torch.ops.aten

COMPOSED_VIEWS = (
    aten.view,
    aten._unsafe_view,
    aten.reshape,
    aten.view_as,
    aten.reshape_as,
    aten.flatten,
    aten.unflatten,
    aten.squeeze,
    aten.unsqueeze,
)
"""Operators that keep the elements in row-major order under another shape: any chain of them is one reshape."""

STRIDE_SENSITIVE = (
    aten.as_strided,
    aten.as_strided_copy,
    aten.as_strided_scatter,
    aten.view_as_complex,
    aten.stride,
    aten.sym_stride,
    aten.sym_storage_offset,
    aten.is_contiguous,
)


DENSE_RESULTS = (
    aten.linear,
    aten.mm,
    aten.addmm,
    aten.bmm,
    aten.baddbmm,
    aten.matmul,
    aten.embedding,
)
"""Operators whose result has the same strides whatever their inputs' are."""


def stride_sensitive(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose own strides reach an operator that looks at them.

    Those are a few of ATen (also ``view.dtype``, which wants dense rows), control flow (its bodies were traced with
    given strides), and operators of other libraries, which may do anything.
    """
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if _looks_at_strides(node) or (node in found and not is_op(node, *DENSE_RESULTS)):
            found.update(node.all_input_nodes)
    return found


def _looks_at_strides(node: fx.Node) -> bool:
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return True
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target.namespace not in ("aten", "prims", "graphlathe"):
        return True
    return target is aten.view.dtype or is_op(node, *STRIDE_SENSITIVE)
