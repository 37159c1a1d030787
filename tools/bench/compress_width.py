"""Suite ``compress-width``: neurons of every MLP removed, 10, 25 and 40 percent of them, without training.

Against Torch-Pruning, optipfair, torch-kirigami and onnxsim, and against Wanda and SparseGPT of llm-compressor, which
keep as many numbers that are not zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Result, Row, Run, Suite
from .compress_methods import Level
from .compress_parts import MINILM, QUICK_MINILM, QUICK_SMOLLM2, SMOLLM2
from .compress_run import Part, run_parts

SHARES = (0.25, 0.1, 0.4)  # the first is the main level, and what a quick run measures


def levels(facts: Mapping[str, Any], base: Row) -> list[Level]:
    """The shares of the neurons, as parameters."""
    return [
        Level(
            f"{share:.0%} of the neurons",
            share,
            params=facts["parameters"] - round(share * facts["neurons"]) * facts["neuron"],
            main=share == SHARES[0],
        )
        for share in SHARES
    ]


def run(context: Run) -> Result:
    """Measure both models."""
    parts = [Part(SMOLLM2, QUICK_SMOLLM2, levels), Part(MINILM, QUICK_MINILM, levels)]
    return run_parts("compress-width", parts, context)


SUITE = Suite(
    name="compress-width",
    summary="MLP neurons removed from SmolLM2-135M and MiniLM, against Torch-Pruning, optipfair and others",
    goals=(
        "at 10, 25 and 40% of the neurons, our best is at least as good as the best of the others on both scores",
        "the latency falls by at least 0.9 times the share of the MACs",
        "what is trained afterwards wins back half of the loss on the domain that it did not see",
    ),
    run=run,
    paired=True,
)
