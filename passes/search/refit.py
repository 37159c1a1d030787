"""Compensation over a whole model: what is left of each consumer is fitted so that its output stays what it was.

The sites are walked in graph order. At each, two flows are compared on the calibration data: what the consumer reads in
the unchanged model, ``x``, and what it reads now that everything before it is changed, ``z``. The columns that stay are
chosen for ``z`` so that the output is that of the unchanged layer on ``x``: errors of earlier layers are corrected
instead of being passed on (the accumulation of expected errors of Tyr; GPTQ-style methods fit ``z`` to itself).
Consumers of one site that lie behind one another (those of a stream) are fitted one after the other, too.
With ``sequential`` off both are the unchanged flow, as in FLAP. In fits by least squares, positions count as much as
the norm after the consumer lets through (`norm_metric`). How much a fit is damped is chosen by what it does on data
that it did not see (`sample_sums.chosen_damping`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import fx

from ...ir.errors import PreconditionError
from ...ir.execute import needed
from ...ir.program import Program
from ...ir.structure import Structure
from ...ir.weights import Weight
from ..base import Batch, Context
from ..fidelity import position_mask
from .biases import own_bias, why_no_bias
from .compensation.base import Compensated
from .compensation.bias import bias
from .compensation.least_squares import least_squares
from .compensation.mask_tuning import mask_tuning
from .consumers import Consumer, columns_labels, input_rows, other_readers, weight_matrix, with_weight_matrix
from .flow import Walk
from .levels import combined, zeroed
from .norm_metric import Norms, position_weights
from .rows import counted_positions, unflattened
from .sample_sums import Samples, Sums, chosen_damping
from .sites import ChannelSite

Cut = tuple[ChannelSite, tuple[int, ...]]


@dataclass(frozen=True)
class Method:
    """A compensation.

    Attributes:
        fit: ``(weight [out, in], kept columns, unit of each column, sums, damping) -> Compensated``.
        products: whether it needs Gram matrices; means alone otherwise.
        bias: whether it adds to the consumers' biases.
        weighted: whether positions count as much as the norm after the consumer lets through.
    """

    fit: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Sums, float], Compensated]
    products: bool
    bias: bool
    weighted: bool = False


def _bias(weight: torch.Tensor, kept: torch.Tensor, units: torch.Tensor, sums: Sums, damping: float) -> Compensated:
    return bias(weight, kept, sums.before / sums.count)


@dataclass(frozen=True)
class _Moments:
    """Centred statistics: means, covariance of ``z``, covariance of ``z`` with the wanted output."""

    mean: torch.Tensor
    gram: torch.Tensor
    target: torch.Tensor
    target_mean: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor, sums: Sums) -> _Moments:
        assert sums.gram is not None and sums.cross is not None
        z, x = sums.now / sums.count, sums.before / sums.count
        w = weight.double()
        gram = sums.gram / sums.count - torch.outer(z, z)
        return cls(z, gram, (sums.cross / sums.count - torch.outer(z, x)) @ w.T, w @ x)


def _least_squares(
    weight: torch.Tensor, kept: torch.Tensor, units: torch.Tensor, sums: Sums, damping: float
) -> Compensated:
    m = _Moments.of(weight, sums)
    return least_squares(weight, kept, m.gram, m.mean, damping=damping, target=m.target, target_mean=m.target_mean)


def _mask_tuning(
    weight: torch.Tensor, kept: torch.Tensor, units: torch.Tensor, sums: Sums, damping: float
) -> Compensated:
    m = _Moments.of(weight, sums)
    return mask_tuning(weight, kept, m.gram, units, m.mean, damping=damping, target=m.target, target_mean=m.target_mean)


METHODS: dict[str, Method] = {
    "bias": Method(_bias, products=False, bias=True),
    "least-squares": Method(_least_squares, products=True, bias=True, weighted=True),
    "mask-tuning": Method(_mask_tuning, products=True, bias=True),
}
"""Compensations by name; ``none`` needs no walk."""


@dataclass
class Refit:
    """What compensation gives.

    Attributes:
        weights: weights of unchanged shape: zero where it was cut, fitted elsewhere, and biases.
        skipped: why consumers were left as they are, with counts.
        notes: what the method says.
    """

    weights: dict[str, Weight] = field(default_factory=dict[str, Weight])
    skipped: dict[str, int] = field(default_factory=dict[str, int])
    notes: list[str] = field(default_factory=list[str])


def refit(
    program: Program,
    found: Structure,
    cuts: Sequence[Cut],
    alias: Mapping[fx.Node, fx.Node],
    ctx: Context,
    method: str,
    *,
    sequential: bool = True,
) -> Refit:
    """Fit what is left of the consumers of sites that will be cut.

    Args:
        program: the program before the cut; its consumers have biases where the method adds to them.
        found: its structure.
        cuts: sites with the atoms that go.
        alias: values that are replaced by earlier ones (dropped units).
        ctx: calibration batches.
        method: a name out of `METHODS`.
        sequential: whether later layers see what was done to earlier ones.

    Raises:
        PreconditionError: there is no calibration data, or it holds NaN or infinity.
    """
    if not ctx.calibration:
        raise PreconditionError(
            f"the compensation '{method}' needs calibration data", remedy="pass calibration= (or --calibration FILE)"
        )
    how, result = METHODS[method], Refit()
    norms = Norms(program) if how.weighted else None
    cuts = sorted(((site, removed) for site, removed in cuts if removed), key=lambda cut: cut[0].first)
    masked = combined(program, (zeroed(program, site, removed) for site, removed in cuts))
    kept = _kept_columns(cuts)
    alive = needed(program.graph, (), alias)
    dense = [Walk(program, found, batch) for batch in ctx.calibration]
    now = [Walk(program, found, batch, alias) for batch in ctx.calibration]
    position = {node: i for i, node in enumerate(program.graph.nodes)}
    firsts = [*(site.first for site, _ in cuts), len(position)]
    for index, (site, _) in enumerate(ctx.progress(cuts, len(cuts), f"compensation: {method}")):
        work = [c for c in site.consumers if c.node in alive and _usable(program, site, c, how, result)]
        for run in _runs(program, work) if sequential else [work] if work else []:
            samples = {consumer: Samples() for consumer in run}
            operands = {consumer.operand for consumer in run}
            streams = {c: norms.after(c.node) if norms is not None else None for c in run}
            both = operands | {stream for stream in streams.values() if stream is not None}
            # What comes before these consumers does not change any more, unless a later site does it.
            settled = max(site.first, min(firsts[index + 1], *(position[c.node] for c in run)))
            for number, (batch, before, after) in enumerate(zip(ctx.calibration, dense, now, strict=True)):
                x = before.values(both, {}, settled)
                z = after.values(operands, combined(program, (masked, result.weights)), settled) if sequential else x
                for consumer in run:
                    rows = (
                        counted_rows(consumer, batch, z[consumer.operand]),
                        counted_rows(consumer, batch, x[consumer.operand]),
                    )
                    stream = streams[consumer]
                    weights = None if stream is None else position_weights(counted_positions(batch, x[stream]))
                    if weights is not None and len(weights) != len(rows[0]):
                        weights = None  # its rows are others than the positions of the stream
                    samples[consumer].add(number, len(dense), *rows, how.products, weights)
            for consumer in run:
                _fit(program, site, kept[consumer.node], consumer, samples[consumer], how, result)
    for name, weight in masked.items():
        result.weights.setdefault(name, weight)
    return result


def _runs(program: Program, consumers: Sequence[Consumer]) -> list[list[Consumer]]:
    """Consumers in the order of the graph, in runs in which none reads what another one of its run changes."""
    by_node = {consumer.node: consumer for consumer in consumers}
    runs: list[list[Consumer]] = []
    behind: set[fx.Node] = set()  # what the last run changes
    for node in program.graph.nodes:
        consumer = by_node.get(node)
        if consumer is not None and (not runs or consumer.operand in behind):
            runs.append([])
            behind = set()
        if consumer is not None:
            runs[-1].append(consumer)
        if consumer is not None or not behind.isdisjoint(node.all_input_nodes):
            behind.add(node)
    return runs


def _kept_columns(cuts: Sequence[Cut]) -> dict[fx.Node, torch.Tensor]:
    """The columns of each consumer that no site removes: some are read by several sites (a concatenation's reader).

    Such a consumer is fitted for each of its sites, in their order; the last fit, which knows all of what it reads,
    counts.
    """
    kept: dict[fx.Node, torch.Tensor] = {}
    for site, removed in cuts:
        gone = np.fromiter(removed, dtype=np.int64)
        for consumer in site.consumers:
            stays = torch.from_numpy(~np.isin(columns_labels(consumer), gone))
            kept[consumer.node] = kept.get(consumer.node, stays) & stays
    return kept


def _fit(
    program: Program,
    site: ChannelSite,
    kept: torch.Tensor,
    consumer: Consumer,
    samples: Samples,
    how: Method,
    result: Refit,
) -> None:
    sums = samples.all
    finite = bool(sums.now.isfinite().all() and sums.before.isfinite().all())
    if not finite or not sums.count:
        what = "holds NaN or infinity" if sums.count else "has no position that counts"
        raise PreconditionError(
            f"what {site.label} reads on the calibration data {what}",
            node=consumer.operand.name,
            origin=consumer.origin,
            remedy="look at the calibration data and the weights",
        )
    matrix = weight_matrix(program, consumer)
    units = torch.from_numpy(columns_labels(consumer))
    damping = 0.0
    if how.products:
        damping = chosen_damping(samples, matrix, lambda part, damping: how.fit(matrix, kept, units, part, damping))
    fitted = how.fit(matrix, kept, units, sums, damping)
    result.weights[consumer.weight] = with_weight_matrix(program, consumer, fitted.weight)
    result.notes += [f"{site.label}: {note}" for note in fitted.notes]
    name = own_bias(program, consumer)
    if fitted.bias is not None and name is not None:
        old = program.weights[name].tensor()
        result.weights[name] = Weight.from_tensor((old.double() + fitted.bias.double()).to(old.dtype))


def _usable(program: Program, site: ChannelSite, consumer: Consumer, how: Method, result: Refit) -> bool:
    reason = why_not_fitted(program, site, consumer)
    if not reason and how.bias and own_bias(program, consumer) is None:
        reason = why_no_bias(consumer) or f"%{consumer.node.name} has no bias of its own"
    if reason:
        result.skipped[reason] = result.skipped.get(reason, 0) + 1
    return not reason


def why_not_fitted(program: Program, site: ChannelSite, consumer: Consumer) -> str:
    """Why a consumer of a site cannot be fitted; empty if it can."""
    if site.unread:
        return site.unread[0]
    if other_readers(program, consumer):
        return f"weight '{consumer.weight}' is read by several operators"
    return site.group.zero_reason


def counted_rows(consumer: Consumer, batch: Batch, value: torch.Tensor) -> torch.Tensor:
    """The rows of an operand that count: not those of positions that a mask hides."""
    rows = input_rows(consumer, value)
    if consumer.channel_dim != value.dim() - 1:
        return rows
    mask = None
    if value.dim() == 3:
        mask = position_mask(batch, value.shape[:2], inside=True)
    elif unflattened(consumer) is not None and isinstance(known := batch.get("attention_mask"), torch.Tensor):
        mask = position_mask(batch, known.shape, inside=True) if known.dim() == 2 else None
    return rows[mask.reshape(-1) != 0] if mask is not None and mask.numel() == len(rows) else rows
