"""Weights times the norms of their inputs, ``|W_ij| * |X_j|``, added up over an atom's columns.

Source: Wanda (Sun et al. 2023, arXiv 2306.11695), which ranks single weights; here the sum over whole columns ranks
channels. The norm is the root mean square over rows, so that scores do not grow with the data.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ....ir.program import Program
from ...base import Context
from ..consumers import weight_matrix
from ..sites import ChannelSite
from ..statistics import collect
from .base import AtomScores, all_consumers, per_atom


def wanda(program: Program, sites: Sequence[ChannelSite], ctx: Context) -> AtomScores:
    """``sum over columns j of an atom, and rows i, of |W_ij| * sqrt(E x_j^2)``, over all consumers.

    Args, returns: as `base.ChannelScore`.
    """
    found = collect(program, all_consumers(sites), ctx)
    scores: AtomScores = {}
    for site in sites:
        scores[site.index] = np.zeros(site.size)
        for consumer in site.consumers:
            moments = found[consumer].moments
            norm = (moments.squares / moments.count).sqrt()
            scores[site.index] += per_atom(
                site, consumer, weight_matrix(program, consumer).abs().double().sum(0) * norm
            )
    return scores
