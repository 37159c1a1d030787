"""Weighted input variance: how much an atom's contribution fluctuates around its mean, ``var(x_j) * |W_:j|^2``.

What does not fluctuate can be removed and its mean put into the bias (`compensation.bias`): a constant channel scores
zero, however large it is.

Source: FLAP (An et al. 2023, arXiv 2312.11983), metric WIFV. Its code skips the first batch's variance and divides by
the number of samples less one; here all rows count alike, and the sum is over all columns of an atom.
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


def fluctuation(program: Program, sites: Sequence[ChannelSite], ctx: Context) -> AtomScores:
    """``sum over columns j of an atom of var(x_j) * |W_:j|^2``, over all consumers.

    Args, returns: as `base.ChannelScore`.
    """
    found = collect(program, all_consumers(sites), ctx)
    scores: AtomScores = {}
    for site in sites:
        scores[site.index] = np.zeros(site.size)
        for consumer in site.consumers:
            lengths = weight_matrix(program, consumer).double().square().sum(0)
            scores[site.index] += per_atom(site, consumer, found[consumer].moments.variance * lengths)
    return scores
