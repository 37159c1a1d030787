"""How large an atom's channels are where they are read: the length of the vector of ``E |x_j|`` over its columns.

For a single channel this is its mean absolute value; for a head, the length of its mean absolute output.

Source: Minitron (Muralidharan et al. 2024, arXiv 2407.14679), which combines the mean and the L2 norm of activations
in this way.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ....ir.program import Program
from ...base import Context
from ..sites import ChannelSite
from ..statistics import collect
from .base import AtomScores, all_consumers, distinct_inputs, per_atom


def activation(program: Program, sites: Sequence[ChannelSite], ctx: Context) -> AtomScores:
    """``sqrt(sum over columns j of an atom of (E |x_j|)^2)``; a value that several consumers read counts once.

    Args, returns: as `base.ChannelScore`.
    """
    found = collect(program, all_consumers(sites), ctx)
    return {
        site.index: np.sqrt(
            sum(
                (per_atom(site, c, found[c].moments.absolute_mean.square()) for c in distinct_inputs(site)),
                np.zeros(site.size),
            )
        )
        for site in sites
    }
