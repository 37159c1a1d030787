"""The expander that reads the stream: the kept heads keep their slices of the output projection, and the feed-forward
layer after them becomes narrower.

    before   y = x + o W_o         z = y + ffn(n(y))            width w
    after    y = x + o' W_o'       z = y + ffn'(n(y))           width w' < w

Both output maps start from closed forms on calibration data, block by block, each on what the blocks before it give
*now*, so that the sums ``y`` and ``z`` come back to what they are in the dense model. The hidden units that go are
those which the others can make up for best (`passes.search.local.obs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from ...ir.axes import cut_all
from ...ir.flow import keeps_value
from ...ir.program import Program
from ...ir.rewrite import Rewriter
from ...ir.structure import structure
from ...ir.weights import Weight
from ..search.consumers import Consumer, other_readers, weight_matrix, with_weight_matrix
from ..search.local.obs import remove_groups
from ..search.sites import channel_sites
from ..search.units import Unit
from .blocks import HeadBlock
from .observed import Observed, affine_fit, linear_fit, twin, unexplained
from .positions import is_step, steps_between

_DAMPING = 1e-3


@dataclass(frozen=True)
class Fit:
    """What one block's closed forms left over.

    Attributes:
        attention, mlp: share of the variance of what each output map should add; NaN where it was not fitted.
        units: the hidden units that stay.
    """

    attention: float
    mlp: float
    units: tuple[int, ...]


def narrow(now: Observed, dense: Observed, block: HeadBlock, width: int) -> Fit:
    """Fit one block whose heads were cut already; columns of hidden units that are to go become zero.

    Args:
        now: the program, changed in place, on calibration data. `cut_units` then removes the units of all blocks.
        dense: a clone of it from before any change, on the same data.
        block: the block; it has hidden units that can be cut.
        width: how many of them stay.

    Raises:
        PreconditionError: the data gives no finite numbers.
    """
    attention = _refit(now, dense, block.output, block.attention, None)[0]
    assert block.hidden is not None
    consumer = block.hidden.consumers[0]
    members = np.stack([np.flatnonzero(consumer.labels == unit) for unit in range(block.hidden.size)])
    gone = block.hidden.size - width
    mlp, units = _refit(now, dense, consumer, block.mlp, (torch.from_numpy(members), gone))
    return Fit(attention, mlp, units)


def _refit(
    now: Observed,
    dense: Observed,
    consumer: Consumer,
    unit: Unit,
    removal: tuple[torch.Tensor, int] | None,
) -> tuple[float, tuple[int, ...]]:
    """Fit an output map so that the sum behind it is the dense model's; with ``removal``, without some of its columns.

    Where a norm stands between the map and the sum, or the weight is shared, only columns are chosen.
    """
    program = now.program
    way = steps_between(consumer.node, unit.replaced)
    free = way is not None and not other_readers(program, consumer) and _reaches(consumer.node, unit.replaced)
    if free:
        rows, base, own = now.rows([consumer.operand, unit.by, consumer.node], [way or (), (), way or ()])
        wanted = dense.rows([twin(dense.program, unit.replaced)])[0].double() - base.double()
    else:
        rows, own = now.rows([consumer.operand, consumer.node])
        wanted = dense.rows([twin(dense.program, consumer.node)])[0].double()
    matrix = weight_matrix(program, consumer).double()
    constant = own.double() - rows.double() @ matrix.T  # its bias, whatever form that has
    kept = torch.arange(matrix.shape[1])
    units: tuple[int, ...] = ()
    if removal is not None:
        members, gone = removal
        x = rows.double() - rows.double().mean(0)
        goal = wanted - wanted.mean(0)
        found = remove_groups(matrix, x.T @ x, members, [gone], target=x.T @ goal, damping=_DAMPING)[0]
        units = tuple(sorted({*range(len(members))} - {*found.removed}))
        kept = members[list(units)].flatten().sort().values
    left = float("nan")
    fitted, bias = matrix[:, kept], None
    if free:
        x = rows[:, kept]
        if consumer.bias is not None:
            fitted, bias = affine_fit(x, wanted, _DAMPING, matrix[:, kept])
            left = unexplained(wanted, x.double() @ fitted.T + bias)
        else:
            fitted = linear_fit(x, wanted - constant, _DAMPING, matrix[:, kept])
            left = unexplained(wanted, x.double() @ fitted.T + constant)
    result = torch.zeros_like(matrix)
    result[:, kept] = fitted
    rewriter = Rewriter(program, "shrp")
    rewriter.weight(consumer.weight, with_weight_matrix(program, consumer, result.to(torch.float64)))
    if bias is not None and consumer.bias is not None:
        was = program.weights[consumer.bias]
        rewriter.weight(consumer.bias, Weight.from_tensor(bias.reshape(was.shape).to(was.dtype)))
    return left, units


def _reaches(node: fx.Node, add: fx.Node) -> bool:
    """Whether a value goes into a sum as it is: through copies, inactive dropout and moves of positions only."""
    while True:
        if len(node.users) != 1:
            return False
        user = next(iter(node.users))
        if user is add:
            return True
        if not keeps_value(user) and not is_step(user):
            return False
        node = user


def cut_units(program: Program, kept: Sequence[tuple[HeadBlock, Sequence[int]]]) -> None:
    """Remove all hidden units but those, after `narrow` has zeroed the others' columns.

    Args:
        program: changed in place.
        kept: blocks with their units that stay.
    """
    found, _ = channel_sites(program, structure(program), ("mlp",))
    by_reader = {site.consumers[0].node: site for site in found if site.consumers}
    choices = [
        (by_reader[block.hidden.consumers[0].node].group, units)
        for block, units in kept
        if block.hidden is not None and len(units) < block.hidden.size
    ]
    if choices:
        cut_all(program, choices, made_by="shrp")
