"""The evolutionary search over the places of a program: candidates, seeds, workers, journal."""

from __future__ import annotations

import hashlib
import math
import random
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ...ir.errors import GraphlatheError, PreconditionError
from ...ir.program import Program
from ..base import Batch, Context
from .allocators.evolution import Outcome, Point, Settings, Stage, evolve
from .allocators.global_threshold import global_threshold
from .allocators.greedy import greedy
from .allocators.knapsack import knapsack
from .allocators.runoff import runoff
from .allocators.table import LevelTable, State
from .allocators.uniform import uniform
from .candidates import Candidates
from .executors import Evaluations, InProcess
from .journal import Journal
from .levels import Place
from .objective import TOP
from .workspace import write_workspace

_CHEAP = {"uniform": uniform, "global-threshold": global_threshold, "greedy": greedy, "knapsack": knapsack}


def cheap_states(table: LevelTable, limit: float) -> dict[str, State]:
    """What every allocator that runs nothing makes of a table; those that need estimates only where there are some."""
    found: dict[str, State] = {"uniform": uniform(table, limit).state}
    if all(error is not None for row in table.errors for error in row):
        found |= {name: call(table, limit).state for name, call in _CHEAP.items() if name not in found}
    return found


def two_stages(batches: int, *, survivors: int, small: int = 1, large: int | None = None) -> tuple[Stage, ...]:
    """Stages that judge candidates on a few batches, and those that survive on many.

    Args:
        batches: how many there are.
        survivors: how many candidates of the first stage are judged on more.
        small: batches of the first stage.
        large: batches of the last; None: all.
    """
    large = batches if large is None else min(large, batches)
    small = min(small, large)
    return (Stage(survivors, small), Stage(1, large)) if small < large else (Stage(1, large),)


def in_drawn_order(batches: Sequence[Batch], seed: int) -> list[Batch]:
    """The batches in the order in which a search with this seed takes them."""
    drawn = list(batches)
    random.Random(f"batches {seed}").shuffle(drawn)
    return drawn


def search(
    program: Program,
    places: Sequence[Place],
    table: LevelTable,
    limit: float,
    batches: Sequence[Batch],
    ctx: Context,
    settings: Settings,
    seeds: dict[str, State],
    finalists: int = 1,
) -> tuple[Outcome, dict[str, Any]]:
    """Evolve a state, on whatever runs evaluations, and with whatever journal the context has.

    Args:
        program: the program that candidates are compared with.
        places: its places.
        table: their costs.
        limit: what the whole may cost.
        batches: the data, batch by batch. In an order that the seed of ``settings`` draws, which is the same for all
            candidates, its stages take the first so many of them: the first ones as they were given are often alike.
        ctx: ``executor``, ``workspace`` and ``journal`` are used. A journal is told by what is evaluated, not by how it
            is searched: a search with more generations goes on where another one ended.
        settings: how to search.
        seeds: named states to start from.
        finalists: so many of the states that led the search are judged on all batches in the end, and the best of them
            is taken (`allocators.runoff`); 1: the last one is.

    Returns:
        The outcome, and the history for the plan and its pictures.

    Raises:
        PreconditionError: there is less data than the last stage needs, or no candidate gives numbers.
        InputError: the journal is damaged.
    """
    wanted = settings.stages[-1].batches
    if len(batches) < wanted:
        raise PreconditionError(
            f"the search judges on {wanted} batches, but there are {len(batches)}",
            remedy="give more calibration data, or smaller stages",
        )
    batches = in_drawn_order(batches, settings.seed)[: wanted if finalists == 1 else len(batches)]
    seeds = {name: state for name, state in seeds.items() if table.cost(state) <= limit}
    local = None
    with ExitStack() as stack:
        journal = None
        if ctx.journal is not None:
            of = _fingerprint(program, places, batches)
            name = hashlib.sha256(repr(sorted(of.items())).encode()).hexdigest()[:16]
            ctx.journal.mkdir(parents=True, exist_ok=True)
            journal = stack.enter_context(Journal.open(ctx.journal / f"{name}.jsonl", of))
        if ctx.executor is None or isinstance(ctx.executor, InProcess):
            evaluate = local = Candidates(program, places, ctx.structure(program), batches)
        else:
            if ctx.workspace is not None:
                ctx.workspace.mkdir(parents=True, exist_ok=True)
            # A folder of its own for each search: workers outlive searches, and know what they have read by its path.
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="graphlathe-search-", dir=ctx.workspace))
            evaluate = write_workspace(Path(folder), program, places, batches)
        evaluations = stack.enter_context(Evaluations(evaluate, executor=ctx.executor, journal=journal))
        outcome = evolve(table, limit, evaluations, list(seeds.values()), settings, ctx.progress)
        final: list[Point] = []
        if len(batches) > wanted:
            outcome, final = runoff(outcome, table, evaluations, len(batches), finalists)
    if not math.isfinite(outcome.score):
        raise PreconditionError(
            "the outputs of the best candidate are not numbers",
            remedy="look for NaN or infinity in the calibration data and the weights",
        )
    return outcome, _history(outcome, seeds, local, final)


def _history(
    outcome: Outcome, seeds: dict[str, State], local: Candidates | None, final: Sequence[Point]
) -> dict[str, Any]:
    """What the plan keeps of a search."""
    origin: dict[State, str] = {}
    for name, state in seeds.items():
        origin.setdefault(state, f"seed: {name}")
    return {
        "history": [
            {"generation": row.number, "evaluations": row.evaluations, "best": _finite(row.score), "cost": row.cost}
            for row in outcome.history
        ],
        "evaluated": [
            {"cost": p.cost, "score": _finite(p.score), "origin": origin.get(p.state, "mutation")}
            for p in outcome.points
        ],
        "finalists": [
            {"cost": p.cost, "score": _finite(p.score), "origin": origin.get(p.state, "mutation")} for p in final
        ],
        "chosen": {"cost": outcome.cost, "score": _finite(outcome.score)},
        "evaluations": outcome.evaluations,
        "tokens": None if local is None else round(local.tokens),
        "stopped": outcome.stopped,
    }


def _finite(score: float) -> float | None:
    """JSON has no infinity."""
    return score if math.isfinite(score) else None


def _fingerprint(program: Program, places: Sequence[Place], batches: Sequence[Batch]) -> dict[str, str]:
    """What must be equal for two searches to give equal scores."""
    levels = hashlib.sha256()
    for place in places:
        for level in place.levels:
            levels.update(f"{place.kind} {place.index} {level.label} {level.removed}".encode())
            for name, weight in level.replaced.items():
                levels.update(f"{name} {weight.digest()}".encode())
    data = hashlib.sha256()
    for batch in batches:
        for name, value in _tensors(batch):
            data.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            data.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return {
        "program": program.fingerprint(),
        "levels": levels.hexdigest()[:16],
        "data": data.hexdigest()[:16],
        "objective": f"divergence of the {TOP} most probable entries, else relative error",
    }


def _tensors(batch: Batch) -> Iterable[tuple[str, torch.Tensor]]:
    for name, value in sorted(batch.items()):
        if not isinstance(value, torch.Tensor):
            raise GraphlatheError(f"input '{name}' is a {type(value).__name__}", expected="a tensor")
        yield name, value
