"""Files that ONNX Runtime's transformer optimiser wrote: its operators are imported, with equal outputs."""

from __future__ import annotations

import logging
from pathlib import Path

import onnx
import pytest

from graphlathe.ir.from_onnx import from_onnx
from graphlathe.tools import zoo
from graphlathe.tools.zoo.legacy_onnx import write_legacy_onnx
from tests.onnx_nodes import MICROSOFT

FUSED = {"bert": {"SkipLayerNormalization", "BiasGelu"}, "gpt2": {"SkipLayerNormalization", "FastGelu"}}


@pytest.mark.filterwarnings("ignore")  # the optimiser uses what onnx and numpy deprecated
@pytest.mark.parametrize("name", FUSED)
def test_optimised_models(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    optimizer = pytest.importorskip("onnxruntime.transformers.optimizer", reason="it is part of ONNX Runtime")
    model, path = zoo.get(name), tmp_path / "optimised.onnx"
    written = write_legacy_onnx(model, tmp_path / "model.onnx")
    config = model.module().config
    with caplog.at_level(logging.CRITICAL):
        optimised = optimizer.optimize_model(
            str(written.path),
            model_type=name,
            num_heads=config.num_attention_heads,
            hidden_size=config.hidden_size,
            opt_level=0,
        )
        optimised.save_model_to_file(str(path))
    used = {node.op_type for node in onnx.load(path).graph.node if node.domain == MICROSOFT}
    assert used >= FUSED[name]
    program = from_onnx(path)
    assert set(program.main.dims.by_name) == {"B", "S"}
    for sizes in (model.trace_sizes, *model.unseen_sizes):
        inputs = {key: value for key, value in written.inputs(sizes).items() if key in program.main.inputs}
        for actual, expected in zip(program.run(inputs).values(), written.expected(sizes), strict=True):
            assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
