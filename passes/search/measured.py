"""Errors that are measured: what every level does to the outputs, alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...ir.errors import PreconditionError
from ...ir.program import Program
from ..base import Batch, Context
from .candidates import Candidates, positions
from .place_table import Table

POSITIONS = 512
"""Tokens (or other positions) on which levels are tried, at least, where there are as many."""


def measured(program: Program, table: Table, ctx: Context, *, every: bool = False) -> Table:
    """A table all of whose levels have an error on one scale, if some had none.

    Estimates from scores cannot be compared with what dropping a branch does. Where a table holds both, every level of
    every place is tried alone on the first calibration batches, of `POSITIONS` together: partial forward passes.

    Args:
        program: the program.
        table: its places.
        ctx: calibration data.
        every: measure also where all levels have an estimate.

    Raises:
        PreconditionError: there is no calibration data.
    """
    if not every and all(level.error is not None for place in table.places for level in place.levels):
        return table
    if not ctx.calibration:
        raise PreconditionError(
            "levels that cut and levels that drop can only be compared by trying them",
            remedy="pass calibration= (or --calibration FILE)",
        )
    data = _first(ctx.calibration)
    candidates = Candidates(program, table.places, ctx.structure(program), data)
    untouched = (0,) * len(table.places)
    work = [(i, n) for i, place in enumerate(table.places) for n in range(1, len(place.levels))]
    errors: dict[tuple[int, int], float] = {}
    for i, n in ctx.progress(work, len(work), "single levels"):
        state = (*untouched[:i], n, *untouched[i + 1 :])
        errors[i, n] = sum(candidates(state, batch) for batch in range(len(data))) / len(data)
    places = [
        replace(
            place,
            levels=tuple(replace(level, error=errors.get((i, n), 0.0)) for n, level in enumerate(place.levels)),
        )
        for i, place in enumerate(table.places)
    ]
    note = f"errors of {len(work)} levels were measured, which took {candidates.tokens:,.0f} tokens"
    return replace(table, places=places, notes=[*table.notes, note])


def _first(batches: Sequence[Batch]) -> list[Batch]:
    """As many batches as have `POSITIONS`, one at least."""
    found: list[Batch] = []
    count = 0
    for batch in batches:
        if count >= POSITIONS:
            break
        found.append(batch)
        count += positions(batch)
    return found
