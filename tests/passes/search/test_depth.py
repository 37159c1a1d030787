"""Seeds of a search over depth: each fits, windows are runs of neighbours."""

from __future__ import annotations

import pytest

from graphlathe.passes.search.allocators.table import LevelTable
from graphlathe.passes.search.depth import depth_seeds
from graphlathe.passes.search.levels import Place
from graphlathe.passes.search.place_table import Table
from graphlathe.passes.search.scores import SCORES
from tests.passes.search.small_models import context, meter_of, unit_places
from tests.zoo_programs import traced, zoo_parameters


def table_of(name: str, places: list[Place]) -> tuple[Table, LevelTable]:
    meter = meter_of(traced(name))
    whole = meter.whole([], [p.levels[1].drop for p in places if p.levels[1].drop is not None])
    table = Table(places, meter, whole=whole, total=meter.total)
    return table, table.levels()


@pytest.mark.parametrize("name", zoo_parameters(["llama", "bert", "t5"]))
@pytest.mark.parametrize("granularity", ["block", "branches"])
@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_every_seed_fits(name: str, granularity: str, ratio: float) -> None:
    branches = granularity == "branches"
    places = unit_places(name, "attention") + unit_places(name, "mlp") if branches else unit_places(name, "block")
    table, levels = table_of(name, places)
    limit = table.limit(ratio, None)
    seeds = depth_seeds(traced(name), places, levels, limit, context(name, 2))
    assert set(seeds) >= {"spread", *(f"{s}, {how}" for s in SCORES for how in ("greedy", "knapsack"))}
    for label, state in seeds.items():
        levels.check(state)
        assert levels.cost(state) <= limit, label
    windows = [state for label, state in seeds.items() if label.startswith("window")]
    assert len(windows) <= 1
    for state in windows:
        gone = sorted({p.block for p, level in zip(places, state, strict=True) if level and p.block is not None})
        assert gone == list(range(gone[0], gone[-1] + 1))
        assert f"window of {len(gone)}" in seeds
    if name != "t5" and ratio == 0.5:
        # Half of three equal blocks: two must go.
        assert windows and (branches or sum(windows[0]) == 2)


def test_a_score_that_is_no_number_is_the_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    places = unit_places("llama", "block")
    table, levels = table_of("llama", places)
    nan = {0: float("nan"), 1: 1.0, 2: 2.0}
    monkeypatch.setattr("graphlathe.passes.search.depth.SCORES", {"nan": lambda *unused: nan})
    seeds = depth_seeds(traced("llama"), places, levels, table.limit(0.3, None), context("llama"))
    assert seeds["nan, greedy"] == (0, 1, 0)
