"""The run of neighbouring blocks that together turn their stream least.

Influences of single blocks do not add up: k blocks may each turn the stream little, and all the same way. A window is
scored as a whole, ``1 - E[cos(x_s, x_{s+k})]``.

Source: Gromov et al. 2024 (arXiv 2403.17887), which drops one window of layers; the measure is that of ShortGPT.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from ....ir.errors import PreconditionError
from ....ir.program import Program
from ...base import Context
from ..units import Unit
from .block_influence import cosine
from .stream_change import stream_change


def best_window(program: Program, units: Sequence[Unit], k: int, ctx: Context) -> tuple[list[int], dict[int, float]]:
    """The ``k`` neighbouring units whose removal turns the stream least.

    Args:
        program: the program.
        units: blocks, in execution order (`units.removable_units` of granularity ``block``).
        k: how many, at least 1.
        ctx: calibration batches.

    Returns:
        The units' indices, and the score of each possible window by the index of its first unit; lower matters less.

    Raises:
        PreconditionError: there are no ``k`` neighbours that can all be dropped.
    """
    found = best_windows(program, units, [k], ctx)
    if k not in found:
        raise PreconditionError(
            f"there are no {k} neighbouring units that can all be dropped",
            expected=f"a number from 1 to {_longest(units)}",
        )
    return found[k]


def best_windows(
    program: Program, units: Sequence[Unit], lengths: Iterable[int], ctx: Context
) -> dict[int, tuple[list[int], dict[int, float]]]:
    """The best window of each length, as `best_window`, all in one run per batch; none of a length that has none."""
    windows = {k: [w for s in range(len(units) - k + 1) if k > 0 and _joined(w := units[s : s + k])] for k in lengths}
    flat = [window for each in windows.values() for window in each]
    if not flat:
        return {}
    pairs = [(window[0].by, window[-1].replaced) for window in flat]
    turned = iter(stream_change(program, pairs, (), ctx, cosine, "windows"))
    found: dict[int, tuple[list[int], dict[int, float]]] = {}
    for k, each in windows.items():
        scores = {window[0].index: 1.0 - next(turned) for window in each}
        if each:
            best = min(each, key=lambda window: scores[window[0].index])
            found[k] = [unit.index for unit in best], scores
    return found


def _joined(window: Sequence[Unit]) -> bool:
    """Whether each unit starts where the one before it ends, and all can go."""
    neighbours = all(a.replaced is b.by for a, b in itertools.pairwise(window))
    return neighbours and not any(unit.blocked for unit in window)


def _longest(units: Sequence[Unit]) -> int:
    longest = run = 0
    for place, unit in enumerate(units):
        joined = run and units[place - 1].replaced is unit.by
        run = 0 if unit.blocked else run + 1 if joined else 1
        longest = max(longest, run)
    return longest
