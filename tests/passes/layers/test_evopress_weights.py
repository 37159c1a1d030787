"""``evopress`` over weights (sparsity, bits): brute force over all states, single layers solved alone, both laws."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.passes.layers.evopress import EvoPress
from graphlathe.passes.search.local.gptq import gptq
from graphlathe.passes.search.local.sparsegpt import sparsegpt
from tests.passes.channels.tiny import WIDTH, Attention, Mlp, Stack, data, divergence, program_of, refused, run, stack

BITS_METHODS = ("gptq", "round-to-nearest")


Batches = list[dict[str, torch.Tensor]]


class Map(torch.nn.Module):
    """x + up(tanh(x)): a block with one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.up(torch.tanh(x))


def maps(seed: int) -> Stack:
    """Three such blocks. The second one adds little, which errors of single layers do not tell."""
    model = stack(Map(), Map(), Map(), seed=seed)
    weight_of(model, "blocks.1.up").mul_(0.1)
    return model


def inputs_of_layers(model: Stack, batches: Batches) -> dict[str, torch.Tensor]:
    """What each linear layer of the blocks reads: [rows, in]."""
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = []
    for name in layer_order(model):

        def record(_: Any, args: Any, out: Any, name: str = name) -> None:
            seen.setdefault(name, []).append(args[0].flatten(0, 1))

        hooks.append(model.get_submodule(name).register_forward_hook(record))
    with torch.no_grad():
        for batch in batches:
            model(batch["x"])
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


def layer_order(model: Stack) -> list[str]:
    order = ("q", "k", "v", "o", "up", "down")
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith("blocks.")]
    return sorted(names, key=lambda n: (int(n.split(".")[1]), order.index(n.split(".")[2])))


def weight_of(model: Stack, name: str) -> torch.Tensor:
    return model.get_parameter(f"{name}.weight").detach()


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest points of a grid for each row, from its least to its largest number, both widened to 0."""
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round()
    return (((weight / scale).round() + zero).clamp(0, 2**bits - 1) - zero) * scale


def solution(weight: torch.Tensor, rows: torch.Tensor, size: int, method: str) -> torch.Tensor:
    """A layer of so many nonzeros or bits, solved alone on what it reads in the uncut model."""
    if method == "round-to-nearest":
        return rounded(weight, size)
    gram = rows.T @ rows / len(rows)
    return gptq(weight, gram, bits=size).dequantize() if method == "gptq" else sparsegpt(weight, gram, size)


def corrected(weight: torch.Tensor, new: torch.Tensor, rows: torch.Tensor, rank: int) -> torch.Tensor:
    """With the leading directions of what a layer's outputs lost given back."""
    lost = weight - new
    directions = torch.linalg.svd(rows @ lost.T, full_matrices=False).Vh[:rank]
    return new + directions.T @ directions @ lost


def with_solutions(
    model: Stack, sizes: Mapping[str, int], rows: Mapping[str, torch.Tensor], method: str, rank: int = 0
) -> Stack:
    """The model with some layers replaced by their solutions, with maps of a rank beside them."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name, size in sizes.items():
            new = solution(weight_of(model, name), rows[name], size, method)
            new = corrected(weight_of(model, name), new, rows[name], rank) if rank else new
            changed.get_parameter(f"{name}.weight").copy_(new)
    return changed


def chosen(stats: Any, model: Stack) -> dict[str, int]:
    """The nonzeros or bits of the layers that are not left as they are."""
    sites = zip(stats.plan["sites"], layer_order(model), strict=True)
    return {name: int(site["level"].split()[0].split("=")[1]) for site, name in sites if site["level"]}


def in_float32(model: Stack) -> tuple[Program, Batches]:
    """The model, changed to float32, as a program; and its data."""
    model.float()
    batches = [{"x": b["x"].float()} for b in data()]
    return trace(model, batches[0]), batches


def packed(model: Stack, name: str, bits: int) -> int:
    """The bytes of a layer in 2, 4 or 8 bits: codes, rows filled up to a byte, with a scale and a zero for each."""
    rows, columns = weight_of(model, name).shape
    return rows * (math.ceil(columns * bits / 8) + 5)


def best_solution(
    model: Stack, costs: Mapping[int | None, int], budget: int, method: str, batches: Batches, rank: int = 0
) -> tuple[float, dict[str, int]]:
    """The best of all choices of a level for each layer (None as it is) that cost no more than the budget together."""
    rows = inputs_of_layers(model, batches)
    found: list[tuple[float, dict[str, int]]] = []
    with torch.no_grad():
        wanted = [model(b["x"]).double() for b in batches]
        for state in itertools.product(costs, repeat=len(rows)):
            if sum(costs[level] for level in state) <= budget:
                sizes = {name: level for name, level in zip(rows, state, strict=True) if level is not None}
                changed = with_solutions(model, sizes, rows, method, rank)
                errors = [divergence(changed(b["x"]).double(), y) for b, y in zip(batches, wanted, strict=True)]
                found.append((sum(errors) / len(errors), sizes))
    return min(found, key=lambda pair: pair[0])


SEARCH: dict[str, Any] = {"generations": 20, "offspring": 12, "survivors": 4, "confidence": 0}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sparsities_are_the_best_of_all_states_under_the_budget(seed: int) -> None:
    """Three layers of 36, 20 or 4 nonzeros: all 27 states are tried on the eager model."""
    model = maps(seed)
    program = program_of(model)
    error, wanted = best_solution(model, {None: 36, 20: 20, 4: 4}, 60, "sparsegpt", data())
    target = program.parameter_count - 3 * 36 + 60
    _, stats = run(program, EvoPress(mode="sparsity", levels=2, target=target, **SEARCH), data())
    assert chosen(stats, model) == wanted
    assert stats.plan["search"]["chosen"]["score"] == pytest.approx(error, rel=1e-4)
    assert stats.plan["search"]["history"][0]["best"] > 1.01 * error  # what it starts from is not the best


@pytest.mark.parametrize("method", BITS_METHODS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bits_are_the_best_of_all_states_under_the_budget(seed: int, method: str) -> None:
    """Three layers as they are, in 4 bits or in 2: all 27 states are tried on the eager model."""
    model = maps(seed)
    program, batches = in_float32(model)
    costs: dict[int | None, int] = {None: 4 * WIDTH**2} | {n: packed(model, "blocks.0.up", n) for n in (4, 2)}
    budget = sum(costs.values())
    error, wanted = best_solution(model, costs, budget, method, batches)
    target = program.weight_nbytes - 3 * costs[None] + budget
    settings = EvoPress(mode="bits", bits=(4, 2), method=method, target=target, **SEARCH)
    after, stats = run(program, settings, batches)
    assert chosen(stats, model) == wanted
    assert after.weight_nbytes <= target
    assert stats.plan["search"]["chosen"]["score"] == pytest.approx(error, rel=1e-4)
    assert stats.plan["search"]["history"][0]["best"] > 1.01 * error  # what it starts from is not the best


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sparsities_with_maps_are_the_best_of_all_states(seed: int) -> None:
    """Three layers of 36 numbers, or 14 or 4 nonzeros with maps of 12: they, too, are in the budget."""
    model = maps(seed)
    program = program_of(model)
    error, wanted = best_solution(model, {None: 36, 14: 26, 4: 16}, 78, "sparsegpt", data(), rank=1)
    target = program.parameter_count - 3 * 36 + 78
    after, stats = run(program, EvoPress(mode="sparsity", levels=2, rank=1, target=target, **SEARCH), data())
    assert chosen(stats, model) == wanted
    assert stats.plan["search"]["chosen"]["score"] == pytest.approx(error, rel=1e-4)
    assert sum(int((after.weights[name].tensor() != 0).sum()) for name in after.used_weights()) <= target
    got = [divergence(after.run(b)["output"], program.run(b)["output"]) for b in data()]
    assert sum(got) / len(got) == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize("method", BITS_METHODS)
def test_bits_with_maps_are_the_best_of_all_states(method: str) -> None:
    """Three layers as they are, or in 4 or 2 bits with maps of 12 numbers: what the program holds is the budget."""
    model = maps(2)
    program, batches = in_float32(model)
    costs: dict[int | None, int] = {None: 4 * WIDTH**2}
    costs |= {n: packed(model, "blocks.0.up", n) + 4 * 2 * WIDTH for n in (4, 2)}
    error, wanted = best_solution(model, costs, sum(costs.values()), method, batches, rank=1)
    target = program.weight_nbytes - 3 * costs[None] + sum(costs.values())
    settings = EvoPress(mode="bits", bits=(4, 2), method=method, rank=1, target=target, **SEARCH)
    after, stats = run(program, settings, batches)
    assert chosen(stats, model) == wanted
    assert after.weight_nbytes <= target
    assert after.weight_nbytes == stats.plan["budget"]["after"]
    assert stats.plan["search"]["chosen"]["score"] == pytest.approx(error, rel=1e-4)


def test_layers_too_small_for_maps_stay_whole_and_are_reported() -> None:
    """Maps of rank 3 take 36 numbers beside the 24 of keys and values, and 42 beside 48."""
    program = program_of(stack(Attention(4, 2), Mlp(8), seed=4))
    settings = EvoPress(mode="sparsity", ratio=0.02, levels=2, rank=3, generations=1, offspring=2)
    after, stats = run(program, settings, data())
    assert stats.misses["a layer too small for maps of rank 3 beside it"] == 2
    for name in "kv":
        assert torch.equal(*(p.weights[f"blocks.0.{name}.weight"].tensor() for p in (after, program)))
    every = EvoPress(mode="sparsity", ratio=0.1, levels=2, rank=6)
    refused(program, every, data(), r"can be removed: blocked by .*too small for maps of rank 6 beside it \(6x\)")


def test_sparse_weights_are_the_layers_own_solutions() -> None:
    """Each layer has exactly the planned number of nonzeros, and is SparseGPT's answer to what it reads in the uncut
    model; and the whole obeys the budget.
    """
    model = stack(Attention(2, 2), Mlp(9), Attention(2, 2), Mlp(9), seed=5)
    program = program_of(model)
    after, stats = run(program, EvoPress(mode="sparsity", ratio=0.5, levels=6, generations=3, offspring=4), data())
    rows, nonzeros = inputs_of_layers(model, data()), chosen(stats, model)
    for name in layer_order(model):
        old, new = weight_of(model, name), after.weights[f"{name}.weight"].tensor()
        if name not in nonzeros:
            assert torch.equal(new, old)
            continue
        assert int((new != 0).sum()) == nonzeros[name]
        wanted = solution(old, rows[name], nonzeros[name], "sparsegpt")
        torch.testing.assert_close(new, wanted, rtol=0, atol=1e-9)
    sizes = {name: weight_of(model, name).numel() for name in layer_order(model)}
    assert sum(sizes.values()) * 0.4 < sum((sizes | nonzeros).values()) <= sum(sizes.values()) * 0.5


def test_the_search_starts_from_the_equal_share() -> None:
    """Whatever the steps of the levels, it is never worse than every layer at the sparsity of the whole."""
    model = stack(Attention(2, 2), Mlp(9), Attention(2, 2), Mlp(9), seed=5)
    program = program_of(model)
    sizes = {name: weight_of(model, name).numel() for name in layer_order(model)}
    equal = {name: size - math.ceil(0.075 * size) for name, size in sizes.items()}
    rows = inputs_of_layers(model, data())
    sparse = with_solutions(model, equal, rows, "sparsegpt")
    with torch.no_grad():
        found = [divergence(sparse(b["x"]).double(), model(b["x"]).double()) for b in data()]
    settings = EvoPress(mode="sparsity", ratio=0.075, levels=3, generations=2, offspring=4, confidence=0)
    _, stats = run(program, settings, data())
    seeds = {point["origin"]: point["score"] for point in stats.plan["search"]["evaluated"]}
    assert stats.plan["search"]["chosen"]["score"] <= seeds["seed: equal share"]
    assert seeds["seed: equal share"] == pytest.approx(sum(found) / len(found), rel=1e-4)


@pytest.mark.parametrize("method", BITS_METHODS)
def test_bits_are_the_planned_ones(method: str) -> None:
    """The model with each layer replaced by its own solution does what the program with packed codes does."""
    model = stack(Attention(2, 2), Mlp(9), Attention(2, 2), Mlp(9), seed=6)
    program, batches = in_float32(model)
    settings = EvoPress(mode="bits", method=method, ratio=0.6, generations=3, offspring=4)
    after, stats = run(program, settings, batches)
    bits = chosen(stats, model)
    assert bits and set(bits.values()) <= {8, 4, 3, 2}
    changed = with_solutions(model, bits, inputs_of_layers(model, batches), method)
    with torch.no_grad():
        for batch in batches:
            torch.testing.assert_close(after.run(batch)["output"], changed(batch["x"]), rtol=1e-5, atol=1e-5)
    assert after.weight_nbytes < program.weight_nbytes


@pytest.mark.parametrize("mode", ["sparsity", "bits"])
@pytest.mark.parametrize("amount", ["ratio", "target"])
def test_neutral_settings_change_nothing(mode: str, amount: str) -> None:
    program, batches = in_float32(stack(Attention(2, 2), Mlp(9), seed=7))
    whole = {"sparsity": program.parameter_count, "bits": program.weight_nbytes}
    settings: dict[str, Any] = {"ratio": 0.0} if amount == "ratio" else {"target": whole[mode]}
    after, stats = run(program, EvoPress(mode=mode, **settings), batches)
    assert after.fingerprint() == program.fingerprint()
    assert not any(site["level"] for site in stats.plan["sites"])
    for batch in batches:
        assert torch.equal(after.run(batch)["output"], program.run(batch)["output"])


def hold_zeros(model: Stack) -> set[str]:
    """Two layers have 8 nonzero weights."""
    zeros = torch.randperm(48, generator=torch.Generator().manual_seed(3))[:40]
    planted = {"blocks.0.down", "blocks.2.up"}
    for name in planted:
        weight_of(model, name).view(-1)[zeros] = 0
    return planted


def read_zeros(model: Stack) -> set[str]:
    """Two layers read one channel that is not zero."""
    for block in (0, 2):
        for part in ("weight", "bias"):
            model.get_parameter(f"blocks.{block}.norm.{part}").detach()[1:] = 0
    return {"blocks.0.up", "blocks.2.up"}


def are_not_read(model: Stack) -> set[str]:
    """A block adds nothing but a bias; the error of its first layer does not tell."""
    weight_of(model, "blocks.1.down").zero_()
    return {"blocks.1.up", "blocks.1.down"}


@pytest.mark.parametrize("plant", [hold_zeros, read_zeros, are_not_read])
def test_sparsity_goes_where_weights_are_of_no_use(plant: Callable[[Stack], set[str]]) -> None:
    """Of the six layers of 48 weights, two have 40 of no use."""
    model = stack(Mlp(8), Mlp(8), Mlp(8), seed=8)
    for block in range(3):  # hidden units that are never active would make other weights useless, too
        model.get_parameter(f"blocks.{block}.up.bias").detach().add_(4)
    planted = plant(model)
    program = program_of(model)
    settings = EvoPress(mode="sparsity", levels=4, ratio=80 / (6 * 48), **SEARCH)
    after, stats = run(program, settings, data())
    assert chosen(stats, model) == dict.fromkeys(planted, 8)
    for batch in data(2, seed=9):
        torch.testing.assert_close(after.run(batch)["output"], program.run(batch)["output"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", BITS_METHODS)
@pytest.mark.parametrize("rest", [None, 8])
def test_few_bits_go_where_weights_lie_on_a_coarse_grid(method: str, rest: int | None) -> None:
    """The budget is met by this layer in 2 bits, which lose nothing, and the others as they are, or in 8 bits."""
    model = stack(Mlp(8), Mlp(8), Mlp(8), seed=9)
    planted = "blocks.1.up"
    codes = torch.randint(-1, 3, (8, WIDTH), generator=torch.Generator().manual_seed(3))
    codes[:, 0], codes[:, 1] = -1, 2  # both ends of the grid
    weight_of(model, planted).copy_(codes * torch.tensor([[0.25], [0.5]] * 4))
    program, batches = in_float32(model)
    wanted = {planted: 2} | ({} if rest is None else dict.fromkeys({*layer_order(model)} - {planted}, rest))
    saved = sum(weight_of(model, name).nbytes - packed(model, name, bits) for name, bits in wanted.items())
    settings = EvoPress(mode="bits", method=method, target=program.weight_nbytes - saved, **SEARCH)
    after, stats = run(program, settings, batches)
    assert chosen(stats, model) == wanted
    for batch in batches if rest is None else []:
        assert torch.equal(after.run(batch)["output"], program.run(batch)["output"])
