"""Suite ``compress-depth``: whole blocks removed, 10, 20 and 30 percent of them, without training.

Against passthrough models (slices of the same layers, chosen by block influence, by the best window in one pass, and by
trying every window), optipfair's depth pruning and onnxsim's block pruning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Result, Row, Run, Suite
from .compress_methods import Level
from .compress_parts import MINILM, QUICK_MINILM, QUICK_SMOLLM2, SMOLLM2
from .compress_run import Part, run_parts

SHARES = (0.2, 0.1, 0.3)  # the first is the main level, and what a quick run measures


def levels(facts: Mapping[str, Any], base: Row) -> list[Level]:
    """The shares of the blocks, as counts, parameters and multiply-adds; a count of zero is left out."""
    found: dict[int, Level] = {}
    for share in SHARES:
        count = round(share * facts["blocks"])
        if count and count not in found:
            params = facts["parameters"] - count * facts["block"]
            found[count] = Level(
                f"{count} of {facts['blocks']} blocks", count / facts["blocks"], count, params, main=share == SHARES[0]
            )
    return list(found.values())


def run(context: Run) -> Result:
    """Measure both models."""
    parts = [Part(SMOLLM2, QUICK_SMOLLM2, levels), Part(MINILM, QUICK_MINILM, levels)]
    return run_parts("compress-depth", parts, context)


SUITE = Suite(
    name="compress-depth",
    summary="blocks removed from SmolLM2-135M and MiniLM, against passthrough models, optipfair and onnxsim",
    goals=(
        "at 10, 20 and 30% of the blocks, our best is at least as good as the best of the others on both scores",
        "the latency falls by at least 0.9 times the share of the MACs",
        "what is trained afterwards wins back half of the loss on the domain that it did not see",
    ),
    run=run,
    paired=True,
)
