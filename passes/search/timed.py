"""Levels that cost measured milliseconds.

Each class of equal places is measured once at each level, with all of its places at that level, in ONNX Runtime at the
sizes of the first calibration batch (`milliseconds.ms_table`). What a place costs is what its harshest level saves.
Savings are added up; the program that comes out is timed once, beside the one that it was made from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ...ir.errors import PreconditionError
from ...ir.program import Program
from ..base import Context
from .apply import DROPS, apply_plan
from .levels import Level, Place
from .milliseconds import Milliseconds, ms_table
from .place_table import Table
from .plan import Decision, Plan

MOST_LEVELS = 32
"""More levels of one class than this take too long to measure."""

TIMED_LEVELS = 16
"""Levels of a class where nobody says how many."""

_Key = tuple[str, str, int]


def timed(program: Program, table: Table, ctx: Context) -> Table:
    """The table with milliseconds for costs.

    Args:
        program: the program.
        table: its places, with levels that cut or drop.
        ctx: its first calibration batch is what is run.

    Raises:
        PreconditionError: there is no calibration data, or a place has too many levels.
        GraphlatheError: onnxruntime is not installed, or the machine is too busy to measure on.
    """
    if not ctx.calibration:
        raise PreconditionError(
            "a budget in milliseconds is measured on calibration data", remedy="pass calibration= (or --calibration)"
        )
    classes: dict[tuple[str, str], list[Place]] = {}
    for place in table.places:
        classes.setdefault((place.kind, _shape(program, place)), []).append(place)
    variants: dict[_Key, Callable[[], Program]] = {}
    counts: dict[_Key, int] = {}
    for (kind, shape), members in classes.items():
        levels = members[0].levels
        if len(levels) - 1 > MOST_LEVELS:
            raise PreconditionError(
                f"{len(levels) - 1} levels of {members[0].label} would have to be measured",
                expected=f"at most {MOST_LEVELS}",
                remedy="leave out steps, or set steps=8, for example",
            )
        for number in range(1, len(levels)):
            key = kind, f"{shape}: {levels[number].label}", number
            variants[key] = _variant(program, members, number, ctx)
            counts[key] = len(members)
    file = None if ctx.journal is None else ctx.journal / "milliseconds.json"
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
    found = ms_table(program, variants, counts, _feeds(program, ctx), file, progress=ctx.progress)
    places: list[Place] = []
    for place in table.places:
        shape = _shape(program, place)
        saved = [0.0] + [
            found.saved[place.kind, f"{shape}: {level.label}", number]
            for number, level in enumerate(place.levels[1:], 1)
        ]
        whole = max(saved)
        levels = tuple(replace(level, cost=whole - ms) for level, ms in zip(place.levels, saved, strict=True))
        places.append(replace(place, levels=levels))
    return replace(
        table,
        places=places,
        whole=sum(place.levels[0].cost for place in places),
        total=found.baseline,
        added_up=True,
        runs=found.runs,
    )


def finished(before: Program, after: Program, ctx: Context) -> Milliseconds[str]:
    """What a program saves that came out of a plan, under the key ``""``, timed in turn with the one before.

    Raises:
        GraphlatheError: the machine is too busy to measure on.
    """
    return ms_table(before, {"": lambda: after}, {"": 1}, _feeds(before, ctx))


def _feeds(program: Program, ctx: Context) -> dict[str, Any]:
    assert ctx.calibration
    return program.feeds(**ctx.calibration[0])


def _shape(program: Program, place: Place) -> str:
    """What decides how long a place takes: the shapes of its weights."""
    site = next((level.site for level in place.levels if level.site is not None), None)
    if site is not None:
        shapes = sorted((m.dim, program.weights[m.weight].shape) for m in site.group.members)
        return f"{site.size} of {shapes}" + (", or dropped" if place.levels[-1].drop is not None else "")
    unit = next(level.drop for level in place.levels if level.drop is not None)
    inside, stack = set[str](), [unit.replaced]
    seen = {unit.by, unit.replaced}
    while stack:
        for node in stack.pop().all_input_nodes:
            if node.op == "get_attr":
                inside.add(str(node.target))
            elif node not in seen:
                seen.add(node)
                stack.append(node)
    known = [program.weights[name].shape for name in inside if name in program.weights]
    return f"drop {sorted(known)}"


def _variant(program: Program, members: list[Place], number: int, ctx: Context) -> Callable[[], Program]:
    """What makes the program with all places of a class at one level."""

    def make() -> Program:
        copy = program.clone()
        decisions = tuple(_decision(place, place.levels[number]) for place in members)
        apply_plan(copy, Plan(decisions), Context(calibration=ctx.calibration), "milliseconds")
        return copy

    return make


def _decision(place: Place, level: Level) -> Decision:
    if level.drop is not None:
        kind = place.kind if place.kind in DROPS else {"heads": "drop-attention", "mlp": "drop-mlp"}[place.kind]
        return Decision(kind, level.drop.index, level.drop.label, place.block, 1, (0,))
    assert level.site is not None
    return Decision(place.kind, place.index, place.label, place.block, level.site.size, level.removed)
