"""A plan's JSON, checked: what is drawn of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..ir.errors import InputError
from ..passes.search.linear_texts import kept_share

_LINEAR = "linear"  # the kind of sites that are weights
_LONG = ("shape=", "was=", "method=", "group=")


@dataclass(frozen=True)
class Site:
    """One site of a plan.

    Attributes:
        label: its name.
        kind: what it is, such as ``mlp``.
        block: its number in its stream, if it has one.
        units: how many there were.
        removed: those that went.
        scores: one for each unit, NaN where there is none; None without scores.
        level: what was chosen for it.
        share: of a layer whose weight is stored at a level, what that leaves of it (NaN where it does not say); None
            where units go.
    """

    label: str
    kind: str
    block: int | None
    units: int
    removed: tuple[int, ...]
    scores: tuple[float, ...] | None
    level: str
    share: float | None = None

    @property
    def short_level(self) -> str:
        """The level in few words: how a weight is stored, without what it was and how that was found."""
        return " ".join(word for word in self.level.split() if not word.startswith(_LONG))

    @property
    def kept_percent(self) -> float:
        """Share of the units, or of the weight, that stays, in percent; NaN where nothing says."""
        if self.share is not None:
            return 100 * self.share
        return 100 * (self.units - len(self.removed)) / self.units if self.units else 0.0


@dataclass(frozen=True)
class Step:
    """The best of a search after a generation."""

    generation: int
    evaluations: int
    best: float
    cost: float


@dataclass(frozen=True)
class Point:
    """A candidate that was evaluated; ``origin`` is ``seed: NAME`` or ``mutation``."""

    cost: float
    score: float
    origin: str = ""

    @property
    def finite(self) -> bool:
        """Whether it can be drawn."""
        return math.isfinite(self.cost) and math.isfinite(self.score)


@dataclass(frozen=True)
class Search:
    """What a search did. Lower scores and lower costs are better.

    Attributes:
        history: the best after each generation.
        evaluated: all candidates.
        chosen: the one that was taken.
        unit: what a cost is counted in: params, bytes, macs, ms...
        limit: the budget.
    """

    history: tuple[Step, ...]
    evaluated: tuple[Point, ...]
    chosen: Point | None
    unit: str
    limit: float | None


@dataclass(frozen=True)
class PlanData:
    """A plan's sites, and the search that found it, if there was one."""

    sites: tuple[Site, ...]
    search: Search | None

    @property
    def kinds(self) -> dict[str, list[Site]]:
        """The sites by kind, in the order in which they stand."""
        found: dict[str, list[Site]] = {}
        for site in self.sites:
            found.setdefault(site.kind, []).append(site)
        return found


def read_plan(plan: Mapping[str, Any]) -> PlanData:
    """Read a plan's JSON.

    Raises:
        InputError: a part is missing or makes no sense; the message names it.
    """
    place = "sites"
    try:
        sites: list[Site] = []
        for number, raw in enumerate(plan["sites"]):
            place = f"sites[{number}]"
            sites.append(_site(raw))
        place = "search"
        raw = plan.get("search")
        return PlanData(tuple(sites), None if raw is None else _search(raw))
    except KeyError as error:
        raise InputError(f"the plan's '{place}' has no {error}") from error
    except (TypeError, ValueError, AttributeError, InputError) as error:
        raise InputError(f"the plan's '{place}' cannot be drawn: {error}") from error


def _site(raw: Mapping[str, Any]) -> Site:
    units, removed = int(raw["units"]), tuple(int(u) for u in raw["removed"])
    if len(set(removed)) < len(removed) or any(not 0 <= u < units for u in removed):
        raise ValueError(f"the removed units {list(removed)} are no choice of {units}")
    scores = raw.get("scores")
    if scores is not None:
        scores = tuple(_number(s) for s in scores)
        if len(scores) != units:
            raise ValueError(f"{len(scores)} scores for {units} units")
    block, level, share = raw.get("block"), str(raw.get("level") or ""), None
    if level and raw["kind"] == _LINEAR:
        known = kept_share(level)
        share = math.nan if known is None else known
    return Site(
        label=str(raw["label"]),
        kind=str(raw["kind"]),
        block=None if block is None else int(block),
        units=units,
        removed=removed,
        scores=scores,
        level=level,
        share=share,
    )


def _search(raw: Mapping[str, Any]) -> Search:
    budget, chosen = raw.get("budget") or {}, raw.get("chosen")
    limit = budget.get("limit")
    return Search(
        history=tuple(
            Step(int(s["generation"]), int(s["evaluations"]), _number(s["best"]), _number(s["cost"]))
            for s in raw["history"]
        ),
        evaluated=tuple(
            Point(_number(p["cost"]), _number(p["score"]), str(p.get("origin") or "")) for p in raw["evaluated"]
        ),
        chosen=None if chosen is None else Point(_number(chosen["cost"]), _number(chosen["score"])),
        unit=str(budget.get("kind") or "cost"),
        limit=None if limit is None else float(limit),
    )


def _number(value: Any) -> float:
    """A number; JSON's null stands for what is none."""
    return math.nan if value is None else float(value)
