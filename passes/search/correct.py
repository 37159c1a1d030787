"""A small map in the place of what was dropped.

A dropped run of blocks leaves the stream as it was before them. What they added is predicted from that stream by a map
of low rank, fitted in closed form on calibration data, so nothing is trained:

    before   x ── block ── block ── y          after   x ─┬─ rms ─ A [r, d] ─ B [d, r] ─ + ── y'
                                                          └──────────────────────────────┘

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
from ..base import Batch, Context
from ..fidelity import position_mask
from .compensation.low_rank import low_rank_map
from .flow import Walk
from .units import Unit

aten = torch.ops.aten
_EPSILON = 1e-6
_DAMPING = 0.01


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
    names = {node.name: node for node in dense.graph.nodes}
    before = [Walk(dense, structure(dense), batch) for batch in ctx.calibration or ()] if fit else []
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
        if fit:
            walks = [Walk(program, found, batch) for batch in ctx.calibration or ()]
            pairs = [
                _rows(batch, now.values({run.by}, {}, 0)[run.by], old.values({target}, {}, 0)[target])
                for target in [names[run.replaced.name]]
                for batch, now, old in zip(ctx.calibration or (), walks, before, strict=True)
            ]
            factors = _fitted(pairs, size, run, rewriter.made_by)
        _insert(rewriter, run, *factors)
        made += 1
    rewriter.erase_dead()
    return made, notes


def _rows(batch: Batch, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The map's inputs and wanted outputs at the positions that count: float64 [rows, channels]."""
    mask = position_mask(batch, x.shape[:-1], inside=True) if x.dim() == 3 else None
    x, y = (v.double().reshape(-1, v.shape[-1]) for v in (x, y))
    if mask is not None:
        x, y = x[mask.reshape(-1) != 0], y[mask.reshape(-1) != 0]
    return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=_EPSILON), y - x


def _fitted(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], rank: int, run: Run, made_by: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(B, A, bias)`` of the best map."""
    count = sum(len(x) for x, _ in pairs)
    mean_x, mean_y = (sum(pair[i].sum(0) for pair in pairs) / max(count, 1) for i in (0, 1))
    assert isinstance(mean_x, torch.Tensor) and isinstance(mean_y, torch.Tensor)
    gram = sum((x - mean_x).T @ (x - mean_x) for x, _ in pairs)
    cross = sum((x - mean_x).T @ (y - mean_y) for x, y in pairs)
    assert isinstance(gram, torch.Tensor) and isinstance(cross, torch.Tensor)
    if not bool(gram.isfinite().all() and cross.isfinite().all()):
        raise PreconditionError(
            "the stream holds NaN or infinity on the calibration data",
            pass_name=made_by,
            node=run.by.name,
            remedy="look at the calibration data and the weights",
        )
    left, right = low_rank_map(gram / max(count, 1), cross / max(count, 1), rank, damping=_DAMPING)
    return left, right, mean_y - left @ (right @ mean_x)


def _insert(rewriter: Rewriter, run: Run, left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor) -> None:
    dtype = run.by.meta["val"].dtype
    stem = f"{run.replaced.name}.in_place"

    def weight(name: str, value: torch.Tensor) -> fx.Node:
        stored = Weight.from_tensor(value.to(dtype, copy=True))
        return rewriter.weight(rewriter.fresh_weight_name(f"{stem}.{name}"), stored)

    down, up, shift = weight("down.weight", right), weight("up.weight", left), weight("up.bias", bias)
    with rewriter.before(run.by.next):
        scaled = rewriter.call(aten.rms_norm.default, run.by, [left.shape[0]], None, _EPSILON, like=run.replaced)
        hidden = rewriter.call(aten.linear.default, scaled, down, like=run.replaced)
        added = rewriter.call(aten.linear.default, hidden, up, shift, like=run.replaced)
        new = rewriter.call(aten.add.Tensor, run.by, added, like=run.replaced)
    rewriter.replace(run.replaced, new, erase=False)
