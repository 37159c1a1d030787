"""What an atom is worth after the others have made up for it: scores from Gram matrices of the consumers' inputs.

- ``optimal-compensation``: the growth of the squared output error, per row, when the atom's columns become zero and the
  other columns are refitted by least squares;
- ``condition``: the share of the atom's inputs that the other channels do not predict, ``1 / (H_jj [H^-1]_jj)``, which
  looks at no weights: 1 for a channel that is orthogonal to all others, near 0 for a redundant one.

Both stand in for COMP (arXiv 2501.15255), see `local.columns`, and make no claim to follow that paper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ....ir.program import Program
from ...base import Context
from ..consumers import Consumer, weight_matrix
from ..local.columns import condition as column_condition
from ..local.columns import group_compensation_scores
from ..sites import ChannelSite
from ..statistics import collect_in_chunks
from .base import AtomScores, Values, all_consumers, atom_columns, distinct_inputs, per_atom

GRAM_BYTES = 2 << 30
"""How much memory Gram matrices may take at a time; more of them mean more passes over the data."""

DAMPING = 0.01
"""Share of a Gram matrix's mean diagonal that is added to it."""


def optimal_compensation(program: Program, sites: Sequence[ChannelSite], ctx: Context) -> AtomScores:
    """``tr(W_g ([H^-1]_gg)^-1 W_g^T)`` with ``H = E[x x^T]``, damped, over all consumers.

    Args, returns: as `base.ChannelScore`.
    """

    def of(site: ChannelSite, consumer: Consumer, gram: Tensor) -> Values:
        columns = atom_columns(site, consumer).to(gram.device)
        weight = weight_matrix(program, consumer).double()
        return group_compensation_scores(weight, gram, columns, DAMPING).double().cpu().numpy()

    uses = [(site, consumer) for site in sites for consumer in site.consumers]
    return _added(program, sites, uses, of, ctx)


def condition(program: Program, sites: Sequence[ChannelSite], ctx: Context) -> AtomScores:
    """The mean of ``1 / (H_jj [H^-1]_jj)`` over an atom's columns, with ``H = E[x x^T]``, damped; a column that is
    always zero counts 0. A value that several consumers read counts once.

    Args, returns: as `base.ChannelScore`.
    """

    def of(site: ChannelSite, consumer: Consumer, gram: Tensor) -> Values:
        unpredicted = torch.where(gram.diagonal() > 0, 1 / column_condition(gram, DAMPING), 0.0)
        return per_atom(site, consumer, unpredicted)

    uses = [(site, consumer) for site in sites for consumer in distinct_inputs(site)]
    scores = _added(program, sites, uses, of, ctx)
    columns = {site.index: 0 for site in sites}
    for site, consumer in uses:
        columns[site.index] += atom_columns(site, consumer).shape[1]
    return {index: values / columns[index] for index, values in scores.items()}


def _added(
    program: Program,
    sites: Sequence[ChannelSite],
    uses: Sequence[tuple[ChannelSite, Consumer]],
    of: Callable[[ChannelSite, Consumer, Tensor], Values],
    ctx: Context,
) -> AtomScores:
    """Add up a score over the consumers of each site, with only some Gram matrices in memory at a time."""
    scores: AtomScores = {site.index: np.zeros(site.size) for site in sites}
    wanted = set(id(consumer) for _, consumer in uses)
    consumers = [consumer for consumer in all_consumers(sites) if id(consumer) in wanted]
    for found in collect_in_chunks(program, consumers, ctx, limit_bytes=GRAM_BYTES):
        for site, consumer in uses:
            if consumer in found:
                gram = found[consumer].gram
                assert gram is not None
                scores[site.index] += of(site, consumer, gram.matrix / gram.count)
    return scores
