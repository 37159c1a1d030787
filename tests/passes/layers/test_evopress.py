"""``evopress`` in depth, against brute force over all states, and what it refuses."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from graphlathe.ir.errors import PipelineError
from graphlathe.ir.program import Program
from graphlathe.ir.structure import structure
from graphlathe.passes.layers.evopress import EvoPress
from graphlathe.passes.search.units import removable_units, replacements
from tests.passes.channels.tiny import WIDTH, Attention, Mlp, Stack, data, divergence, program_of, refused, run, stack

BLOCKS = 4


Batches = list[dict[str, torch.Tensor]]


def model_of(seed: int = 0) -> Stack:
    """Four blocks of an attention and an MLP, which cost differently."""
    blocks = [block for _ in range(BLOCKS) for block in (Attention(2, 2), Mlp(9))]
    return stack(*blocks, seed=seed)


def error_of(program: Program, alias: dict[Any, Any], batches: Batches) -> float:
    errors = [
        divergence(program.run(b, alias=alias)["output"].double(), program.run(b)["output"].double()) for b in batches
    ]
    return sum(errors) / len(errors)


def best_state(program: Program, kinds: tuple[str, ...], fits: Callable[[int], bool]) -> tuple[float, set[str]]:
    """The best of all sets of branches that save enough and of which none could stay, by trying every one."""
    found = structure(program)
    units = [(kind, u) for kind in kinds for u in removable_units(found, kind)]
    weights = {"attention": 4 * (WIDTH * 4) + 3 * 4 + WIDTH + 2 * WIDTH, "mlp": 9 * (2 * WIDTH + 1) + 3 * WIDTH}
    weights["block"] = sum(weights.values())
    best: tuple[float, set[str]] = (float("inf"), set())
    for chosen in itertools.product((False, True), repeat=len(units)):
        gone = [pair for pair, is_gone in zip(units, chosen, strict=True) if is_gone]
        saved = sum(weights[kind] for kind, _ in gone)
        if fits(saved) and not any(fits(saved - weights[kind]) for kind, _ in gone):
            error = error_of(program, replacements([u for _, u in gone]), data())
            best = min(best, (error, {f"drop-{kind} {u.index}" for kind, u in gone}), key=lambda pair: pair[0])
    return best


def dropped(stats: Any) -> set[str]:
    return {f"{site['kind']} {site['index']}" for site in stats.plan["sites"] if site["removed"]}


@pytest.mark.parametrize("seed", [0, 1])
def test_branches_are_the_best_of_all_states_under_the_budget(seed: int) -> None:
    """All 256 states are tried: the search must find the best that uses the budget, trading attention for MLPs."""
    program = program_of(model_of(seed))
    target = program.parameter_count - 400
    settings = EvoPress(target=target, generations=40, offspring=16, survivors=4, confidence=0, seed=seed)
    after, stats = run(program, settings, data())
    assert after.parameter_count <= target
    error, wanted = best_state(program, ("attention", "mlp"), lambda saved: saved >= 400)
    assert dropped(stats) == wanted
    # What the pass reports is that error, and what the changed program does.
    assert stats.plan["search"]["chosen"]["score"] == pytest.approx(error, rel=1e-4)
    got = sum(divergence(after.run(b)["output"], program.run(b)["output"]) for b in data()) / len(data())
    assert got == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_whole_blocks_are_the_best_of_all_states(count: int) -> None:
    program = program_of(model_of(2))
    settings = EvoPress(ratio=count / BLOCKS, tied=True, generations=20, offspring=6, survivors=3, confidence=0)
    _, stats = run(program, settings, data())
    each = 9 * (2 * WIDTH + 1) + 3 * WIDTH + 4 * (WIDTH * 4) + 3 * 4 + WIDTH + 2 * WIDTH
    _, wanted = best_state(program, ("block",), lambda saved: saved >= count * each)
    assert dropped(stats) == wanted
    assert len(wanted) == count


def test_the_search_is_never_worse_than_what_it_starts_from() -> None:
    program = program_of(model_of(3))
    plan = run(program, EvoPress(ratio=0.4, generations=6, offspring=6), data())[1].plan
    history = [row["best"] for row in plan["search"]["history"]]
    starts = [p["score"] for p in plan["search"]["evaluated"] if p["origin"].startswith("seed")]
    assert history == sorted(history, reverse=True)
    assert plan["search"]["chosen"]["score"] <= min(starts)
    assert len({p["origin"] for p in plan["search"]["evaluated"]}) > 1


def test_equal_seeds_give_equal_searches() -> None:
    program = program_of(model_of(4))
    settings = EvoPress(ratio=0.3, generations=3, offspring=4, seed=5)
    assert run(program, settings, data())[1].plan == run(program, settings, data())[1].plan


def test_bad_input_is_refused() -> None:
    program = program_of(model_of())
    refused(program, EvoPress(ratio=0.5), None, "needs calibration data")
    refused(program, EvoPress(ratio=0.5), [], "needs calibration data")
    least = min_cost(program)
    error = str(refused(program, EvoPress(target=least - 1), data(), "out of reach"))
    ends = [n.name for n in program.graph.nodes if any(a.op == "get_attr" for a in n.all_input_nodes)]
    assert f"{least:,}" in error and f"never dropped: %{ends[-1]}" in error
    bad = data()
    bad[0]["x"][0, 0, 0] = torch.nan
    for mode in ("depth", "sparsity", "bits"):
        refused(program, EvoPress(mode=mode, ratio=0.5, generations=1), bad, "NaN|not a number|not finite|infinity")
    with pytest.raises(PipelineError, match="one way to say how much"):
        EvoPress()
    with pytest.raises(PipelineError, match="is its own"):
        EvoPress(ratio=0.5, mode="bits", budget="bytes")


def min_cost(program: Program) -> int:
    """What is left when every branch is gone."""
    return sum(program.weights[f"{name}.{part}"].numel for name in ("first", "head") for part in ("weight", "bias"))
