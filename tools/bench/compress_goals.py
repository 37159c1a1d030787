"""The goals of the compression suites, from their rows.

Methods are compared within one budget: what the level limits (parameters, or numbers that are not zero; multiply-adds;
milliseconds) must not be over the limit by more than a tolerance, for ours and for the others. A method that keeps more
is not beaten by us, and does not beat us; a method that keeps less and is better still does. Results of training are
compared with what they restore, not with the other tools' results without training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from .base import Goal, Row
from .compress_methods import Level, Method
from .compress_subject import SUBJECTS, Case, Score, subject_of

TOLERANCE = {"parameters": 0.02, "macs": 0.03, "seconds": 0.05}
LATENCY_SHARE = 0.9
"""Least fall of the latency, over that of multiply-adds."""
RECOVERED = 0.5
"""Least share of the lost quality that training brings back, on a domain that it did not see."""
HALVED = 0.93
"""Least share of the dense model's quality that is kept, with training, where half of its blocks' parameters go."""
THROUGHPUT = 4.0
"""Least throughput, times the dense model's, at a level that is about speed and not about the other tools."""

Measured = tuple[Method, Level, Row]


def cost_of(method: Method, level: Level, row: Row) -> float:
    """What the level limits, of one row; NaN where it was not measured."""
    if level.ms:
        found = row.get(longest(row))
    elif level.macs:
        found = row.get("macs")
    else:
        found = row.get("nonzeros" if method.sparse else "parameters")
    return math.nan if found is None else float(found)


def tolerance_of(level: Level) -> float:
    """How much more counts as equal."""
    return TOLERANCE["seconds" if level.ms else "macs" if level.macs else "parameters"]


def limit_of(level: Level) -> float:
    """The level's limit, in the units of `cost_of`."""
    return level.ms / 1e3 if level.ms else float(level.macs or level.params)


def goals_of(model: str, base: Row, rows: Sequence[Measured]) -> list[Goal]:
    """All goals at these rows: against the other tools, the latency, and what training wins back."""
    scores = scores_of(model)
    goals: list[Goal] = []
    for level in dict.fromkeys(level for _, level, _ in rows):
        here = [(method, level, row) for method, at, row in rows if at == level and row["state"] == "ok"]
        where = f"{model}, {level.name}"
        if not level.peers:
            goals += (_extreme_goals if level.macs else _half_goals)(where, level, base, here)
        else:
            goals += _peer_goals(where, level, here, scores)
            smaller = [each for each in here if not each[0].sparse]
            if len(smaller) < len(here):
                goals += _peer_goals(f"{where}, smaller matrices only", level, smaller, scores)
        goals += _latency_goals(where, base, here)
        goals += _recovery_goals(where, base, here, scores)
    return goals


def scores_of(model: str) -> tuple[Score, ...]:
    """The quality columns of a subject."""
    assert model in SUBJECTS
    return subject_of(Case(model)).scores


def _value(row: Row, score: Score) -> float:
    found = row.get(score.column)
    return math.nan if found is None else float(found)


def _best(rows: Iterable[Measured], score: Score) -> Measured | None:
    known = [each for each in rows if not math.isnan(_value(each[2], score))]
    pick: Callable[..., Measured] = max if score.higher else min
    return pick(known, key=lambda each: _value(each[2], score)) if known else None


def _peer_goals(where: str, level: Level, rows: Sequence[Measured], scores: Sequence[Score]) -> list[Goal]:
    """Our best result, chosen on the last score, against the best of the others on every score."""
    slack = 1 + tolerance_of(level)
    untrained = [each for each in rows if not each[0].trained]
    fitting = [each for each in untrained if cost_of(*each) <= limit_of(level) * slack]
    mine = _best([each for each in fitting if each[0].by == "ours"], scores[-1])
    others = [each for each in fitting if each[0].by != "ours"]
    goals: list[Goal] = []
    for score in scores:
        theirs = _best(others, score)
        if score.higher:
            name, target = f"{where}: {score.column} less the best of the others", 0.0
            value = _value(mine[2], score) - _value(theirs[2], score) if mine and theirs else math.nan
        else:
            name, target = f"{where}: {score.column} over the best of the others", 1.0
            value = _value(mine[2], score) / _value(theirs[2], score) if mine and theirs else math.nan
        if mine and theirs:
            name += f" ({mine[0].label}; {theirs[0].label})"
        goals.append(Goal(name, value, target, at_least=score.higher))
    return goals


def _latency_goals(where: str, base: Row, rows: Sequence[Measured]) -> list[Goal]:
    shares = {
        method.label: share
        for method, _, row in rows
        if method.by == "ours" and not math.isnan(share := latency_over_macs(row, base))
    }
    if not shares:
        return []
    worst = min(shares, key=shares.__getitem__)
    name = f"{where}: fall of the latency over that of the MACs, the least of ours ({worst})"
    return [Goal(name, shares[worst], LATENCY_SHARE, at_least=True)]


def _recovery_goals(where: str, base: Row, rows: Sequence[Measured], scores: Sequence[Score]) -> list[Goal]:
    """``(before - after) / (before - dense)`` on the unseen domain, for every result of training.

    Where nothing was lost without training, there is nothing to win back, and no goal.
    """
    plain = {method.label: row for method, _, row in rows}
    goals: list[Goal] = []
    for method, _, row in rows:
        if method.restores is None:
            continue
        for score in (score for score in scores if score.unseen):
            before = _value(plain.get(method.restores, {}), score)
            lost = before - _value(base, score)
            if lost >= 0 if score.higher else lost <= 0:
                continue
            value = (before - _value(row, score)) / lost
            name = f"{where}: share of the {score.column} lost by '{method.restores}' that '{method.label}' brings back"
            goals.append(Goal(name, value, RECOVERED, at_least=True))
    return goals


def _extreme_goals(where: str, level: Level, base: Row, rows: Sequence[Measured]) -> list[Goal]:
    mine = [each for each in rows if each[0].by == "ours" and cost_of(*each) <= limit_of(level)]
    speeds = [row[f"dense_{name}"] / row[name] for _, _, row in mine if (name := longest(row)) and row[name]]
    shares = [row["macs"] / base["macs"] for _, _, row in mine]
    return [
        Goal(f"{where}: throughput, times the dense model's", max(speeds, default=math.nan), THROUGHPUT, at_least=True),
        Goal(f"{where}: share of the MACs that is kept", min(shares, default=math.nan), level.macs / base["macs"]),
    ]


def _half_goals(where: str, level: Level, base: Row, rows: Sequence[Measured]) -> list[Goal]:
    """What narrower blocks keep of the dense model's quality, and how that compares with fewer whole ones."""
    score = scores_of(base["model"])[-1]
    fitting = [each for each in rows if cost_of(*each) <= limit_of(level) * (1 + tolerance_of(level))]
    whole = _best([each for each in fitting if each[0].whole], score)
    narrow = [each for each in fitting if not each[0].whole]
    # Equal parameters are not equal work.
    limit = whole[2]["macs"] * (1 + TOLERANCE["macs"]) if whole else 0.0
    as_fast = [each for each in narrow if each[2]["macs"] <= limit]
    kept = _share(_best(narrow, score), base, score)
    more = _share(_best(as_fast, score), base, score) - _share(whole, base, score)
    return [
        Goal(f"{where}: share of the dense model's {score.column}", kept, HALVED, at_least=True),
        Goal(f"{where}: the same at equal MACs, less that with whole blocks dropped", more, 0.0, at_least=True),
    ]


def _share(found: Measured | None, base: Row, score: Score) -> float:
    return _value(found[2], score) / _value(base, score) if found else math.nan


def latency_over_macs(row: Row, base: Row) -> float:
    """``(1 - time / dense time) / (1 - MACs / dense MACs)`` of the longest timed input; NaN where MACs hardly fell."""
    name = longest(row)
    mine, theirs = row.get(name), row.get(f"dense_{name}")
    if not mine or not theirs or not row.get("macs") or row["macs"] >= 0.98 * base["macs"]:
        return math.nan
    return (1 - mine / theirs) / (1 - row["macs"] / base["macs"])


def longest(row: Row) -> str:
    """The last of the timed columns."""
    timed = [key for key in row if f"dense_{key}" in row]
    return timed[-1] if timed else ""
