"""Numbers of few bits in ONNX files, at every opset: the checker takes them, and ONNX Runtime expands them alike."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from graphlathe import kernels
from graphlathe.ir.from_torch import trace
from graphlathe.ir.to_onnx import OPSETS, export_onnx


class Codes(torch.nn.Module):
    def __init__(self, bits: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(bits)
        self.bits = bits
        self.packed = torch.nn.Buffer(torch.randint(0, 256, (6, 8), dtype=torch.uint8, generator=generator))
        self.scale = torch.nn.Buffer(torch.rand(6, 8 // bits, generator=generator))
        self.zero = torch.nn.Buffer(torch.randint(0, 2**bits, (6, 8 // bits), generator=generator).to(torch.uint8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes = kernels.unpack_bits(self.packed, bits=self.bits)
        return x @ kernels.dequantize(codes, self.scale, self.zero, axis=1, block_size=8).T


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_file_is_valid_and_runs(bits: int, opset: int, tmp_path: Path) -> None:
    model = Codes(bits)
    x = torch.randn(3, 64 // bits, generator=torch.Generator().manual_seed(0))
    path = export_onnx(trace(model, (x,)), tmp_path / "model.onnx", opset=opset)
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = model(x)
    assert float((torch.from_numpy(actual) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
