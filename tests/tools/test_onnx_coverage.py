"""A fixed tenth of ``graphlathe bench onnx-coverage``: ONNX's own tests, imported, run, exported and run again."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphlathe.tools.bench.onnx_cases import KINDS, Case, cases
from graphlathe.tools.bench.onnx_coverage_steps import Outcome, run_case

pytest.importorskip("onnxruntime", reason="it runs what was exported")
pytestmark = pytest.mark.filterwarnings("ignore")  # the tests hold infinities, and operators that torch has deprecated

REFUSED = {"Bernoulli", "Dropout", "ImageDecoder", "TfIdfVectorizer"}
"""What cannot be imported: randomness, training, image files, and text."""
ROUNDED = {
    *("attention_4d_fp16", "attention_4d_causal_fp16", "attention_4d_causal_fp16_expanded"),
    *("basic_deform_conv_with_padding", "dft_inverse", "dft_inverse_opset19"),
}
"""Sums that are added in another order than onnx's, and differ in the last digit by more than it allows."""
UNWRITTEN = {"BitCast", "Unique"}
"""Imported and run, but export of some forms is not possible."""

SHARDS = 6
"""Tests to divide the sample into. Reading onnx's tests takes seconds, so nothing is read when pytest collects."""


def explained(case: Case, outcome: Outcome) -> bool:
    """Whether a test passes, or ends in the way that is known for its operator."""
    match outcome.state:
        case "passed" | "specialised":
            return True
        case "unsupported":
            return case.kind == "node" and case.operator in REFUSED and "cannot be imported (node " in outcome.reason
        case "wrong":
            return case.name in ROUNDED
        case "export":
            return case.kind == "node" and case.operator in UNWRITTEN
        case _:
            return False


def test_the_sample_is_about_a_tenth_of_nodes_and_models() -> None:
    for kinds in (KINDS[:1], KINDS[1:]):
        taken = [case.in_sample for case in cases().values() if case.kind in kinds]
        assert 0.07 < sum(taken) / len(taken) < 0.13


@pytest.mark.parametrize("shard", range(SHARDS))
def test_the_sample(shard: int, tmp_path: Path) -> None:
    chosen = [case for case in cases().values() if case.in_sample][shard::SHARDS]
    assert chosen
    outcomes = [(case, run_case(case, tmp_path)) for case in chosen]
    wrong = [f"{c.kind}/{c.name}: {o.state}: {o.reason}" for c, o in outcomes if not explained(c, o)]
    assert not wrong
