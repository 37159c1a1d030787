"""Random tables of levels, small enough to try every state."""

from __future__ import annotations

import itertools

from hypothesis import strategies as st

from graphlathe.passes.search.allocators.table import LevelTable, State

WHOLE = st.integers(0, 12)
REAL = st.floats(0, 10, allow_subnormal=False)


@st.composite
def tables(draw: st.DrawFn, costs: st.SearchStrategy[float] | None = None, max_sites: int = 5) -> LevelTable:
    """1 to 5 sites of 1 to 4 levels, whose costs need not fall, with estimated errors of any shape."""
    costs = draw(st.sampled_from([WHOLE, REAL])) if costs is None else costs
    levels = draw(st.lists(st.integers(1, 4), min_size=1, max_size=max_sites))
    return LevelTable(
        costs=tuple(tuple(draw(costs) for _ in range(n)) for n in levels),
        errors=tuple(tuple(float(draw(st.integers(-3, 20))) for _ in range(n)) for n in levels),
        kinds=tuple(draw(st.sampled_from(["attention", "mlp"])) for _ in levels),
        fixed=draw(costs),
    )


@st.composite
def problems(draw: st.DrawFn, costs: st.SearchStrategy[float] | None = None) -> tuple[LevelTable, float]:
    """A table and a limit that some state meets: anything in between, or exactly what a state costs."""
    table = draw(tables(costs))
    low, high = table.cost(table.smallest()), table.cost(tuple(row.index(max(row)) for row in table.units))
    exact = st.sampled_from(all_states(table)).map(table.cost)
    return table, draw(st.one_of(exact, st.floats(low, high))) if high > low else high


def all_states(table: LevelTable) -> list[State]:
    return list(itertools.product(*(range(len(row)) for row in table.costs)))
