"""``evopress`` against brute force over all states, and its levels against solutions of single layers."""

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
from graphlathe.passes.search.local.gptq import gptq
from graphlathe.passes.search.local.sparsegpt import sparsegpt
from graphlathe.passes.search.units import removable_units, replacements
from tests.passes.channels.tiny import WIDTH, Attention, Mlp, Stack, data, program_of, refused, run, stack

BLOCKS = 4


def model_of(seed: int = 0) -> Stack:
    """Four blocks of an attention and an MLP, which cost differently."""
    blocks = [block for _ in range(BLOCKS) for block in (Attention(2, 2), Mlp(9))]
    return stack(*blocks, seed=seed)


def divergence(got: torch.Tensor, want: torch.Tensor) -> float:
    """The mean divergence of distributions over classes; in float64."""
    p, q = torch.log_softmax(want, -1), torch.log_softmax(got, -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def error_of(program: Program, alias: dict[Any, Any], batches: list[dict[str, torch.Tensor]]) -> float:
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


def inputs_of_layers(model: Stack) -> dict[str, torch.Tensor]:
    """What each linear layer of the blocks reads on the calibration data: float64 [rows, in]."""
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = []
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.startswith("blocks."):

            def record(_: Any, args: Any, out: Any, name: str = name) -> None:
                seen.setdefault(name, []).append(args[0].flatten(0, 1))

            hooks.append(layer.register_forward_hook(record))
    with torch.no_grad():
        for batch in data():
            model(batch["x"])
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


def layer_order(model: Stack) -> list[str]:
    order = ("q", "k", "v", "o", "up", "down")
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith("blocks.")]
    return sorted(names, key=lambda n: (int(n.split(".")[1]), order.index(n.split(".")[2])))


def test_sparse_weights_are_the_layers_own_solutions() -> None:
    """Each layer has exactly the planned number of nonzeros, and is SparseGPT's answer to what it reads in the uncut
    model; and the whole obeys the budget.
    """
    model = stack(Attention(2, 2), Mlp(9), Attention(2, 2), Mlp(9), seed=5)
    program = program_of(model)
    after, stats = run(program, EvoPress(mode="sparsity", ratio=0.5, levels=6, generations=3, offspring=4), data())
    rows = inputs_of_layers(model)
    planned = 0
    for site, name in zip(stats.plan["sites"], layer_order(model), strict=True):
        old = program.weights[f"{name}.weight"].tensor()
        new = after.weights[f"{name}.weight"].tensor()
        if not site["level"]:
            assert torch.equal(new, old)
            planned += old.numel()
            continue
        nonzeros = int(site["level"].split("nonzeros=")[1].split()[0])
        planned += nonzeros
        assert int((new != 0).sum()) == nonzeros
        gram = rows[name].T @ rows[name] / len(rows[name])
        torch.testing.assert_close(new, sparsegpt(old, gram, nonzeros), rtol=0, atol=1e-9)
    whole = sum(program.weights[f"{name}.weight"].numel for name in layer_order(model))
    assert whole * 0.4 < planned <= whole * 0.5


def test_bits_are_the_planned_ones() -> None:
    model = stack(Attention(2, 2), Mlp(9), Attention(2, 2), Mlp(9), seed=6)
    model.float()
    batches = [{"x": b["x"].float()} for b in data()]
    from graphlathe.ir.from_torch import trace

    program = trace(model, batches[0])
    after, stats = run(program, EvoPress(mode="bits", ratio=0.6, generations=3, offspring=4), batches)
    rows = {name: value.double() for name, value in inputs_of_layers(model.double()).items()}
    model.float()
    chosen = {}
    for site, name in zip(stats.plan["sites"], layer_order(model), strict=True):
        if site["level"]:
            chosen[name] = int(site["level"].split("bits=")[1].split()[0])
    assert chosen and set(chosen.values()) <= {8, 4, 3, 2}
    # The model with each layer replaced by GPTQ's answer does what the program with packed codes does.
    with torch.no_grad():
        for name, bits in chosen.items():
            layer = model.get_submodule(name)
            gram = (rows[name].T @ rows[name] / len(rows[name])).float()
            solved = gptq(layer.weight.detach(), gram, bits=bits)  # type: ignore[arg-type]
            layer.weight.copy_(solved.dequantize())  # type: ignore[operator,union-attr]
        for batch in batches:
            torch.testing.assert_close(after.run(batch)["output"], model(batch["x"]), rtol=1e-3, atol=1e-3)
    assert after.weight_nbytes < program.weight_nbytes


def test_bad_input_is_refused() -> None:
    program = program_of(model_of())
    refused(program, EvoPress(ratio=0.5), None, "needs calibration data")
    refused(program, EvoPress(ratio=0.5), [], "needs calibration data")
    least = min_cost(program)
    assert f"{least:,}" in str(refused(program, EvoPress(target=least - 1), data(), "out of reach"))
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
