"""Evolution over levels at a fixed budget, by what candidates score and not by estimates that are added up.

Per generation, from one parent: draw offspring (`mutation`), score them on little data, promote the best to the next
stage with more data, and let the best of the last stage take the parent's place if it is better. Errors of sites do not
add up, so states that no estimate prefers are found; any state is a valid start, so the results of all cheap
allocators are.

Source: EvoPress (Sieberling et al. 2024, arXiv 2410.14649): (1 + lambda) evolution, the number of flips, and selection
in stages. What differs, and why:

- Sites of different costs and kinds may trade (`mutation`); the paper's swaps are inside one kind.
- Batch b is the same data for every state. A stage scores batches 0 to n - 1, so nothing is measured twice, and states
  are compared on equal data. A state takes the parent's place only if the mean of its paired differences is below zero
  by ``confidence`` standard errors: otherwise the search drifts towards states that were lucky.
- A state that lost in an early stage stays a candidate: the best of all that were never promoted go on, not the best of
  one generation. The parent takes part in the last stage only.
- A state is drawn once. The search ends when nothing new is left to draw or promote, also where nothing can be swapped.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ....ir.errors import InputError, PreconditionError
from ...progress import Progress, silent
from ..executors import Evaluate, Evaluations
from ..journal import Key
from .mutation import Mutator
from .table import LevelTable, State
from .uniform import uniform

_DRAWS = 8  # draws per wanted offspring that give nothing new, in a row, before all single flips are gone through


@dataclass(frozen=True)
class Stage:
    """One selection: so many states survive it, judged on batches 0 to ``batches`` - 1."""

    survivors: int
    batches: int


@dataclass(frozen=True)
class Settings:
    """How to search.

    Attributes:
        generations: at most so many.
        offspring: new states per generation.
        max_flips: flips of a mutation: the smaller of two uniform draws from 1 to this.
        stages: from little data to much; one state survives the last.
        same_kind: whether only sites of one kind trade.
        random_starts: random states among which the search starts, beside the seeds.
        patience: stop after so many generations in a row without a better state; None: never.
        confidence: standard errors by which a state must be better than its parent. 0: any better mean is enough, as in
            the paper. With one batch there is no error to estimate, and the better score wins.
        seed: equal seeds give equal searches.

    Raises:
        InputError: a number is out of range, or the stages do not narrow down.
    """

    generations: int = 100
    offspring: int = 32
    max_flips: int = 3
    stages: tuple[Stage, ...] = (Stage(survivors=2, batches=1), Stage(survivors=1, batches=8))
    same_kind: bool = False
    random_starts: int = 0
    patience: int | None = None
    confidence: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        at_least = {"generations": 0, "offspring": 1, "max_flips": 1, "random_starts": 0, "confidence": 0}
        at_least |= {"patience": 1} if self.patience is not None else {}
        for name, least in at_least.items():
            if not getattr(self, name) >= least:
                raise InputError(f"{name} of the evolution is {getattr(self, name)}", expected=f"at least {least}")
        batches, survivors = [s.batches for s in self.stages], [s.survivors for s in self.stages]
        narrowing = batches == sorted(batches) and survivors == sorted(survivors, reverse=True)
        if not self.stages or not narrowing or batches[0] < 1 or survivors[-1] != 1:
            raise InputError(
                f"the stages of the evolution are {', '.join(map(str, self.stages)) or 'missing'}",
                expected="more batches and fewer survivors from stage to stage, and one survivor of the last",
            )


@dataclass(frozen=True)
class Point:
    """A state that was scored on all batches of the last stage; ``score`` is their mean."""

    state: State
    cost: float
    score: float


@dataclass(frozen=True)
class Generation:
    """What a generation led to; number 0 is the choice among the starts.

    Attributes:
        number: counted from 1.
        score: the best state's mean score on all batches of the last stage.
        cost: what that state costs.
        evaluations: states times batches so far, each counted once.
        offspring: new states of this generation.
        accepted: whether one took its parent's place.
    """

    number: int
    score: float
    cost: float
    evaluations: int
    offspring: int
    accepted: bool


@dataclass(frozen=True)
class Outcome:
    """What a search found.

    Attributes:
        state, score, cost: the best state, its mean score on all batches of the last stage, and what it costs.
        limit: what it was allowed to cost.
        history: generation by generation.
        parents: the states that led, from the best start to the last.
        points: everything that was scored on all batches of the last stage, in this order.
        evaluations: how many scores of a state on a batch were needed.
        reused: how many of them were known before (from a journal, or an earlier search); it depends on what ran
            before, so outcomes are equal whatever it is.
        exhausted: whether the search ended because nothing new was left.
        stopped: why it ended: ``exhausted``, ``patience`` or ``generations``.
    """

    state: State
    score: float
    cost: float
    limit: float
    history: tuple[Generation, ...]
    parents: tuple[State, ...]
    points: tuple[Point, ...]
    evaluations: int
    stopped: str
    reused: int = field(compare=False)

    @property
    def exhausted(self) -> bool:
        """Whether nothing new was left to try."""
        return self.stopped == "exhausted"

    def pareto(self) -> list[Point]:
        """The points that no other beats in both cost and score, by rising cost."""
        best: list[Point] = []
        for point in sorted(self.points, key=lambda p: (p.cost, p.score)):
            if not best or point.score < best[-1].score:
                best.append(point)
        return best

    def to_json(self) -> dict[str, Any]:
        """What `json.dumps` takes. Scores that are not finite are None: JSON has no infinity."""
        return _plain(asdict(self) | {"exhausted": self.exhausted, "pareto": [asdict(p) for p in self.pareto()]})


def evolve(
    table: LevelTable,
    limit: float,
    evaluate: Evaluate | Evaluations,
    seeds: Sequence[State] = (),
    settings: Settings | None = None,
    progress: Progress = silent,
) -> Outcome:
    """Search for the state with the lowest mean score among those that cost at most ``limit``.

    Args:
        table: the levels; estimates of harm are not read.
        limit: what the state may cost, with the fixed cost.
        evaluate: the score of a state on a batch, lower is better; or `Evaluations`, which say where that runs and
            keep a journal. The same state and batch must give the same score.
        seeds: states to start from; the best of them, and of them filled up to the limit, is the first parent. Without
            any, uniform shares.
        settings: how to search.
        progress: shows a bar.

    Raises:
        PreconditionError: not even the cheapest state fits, or a seed costs more than the limit.
        InputError: a seed is no state of the table.
    """
    settings = settings or Settings()
    evaluations = evaluate if isinstance(evaluate, Evaluations) else Evaluations(evaluate)
    search = _Search(table, limit, evaluations, settings)
    known = evaluations.evaluated
    parent = search.start(seeds)
    parents = [parent]
    stopped, waited = "generations", 0
    for number in progress(range(1, settings.generations + 1), settings.generations, "evolution"):
        offspring = search.offspring(parent)
        candidates = search.narrowed(offspring)
        if not candidates:
            stopped = "exhausted"
            break
        search.score(candidates)
        ranked = sorted(candidates, key=lambda state: (search.points[state], state))
        better = next((state for state in ranked if search.better(state, parent)), None)
        parent, waited = (parent, waited + 1) if better is None else (better, 0)
        parents += [] if better is None else [better]
        search.note(number, parent, len(offspring), accepted=better is not None)
        if waited == settings.patience:
            stopped = "patience"
            break
    return Outcome(
        state=parent,
        score=search.points[parent],
        cost=table.cost(parent),
        limit=limit,
        history=tuple(search.history),
        parents=tuple(parents),
        points=tuple(Point(state, table.cost(state), score) for state, score in search.points.items()),
        evaluations=len(search.asked),
        stopped=stopped,
        reused=len(search.asked) - (evaluations.evaluated - known),
    )


class _Search:
    """What a search knows so far.

    Attributes:
        points: mean scores on all batches of the last stage.
        asked: the scores that were needed.
        waiting: for every stage but the last, states that were scored in it and not promoted, with their scores.
        seen: all states that were ever drawn.
    """

    def __init__(self, table: LevelTable, limit: float, evaluations: Evaluations, settings: Settings) -> None:
        self.table, self.limit, self.evaluations, self.settings = table, limit, evaluations, settings
        self.batches = settings.stages[-1].batches
        draw = random.Random(settings.seed)
        self.mutator = Mutator(table, table.budget(limit), settings.max_flips, settings.same_kind, draw)
        self.points: dict[State, float] = {}
        self.asked: set[Key] = set()
        self.waiting: list[dict[State, float]] = [{} for _ in settings.stages[:-1]]
        self.seen: set[State] = set()
        self.history: list[Generation] = []

    def start(self, seeds: Sequence[State]) -> State:
        """The best of the starts."""
        given = [tuple(seed) for seed in seeds] or [uniform(self.table, self.limit).state]
        for number, seed in enumerate(given):
            self.table.check(seed)
            if self.table.cost(seed) > self.limit:
                raise PreconditionError(
                    f"seed {number} costs {self.table.cost(seed):,}", expected=f"at most the limit of {self.limit:,}"
                )
        starts = list(dict.fromkeys([*given, *(self.mutator.filled(seed) for seed in given)]))
        self.seen.update(starts)
        drawn = dict.fromkeys(self.mutator.walk(given[0]) for _ in range(self.settings.random_starts))
        random_starts = [state for state in drawn if state not in self.seen]
        self.seen.update(random_starts)
        starts += self.narrowed(random_starts)
        self.score(starts)
        best = min(starts, key=lambda state: (self.points[state], state))
        self.note(0, best, len(starts) + len(random_starts), accepted=True)
        return best

    def offspring(self, parent: State) -> list[State]:
        """New neighbours of the parent: as many as wanted, or what was found."""
        wanted = self.settings.offspring
        found: dict[State, None] = {}
        misses = 0
        while len(found) < wanted and misses < _DRAWS * wanted:
            state = self.mutator.neighbour(parent)
            if state is None or state in self.seen or state in found:
                misses += 1
            else:
                found[state], misses = None, 0
        if not found:  # nearly everything around was seen; chance must not decide whether the rest is
            for state in self.mutator.singles(parent):
                if state not in self.seen:
                    found[state] = None
                if len(found) == wanted:
                    break
        self.seen.update(found)
        return list(found)

    def narrowed(self, states: Sequence[State]) -> list[State]:
        """Pass states, and those that wait, through all stages but the last; return what gets there."""
        for stage, waiting in zip(self.settings.stages, self.waiting, strict=False):
            waiting.update(zip(states, self._means(states, stage.batches), strict=True))
            states = sorted(waiting, key=lambda state, scores=waiting: (scores[state], state))[: stage.survivors]
            for state in states:
                del waiting[state]
        return list(states)

    def score(self, states: Sequence[State]) -> None:
        """Score states on all batches of the last stage."""
        self.points.update(zip(states, self._means(states, self.batches), strict=True))

    def better(self, state: State, parent: State) -> bool:
        """Whether the mean paired difference is below zero by enough standard errors."""
        if math.isinf(self.points[state]) or math.isinf(self.points[parent]):
            return self.points[state] < self.points[parent]
        scores = self.evaluations.scores
        paired = [scores[state, batch] - scores[parent, batch] for batch in range(self.batches)]
        mean = statistics.fmean(paired)
        error = statistics.stdev(paired) / math.sqrt(len(paired)) if len(paired) > 1 else 0.0
        return mean < min(0.0, -self.settings.confidence * error)

    def note(self, number: int, parent: State, offspring: int, accepted: bool) -> None:
        """Add a row to the history."""
        row = Generation(number, self.points[parent], self.table.cost(parent), len(self.asked), offspring, accepted)
        self.history.append(row)

    def _means(self, states: Sequence[State], batches: int) -> list[float]:
        self.asked.update((state, batch) for state in states for batch in range(batches))
        return self.evaluations.means(states, batches)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
