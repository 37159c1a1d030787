"""What every preset makes of a model runs in ONNX Runtime, and can be read again from ONNX and from our format."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

from graphlathe.ir.from_torch import trace
from graphlathe.ir.load import load
from graphlathe.ir.program import Program
from graphlathe.ir.verify import relative_error
from graphlathe.passes.base import Pass
from graphlathe.passes.heads.shrp import Shrp
from graphlathe.passes.layers.evopress import EvoPress
from graphlathe.passes.layers.shortgpt import ShortGpt
from graphlathe.passes.weights.distill import Distill
from graphlathe.passes.weights.rocket import Rocket
from tests.passes.channels.tiny import WIDTH, Attention, Mlp, data, run, stack
from tests.passes.search.test_apply_plan import PRESETS, QUICK

TOLERANCE = 1e-5
SHORT: dict[str, Any] = {"stage": "expand", "heads": 1, "router_steps": 1, "steps": 2}
MADE: dict[str, Pass] = {
    **PRESETS,
    "shrp expand": Shrp(**SHORT),
    "shrp expand, stream": Shrp(**SHORT, reads="stream", width=5),
    "shortgpt rank": ShortGpt(blocks=1, rank=2),
    "evopress tied rank": EvoPress(ratio=0.4, tied=True, rank=2, **QUICK),
    "evopress bits of groups": EvoPress(mode="bits", ratio=0.5, bits=(3, 2), group=4, **QUICK),
    "evopress rounded bits": EvoPress(mode="bits", ratio=0.5, method="round-to-nearest", **QUICK),
    "evopress wanda with maps": EvoPress(mode="sparsity", ratio=0.15, method="wanda", rank=2, **QUICK),
    "evopress bits of groups with maps": EvoPress(mode="bits", ratio=0.2, bits=(3, 2), group=4, rank=1, **QUICK),
    "rocket with zeros": Rocket(ratio=0.2, kappa=2.0, most=0.5),
    "distill": Distill(steps=2, learning_rate=0.01, hold_out=0.0),
}


def floats(size: tuple[int, int] = (3, 7), seed: int = 1) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(*size, WIDTH, generator=torch.Generator().manual_seed(seed))}


@functools.cache
def model(seed: int = 0) -> Program:
    """Two blocks of shared heads and an MLP whose last map has no bias, in float32."""
    blocks = [block for _ in range(2) for block in (Attention(4, 2), Mlp(8, bias=False))]
    return trace(stack(*blocks, seed=seed).float(), floats(), dynamic={"x": {1: "S"}})


def in_onnxruntime(path: Path, feeds: dict[str, Any]) -> dict[str, torch.Tensor]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    values = session.run(None, {name: value.numpy() for name, value in feeds.items()})
    return dict(zip(names, map(torch.as_tensor, values), strict=True))


@pytest.mark.parametrize("preset", MADE)
def test_the_compressed_model_reloads_and_runs_elsewhere(preset: str, tmp_path: Path) -> None:
    program = model()
    batches = [{"x": batch["x"].float()} for batch in data()]
    made, _ = run(program, MADE[preset], batches, original=model(seed=1))
    assert made.fingerprint() != program.fingerprint()
    file = made.export_onnx(tmp_path / "made.onnx", fallback=False)
    folder = made.save(tmp_path / "made")
    imported, saved = load(file), load(folder)
    assert saved.fingerprint() == made.fingerprint()
    for batch in (floats(), floats((3, 4), seed=2)):
        expected = made.run(batch)
        assert relative_error(in_onnxruntime(file, batch), expected) <= TOLERANCE
        assert relative_error(imported.run(batch), expected) <= TOLERANCE
        assert relative_error(saved.run(batch), expected) == 0.0
