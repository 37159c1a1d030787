"""Suite ``compress-vision``: EfficientNet-Lite0 at 90, 80 and 70 percent of its parameters, without training.

Against Torch-Pruning, torch-kirigami and onnxsim. There are no labels: what counts is how often the first choice is
that of the dense model, on crops of photos that no method has seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Result, Row, Run, Suite
from .compress_methods import Level
from .compress_parts import LITE0, QUICK_LITE0
from .compress_run import Part, run_parts

KEPT = (0.8, 0.9, 0.7)  # the first is what a quick run measures


def levels(facts: Mapping[str, Any], base: Row) -> list[Level]:
    """The shares of the parameters that may be left."""
    return [Level(f"{kept:.0%} of the parameters", 0.0, params=int(kept * facts["parameters"])) for kept in KEPT]


def run(context: Run) -> Result:
    """Measure the classifier."""
    return run_parts("compress-vision", [Part(LITE0, QUICK_LITE0, levels)], context)


SUITE = Suite(
    name="compress-vision",
    summary="EfficientNet-Lite0 at 90, 80 and 70% of its parameters, against Torch-Pruning, torch-kirigami and onnxsim",
    goals=(
        "at equal parameters, our best agrees with the dense model at least as often as the best of the others",
        "the latency falls by at least 0.9 times the share of the MACs",
    ),
    run=run,
    paired=True,
)
