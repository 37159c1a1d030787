"""Which site of a program that was cut is which site of the program before.

Names do not tell: groups of heads, and the heads of each group, consist of the same dimensions of the same weights. The
elements of those dimensions do, by their numbers in the uncut weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...ir.program import Program
from .sites import ChannelSite

Key = frozenset[tuple[Any, ...]]


class Uncut:
    """The numbers of what is left, in the weights as they were.

    Args:
        program: the program before any cut; weights that it gets later (of norms that are rescaled) tell nothing.
    """

    def __init__(self, program: Program) -> None:
        self._shapes = {name: weight.shape for name, weight in program.weights.items()}
        self._left: dict[tuple[str, int], np.ndarray] = {}

    def _of(self, weight: str, dim: int) -> np.ndarray:
        """The elements of a dimension that are left."""
        return self._left.setdefault((weight, dim), np.arange(self._shapes[weight][dim]))

    def cut(self, site: ChannelSite, removed: list[int]) -> None:
        """Note that these units of a site, as it was found in the uncut program, are gone."""
        for member in site.group.members:
            left = self._of(member.weight, member.dim)
            self._left[member.weight, member.dim] = left[~np.isin(left, member.index[removed])]

    def before(self, site: ChannelSite) -> Key:
        """What a site of the uncut program consists of by now."""
        return self._key(
            site, lambda member: [a[np.isin(a, self._of(member.weight, member.dim))] for a in member.index]
        )

    def now(self, site: ChannelSite) -> Key:
        """What a site of the program as it is now consists of."""
        return self._key(site, lambda member: [self._of(member.weight, member.dim)[atom] for atom in member.index])

    def _key(self, site: ChannelSite, atoms: Any) -> Key:
        known = [member for member in site.group.members if member.weight in self._shapes]
        return frozenset(
            (member.weight, member.dim, tuple(tuple(sorted(atom.tolist())) for atom in atoms(member)))
            for member in known
        )
