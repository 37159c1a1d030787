"""`load`: every kind of file and folder is told apart, and everything else is refused with advice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from graphlathe.ir.errors import ImportModelError
from graphlathe.ir.from_torch import trace
from graphlathe.ir.load import load

X = torch.linspace(-1, 1, 12).reshape(4, 3)


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).eval()


def test_saved_program(module: nn.Module, tmp_path: Path) -> None:
    trace(module, (X,), dynamic={"input": {0: "N"}}).save(tmp_path / "saved")
    for path in (tmp_path / "saved", tmp_path / "saved" / "program.json", str(tmp_path / "saved")):
        assert torch.equal(load(path)(X[:3]), module(X[:3]))


def test_exported_program(module: nn.Module, tmp_path: Path) -> None:
    torch.export.save(torch.export.export(module, (X,)), tmp_path / "model.pt2")
    assert torch.equal(load(tmp_path / "model.pt2")(X), module(X))


def test_onnx_file_and_folder(module: nn.Module, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    trace(module, (X,), dynamic={"input": {0: "N"}}).export_onnx(folder / "model.onnx")
    for path in (folder / "model.onnx", folder):
        program = load(path)
        assert list(program.main.dims.by_name) == ["N"]
        torch.testing.assert_close(program(X[:3]), module(X[:3]))
    assert load(folder, sizes={"N": 4}, static=True).inputs[0].shape == (4, 3)
    (folder / "other.onnx").write_bytes((folder / "model.onnx").read_bytes())
    with pytest.raises(ImportModelError, match="2 ONNX files"):
        load(folder)


def test_checkpoint_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="checkpoints are read through transformers")
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    model = transformers.ViTModel(config).eval()
    model.save_pretrained(tmp_path)
    pixels = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
    assert torch.equal(load(tmp_path)(pixel_values=pixels)["last_hidden_state"], expected)
    assert load(tmp_path, meta=True).weights["embeddings.cls_token"].is_meta


@pytest.mark.parametrize("name", ["model.onnx", "model.pt2", "model.gguf"])
@pytest.mark.parametrize("content", [b"", b"\x08\x09garbage"])
def test_broken_files(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImportModelError, match=name.replace(".", r"\.")):
        load(tmp_path / name)


def test_truncated_exported_program(module: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(module, (X,)), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ImportModelError, match="truncated"):
        load(path)


def test_truncated_saved_program(module: nn.Module, tmp_path: Path) -> None:
    folder = trace(module, (X,)).save(tmp_path / "saved")
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ImportModelError):
        load(folder)(X)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ImportModelError, match="does not exist"):
        load(tmp_path / "nothing")
    with pytest.raises(ImportModelError, match="holds nothing"):
        load(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ImportModelError, match="holds no model"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "advice"),
    [("w.safetensors", "checkpoint folder"), ("m.pt", "pickle"), ("m.tflite", "ONNX"), ("config.json", "folder")],
)
def test_unknown_kinds_come_with_advice(name: str, advice: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ImportModelError, match="unknown kind") as error:
        load(tmp_path / name)
    assert advice in str(error.value.remedy)


def test_options_that_do_not_apply(module: nn.Module, tmp_path: Path) -> None:
    trace(module, (X,)).save(tmp_path / "saved")
    with pytest.raises(ImportModelError, match="no reading option 'meta'"):
        load(tmp_path / "saved", meta=True)
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(ImportModelError, match="did you mean 'sizes'"):
        load(tmp_path / "model.onnx", size={"N": 2})
