"""Channel sites whose levels are pruned by the optimal brain surgeon: what stays is refitted at every level.

Sites are walked in graph order. Each reads what it would read if every site before it had the mean weight of its
levels, and is fitted to give what it gave in the unchanged model: the expected error that earlier layers pass on is
made up for. Consumers are linear, so that the mean weight gives the mean output; levels that keep more weigh more:

    W = sum_l (1 - s_l) W_l / sum_l (1 - s_l)        s_l: the share of the atoms that level l removes

A site with several consumers is pruned as one layer whose weight has theirs along the diagonal; each has its own mean.

Source: Tyr-the-Pruner (2025, arXiv 2503.09657), the super-network of pruned levels with weighted expectation error
accumulation. One expected level alone is the median version of the paper's reference implementation.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch

from ...ir.errors import PreconditionError
from ...ir.program import Program
from ...ir.weights import Weight
from ..base import Context
from .budget import Meter
from .compensation.base import Compensated
from .compensation.least_squares import least_squares
from .consumers import Consumer, other_readers, weight_matrix, with_weight_matrix
from .flow import Walk
from .levels import TOO_NARROW, Level, Place
from .local.columns import group_compensation_scores
from .local.obs import Removal, remove_groups
from .refit import counted_rows
from .sample_sums import Samples, Sums, chosen_damping
from .scores.base import atom_columns
from .sites import ChannelSite


def obs_places(
    program: Program,
    sites: Sequence[ChannelSite],
    meter: Meter,
    ctx: Context,
    counts: Mapping[int, Sequence[int]],
    *,
    middle: Mapping[int, int],
    expected: Mapping[int, Collection[int]] | None = None,
    rounds: Mapping[str, int],
    damping: float | None = None,
) -> tuple[list[Place], dict[str, int]]:
    """Places whose levels remove given numbers of atoms.

    Args:
        program: the program.
        sites: its sites, in graph order.
        meter: counts what a level saves.
        ctx: calibration batches.
        counts: for each site's index, increasing numbers of atoms to remove, each below the number of atoms.
        middle: for each site's index, the number of atoms (one of its counts, or 0) that its damping is chosen for.
        expected: for each site's index, the numbers of atoms (of its counts, or 0) that may be gone when later sites
            read; None: ``middle`` alone.
        rounds: by kind, in how many rounds atoms are removed; 1 for other kinds.
        damping: share of the mean diagonal added to Gram matrices; None: for each site the one that does best on data
            that it was not fitted to.

    Returns:
        The places, and why other sites were left out, with counts.

    Raises:
        PreconditionError: there is no calibration data, or it holds NaN or infinity.
    """
    if not ctx.calibration:
        raise PreconditionError("it needs calibration data", remedy="pass calibration= (or --calibration FILE)")
    found = ctx.structure(program)
    dense = [Walk(program, found, batch) for batch in ctx.calibration]
    now = [Walk(program, found, batch) for batch in ctx.calibration]
    means: dict[str, Weight] = {}
    fitted: set[str] = set()
    places: list[Place] = []
    blocked: dict[str, int] = {}
    for site in ctx.progress(sites, len(sites), "levels"):
        reason = _unfit(program, site, fitted)
        if reason or not counts[site.index]:
            blocked[reason or TOO_NARROW] = blocked.get(reason or TOO_NARROW, 0) + 1
            continue
        samples = {consumer: Samples() for consumer in site.consumers}
        operands = {consumer.operand for consumer in site.consumers}
        for number, (batch, before, after) in enumerate(zip(ctx.calibration, dense, now, strict=True)):
            x = before.values(operands, {}, site.first)
            z = after.values(operands, means, site.first)
            for consumer in site.consumers:
                rows = (counted_rows(consumer, batch, value[consumer.operand]) for value in (z, x))
                samples[consumer].add(number, len(dense), *rows, products=True)
        sums = {consumer: each.all for consumer, each in samples.items()}
        _check(site, sums)
        level = damping
        if level is None:
            typical = middle[site.index] or counts[site.index][len(counts[site.index]) // 2]
            level = _damping(program, site, samples, sums, typical)
        removals = _pruned(program, site, sums, counts[site.index], rounds.get(site.kind, 1), level)
        fitted |= {consumer.weight for consumer in site.consumers}
        place = _place(program, site, sums, removals, meter)
        places.append(place)
        means |= _mean(program, site, place, (middle[site.index],) if expected is None else expected[site.index])
    return places, blocked


def _unfit(program: Program, site: ChannelSite, fitted: Collection[str]) -> str:
    if site.unread or not site.consumers:
        return site.unread[0] if site.unread else "no operator sums over its channels"
    shared = [c for c in site.consumers if other_readers(program, c)]
    if shared:
        return f"weight '{shared[0].weight}' is read by several operators"
    # Two weights that replace one cannot both be chosen.
    twice = [c for c in site.consumers if c.weight in fitted]
    return f"weight '{twice[0].weight}' is fitted for another site already" if twice else site.group.zero_reason


def _check(site: ChannelSite, sums: Mapping[Consumer, Sums]) -> None:
    for consumer, seen in sums.items():
        if not seen.count or seen.gram is None or not bool(seen.gram.isfinite().all()):
            raise PreconditionError(
                f"what {site.label} reads on the calibration data "
                + ("holds NaN or infinity" if seen.count else "has no position that counts"),
                node=consumer.operand.name,
                origin=consumer.origin,
                remedy="look at the calibration data and the weights",
            )


def _damping(
    program: Program,
    site: ChannelSite,
    samples: Mapping[Consumer, Samples],
    sums: Mapping[Consumer, Sums],
    count: int,
) -> float:
    """The damping with which the widest consumer, without its ``count`` least important atoms, does best elsewhere."""
    consumer = max(site.consumers, key=lambda c: len(c.labels))
    weight = weight_matrix(program, consumer).double()
    gram = sums[consumer].gram
    assert gram is not None
    columns = atom_columns(site, consumer)
    gone = group_compensation_scores(weight, gram, columns).argsort()[:count]
    kept = torch.ones(weight.shape[1], dtype=torch.bool)
    kept[columns[gone].flatten()] = False

    def fit(part: Sums, damping: float) -> Compensated:
        assert part.gram is not None and part.cross is not None
        target = part.cross / part.count @ weight.T
        return least_squares(weight, kept, part.gram / part.count, damping=damping, target=target)

    return chosen_damping(samples[consumer], weight, fit)


def _pruned(
    program: Program,
    site: ChannelSite,
    sums: Mapping[Consumer, Sums],
    counts: Sequence[int],
    rounds: int,
    damping: float,
) -> list[Removal]:
    """Remove atoms from all consumers at once."""
    weights, grams, targets, groups = [], [], [], []
    offset = 0
    for consumer in site.consumers:
        seen = sums[consumer]
        assert seen.gram is not None and seen.cross is not None
        weight = weight_matrix(program, consumer).double()
        weights.append(weight)
        grams.append(seen.gram / seen.count)
        targets.append(seen.cross / seen.count @ weight.T)
        groups.append(atom_columns(site, consumer) + offset)
        offset += weight.shape[1]
    return remove_groups(
        torch.block_diag(*weights),
        torch.block_diag(*grams),
        torch.cat(groups, 1),
        counts,
        target=torch.block_diag(*targets),
        rounds=rounds,
        damping=damping,
    )


def _place(
    program: Program, site: ChannelSite, sums: Mapping[Consumer, Sums], removals: Sequence[Removal], meter: Meter
) -> Place:
    whole = meter.cut(site, range(site.size))
    order = np.array(removals[-1].removed, dtype=np.int64)
    levels = [Level("untouched", round(whole), 0.0)]
    for removal in removals:
        replaced: dict[str, Weight] = {}
        error, row, column = 0.0, 0, 0
        for consumer in site.consumers:
            old = weight_matrix(program, consumer)
            rows, columns = old.shape
            new = removal.weight[row : row + rows, column : column + columns]
            row, column = row + rows, column + columns
            replaced[consumer.weight] = with_weight_matrix(program, consumer, new)
            error += _error(old.double(), new.double(), sums[consumer])
        count = len(removal.removed)
        cost = round(whole - meter.cut(site, removal.removed))
        levels.append(
            Level(f"{count} of {site.size} cut", cost, error, site=site, order=order, count=count, replaced=replaced)
        )
    return Place(site.kind, site.label, site.block, tuple(levels), site.first, site.index)


def _mean(program: Program, site: ChannelSite, place: Place, counts: Collection[int]) -> dict[str, Weight]:
    """The mean weights of the levels that remove some numbers of atoms, weighed by the shares that they keep."""
    levels = [level for level in place.levels if level.count in counts]
    kept = [site.size - level.count for level in levels]
    means: dict[str, Weight] = {}
    for name in dict.fromkeys(name for level in levels for name in level.replaced):
        old = program.weights[name]
        mean = torch.zeros(old.shape, dtype=torch.float64)
        for level, share in zip(levels, kept, strict=True):
            mean.add_(level.replaced.get(name, old).tensor(), alpha=share / sum(kept))
        means[name] = Weight.from_tensor(mean.to(old.dtype))
    return means


def _error(old: torch.Tensor, new: torch.Tensor, sums: Sums) -> float:
    """Squared error of a layer relative to its own output on what it reads now: a number comparable over layers."""
    assert sums.gram is not None
    change = new - old
    lost, whole = (float((w @ sums.gram * w).sum()) for w in (change, old))
    return max(lost, 0.0) / whole if whole > 0 else (0.0 if lost <= 0 else math.inf)
