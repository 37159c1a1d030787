"""Values inside a program on calibration data, as rows: what closed forms are fitted on."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ...ir.errors import PreconditionError
from ...ir.program import Program
from ..base import Batch
from ..fidelity import position_mask, seeded
from ..search.compensation.normal_equations import solve
from .positions import Steps, moved

MOST_ROWS = 16384
"""Positions that a closed form is fitted on at most; more change it little, and would have to be kept in memory."""


class _SeenAll(Exception):
    """Every wanted value has come by: the rest of the graph is not needed."""


class Observed:
    """One program on calibration data, run from where the last look was instead of from the start.

    Args:
        program: the program. What comes before `advance`d values must not change any more.
        batches: named inputs; as many are used as `MOST_ROWS` positions take.
    """

    def __init__(self, program: Program, batches: Sequence[Batch]) -> None:
        self.program = program
        self.batches = list(batches)
        self._known: list[dict[fx.Node, Any]] = [{} for _ in batches]

    def advance(self, node: fx.Node) -> None:
        """Remember a value from which everything that is looked at later follows, in place of the one before."""
        for index, known in enumerate(self._known):
            self._known[index] = self._run(index, {node}) if node not in known else known

    def rows(self, nodes: Sequence[fx.Node], steps: Sequence[Steps] | None = None) -> list[torch.Tensor]:
        """The values of some nodes, without masked positions.

        Args:
            nodes: values of shape [..., channels] with the same leading dimensions, after the steps.
            steps: for each how its positions are rearranged first (`positions.steps_between`); None for not at all.

        Returns:
            For each node [positions, channels], in float64 where the value is, else float32.

        Raises:
            PreconditionError: a value is no finite number.
        """
        ways = steps or [()] * len(nodes)
        wanted = {*nodes, *(step for way in ways for step in way)}
        found: list[list[torch.Tensor]] = [[] for _ in nodes]
        count = 0
        for index, batch in enumerate(self.batches):
            seen = self._run(index, wanted)
            for place, (node, way) in enumerate(zip(nodes, ways, strict=True)):
                found[place].append(_positions(moved(seen[node], way, seen), batch, node, index))
            count += len(found[0][-1])
            if count >= MOST_ROWS:
                del self.batches[index + 1 :], self._known[index + 1 :]
                break
        return [torch.cat(parts)[:MOST_ROWS] for parts in found]

    def _run(self, index: int, wanted: set[fx.Node]) -> dict[fx.Node, Any]:
        """The wanted values for one batch; nothing after the last of them is run."""
        seen: dict[fx.Node, Any] = {}

        def observe(node: fx.Node, value: Any) -> None:
            if node in wanted:
                seen[node] = value
                if len(seen) == len(wanted):
                    raise _SeenAll

        program = self.program
        feeds = program.feeds(**self.batches[index])
        with contextlib.suppress(_SeenAll):
            seeded(lambda: program.run(feeds, observe=observe, given=self._known[index]))
        return seen


def _positions(value: torch.Tensor, batch: Batch, node: fx.Node, index: int) -> torch.Tensor:
    mask = position_mask(batch, value.shape[:-1], inside=True)
    flat = value.reshape(-1, value.shape[-1])
    flat = flat if mask is None else flat[mask.reshape(-1) != 0]
    if not bool(flat.isfinite().all()):
        raise PreconditionError(
            f"a value is no finite number for calibration batch {index}",
            node=node.name,
            expected="finite numbers",
            remedy="look for NaN or infinity in the calibration data and the weights",
        )
    return flat if flat.dtype == torch.float64 else flat.float()


def twin(program: Program, node: fx.Node) -> fx.Node:
    """The node of the same name in a clone's main graph."""
    return next(n for n in program.graph.nodes if n.name == node.name)


def affine_fit(
    rows: torch.Tensor, wanted: torch.Tensor, damping: float, start: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The affine map that minimises ``|rows W^T + b - wanted|^2 + damping * |W - start|^2`` (ridge regression).

    Args:
        rows: [positions, in].
        wanted: [positions, out].
        damping: relative to the mean variance of the rows.
        start: [out, in], what the damping pulls towards; None for zero.

    Returns:
        float64 ``W`` [out, in] and ``b`` [out].
    """
    x, y = rows.double(), wanted.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    old = torch.zeros(y.shape[1], x.shape[1], dtype=torch.float64) if start is None else start.double()
    weight = old + _ridge(x, y - x @ old.T, damping).T
    return weight, mean_y - weight @ mean_x


def linear_fit(rows: torch.Tensor, wanted: torch.Tensor, damping: float, start: torch.Tensor) -> torch.Tensor:
    """`affine_fit` without the constant.

    Returns:
        float64 [out, in].
    """
    x, y, old = rows.double(), wanted.double(), start.double()
    return old + _ridge(x, y - x @ old.T, damping).T


def _ridge(x: torch.Tensor, y: torch.Tensor, damping: float) -> torch.Tensor:
    """``(X^T X + d I)^-1 X^T Y``; of fewer rows than columns by ``X^T (X X^T + d I)^-1 Y``, which is the same."""
    count, width = x.shape
    if count >= width:
        return solve(x.T @ x, x.T @ y, damping)
    # The damping is relative to the mean of the diagonal, which has as much in it but another length.
    return x.T @ solve(x @ x.T, y, damping * count / width)


def unexplained(wanted: torch.Tensor, got: torch.Tensor) -> float:
    """The share of the variance of ``wanted`` that ``got`` leaves over."""
    spread = float((wanted - wanted.mean(0)).square().sum())
    return float((wanted - got).square().sum()) / spread if spread > 0 else 0.0


__all__ = ["MOST_ROWS", "Observed", "affine_fit", "linear_fit", "twin", "unexplained"]
