"""Seeds that drop a window and narrow the rest: the window is the best of its length, the rest the best that fits."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from graphlathe.passes.base import Context
from graphlathe.passes.channels.compress import Compress
from graphlathe.passes.search.allocators.table import LevelTable
from graphlathe.passes.search.depth import depth_seeds
from graphlathe.passes.search.place_table import Table
from graphlathe.passes.search.recipe import table_of
from graphlathe.passes.search.scores.window import best_window
from graphlathe.passes.search.units import removable_units
from graphlathe.passes.search.window_seeds import window_seeds
from tests.passes.search.small_models import context, found
from tests.zoo_programs import traced

EVERYTHING = ("mlp", "heads", "drop-attention", "drop-mlp")


def tables(name: str, sites: tuple[str, ...] = EVERYTHING) -> tuple[Table, LevelTable]:
    """Places with errors that are all different, so that there is one best state."""
    recipe = Compress(sites=sites, ratio=0.5, steps=2, score="magnitude").recipe()
    table = table_of(traced(name), recipe, Context())
    table.places = [
        replace(p, levels=tuple(replace(level, error=n**2 + 0.01 * i * n) for n, level in enumerate(p.levels)))
        for i, p in enumerate(table.places)
    ]
    return table, table.levels()


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.7])
def test_the_window_goes_and_the_rest_is_the_best_that_fits(name: str, ratio: float) -> None:
    table, levels = tables(name)
    limit, ctx = table.limit(ratio, None), context(name, 2)
    seeds = window_seeds(traced(name), table.places, levels, limit, ctx)
    blocks = removable_units(found(name), "block")
    lengths = [int(label.removeprefix("window of ").removesuffix(", knapsack")) for label in seeds]
    assert lengths == {0.2: [1], 0.5: [1, 2], 0.7: [1, 2]}[ratio]
    for length, state in zip(lengths, seeds.values(), strict=True):
        window, _ = best_window(traced(name), blocks, length, ctx)
        gone = [place.block in window for place in table.places]
        chosen = [place.levels[n] for place, n in zip(table.places, state, strict=True)]
        assert all(level.drop is not None for level, out in zip(chosen, gone, strict=True) if out)
        free = [range(len(p.levels)) if not out else [n] for p, n, out in zip(table.places, state, gone, strict=True)]
        fitting = [s for s in itertools.product(*free) if levels.cost(s) <= limit]
        assert levels.error(state) == min(error for s in fitting if (error := levels.error(s)) is not None)


def test_it_ends_with_the_window_that_is_enough_alone() -> None:
    table, levels = tables("llama")
    whole = max(sum(p.levels[0].cost for p in table.places if p.block == block) for block in range(3))
    seeds = window_seeds(traced("llama"), table.places, levels, table.total - whole, context("llama"))
    assert list(seeds) == ["window of 1, knapsack"]
    assert levels.cost(seeds["window of 1, knapsack"]) <= table.total - whole


def test_without_errors_the_rest_is_shared_evenly() -> None:
    table, _ = tables("llama")
    table.places = [replace(p, levels=tuple(replace(level, error=None) for level in p.levels)) for p in table.places]
    seeds = window_seeds(traced("llama"), table.places, table.levels(), table.limit(0.5, None), context("llama"))
    assert seeds and all("uniform" in label for label in seeds)


@pytest.mark.parametrize("sites", [("mlp", "heads"), ("drop-attention", "drop-mlp"), ("drop-block",)])
def test_there_are_none_where_blocks_only_go_or_only_get_narrower(sites: tuple[str, ...]) -> None:
    table, levels = tables("llama", sites)
    limit = table.limit(0.4, None)
    assert window_seeds(traced("llama"), table.places, levels, limit, context("llama")) == {}
    if "mlp" not in sites:
        assert depth_seeds(traced("llama"), table.places, levels, limit, context("llama"))
