"""Which of the states that led a search is best on more data than it was judged on.

A search takes the best of hundreds of candidates on a little data, so what it ends with is partly what suits that data
by chance. The states that led it are few; judged on all the data, the start may win again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..executors import Evaluations
from .evolution import Outcome, Point
from .table import LevelTable, State


def finalists_of(parents: Sequence[State], count: int) -> list[State]:
    """The last of the states that led a search, the first, and before it the latest others: at most ``count``."""
    return [parents[-1], *parents[:1], *reversed(parents[1:-1])][: min(count, len(parents))]


def runoff(
    outcome: Outcome, table: LevelTable, evaluations: Evaluations, batches: int, count: int
) -> tuple[Outcome, list[Point]]:
    """Judge the states that led a search again, and let the best of them be its result.

    Args:
        outcome: of the search.
        table: its levels.
        evaluations: its scores.
        batches: on how many batches, from the first; more than the last stage of the search had.
        count: how many states; 1 leaves the outcome as it is.

    Returns:
        The outcome with the best of them as its state (its score still is that on the data of the last stage, as all
        others of the outcome are), and how they did, in order of `finalists_of`; empty where there was one only.
    """
    states = finalists_of(outcome.parents, count)
    if len(states) < 2:
        return outcome, []
    means = evaluations.means(states, batches)
    points = [Point(state, table.cost(state), score) for state, score in zip(states, means, strict=True)]
    best = min(points, key=lambda point: point.score)
    known = {point.state: point.score for point in outcome.points}
    return replace(outcome, state=best.state, cost=best.cost, score=known[best.state]), points
