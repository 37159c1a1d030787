"""A small map in the place of what was dropped.

A dropped run of blocks leaves the stream as it was before them. What they added is predicted from that stream by a map
of low rank, fitted in closed form on calibration data, so nothing is trained:

    before   x ── block ── block ── y          after   x ─┬─ rms ─ A [r, d] ─ B [d, r] ─ + ── y'
                                                          └──────────────────────────────┘

Channels of a stream, and positions, differ in size by orders of magnitude. So the map's inputs are scaled to equal
variance before they are damped, and its errors count as much as the norms that read the stream let through
(`norm_metric`). How much is damped is chosen on held-out halves of the data (`sample_sums.chosen_damping`).

Runs are fitted in graph order. Each reads the stream as the changed model has it, and is fitted to bring it to where it
is in the unchanged model, so that a later map corrects what earlier ones left over.

Source: reduced-rank regression (Izenman 1975); the form is that of LoRA-Drop's light layers, which it trains instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ...ir.errors import PreconditionError
from ...ir.program import Program
from ...ir.rewrite import Rewriter
from ...ir.structure import structure
from ...ir.weights import Weight
from ..base import Context
from .compensation.base import Compensated
from .compensation.low_rank import low_rank_map
from .flow import Walk
from .norm_metric import Norms, position_weights
from .rows import counted_positions
from .sample_sums import Samples, Sums, chosen_damping
from .units import Unit

aten = torch.ops.aten
_EPSILON = 1e-6
DAMPINGS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
"""Ridges among which is chosen, for inputs of variance one."""


@dataclass(frozen=True, eq=False)
class Run:
    """Neighbouring units that are dropped together: ``replaced`` is read from ``by``."""

    replaced: fx.Node
    by: fx.Node


def runs_of(program: Program, units: Sequence[Unit]) -> list[Run]:
    """Units in graph order, those that follow each other joined."""
    position = {node: i for i, node in enumerate(program.graph.nodes)}
    runs: list[Run] = []
    for unit in sorted(units, key=lambda u: position[u.replaced]):
        if runs and runs[-1].replaced is unit.by:
            runs[-1] = Run(unit.replaced, runs[-1].by)
        else:
            runs.append(Run(unit.replaced, unit.by))
    return runs


def why_not_corrected(run: Run) -> str:
    """Why a run gets no map; empty if it can have one."""
    value = run.by.meta["val"]
    if not value.is_floating_point() or value.dim() not in (2, 3) or not isinstance(value.shape[-1], int):
        return f"the stream at %{run.by.name} is not [.., positions, channels]"
    return ""


def correction_size(unit: Unit, rank: int) -> int:
    """Parameters of the map in the place of a unit; 0 where it gets none."""
    if not rank or why_not_corrected(Run(unit.replaced, unit.by)):
        return 0
    width = int(unit.by.meta["val"].shape[-1])
    return 2 * min(rank, width) * width + width


def correct(
    program: Program, units: Sequence[Unit], rank: int, ctx: Context, rewriter: Rewriter, *, fit: bool = True
) -> tuple[int, list[str]]:
    """Drop units and put maps of low rank in their places, in place.

    Args:
        program: the program.
        units: what to drop.
        rank: of the maps.
        ctx: calibration batches.
        rewriter: of the program.
        fit: whether to fit the maps; otherwise they are zeros, for counting.

    Returns:
        How many maps there are now, and where there could be none, and why.

    Raises:
        PreconditionError: there is no calibration data, or it holds NaN or infinity.
    """
    if fit and not ctx.calibration:
        raise PreconditionError(
            "maps in the place of dropped blocks are fitted on calibration data",
            pass_name=rewriter.made_by,
            remedy="pass calibration= (or --calibration FILE), or rank=0",
        )
    found, dense = structure(program), program.clone()
    norms = Norms(program) if fit else None
    names = {node.name: node for node in dense.graph.nodes}
    streams = structure(dense)
    before = [Walk(dense, streams, batch) for batch in ctx.calibration or ()] if fit else []
    runs, notes, made = runs_of(program, units), list[str](), 0
    for run in ctx.progress(runs, len(runs), "maps in the place of blocks") if fit else runs:
        reason = why_not_corrected(run)
        if reason:
            notes.append(f"no map in its place: {reason}")
            rewriter.replace(run.replaced, run.by, erase=False)
            continue
        width = int(run.by.meta["val"].shape[-1])
        size = min(rank, width)
        factors = torch.zeros(width, size), torch.zeros(size, width), torch.zeros(width)
        if norms is not None:
            samples = Samples()
            target, metric = names[run.replaced.name], norms.channel_weights(run.replaced)
            for number, (batch, old) in enumerate(zip(ctx.calibration or (), before, strict=True)):
                x = Walk(program, found, batch).values({run.by}, {}, 0)[run.by]
                y = old.values({target}, {}, 0)[target]
                x, y = (counted_positions(batch, value).double() for value in (x, y))
                scaled = torch.nn.functional.rms_norm(x, x.shape[-1:], eps=_EPSILON)
                weights = None if metric is None else position_weights(y)
                samples.add(number, len(before), scaled, y - x, products=True, weights=weights)
            factors = _fitted(samples, size, run, metric, rewriter.made_by)
        _insert(rewriter, run, *factors)
        made += 1
    rewriter.erase_dead()
    return made, notes


def _fitted(
    samples: Samples, rank: int, run: Run, weights: torch.Tensor | None, made_by: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(B, A, bias)`` of the best map."""
    whole = samples.all
    assert whole.gram is not None and whole.cross is not None
    if not bool(whole.gram.isfinite().all() and whole.cross.isfinite().all()):
        raise PreconditionError(
            "the stream holds NaN or infinity on the calibration data",
            pass_name=made_by,
            node=run.by.name,
            remedy="look at the calibration data and the weights",
        )

    metric = torch.ones(len(whole.gram), dtype=torch.float64) if weights is None else weights

    def factors(sums: Sums, damping: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``B`` and ``A`` for outputs times the metric, and the means of both sides."""
        assert sums.gram is not None and sums.cross is not None
        mean_x, mean_y = sums.now / sums.count, sums.before / sums.count * metric
        gram = sums.gram / sums.count - torch.outer(mean_x, mean_x)
        cross = sums.cross / sums.count * metric - torch.outer(mean_x, mean_y)
        spread = gram.diagonal().clamp_min(0).sqrt()
        spread = spread.clamp_min(max(1e-6 * float(spread.max()), 1e-30))
        gram = gram / torch.outer(spread, spread)
        left, right = low_rank_map(gram, cross / spread[:, None], rank, damping=damping)
        right = right / spread
        return left, right, mean_y - left @ (right @ mean_x)

    def compensated(sums: Sums, damping: float) -> Compensated:
        left, right, bias = factors(sums, damping)
        return Compensated(left @ right, bias)

    left, right, bias = factors(whole, chosen_damping(samples, torch.diag(metric), compensated, DAMPINGS))
    return left / metric[:, None], right, bias / metric


def _insert(rewriter: Rewriter, run: Run, left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor) -> None:
    dtype = run.by.meta["val"].dtype
    stem = f"{run.replaced.name}.in_place"

    def weight(name: str, value: torch.Tensor) -> fx.Node:
        # In the order in which a file holds it: products with another one round differently.
        stored = value.to(dtype).clone(memory_format=torch.contiguous_format)
        return rewriter.weight(rewriter.fresh_weight_name(f"{stem}.{name}"), Weight.from_tensor(stored))

    down, up, shift = weight("down.weight", right), weight("up.weight", left), weight("up.bias", bias)
    with rewriter.before(run.by.next):
        scaled = rewriter.call(aten.rms_norm.default, run.by, [left.shape[0]], None, _EPSILON, like=run.replaced)
        hidden = rewriter.call(aten.linear.default, scaled, down, like=run.replaced)
        added = rewriter.call(aten.linear.default, hidden, up, shift, like=run.replaced)
        new = rewriter.call(aten.add.Tensor, run.by, added, like=run.replaced)
    rewriter.replace(run.replaced, new, erase=False)
