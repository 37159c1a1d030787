"""One linear layer becomes two, with nothing between them.

before   y = linear(x, w, b)               w: [out, in]
after    y = linear(linear(x, right), left, b)     right: [r, in], left: [out, r]
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx

from ...ir.axes.relate import bind
from ...ir.flow import op_name
from ...ir.rewrite import Rewriter
from ...ir.weights import Weight
from .consumers import Consumer
from .linear_sites import LinearSite
from .local.factorize import Factors

aten = torch.ops.aten


def split(rewriter: Rewriter, site: LinearSite, factors: Factors) -> None:
    """Let a site's operators multiply by two factors in turn.

    Args:
        rewriter: of the site's program.
        site: the site; it must not be used afterwards.
        factors: its weight [outputs, inputs] as ``left @ right``; zeros of ``left`` are stored and multiplied by.
    """
    names: dict[tuple[str, torch.dtype], str] = {}
    for consumer in site.consumers:
        node = consumer.node
        # A weight may be cast before it is used; its factors are stored in the type that they are used in.
        dtype = operand_of(node).meta["val"].dtype
        first, second = (
            _factor(rewriter, site, consumer, names, what, matrix.to(dtype))
            for what, matrix in (("right", factors.right), ("left", factors.left))
        )
        with rewriter.before(node):
            new = _calls(rewriter, node, first, second)
        rewriter.replace(node, new)


def operand_of(node: fx.Node) -> fx.Node:
    """What an operator of a site multiplies now: changes of other sites replace what its consumer says."""
    args = bind(node)
    return next(args[key] for key in ("input", "mat1", "self") if key in args)


def _factor(
    rewriter: Rewriter,
    site: LinearSite,
    consumer: Consumer,
    names: dict[tuple[str, torch.dtype], str],
    what: str,
    matrix: Tensor,
) -> fx.Node:
    """The weight of one factor in the form that the operator reads; made once for all operators of a site."""
    key = f"{what} {op_name(consumer.node)}", matrix.dtype
    if key in names:
        return rewriter.weight(names[key])
    name = op_name(consumer.node)
    kernel = consumer.node.meta["val"].dim() - 2 if name.startswith("conv") else 0
    value = matrix if name == "linear" or kernel else matrix.T
    value = value.reshape(*value.shape, *(1,) * kernel).contiguous()
    names[key] = rewriter.fresh_weight_name(f"{site.weight}.{what}")
    return rewriter.weight(names[key], Weight.from_tensor(value))


def _calls(rewriter: Rewriter, node: fx.Node, first: fx.Node, second: fx.Node) -> fx.Node:
    args, target, operand = bind(node), cast(Any, node.target), operand_of(node)
    name = op_name(node)
    if name == "linear":
        hidden = rewriter.call(target, operand, first, like=node)
        return rewriter.call(target, hidden, second, args["bias"], like=node)
    if name == "addmm":
        hidden = rewriter.call(aten.mm.default, operand, first, like=node)
        scales = {key: args[key] for key in ("beta", "alpha")}
        return rewriter.call(target, args["self"], hidden, second, like=node, **scales)
    if name in ("mm", "matmul"):
        hidden = rewriter.call(target, operand, first, like=node)
        return rewriter.call(target, hidden, second, like=node)
    return two_convolutions(rewriter, node, first, second, args["bias"])


def two_convolutions(
    rewriter: Rewriter, node: fx.Node, first: fx.Node, second: fx.Node, bias: fx.Node | None
) -> fx.Node:
    """Two convolutions of what another one reads: strides and padding belong to the first, which sees the places."""
    args, target, operand = bind(node), cast(Any, node.target), operand_of(node)
    if op_name(node) == "convolution":
        rest = [args[key] for key in ("stride", "padding", "dilation", "transposed", "output_padding", "groups")]
        hidden = rewriter.call(target, operand, first, None, *rest, like=node)
        count = node.meta["val"].dim() - 2
        plain = [[1] * count, [0] * count, [1] * count, False, [0] * count, 1]
        return rewriter.call(target, hidden, second, bias, *plain, like=node)
    hidden = rewriter.call(target, operand, first, None, *(args[k] for k in ("stride", "padding")), like=node)
    return rewriter.call(target, hidden, second, bias, like=node)
