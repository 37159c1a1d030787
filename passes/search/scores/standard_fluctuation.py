"""Fluctuations that can be compared over layers: FLAP's adaptive structure search.

Per layer, the fluctuations of the columns (`fluctuation`) are standardised: mean 0, deviation 1. An atom of several
columns (a head) counts by the mean of its columns, and those of heads are squared before they are standardised, as in
the paper's code, which makes single outstanding channels of a head count more.

Source: FLAP (An et al. 2024, arXiv 2312.11983), section 3.3 and the setting AL-AM of its code.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ....ir.program import Program
from ...base import Context
from ..consumers import columns_labels, weight_matrix
from ..sites import ChannelSite
from ..statistics import collect
from .base import AtomScores, all_consumers

_HEADS = ("heads", "query-heads")


def standard_fluctuation(program: Program, sites: Sequence[ChannelSite], ctx: Context) -> AtomScores:
    """The mean over an atom's columns of their standardised fluctuation, over all consumers.

    Args, returns: as `base.ChannelScore`.
    """
    found = collect(program, all_consumers(sites), ctx)
    scores: AtomScores = {}
    for site in sites:
        total, count = np.zeros(site.size), np.zeros(site.size)
        for consumer in site.consumers:
            lengths = weight_matrix(program, consumer).double().square().sum(0)
            values = found[consumer].moments.variance.double() * lengths
            labels = torch.from_numpy(columns_labels(consumer))
            kept = labels >= 0
            values, atoms = values[kept], labels[kept].numpy()
            values = values.square() if site.kind in _HEADS else values
            standard = (values - values.mean()).numpy()
            deviation = float(np.sqrt(np.square(standard).mean()))
            np.add.at(total, atoms, standard / deviation if deviation else standard)
            np.add.at(count, atoms, 1.0)
        scores[site.index] = total / np.maximum(count, 1.0)
    return scores
