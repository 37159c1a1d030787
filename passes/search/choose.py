"""Carrying out a recipe: allocate, build a plan, check what it really costs, apply it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ...ir.errors import GraphlatheError
from ...ir.program import Program
from ..base import Context, Stats
from .allocators.table import Allocation
from .apply import apply_plan
from .place_table import Table
from .plan import Decision, Plan
from .recipe import Recipe, allocate, out_of_reach, plan_of, table_of
from .timed import finished

_TRIES = 8
_CLOSE = 0.03
"""A plan may stay this far (share of what is to go) under its budget before a milder one is tried."""

Allocator = Callable[[Table, float], tuple[Sequence[int], dict[str, Any] | None]]
"""``(table, limit) -> (state, history of the search)``."""


def compress(
    program: Program,
    recipe: Recipe,
    ctx: Context,
    made_by: str,
    *,
    name: str,
    sequential: bool = True,
    table: Table | None = None,
    allocator: Allocator | None = None,
) -> Stats:
    """Choose and apply, in place.

    What levels save is counted one by one; where places meet, the whole saves less than that. So the program that a
    plan gives is counted, and the plan is made again with another limit until it fits the budget and uses it.

    Args:
        program: the program.
        recipe: what to choose.
        ctx: calibration data.
        made_by: the text of the pass, for the plan.
        name: the pass's name, for new nodes and errors.
        sequential: whether compensation of later layers sees what was done to earlier ones.
        table: the recipe's places, where they are known already.
        allocator: chooses a state; without one the recipe's own does.

    Raises:
        PreconditionError: nothing can be cut, the budget is out of reach, or calibration data is missing or bad.
    """
    table = table_of(program, recipe, ctx) if table is None else table
    plan = make_plan(program, recipe, ctx, made_by, name=name, table=table, allocator=allocator)
    return carry_out(program, plan, ctx, name, table=table, sequential=sequential)


def make_plan(
    program: Program,
    recipe: Recipe,
    ctx: Context,
    made_by: str,
    *,
    name: str,
    table: Table,
    allocator: Allocator | None = None,
) -> Plan:
    """Choose, without changing the program; see `compress`."""
    limit = table.limit(recipe.ratio, recipe.target)
    plan, cost = _plan(program, table, recipe, ctx, limit, made_by, name, allocator)
    return plan.with_budget(limit=limit, after=cost)


def carry_out(program: Program, plan: Plan, ctx: Context, name: str, *, table: Table, sequential: bool = True) -> Stats:
    """Apply a plan that was just made, and say what was done.

    Under a budget in milliseconds the result is timed, too: what levels save was measured one by one and added up.
    """
    before = program.clone() if plan.budget.get("unit") == "ms" else None
    applied = apply_plan(program, plan, ctx, name, sequential=sequential)
    if before is not None:
        plan, timing = _timed(plan, before, program, ctx)
        applied.notes += timing
    stats = Stats(hits=applied.done, attempts=len(table.places), plan=plan.to_json())
    for reason, count in table.blocked.items():
        stats.misses[reason] = stats.misses.get(reason, 0) + count
        stats.attempts += count
    stats.notes += [*table.notes, *applied.notes]
    stats.notes += [f"not compensated: {reason} ({count}x)" for reason, count in applied.skipped.items()]
    if not plan.changes:
        stats.notes.append("nothing to remove: the model fits the budget")
    return stats


def _timed(plan: Plan, before: Program, after: Program, ctx: Context) -> tuple[Plan, list[str]]:
    """The plan with what its program really takes and how many runs all measuring took, and a line about it."""
    if not plan.changes:
        return plan, []
    try:
        found = finished(before, after, ctx)
    except GraphlatheError as error:  # a search is not lost because the machine is busy at its end
        return plan, [f"the result was not timed: {error.message}"]
    ms, limit = found.baseline - found.saved[""], plan.budget["limit"]
    note = f"timed in turn: {found.baseline:.4g} ms before, {ms:.4g} after, with a limit of {limit:.4g}" + (
        f", which the single levels would have met ({plan.budget['after']:.4g})" if ms > limit else ""
    )
    return plan.with_budget(measured=ms, runs=plan.budget["runs"] + found.runs), [note]


def _plan(
    program: Program,
    table: Table,
    recipe: Recipe,
    ctx: Context,
    limit: float,
    made_by: str,
    name: str,
    allocator: Allocator | None,
) -> tuple[Plan, float]:
    """A plan whose program fits the limit, and what that costs."""
    if limit >= table.total:
        untouched = table.levels().untouched
        return plan_of(program, table, recipe, untouched, made_by, "fits the budget"), float(table.total)
    low, high = table.levels().cost(table.levels().smallest()), float(table.total)
    wide = (table.total - limit) * _CLOSE
    sites = list(
        dict.fromkeys(level.site for place in table.places for level in place.levels if level.site is not None)
    )
    # Costs that are added up know nothing of biases.
    added = table.meter.biases(sites) if recipe.compensation != "none" and not table.added_up else 0
    best: tuple[Plan, float] | None = None
    aim, cost, known = max(limit - added, low), high, dict[tuple[Decision, ...], float]()
    push = 1.02
    for left in reversed(range(_TRIES)):
        plan, estimate = _choice(program, table, recipe, aim, made_by, allocator)
        if plan.decisions not in known:
            known[plan.decisions] = estimate if table.added_up else _cost(program, table, plan, ctx, name)
        cost = known[plan.decisions]
        if cost <= limit:
            best = (plan, cost) if best is None or cost > best[1] else best
            low = aim
            # A search costs more than what a plan that uses up the budget would gain.
            if limit - cost <= wide or aim >= high or allocator is not None:
                break
        else:
            high = aim
            if aim <= low:
                break
        # As much further as the plan was off, but inside what is known to be too much and too little. Sites that
        # overlap save less together than apart: what was not enough is not enough again, so twice as far every time.
        step = aim - (cost - limit) * (push if cost > limit else 0.98)
        push = 2 * push if cost > limit else push
        aim = step if low < step < high else (low + high) / 2
        if best is not None and high - low <= wide / 8:
            break
        if best is None and (left == 1 or high - low <= wide / 8):
            aim = low  # what is out of reach at the smallest state is out of reach
    if best is None:
        raise out_of_reach(table, limit, cost, recipe.unit)
    return best


def _choice(
    program: Program, table: Table, recipe: Recipe, aim: float, made_by: str, allocator: Allocator | None
) -> tuple[Plan, float]:
    """A plan for a limit, and what its levels cost when they are added up."""
    if allocator is None:
        found: Allocation = allocate(table, recipe, aim)
        table.notes += [note for note in found.notes if note not in table.notes]
        return plan_of(program, table, recipe, found.state, made_by, found.method), found.cost
    state, history = allocator(table, aim)
    plan = replace(plan_of(program, table, recipe, state, made_by, "search"), search=history)
    return plan, table.levels().cost(tuple(state))


def _cost(program: Program, table: Table, plan: Plan, ctx: Context, name: str) -> float:
    """What a plan's program costs: cut for real, with new biases."""
    if not plan.changes:
        return table.total
    copy = program.clone()
    apply_plan(copy, plan, Context(calibration=ctx.calibration), name, fit=False)
    return table.meter.measure(copy)
