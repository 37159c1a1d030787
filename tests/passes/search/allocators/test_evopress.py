"""EvoPress's own algorithm for dropping layers, written down plainly, against the engine set up as in the paper."""

from __future__ import annotations

import itertools
import random

import pytest

from graphlathe.passes.search.allocators.evolution import Settings, Stage, evolve
from graphlathe.passes.search.allocators.table import LevelTable, State

LAYERS, DROPPED = 7, 3
TABLE = LevelTable(costs=((1, 0),) * 2 * LAYERS, kinds=("attention",) * LAYERS + ("mlp",) * LAYERS)
LIMIT = 2 * (LAYERS - DROPPED)

Bits = dict[str, list[bool]]


def fitness(seed: int, state: State) -> float:
    """Harm of every unit, and of neighbours that are dropped together."""
    source = random.Random(seed)
    harm = [source.uniform(0.2, 1.0) for _ in state]
    together = [source.uniform(-0.6, 1.5) for _ in state]
    alone = sum(h * level for h, level in zip(harm, state, strict=True))
    return alone + sum(t * a * b for t, a, b in zip(together, state, state[1:], strict=False))


def as_state(removed: Bits) -> State:
    return tuple(int(bit) for kind in ("attention", "mlp") for bit in removed[kind])


def plain_evopress(seed: int, generations: int, offspring: int, starts: int) -> tuple[State, float]:
    """(1 + lambda): swaps inside attention or MLP by rejection, the fittest of parent and offspring goes on."""
    draw = random.Random(seed)

    def random_start() -> Bits:
        bits: Bits = {}
        for kind in ("attention", "mlp"):
            chosen = draw.sample(range(LAYERS), DROPPED)
            bits[kind] = [layer in chosen for layer in range(LAYERS)]
        return bits

    parent = min((random_start() for _ in range(starts)), key=lambda bits: fitness(seed, as_state(bits)))
    for _ in range(generations):
        children: list[Bits] = []
        for _ in range(offspring):
            child = {kind: list(bits) for kind, bits in parent.items()}
            for _ in range(min(draw.randint(1, 3), draw.randint(1, 3))):
                bits = child[draw.choice(("attention", "mlp"))]
                remove = draw.randrange(LAYERS)
                while bits[remove]:
                    remove = draw.randrange(LAYERS)
                add = draw.randrange(LAYERS)
                while not bits[add]:
                    add = draw.randrange(LAYERS)
                bits[remove], bits[add] = True, False
            children.append(child)
        parent = min([parent, *children], key=lambda bits: fitness(seed, as_state(bits)))
    return as_state(parent), fitness(seed, as_state(parent))


@pytest.mark.parametrize("seed", range(6))
def test_both_reach_the_brute_force_optimum(seed: int) -> None:
    half = [tuple(int(n in chosen) for n in range(LAYERS)) for chosen in itertools.combinations(range(LAYERS), DROPPED)]
    best = min(fitness(seed, (*attention, *mlp)) for attention in half for mlp in half)

    _, plain = plain_evopress(seed, generations=60, offspring=16, starts=16)
    paper = Settings(
        generations=60,
        offspring=16,
        stages=(Stage(survivors=2, batches=1), Stage(survivors=1, batches=2)),
        same_kind=True,
        random_starts=16,
        confidence=0,
        seed=seed,
    )
    start = ((1,) * DROPPED + (0,) * (LAYERS - DROPPED)) * 2
    found = evolve(TABLE, LIMIT, lambda state, batch: fitness(seed, state), [start], paper)

    assert plain == pytest.approx(best, rel=1e-12)
    assert found.score == pytest.approx(best, rel=1e-12)
    for point in found.points:
        assert point.cost == LIMIT
        assert sum(point.state[:LAYERS]) == sum(point.state[LAYERS:]) == DROPPED
