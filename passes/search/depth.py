"""Searching over depth: which blocks, or attention and MLP branches, the whole model does best without."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ...ir.program import Program
from ..base import Context
from .allocators.greedy import greedy
from .allocators.knapsack import knapsack
from .allocators.table import LevelTable, State
from .allocators.uniform import uniform
from .apply import DROPS
from .levels import Place
from .scores import SCORES
from .scores.window import best_windows
from .units import removable_units


def depth_seeds(
    program: Program, places: Sequence[Place], table: LevelTable, limit: float, ctx: Context
) -> dict[str, State]:
    """States to start from: what every heuristic for depth would drop.

    Rankings by each score of `scores.SCORES` (the loss of single removal on the first calibration batch only), filled
    greedily and by the knapsack; the best window of neighbouring blocks of every length that fits; even spread.

    Args:
        program: the program.
        places: places with two levels each, kept and dropped.
        table: their costs.
        limit: what the whole may cost.
        ctx: calibration batches.
    """
    found = ctx.structure(program)
    seeds: dict[str, State] = {"spread": uniform(table, limit).state}
    for name, score in SCORES.items():
        data = replace(ctx, calibration=(ctx.calibration or ())[:1]) if name == "loss" else ctx
        errors: list[tuple[float, float]] = [(0.0, 0.0)] * len(places)
        for kind in dict.fromkeys(place.kind for place in places):
            mine = [n for n, place in enumerate(places) if place.kind == kind]
            every = {unit.index: unit for unit in removable_units(found, DROPS[kind])}
            values = score(program, [every[places[n].index] for n in mine], (), data)
            for n in mine:
                value = values[places[n].index]
                errors[n] = (0.0, math.inf if math.isnan(value) else max(value, 0.0))
        scored = replace(table, errors=tuple(errors))
        seeds[f"{name}, greedy"] = greedy(scored, limit).state
        seeds[f"{name}, knapsack"] = knapsack(scored, limit).state
    return seeds | _windows(program, places, table, limit, ctx)


def _windows(
    program: Program, places: Sequence[Place], table: LevelTable, limit: float, ctx: Context
) -> dict[str, State]:
    """The best run of neighbouring blocks, as short as fits the limit."""
    blocks = removable_units(ctx.structure(program), "block")
    homes = [place.block for place in places]
    lengths = [count for count in range(1, len(blocks)) if _worth(table, homes, count, limit)]
    for count, (chosen, _) in best_windows(program, blocks, lengths, ctx).items():
        state = tuple(int(home in chosen) for home in homes)
        if table.cost(state) <= limit:
            return {f"window of {count}": state}
    return {}


def _worth(table: LevelTable, homes: Sequence[int | None], count: int, limit: float) -> bool:
    """Whether dropping so many blocks, the dearest ones, could be enough."""
    saved: dict[int | None, float] = {}
    for home, row in zip(homes, table.costs, strict=True):
        saved[home] = saved.get(home, 0.0) + row[0] - row[-1]
    return table.cost(table.untouched) - sum(sorted(saved.values(), reverse=True)[:count]) <= limit
