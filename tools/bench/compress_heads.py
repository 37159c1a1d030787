"""Suite ``compress-heads``: a third of the attention heads removed, without training.

Where query heads share a key-value head there are two ways: whole groups (the cache shrinks), or the same number of
query heads of every group (it does not). Against Torch-Pruning, torch-kirigami, onnxsim, Wanda and SparseGPT.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Result, Row, Run, Suite
from .compress_methods import Level
from .compress_ours import GROUPS, QUERIES
from .compress_parts import MINILM, QUICK_MINILM, QUICK_SMOLLM2, SMOLLM2
from .compress_run import Part, run_parts

SHARE = 1 / 3


def levels(facts: Mapping[str, Any], base: Row) -> list[Level]:
    """Groups, and query heads of every group where a group has several."""
    groups = round(SHARE * facts["groups"])
    found = [Level(GROUPS, SHARE, params=facts["parameters"] - groups * facts["group"])]
    queries = round(SHARE * facts["queries"])
    if facts["queries"] > 1 and queries:
        found.append(Level(QUERIES, SHARE, params=facts["parameters"] - queries * facts["query"]))
    return found


def run(context: Run) -> Result:
    """Measure both models."""
    parts = [Part(SMOLLM2, QUICK_SMOLLM2, levels, quick_levels=2), Part(MINILM, QUICK_MINILM, levels)]
    return run_parts("compress-heads", parts, context)


SUITE = Suite(
    name="compress-heads",
    summary="attention heads removed from SmolLM2-135M and MiniLM, against Torch-Pruning, onnxsim and others",
    goals=(
        "at a third of the heads, our best is at least as good as the best of the others on both scores",
        "the latency falls by at least 0.9 times the share of the MACs",
        "what is trained afterwards wins back half of the loss on the domain that it did not see",
    ),
    run=run,
    paired=True,
)
