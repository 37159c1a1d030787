"""The norm of all of an atom's weights, those that make its channels and those that read them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ....ir.program import Program
from ...base import Context
from ..sites import ChannelSite
from .base import AtomScores, check_floating, element_sums


def magnitude(program: Program, sites: Sequence[ChannelSite], ctx: Context) -> AtomScores:
    """``sqrt(sum of w^2)`` over all elements of an atom.

    Args, returns: as `base.ChannelScore`.

    Raises:
        PreconditionError: a weight of a site does not hold floating-point numbers (quantized ones mean nothing alone).
    """
    scores: AtomScores = {}
    for site in sites:
        check_floating(program, site)
        names = dict.fromkeys(member.weight for member in site.group.members)
        squares = {name: program.weights[name].tensor().double().square() for name in names}
        scores[site.index] = np.sqrt(element_sums(site, squares).clip(min=0))
    return scores
