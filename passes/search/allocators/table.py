"""Levels per site: what each site may be changed to, what that costs, and what harm it is estimated to do.

All allocators work on this table, so they serve every method: dropped blocks (levels kept and dropped), channels (one
level per share that is cut), bits, ranks. A *state* is the level of every site.

Costs are compared exactly. A number, integer or floating, is an exact multiple of one unit (floating-point numbers are
fractions whose denominators are powers of two), so that sums are sums of integers and do not depend on their order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from numbers import Integral
from typing import Any, Self

from ....ir.errors import InputError, PreconditionError

State = tuple[int, ...]


@dataclass(frozen=True)
class LevelTable:
    """What every level of every site costs and harms.

    Attributes:
        costs: [site][level]: what the site costs at the level, in whatever the budget counts: parameters, bytes, MACs
            or milliseconds; at least zero. Level 0 is the untouched site.
        errors: [site][level]: estimated harm, lower is better; None where there is no estimate, infinite where the
            level breaks the model. Left out: there is no estimate at all.
        kinds: [site]: for reports, and for swaps inside one kind. Left out: all sites are of one kind.
        labels: [site]: for messages and reports. Left out: ``site 0``, ``site 1``...
        fixed: what costs the same whatever is chosen, at least zero.

    Raises:
        InputError: the rows do not fit each other, a cost is negative or not finite, or an error is not a number.
    """

    costs: tuple[tuple[float, ...], ...]
    errors: tuple[tuple[float | None, ...], ...] = ()
    kinds: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    fixed: float = 0

    def __post_init__(self) -> None:
        rows = tuple(tuple(map(_plain, row)) for row in self.costs)
        errors = tuple(tuple(row) for row in self.errors) or tuple((None,) * len(row) for row in rows)
        set_ = object.__setattr__  # the class is frozen
        set_(self, "costs", rows)
        set_(self, "errors", errors)
        set_(self, "fixed", _plain(self.fixed))
        set_(self, "kinds", tuple(self.kinds) or ("",) * len(rows))
        set_(self, "labels", tuple(self.labels) or tuple(f"site {site}" for site in range(len(rows))))
        for name in ("errors", "kinds", "labels"):
            if len(getattr(self, name)) != len(rows):
                raise InputError(f"the table has {len(rows)} rows of costs, but {len(getattr(self, name))} {name}")
        _check_cost(self.fixed, "the fixed cost")
        for label, costs, harms in zip(self.labels, rows, errors, strict=True):
            if not costs or len(costs) != len(harms):
                raise InputError(
                    f"{label} has {len(costs)} costs and {len(harms)} errors", expected="one of each for every level"
                )
            for level, (cost, harm) in enumerate(zip(costs, harms, strict=True)):
                _check_cost(cost, f"the cost of {label} at level {level}")
                if harm is not None and (math.isnan(harm) or harm == -math.inf):
                    raise InputError(f"the error of {label} at level {level} is {harm}", expected="a number, or None")

    @cached_property
    def unit(self) -> Fraction:
        """The largest number of which all costs are whole multiples."""
        parts = [Fraction(cost) for row in self.costs for cost in row] + [Fraction(self.fixed)]
        denominator = math.lcm(*(part.denominator for part in parts))
        divisor = math.gcd(*(int(part * denominator) for part in parts))
        return Fraction(max(divisor, 1), denominator)

    @cached_property
    def units(self) -> tuple[tuple[int, ...], ...]:
        """[site][level]: the costs in multiples of `unit`."""
        return tuple(tuple(int(Fraction(cost) / self.unit) for cost in row) for row in self.costs)

    @cached_property
    def ladders(self) -> tuple[tuple[int, ...], ...]:
        """[site]: its useful levels from the mildest on: level 0, then those that cost less, by falling cost.

        A level that costs no less than the untouched site (a rank so high that two factors are larger than their
        product, a slower kernel) is never worth its harm. Among levels of equal cost the lower one comes first.
        """
        return tuple(
            (
                0,
                *sorted(
                    (level for level, cost in enumerate(row) if cost < row[0]), key=lambda n, row=row: (-row[n], n)
                ),
            )
            for row in self.units
        )

    def __len__(self) -> int:
        return len(self.costs)

    @property
    def untouched(self) -> State:
        """Level 0 everywhere."""
        return (0,) * len(self)

    def check(self, state: Sequence[int]) -> None:
        """Refuse what is no state of this table.

        Raises:
            InputError: it has too few or too many levels, or one that its site does not have.
        """
        if len(state) != len(self):
            raise InputError(f"a state of {len(state)} levels for {len(self)} sites")
        for label, row, level in zip(self.labels, self.costs, state, strict=True):
            if not 0 <= level < len(row):
                raise InputError(f"{label} has no level {level}", expected=f"0 to {len(row) - 1}")

    def weigh(self, state: Sequence[int]) -> int:
        """The cost of the sites, without the fixed cost, in multiples of `unit`."""
        return sum(row[level] for row, level in zip(self.units, state, strict=True))

    def cost(self, state: Sequence[int]) -> float:
        """The cost of a state with the fixed cost: exact for integers, else the nearest floating-point number."""
        return self._number(self.weigh(state) + self._fixed_units)

    def amount(self, units: int) -> float:
        """Multiples of `unit` as the nearest floating-point number, in what the costs are given in."""
        return units * self.unit.numerator / self.unit.denominator

    def error(self, state: Sequence[int]) -> float | None:
        """The sum of the sites' estimated errors; None where one has no estimate."""
        errors = [row[level] for row, level in zip(self.errors, state, strict=True)]
        return None if None in errors else math.fsum(error for error in errors if error is not None)

    def smallest(self) -> State:
        """The cheapest state: every site at its cheapest level, the lowest of equals."""
        return tuple(row.index(min(row)) for row in self.units)

    def budget(self, limit: float) -> int:
        """What the sites may cost together, in multiples of `unit`, so that `cost` is at most ``limit``.

        Raises:
            PreconditionError: not even the cheapest state fits.
        """
        smallest = self.cost(self.smallest())
        if not smallest <= limit:  # also where the limit is not a number
            raise PreconditionError(
                f"the limit of {limit:,} is out of reach: {smallest:,} is left with every site at its cheapest level",
                expected=f"at least {smallest:,}",
                remedy="raise the limit, or allow harsher levels",
            )
        most = sum(max(row) for row in self.units)
        if limit >= self._number(most + self._fixed_units):
            return most
        # The cost of a state is rounded to a floating-point number, so states slightly above the limit round down to
        # it: a state always fits the limit that is its own cost.
        low, high = self.weigh(self.smallest()), most
        while high - low > 1:
            middle = (low + high) // 2
            if self._number(middle + self._fixed_units) <= limit:
                low = middle
            else:
                high = middle
        return low

    def estimated(self, user: str) -> list[list[float]]:
        """The errors of all levels, for an allocator that needs them.

        Args:
            user: its name, for the message.

        Raises:
            PreconditionError: a level has none.
        """
        for label, row in zip(self.labels, self.errors, strict=True):
            if None in row:
                raise PreconditionError(
                    f"{user} needs an estimated error of every level, and {label} has none at level {row.index(None)}",
                    remedy="estimate it, or use uniform shares, greedy with a measure, or evolution",
                )
        return [[error for error in row if error is not None] for row in self.errors]

    @cached_property
    def _fixed_units(self) -> int:
        return int(Fraction(self.fixed) / self.unit)

    @cached_property
    def _integral(self) -> bool:
        return all(isinstance(cost, int) for row in (*self.costs, (self.fixed,)) for cost in row)

    def _number(self, units: int) -> float:
        value = units * self.unit
        return int(value) if self._integral else float(value)


@dataclass(frozen=True)
class Allocation:
    """What an allocator chose.

    Attributes:
        method: the allocator.
        state: the level of every site.
        cost: what that costs, with the fixed cost.
        error: the estimated error, or None without estimates.
        exact: whether no state that fits has a lower estimated error.
        notes: what a reader of the result should know.
    """

    method: str
    state: State
    cost: float
    error: float | None
    exact: bool = False
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, method: str, table: LevelTable, state: State, *, exact: bool = False, notes: Sequence[str] = ()
    ) -> Self:
        """The allocation with cost and error read from the table."""
        return cls(method, state, table.cost(state), table.error(state), exact, tuple(notes))

    def to_json(self) -> dict[str, Any]:
        """What `json.dumps` takes; an infinite error is None."""
        finite = self.error is not None and math.isfinite(self.error)
        return {
            "method": self.method,
            "state": list(self.state),
            "cost": self.cost,
            "error": self.error if finite else None,
            "exact": self.exact,
            "notes": list(self.notes),
        }


def _plain(number: float) -> float:
    """The number as Python's own type: those of numpy have no exact fractions."""
    return int(number) if isinstance(number, Integral) else float(number)


def _check_cost(cost: float, what: str) -> None:
    if not (math.isfinite(cost) and cost >= 0):
        raise InputError(f"{what} is {cost}", expected="a finite number, at least zero")
