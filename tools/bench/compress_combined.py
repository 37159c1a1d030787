"""Suite ``compress-combined``: whatever may be removed, to a budget of parameters, and to one of milliseconds.

The milliseconds are measured in ONNX Runtime at the longest timed input. The other tools do not measure time: they are
given the same share of the multiply-adds instead. For MiniLM there are two more levels, with training: 48% of the
parameters of its blocks go, against as many whole blocks; and at most 15% of the multiply-adds stay, where it is the
speed that has a goal, and the quality is reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Result, Row, Run, Suite
from .compress_goals import longest
from .compress_methods import Level
from .compress_ours import BY_BLOCKS, BY_PARAMETERS, BY_SPEED, BY_TIME
from .compress_parts import MINILM, QUICK_MINILM, QUICK_SMOLLM2, SMOLLM2
from .compress_run import Part, run_parts

KEPT = 0.8
EXTREME = 0.15
BLOCKS_CUT = 0.48
"""Of the parameters of an encoder's blocks, as in SHRP's paper of BERT-base as a whole."""


def levels(facts: Mapping[str, Any], base: Row) -> list[Level]:
    """The budgets in parameters and in milliseconds."""
    found = [Level(BY_PARAMETERS, 0.0, params=int(KEPT * facts["parameters"]))]
    seconds = base[longest(base)]
    if seconds is not None:
        found.append(Level(BY_TIME, 0.0, macs=int(KEPT * base["macs"]), ms=1e3 * KEPT * seconds))
    return found


def encoder_levels(facts: Mapping[str, Any], base: Row) -> list[Level]:
    """The same, half of the blocks (in whole blocks, or in parts), and the one that is about speed."""
    half = facts["parameters"] - int(BLOCKS_CUT * facts["blocks"] * facts["block"])
    blocks = Level(BY_BLOCKS, 0.0, count=facts["blocks"] // 2, params=half, peers=False)
    return [*levels(facts, base), blocks, Level(BY_SPEED, 0.0, macs=int(EXTREME * base["macs"]), peers=False)]


def run(context: Run) -> Result:
    """Measure both models."""
    parts = [
        Part(SMOLLM2, QUICK_SMOLLM2, levels, quick_levels=2),
        Part(MINILM, QUICK_MINILM, encoder_levels, quick_levels=4),
    ]
    return run_parts("compress-combined", parts, context)


SUITE = Suite(
    name="compress-combined",
    summary="SmolLM2-135M and MiniLM at 80% of the parameters, and of the milliseconds, by any means",
    goals=(
        "at equal parameters, and at equal milliseconds, our best is at least as good as the best of the others",
        "the latency falls by at least 0.9 times the share of the MACs",
        "what is trained afterwards wins back half of the loss on the domain that it did not see",
        "MiniLM less 48% of its blocks' parameters, trained: 93% of the retrieval, and more than without blocks",
        "MiniLM at no more than 15% of its MACs, trained: at least 4 times the throughput",
    ),
    run=run,
    paired=True,
)
