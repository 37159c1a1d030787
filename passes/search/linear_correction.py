"""Low-rank correction: two thin maps beside a weight that became sparse, or codes, for what it lost.

    before   y = linear(x, w, b)                                           w: [out, in]

    after    y = linear(x, w', b) + linear(linear(x, right), left)         right: [rank, in], left: [out, rank]

Of all maps of their rank these move the layer's outputs nearest to where they were, on the inputs that the unchanged
program gives it: they minimise ``||X (w - w' - left right)^T||`` (`compensation.low_rank`). All operators that read the
weight get them.

Source: LQER (Zhang et al. 2024, arXiv 2402.02446) and EoRA (Liu et al. 2024, arXiv 2410.21271), which correct a weight
of one given size; here they are a part of every level, counted in what it costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from ...ir.axes.relate import bind
from ...ir.flow import op_name
from ...ir.rewrite import Rewriter
from ...ir.weights import Weight
from .compensation.low_rank import low_rank_residual
from .linear_factors import operand_of, two_convolutions
from .linear_sites import LinearSite
from .linear_texts import LinearLevel
from .local.factorize import Factors

aten = torch.ops.aten


def fitted(weight: Tensor, approximation: Tensor, root: Tensor, rank: int) -> Factors:
    """The maps beside an approximation of a weight [outputs, inputs]; arguments as `low_rank_residual`."""
    return Factors(*low_rank_residual(weight, approximation, root, rank))


def that_save(levels: Sequence[LinearLevel], cost: Callable[[LinearLevel | None], int]) -> list[LinearLevel]:
    """Of a layer's levels, from mild to harsh, those that cost less than all milder ones and than the layer as it is.

    Args:
        levels: the levels.
        cost: of a level, or of the layer as it is (None).
    """
    least, found = cost(None), list[LinearLevel]()
    for level in levels:
        if cost(level) < least:
            least = cost(level)
            found.append(level)
    return found


def put_beside(rewriter: Rewriter, site: LinearSite, factors: Factors) -> None:
    """Add ``left @ right @ x`` to what each of a site's operators gives for ``x``.

    Args:
        rewriter: of the site's program.
        site: the site.
        factors: the maps, stored in their own type and cast where the operator computes in another one.
    """
    ones = (1,) * (len(rewriter.program.weights[site.weight].shape) - 2)
    first, second = (
        _weight(rewriter, site, what, matrix.reshape(*matrix.shape, *ones))
        for what, matrix in (("right", factors.right), ("left", factors.left))
    )
    for node in (consumer.node for consumer in site.consumers):
        with rewriter.before(node.next):
            added = _product(rewriter, node, first, second)
            scale = bind(node)["alpha"] if op_name(node) == "addmm" else 1
            new = rewriter.call(aten.add.Tensor, node, added, like=node, **({} if scale == 1 else {"alpha": scale}))
        rewriter.replace(node, new)


def _weight(rewriter: Rewriter, site: LinearSite, what: str, value: Tensor) -> fx.Node:
    name = rewriter.fresh_weight_name(f"{site.weight}.correction.{what}")
    return rewriter.weight(name, Weight.from_tensor(value.contiguous()))


def _product(rewriter: Rewriter, node: fx.Node, first: fx.Node, second: fx.Node) -> fx.Node:
    """What a node reads, multiplied by two factors in turn."""
    operand = operand_of(node)
    dtype = operand.meta["val"].dtype
    if first.meta["val"].dtype != dtype:
        first, second = (rewriter.call(aten._to_copy.default, each, dtype=dtype) for each in (first, second))
    if op_name(node).startswith("conv"):
        return two_convolutions(rewriter, node, first, second, None)
    hidden = rewriter.call(aten.linear.default, operand, first, like=node)
    return rewriter.call(aten.linear.default, hidden, second, like=node)
