"""The places of a program for one budget."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from .allocators.table import LevelTable
from .budget import Meter
from .levels import Place

_ROUNDING = 1e-6


@dataclass
class Table:
    """The places of a program for a recipe, with what was left out.

    Attributes:
        places: the places, in graph order.
        meter: counts programs in the budget's unit.
        blocked: why others cannot be touched, with counts.
        notes: lines for the report.
        outside: the largest operators that are in no place because they are in no block.
        whole: what all places cost together.
        total: what the program costs.
        added_up: whether costs of places are known only one by one and added up (milliseconds, bits); otherwise the
            program that a plan makes is counted.
        runs: how often a program was run to measure costs (milliseconds), at the sizes of the first calibration batch.
    """

    places: list[Place]
    meter: Meter
    blocked: dict[str, int] = field(default_factory=dict[str, int])
    notes: list[str] = field(default_factory=list[str])
    outside: tuple[str, ...] = ()
    whole: float = 0.0
    total: float = 0.0
    added_up: bool = False
    runs: int = 0

    def limit(self, ratio: float | None, target: float | None) -> float:
        """What the whole program may cost: the target, or what is left without a share of what the places cost."""
        return target if target is not None else self.total - (ratio or 0.0) * self.whole

    def levels(self) -> LevelTable:
        """The costs and errors as the allocators want them.

        Where places share weights (hidden channels and those of the stream), what they cost is scaled so that the whole
        is not counted twice; the real cost of a plan is checked anyway.
        """
        added = sum(place.levels[0].cost for place in self.places)
        # Measured savings may even add up to more than the whole program takes.
        scale = min(1.0, self.whole / added, self.total / added) if added else 1.0
        costs = [[level.cost * scale for level in place.levels] for place in self.places]
        if not self.added_up:
            # Down, so that the untouched places do not cost more than the program.
            costs = [[math.floor(cost + _ROUNDING) for cost in row] for row in costs]
        return LevelTable(
            costs=tuple(map(tuple, costs)),
            errors=tuple(tuple(level.error for level in place.levels) for place in self.places),
            kinds=tuple(place.kind for place in self.places),
            labels=tuple(place.label for place in self.places),
            fixed=max(self.total - sum(row[0] for row in costs), 0),
        )
