"""Random steps of `evolution`: from a state to others that fit the same budget.

A flip makes one site a step cheaper and another a step milder. Sites of different costs may trade, so flips are
followed by repair (other sites become cheaper until the state fits) and by filling up (sites become milder while one
step fits, also those that just became cheaper). The sites that a flip made milder stay so, hence a neighbour is never
its parent. Costs 2, 2, 3, 3 and a budget of 5; ``o`` is kept, ``-`` dropped:

    parent    o - o -    5
    flip      - - o o    6, does not fit: the first became cheaper, the last milder
    repair    - - - o    3
    fill up   - o - o    5

Where all sites of a kind cost the same and are only kept or dropped, a flip is a swap, nothing is repaired, and a state
after f flips differs from its parent in exactly 2 f sites, as in EvoPress.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence

from .table import LevelTable, State


class Mutator:
    """Draws neighbours of states.

    Args:
        table: the levels. A step goes to the neighbouring level of the site's ladder (`LevelTable.ladders`).
        budget: what a state may weigh (`LevelTable.weigh`).
        max_flips: the number of flips is the smaller of two uniform draws from 1 to this (EvoPress): mostly one.
        same_kind: whether the two sites of a flip are of one kind, and what is repaired and filled up as well.
        draw: the source of randomness.
    """

    def __init__(self, table: LevelTable, budget: int, max_flips: int, same_kind: bool, draw: random.Random) -> None:
        self.table, self.budget, self.max_flips, self.draw = table, budget, max_flips, draw
        kinds = table.kinds if same_kind else ("",) * len(table)
        self._groups = [[site for site, own in enumerate(kinds) if own == kind] for kind in dict.fromkeys(kinds)]
        # Costs by steps of the ladders.
        self._costs = [[row[level] for level in ladder] for row, ladder in zip(table.units, table.ladders, strict=True)]

    def neighbour(self, parent: State) -> State | None:
        """A random state that fits, or None where this draw leads to none.

        Each flip draws a kind (of those that can flip), then a site that becomes cheaper, then one that becomes milder;
        no site is in two flips. Where sites run out there are fewer flips.
        """
        flips = min(self.draw.randint(1, self.max_flips), self.draw.randint(1, self.max_flips))
        before = self._steps(parent)
        steps = list(before)
        changed: dict[int, None] = {}
        for _ in range(flips):
            choices = [pair for group in self._groups if (pair := self._flippable(steps, before, group)) is not None]
            if not choices:
                break
            cheaper, milder, group = self.draw.choice(choices)
            down = self.draw.choice(cheaper if len(milder) > 1 else [site for site in cheaper if site not in milder])
            up = self.draw.choice([site for site in milder if site != down])
            steps[down] += 1
            steps[up] -= 1
            changed.update(dict.fromkeys(group))
        return self._settle(steps, before, changed) if changed else None

    def singles(self, parent: State) -> Iterator[State]:
        """The states that one flip leads to, in random order: each pair of sites once, if its repair succeeds."""
        before = self._steps(parent)
        pairs: list[tuple[int, int, list[int]]] = []
        for group in self._groups:
            found = self._flippable(before, before, group)
            if found is not None:
                pairs += [(down, up, group) for down in found[0] for up in found[1] if down != up]
        self.draw.shuffle(pairs)
        for down, up, group in pairs:
            steps = list(before)
            steps[down] += 1
            steps[up] -= 1
            state = self._settle(steps, before, group)
            if state is not None:
                yield state

    def walk(self, state: State) -> State:
        """A state far from this one: as many neighbours on as there are sites."""
        for _ in range(len(self.table)):
            state = self.neighbour(state) or state
        return state

    def filled(self, state: State) -> State:
        """The state with random sites made milder until no step fits any more."""
        steps = self._steps(state)
        self._fill(steps, range(len(steps)))
        return self._state(steps)

    def _steps(self, state: State) -> list[int]:
        # A level beyond its ladder costs no less than the untouched site: its neighbours are those of the latter.
        return [ladder.index(n) if n in ladder else 0 for n, ladder in zip(state, self.table.ladders, strict=True)]

    def _state(self, steps: Sequence[int]) -> State:
        return tuple(ladder[step] for step, ladder in zip(steps, self.table.ladders, strict=True))

    def _weight(self, steps: Sequence[int]) -> int:
        return sum(costs[step] for step, costs in zip(steps, self._costs, strict=True))

    def _flippable(
        self, steps: Sequence[int], before: Sequence[int], group: list[int]
    ) -> tuple[list[int], list[int], list[int]] | None:
        """Sites, of those not changed yet, that can become cheaper, and milder; None without a pair of them."""
        free = [site for site in group if steps[site] == before[site]]
        cheaper = [site for site in free if steps[site] + 1 < len(self._costs[site])]
        milder = [site for site in free if steps[site] > 0]
        if not cheaper or not milder or cheaper == milder == cheaper[:1]:
            return None
        return cheaper, milder, group

    def _settle(self, steps: list[int], before: Sequence[int], sites: Iterable[int]) -> State | None:
        """Repair and fill up, on these sites; None where it cannot fit while what the flips made milder stays so."""
        sites = list(sites)
        while (weight := self._weight(steps)) > self.budget:
            cheaper = [s for s in sites if steps[s] >= before[s] and self._costs[s][steps[s]] > self._costs[s][-1]]
            if not cheaper:
                return None
            steps[self.draw.choice(cheaper)] += 1
        if weight < self.budget:
            self._fill(steps, sites)
        return self._state(steps)

    def _fill(self, steps: list[int], sites: Sequence[int]) -> None:
        """Make sites milder while a step fits; steps that cost nothing are no gain, and passed over."""
        room = self.budget - self._weight(steps)
        while True:
            options: list[tuple[int, int, int]] = []
            for site in sites:
                costs, here = self._costs[site], steps[site]
                step = next((n for n in reversed(range(here)) if costs[n] > costs[here]), None)
                if step is not None and costs[step] - costs[here] <= room:
                    options.append((site, step, costs[step] - costs[here]))
            if not options:
                return
            site, steps[site], gain = self.draw.choice(options)
            room -= gain
