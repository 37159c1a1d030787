"""Timing calls in turn, and telling the rounds in which something else ran.

Calls are timed in rounds (A B C, B C A, C A B...), so that whatever else the machine does hits all of them, and can be
compared round by round. A round in which wall time ran away from CPU time is left out as a whole, and repeated.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

from ...ir.errors import GraphlatheError

Call = Callable[[], Any]
Clock = Callable[[], tuple[float, float]]

FEWEST = 9
"""A median of fewer rounds is not worth much."""

DISTURBED = 1.3
"""With one thread, more wall time per CPU time than this means that something else ran."""

ATTEMPTS = 10
"""Rounds that are tried for each one that is wanted, before the machine is given up as too busy."""

PATIENCE = 30.0
"""Seconds for which rounds are tried at least: short calls find their gaps in time."""

SHORTEST = 0.002
"""Seconds that one timing lasts at least; a call that is shorter is repeated within it."""


def clock() -> tuple[float, float]:
    """Wall and CPU time of this process, in seconds."""
    return time.perf_counter(), time.process_time()


def paired_rounds(
    calls: Mapping[str, Call], *, repeats: int = FEWEST, disturbed: float = DISTURBED, clock: Clock = clock
) -> dict[str, list[float]]:
    """Time calls in turn.

    Args:
        calls: what to time, by name.
        repeats: undisturbed rounds that are wanted, at least `FEWEST`.
        disturbed: the wall time per CPU time beyond which a round is left out; infinite: none is.
        clock: tells wall and CPU seconds.

    Returns:
        For each name its seconds in every round; the same place is the same round.

    Raises:
        GraphlatheError: too few repeats, or the machine is too busy.
    """
    if repeats < FEWEST:
        raise GraphlatheError(f"repeats is {repeats}", expected=f"at least {FEWEST}")
    names = list(calls)
    numbers = {name: _number(call, clock) for name, call in calls.items()}
    rounds: dict[str, list[float]] = {name: [] for name in names}
    done = turn = 0
    start, _ = clock()
    with _no_collection():
        while done < repeats and (turn < ATTEMPTS * repeats or clock()[0] - start < PATIENCE):
            shift = turn % max(len(names), 1)
            taken: dict[str, float] = {}
            for name in names[shift:] + names[:shift]:
                wall, cpu = _timed(calls[name], numbers[name], clock)
                if wall > disturbed * cpu:
                    break
                taken[name] = wall
            turn += 1
            if len(taken) == len(names):
                done += 1
                for name, seconds in taken.items():
                    rounds[name].append(seconds)
    if done < repeats:
        raise GraphlatheError(
            f"this machine is too busy to measure: {done} of {turn} rounds were undisturbed",
            expected=f"{repeats} rounds in which wall time is at most {disturbed:g} times CPU time",
            remedy="stop what else is running, or allow more with disturbed=",
        )
    return rounds


def _number(call: Call, clock: Clock) -> int:
    """How often a call is repeated within one timing. The first of two calls warms up."""
    call()
    wall, _ = _timed(call, 1, clock)
    return max(1, math.ceil(SHORTEST / max(wall, 1e-7)))


def _timed(call: Call, number: int, clock: Clock) -> tuple[float, float]:
    """Wall and CPU seconds of one of ``number`` calls."""
    wall, cpu = clock()
    for _ in range(number):
        call()
    end_wall, end_cpu = clock()
    return (end_wall - wall) / number, (end_cpu - cpu) / number


@contextmanager
def _no_collection() -> Generator[None]:
    """Keep the garbage collector from running within a timing."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
