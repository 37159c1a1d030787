"""Paired times: two models in turn, in one process, on one thread; what something else disturbed does not count.

A run whose wall time is far above its processor time was waiting for a processor that something else had. Such a
round is rejected for all, and the report says how many were. What counts is the median of the processor times.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

ROUNDS = 9
"""Accepted rounds, at least, for a time to be reported."""
DISTURBED = 1.3
"""Wall over processor time from which a run does not count."""
PATIENCE = 5
"""Rounds that are tried, in multiples of those that are wanted."""
LONGEST_PAUSE = 5.0
"""Seconds to wait, at most, after rounds that were disturbed one after the other."""


@dataclass(frozen=True)
class Paired:
    """What was timed.

    Attributes:
        seconds: median processor time by name; NaN when too few rounds were accepted.
        accepted: rounds that count.
        rejected: rounds that do not.
    """

    seconds: dict[str, float]
    accepted: int
    rejected: int


def _clock() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def time_paired(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int = ROUNDS,
    *,
    warmup: int = 2,
    clock: Callable[[], tuple[float, float]] = _clock,
    sleep: Callable[[float], None] = time.sleep,
) -> Paired:
    """Time calls in turn (A B, B A, A B...) until enough rounds are undisturbed.

    What disturbs mostly goes on for a while: after each rejected round in a row the pause before the next is longer.

    Args:
        calls: what to time, by name.
        rounds: accepted rounds that are wanted.
        warmup: rounds that are not timed.
        clock: wall and processor time, in seconds.
        sleep: waits so many seconds.
    """
    names = list(calls)
    for _ in range(warmup):
        for name in names:
            calls[name]()
    taken: dict[str, list[float]] = {name: [] for name in names}
    rejected = in_a_row = 0
    for turn in range(PATIENCE * rounds):
        one: dict[str, float] = {}
        fair = True
        for name in names if turn % 2 == 0 else names[::-1]:
            wall, cpu = clock()
            calls[name]()
            after_wall, after_cpu = clock()
            one[name] = after_cpu - cpu
            fair = fair and (after_wall - wall) <= DISTURBED * one[name]
        if not fair:
            rejected += 1
            in_a_row += 1
            sleep(min(0.1 * 2.0 ** min(in_a_row, 10), LONGEST_PAUSE))
            continue
        in_a_row = 0
        for name, seconds in one.items():
            taken[name].append(seconds)
        if len(taken[names[0]]) == rounds:
            break
    accepted = len(taken[names[0]])
    enough = accepted >= rounds
    return Paired(
        {name: statistics.median(each) if enough else math.nan for name, each in taken.items()}, accepted, rejected
    )
