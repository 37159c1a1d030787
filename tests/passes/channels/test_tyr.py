"""``tyr`` against its levels by brute force in sequence, and an exhaustive search over them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import pytest
import torch

from graphlathe.ir.errors import PipelineError
from graphlathe.passes.base import Batch, Context
from graphlathe.passes.channels.tyr import Tyr
from graphlathe.passes.search.budget import Meter
from graphlathe.passes.search.candidates import Candidates
from graphlathe.passes.search.obs_places import obs_places
from graphlathe.passes.search.sites import channel_sites
from tests.passes.channels.tiny import (
    WIDTH,
    Attention,
    Mlp,
    Stack,
    data,
    divergence,
    hidden_rows,
    program_of,
    refused,
    removed,
    run,
    stack,
)

ATOM = 2 * WIDTH + 1
EXPECTATIONS = ("weighted", "middle")
Levels = dict[int, tuple[list[int], torch.Tensor]]
"""By the number of atoms that go: which ones, and the fitted weight."""


class Layer:
    """What the local pruner knows of a layer: inputs now, outputs wanted, and the damped normal equations."""

    def __init__(self, weight: torch.Tensor, now: torch.Tensor, before: torch.Tensor) -> None:
        self.weight = weight
        gram = now.T @ now / len(now)
        level = 0.01 * gram.diagonal().mean()
        self.matrix = gram + level * torch.eye(len(gram), dtype=torch.float64)
        self.goal = now.T @ (before @ weight.T) / len(now) + level * weight.T

    def fitted(self, kept: Sequence[int]) -> torch.Tensor:
        """The best weight with columns outside of ``kept`` zero: [out, in]."""
        new = torch.zeros_like(self.weight)
        index = list(kept)
        new[:, index] = torch.linalg.solve(self.matrix[index][:, index], self.goal[index]).T
        return new

    def loss(self, kept: Sequence[int]) -> float:
        """The squared error with damping, up to a constant."""
        new = self.fitted(kept)
        return float((new @ self.matrix * new).sum() - 2 * (new.T * self.goal).sum())


def removals(layer: Layer, size: int, rounds: int, counts: Sequence[int]) -> dict[int, list[int]]:
    """The atoms (``size`` columns each) that are gone at each count: every round takes those of lowest loss alone."""
    atoms = layer.weight.shape[1] // size
    stops = sorted({*counts, *(counts[-1] * r // rounds for r in range(1, rounds + 1))})
    gone: list[int] = []
    found: dict[int, list[int]] = {}
    for stop in stops:
        left = [a for a in range(atoms) if a not in gone]
        if stop > len(gone):
            losses = {a: layer.loss([c for b in left if b != a for c in range(b * size, (b + 1) * size)]) for a in left}
            gone = [*gone, *sorted(left, key=losses.__getitem__)[: stop - len(gone)]]
        if stop in counts:
            found[stop] = sorted(gone)
    return found


def last_map(block: torch.nn.Module) -> torch.nn.Linear:
    return block.o if isinstance(block, Attention) else block.down  # type: ignore[return-value]


def size_of(block: torch.nn.Module) -> int:
    return block.heads // block.groups * block.dim if isinstance(block, Attention) else 1


def mean_weight(block: Levels, expected: Sequence[int], atoms: int) -> torch.Tensor:
    """The mean over some levels of sparsity s, each with the weight 1 - s."""
    total = sum(1 - count / atoms for count in expected)
    return torch.stack([block[count][1] * (1 - count / atoms) for count in expected]).sum(0) / total


def levels(
    model: Stack, counts: Sequence[Sequence[int]], expected: Sequence[Sequence[int]], batches: Sequence[Batch]
) -> list[Levels]:
    """The levels of each block. It reads what it would read if all blocks before it had the mean weight of the levels
    that are expected of them.
    """
    changed = copy.deepcopy(model)
    found = []
    for number, block in enumerate(model.blocks):
        before = torch.cat(hidden_rows(model, batches)[number])
        now = torch.cat(hidden_rows(changed, batches)[number])
        weight, size = last_map(block).weight.detach(), size_of(block)
        layer = Layer(weight, now, before)
        rounds = 16 if isinstance(block, Mlp) else 1
        here: Levels = {0: ([], weight)}
        for count, gone in removals(layer, size, rounds, counts[number]).items():
            kept = [c for c in range(weight.shape[1]) if c // size not in gone]
            here[count] = gone, layer.fitted(kept)
        found.append(here)
        with torch.no_grad():
            last_map(changed.blocks[number]).weight.copy_(mean_weight(here, expected[number], weight.shape[1] // size))
    return found


@pytest.mark.parametrize("expectation", EXPECTATIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_levels_are_those_of_brute_force(seed: int, expectation: str) -> None:
    model = stack(Attention(4, 2), Mlp(8), Attention(4, 4), Mlp(7), seed=seed)
    batches, program = data(), program_of(model)
    ctx = Context(calibration=batches)
    sites, _ = channel_sites(program, ctx.structure(program), ("heads", "mlp"))
    counts, middle = [[1], [1, 3, 6], [1, 3], [2, 4]], [1, 3, 1, 2]
    several = [[0, 1], [1, 3], [0, 1, 3], [2, 4]]  # not the 6
    forms = {"weighted": several, "middle": [[count] for count in middle]}
    tables = {form: levels(model, counts, expected, batches) for form, expected in forms.items()}
    wanted = tables.pop(expectation)
    (other,) = tables.values()
    places, blocked = obs_places(
        program, sites, Meter(program, "params", {}), ctx,
        {s.index: c for s, c in zip(sites, counts, strict=True)},
        middle={s.index: m for s, m in zip(sites, middle, strict=True)},
        expected={s.index: e for s, e in zip(sites, several, strict=True)} if expectation == "weighted" else None,
        rounds={"mlp": 16}, damping=0.01,
    )  # fmt: skip
    assert not blocked
    for number, place in enumerate(places):
        name = f"blocks.{number}.{'o' if number % 2 == 0 else 'down'}.weight"
        assert [level.count for level in place.levels] == sorted(wanted[number])
        for level in place.levels[1:]:
            gone, weight = wanted[number][level.count]
            assert list(level.removed) == gone
            torch.testing.assert_close(level.replaced[name].tensor(), weight, rtol=0, atol=1e-8)
            # Nothing comes before the first block; later ones tell the two forms apart.
            assert not number or float((weight - other[number][level.count][1]).abs().max()) > 1e-3


def score(model: Stack, table: Sequence[Levels], state: Sequence[int], batches: Sequence[Batch]) -> float:
    """The divergence of the eager model with so many atoms of each block gone."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for number, count in enumerate(state):
            last_map(changed.blocks[number]).weight.copy_(table[number][count][1])
        errors = [divergence(changed(b["x"]), model(b["x"])) for b in batches]
    return sum(errors) / len(errors)


@pytest.mark.parametrize("expectation", EXPECTATIONS)
def test_layers_expect_the_levels_around_the_share(expectation: str) -> None:
    """The score of what was chosen tells by which expectation its weights were fitted."""
    model = stack(*(Mlp(16) for _ in range(3)), seed=3)
    batches, program = data(), program_of(model)
    settings = Tyr(
        ratio=0.7, step=1 / 32, iterations=1, generations=0, offspring=1, damping=0.01, expectation=expectation
    )
    _, stats = run(program, settings, batches)
    # 11.2 of 16, with half a channel between levels; 15 is there so that every budget is within reach.
    grid = [9, 10, 11, 12, 13]
    forms = {"weighted": grid, "middle": [11], "all levels": [*grid, 15], "none": [0]}
    state = [len(gone) for gone in removed(stats)]
    scores = {
        form: score(model, levels(model, [[*grid, 15]] * 3, [expected] * 3, batches), state, batches)
        for form, expected in forms.items()
    }
    got = stats.plan["search"]["chosen"]["score"]
    assert got == pytest.approx(scores.pop(expectation), rel=1e-4)
    assert all(abs(got / other - 1) > 1e-3 for other in scores.values())


@pytest.mark.parametrize("expectation", EXPECTATIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_search_finds_the_best_of_all_levels(seed: int, expectation: str) -> None:
    """All choices of levels under the budget are tried on the eager model; enough generations find the best."""
    model = stack(*(Mlp(8) for _ in range(3)), seed=seed)
    batches, program = data(), program_of(model)
    limit = program.parameter_count - 8 * ATOM
    settings = Tyr(
        target=limit, step=0.125, iterations=1, generations=60, offspring=24, damping=0.01, seed=seed,
        expectation=expectation,
    )  # fmt: skip
    after, stats = run(program, settings, batches)
    assert after.parameter_count <= limit
    # Around a third of 8: every level from none to 7.
    counts = [list(range(1, 8))] * 3
    table = levels(model, counts, [[3] if expectation == "middle" else range(8)] * 3, batches)
    # Less is over the budget, more could stay.
    states = [state for state in itertools.product(range(8), repeat=3) if sum(state) == 8]
    least, best = min((score(model, table, state, batches), state) for state in states)
    assert removed(stats) == [table[number][count][0] for number, count in enumerate(best)]
    assert stats.plan["search"]["chosen"]["score"] == pytest.approx(least, rel=1e-4)


def test_slicing_is_zeroing() -> None:
    """What the search judged with zeros in dense matrices equals the program whose matrices are smaller."""
    model = stack(Attention(4, 2), Mlp(8), Attention(4, 2), Mlp(8), seed=2)
    batches, program = data(), program_of(model)
    after, stats = run(program, Tyr(ratio=0.35, iterations=1, generations=3, offspring=4), batches)
    dense = stack(Attention(4, 2), Mlp(8), Attention(4, 2), Mlp(8), seed=2)
    gone = {site["block"] * 2 + (site["kind"] == "mlp"): site["removed"] for site in stats.plan["sites"]}
    assert sum(map(len, gone.values())) > 2
    with torch.no_grad():
        for number, block in enumerate(dense.blocks):
            name, size = f"blocks.{number}.{'o' if isinstance(block, Attention) else 'down'}", size_of(block)
            weight = torch.zeros_like(last_map(block).weight)
            kept = [c for c in range(weight.shape[1]) if c // size not in gone[number]]
            weight[:, kept] = after.weights[f"{name}.weight"].tensor()
            last_map(block).weight.copy_(weight)
            last_map(block).bias.copy_(after.weights[f"{name}.bias"].tensor())
        for batch in data(2, seed=8):
            torch.testing.assert_close(after.run(batch)["output"], dense(batch["x"]), rtol=0, atol=1e-10)
    # Keys and values shrink with their query heads.
    assert all(after.weights[f"blocks.{n}.k.weight"].shape[0] == 2 * (2 - len(gone[n])) for n in (0, 2))


def test_finer_levels_are_never_worse_on_what_was_judged() -> None:
    program = program_of(stack(*(Mlp(16) for _ in range(2)), seed=3))
    scores = []
    for iterations in (1, 3):
        settings = Tyr(ratio=0.4, iterations=iterations, generations=6, offspring=6, step=0.25)
        plan = run(program, settings, data())[1].plan
        scores.append(plan["search"]["chosen"]["score"])
        rows = plan["search"]["history"]
        numbers = [row["generation"] for row in rows]
        assert numbers == sorted(set(numbers))
        assert [row["evaluations"] for row in rows] == sorted(row["evaluations"] for row in rows)
    assert scores[1] <= scores[0] * 1.2


def test_equal_seeds_give_equal_searches() -> None:
    program = program_of(stack(Mlp(8), Mlp(8)))
    settings = Tyr(ratio=0.3, iterations=2, generations=2, offspring=3, seed=4)
    results = [run(program, settings, data()) for _ in range(2)]
    assert results[0][1].plan == results[1][1].plan
    assert results[0][0].fingerprint() == results[1][0].fingerprint()


def test_candidates_of_levels_are_what_a_zeroed_model_does() -> None:
    model = stack(Mlp(8), Mlp(8), seed=6)
    batches, program = data(), program_of(model)
    ctx = Context(calibration=batches)
    sites, _ = channel_sites(program, ctx.structure(program), ("mlp",))
    places, _ = obs_places(
        program, sites, Meter(program, "params", {}), ctx, {s.index: [2, 4] for s in sites},
        middle={s.index: 2 for s in sites}, rounds={"mlp": 16}, damping=0.01,
    )  # fmt: skip
    table = levels(model, [[2, 4]] * 2, [[2]] * 2, batches)
    candidates = Candidates(program, places, ctx.structure(program), batches)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        wanted = [model(b["x"]) for b in batches]
        for number, count in enumerate((4, 2)):
            last_map(changed.blocks[number]).weight.copy_(table[number][count][1])
        for n, batch in enumerate(batches):
            assert candidates((2, 1), n) == pytest.approx(divergence(changed(batch["x"]), wanted[n]), rel=1e-3)


def test_bad_input_is_refused() -> None:
    program = program_of(stack(Mlp(8), Mlp(8)))
    quick = {"iterations": 1, "generations": 1, "offspring": 2}
    refused(program, Tyr(ratio=0.5, **quick), None, "calibration data")
    refused(program, Tyr(ratio=0.5, **quick), [], "calibration data")
    bad = data()
    bad[2]["x"][0, 0, 0] = torch.nan
    refused(program, Tyr(ratio=0.5, **quick), bad, "NaN or infinity")
    least = program.parameter_count - 14 * ATOM
    assert f"{least:,}" in str(refused(program, Tyr(target=least - 1, **quick), data(), "out of reach"))
    after, _ = run(program, Tyr(target=least, **quick), data())
    assert after.parameter_count == least
    refused(program, Tyr(ratio=0.5, sites=("heads",), **quick), data(), "nothing of the kinds heads")
    with pytest.raises(PipelineError, match="one way to say how much"):
        Tyr()
