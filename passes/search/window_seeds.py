"""States that drop a run of neighbouring blocks whole and cut the others a little: where both can be done at a place.

Neither alone is best: beyond some length a window costs more than narrower layers would, and short of it narrower
layers everywhere cost more than the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...ir.program import Program
from ..base import Context
from .allocators.knapsack import knapsack
from .allocators.table import LevelTable, State
from .allocators.uniform import uniform
from .levels import Place
from .scores.window import best_windows
from .units import removable_units


def window_seeds(
    program: Program, places: Sequence[Place], table: LevelTable, limit: float, ctx: Context
) -> dict[str, State]:
    """For every number of blocks up to the one that alone meets the limit: the best window, and the rest by knapsack.

    Args:
        program: the program.
        places: its places; of one that can be dropped, the last level that drops is taken.
        table: their costs, and errors if there are any (without, the rest is shared evenly).
        limit: what the whole may cost.
        ctx: calibration batches, run once.

    Returns:
        States by what they are; none where nothing can be dropped, or nothing cut.
    """
    blocks = removable_units(ctx.structure(program), "block")
    dropped: dict[int, dict[int, int]] = {}
    for i, place in enumerate(places):
        if place.block is not None:
            # What is cut elsewhere in a block that goes makes no difference, so nothing is.
            levels = [number for number, level in enumerate(place.levels) if level.drop is not None]
            dropped.setdefault(place.block, {})[i] = levels[-1] if levels else 0
    whole = {block for block, found in dropped.items() if any(found.values())}
    if not whole or not any(level.count for place in places for level in place.levels):
        return {}
    rest = knapsack if all(error is not None for row in table.errors for error in row) else uniform
    savings = sorted(
        sum(table.costs[i][0] - table.costs[i][level] for i, level in dropped[block].items()) for block in whole
    )
    # From so many blocks on, any window meets the limit alone.
    enough = (n for n in range(1, len(blocks)) if table.cost(table.untouched) - sum(savings[:n]) <= limit)
    lengths = range(1, next(enough, len(blocks) - 1) + 1)
    seeds: dict[str, State] = {}
    for count, (window, _) in best_windows(program, blocks, lengths, ctx).items():
        if not whole >= set(window):
            break
        gone = {i: level for block in window for i, level in dropped[block].items()}
        smaller = _without(table, gone)
        if smaller.cost(smaller.smallest()) <= limit:
            state = rest(smaller, limit).state
            seeds[f"window of {count}, {rest.__name__}"] = tuple(gone.get(i, level) for i, level in enumerate(state))
        if smaller.cost(smaller.untouched) <= limit:
            break
    return seeds


def _without(table: LevelTable, gone: dict[int, int]) -> LevelTable:
    """The table in which some sites have the one level that was chosen for them."""
    return replace(
        table,
        costs=tuple((row[gone[i]],) if i in gone else row for i, row in enumerate(table.costs)),
        errors=tuple((row[gone[i]],) if i in gone else row for i, row in enumerate(table.errors)),
    )
