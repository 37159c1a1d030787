"""Scores: what ranks the units of a residual stream, and the atoms of channel sites. One file each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from ....ir.program import Program
from ...base import Context
from ..units import Unit
from .activation import activation
from .base import AtomScores, ChannelScore
from .block_influence import block_influence
from .compensated import condition, optimal_compensation
from .fluctuation import fluctuation
from .gradient import gradient
from .magnitude import magnitude
from .relevance import register_relevance, relevance
from .removal import removal
from .removal_loss import removal_loss
from .standard_fluctuation import standard_fluctuation
from .stream_norms import l2, norm_ratio
from .usage import usage
from .wanda import wanda
from .window import best_window

Scores = dict[int, float]
Score = Callable[[Program, Sequence[Unit], Collection[Unit], Context], Scores]

SCORES: dict[str, Score] = {
    "block-influence": block_influence,
    "loss": removal_loss,
    "norm-ratio": norm_ratio,
    "l2": l2,
}
"""What ranks blocks and branches, by name."""

CHANNEL_SCORES: dict[str, ChannelScore] = {
    score.name: score
    for score in (
        ChannelScore(
            "magnitude", magnitude, "norm of all weights of an atom", calibration=False, consumers=False, runs=""
        ),
        ChannelScore("wanda", wanda, "weights times input norms, added up", "Sun et al. 2023, arXiv 2306.11695"),
        ChannelScore(
            "fluctuation", fluctuation, "input variance times squared weights", "FLAP, An et al. 2023, arXiv 2312.11983"
        ),
        ChannelScore(
            "standard-fluctuation",
            standard_fluctuation,
            "fluctuation, standardised within each layer",
            "FLAP, An et al. 2023, arXiv 2312.11983",
        ),
        ChannelScore(
            "activation", activation, "mean absolute inputs", "Minitron, Muralidharan et al. 2024, arXiv 2407.14679"
        ),
        ChannelScore(
            "optimal-compensation",
            optimal_compensation,
            "output error that is left after the other columns are refitted (in place of COMP)",
            "Hassibi & Stork 1993",
            runs="chunks",
        ),
        ChannelScore(
            "condition",
            condition,
            "share of the inputs that other channels do not predict (in place of COMP)",
            runs="chunks",
        ),
        ChannelScore("usage", usage, "share of rows to which an atom adds most", "SHRP, stage A"),
        ChannelScore(
            "gradient",
            gradient,
            "first-order change of a loss without the atom",
            "Molchanov et al. 2019, arXiv 1906.10771",
            consumers=False,
            gradients=True,
        ),
        ChannelScore("removal", removal, "drift of the outputs without the atom alone", consumers=False, runs="atoms"),
        ChannelScore(
            "relevance", relevance, "what a registered analysis says", calibration=False, consumers=False, runs=""
        ),
    )
}
"""What ranks the atoms of channel sites, by name."""

__all__ = [
    "CHANNEL_SCORES",
    "SCORES",
    "AtomScores",
    "ChannelScore",
    "Score",
    "Scores",
    "best_window",
    "block_influence",
    "register_relevance",
    "relevance",
    "removal_loss",
]
