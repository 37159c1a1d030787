"""The suite ``scale``: its sparse checkpoint is a true one, its path is right when small, and it checks the disk."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from graphlathe.ir.errors import GraphlatheError
from graphlathe.ir.safetensors_index import read_checkpoint
from graphlathe.tools.bench import base
from graphlathe.tools.bench.scale import _check_disk, _phases
from graphlathe.tools.bench.scale_steps import (
    SHAPE_8B,
    check_small,
    checkpoint_bytes,
    config,
    tensor_shapes,
    write_checkpoint,
)


def test_sparse_checkpoint(tmp_path: Path) -> None:
    """Headers promise the full size, the disk holds next to nothing, and names and shapes are the library's own."""
    transformers = pytest.importorskip("transformers", reason="checkpoints are read through transformers")
    import torch

    write_checkpoint(tmp_path / "model", 2)
    stored = read_checkpoint(tmp_path / "model")
    assert sum(w.nbytes for w in stored.values()) == checkpoint_bytes(2) > 2e9
    assert sum(file.stat().st_blocks * 512 for file in (tmp_path / "model").iterdir()) < 1e6
    with torch.device("meta"):
        module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config(2, SHAPE_8B)))
    assert {name: list(p.shape) for name, p in module.named_parameters()} == tensor_shapes(2)
    assert {name: list(w.shape) for name, w in stored.items()} == tensor_shapes(2)


def test_size_of_the_published_model() -> None:
    """The configuration is that of an 8B model: 8,030,261,248 parameters."""
    assert checkpoint_bytes(32) == 2 * 8_030_261_248


def test_disk_space_is_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10, 9, int(1e9)))
    _check_disk(tmp_path, int(0.9e9))
    with pytest.raises(GraphlatheError, match=r"writes 13\.0 GB.*1\.0 GB free"):
        _check_disk(tmp_path, int(13e9))


def test_rows_and_registration() -> None:
    assert base.get("scale").name == "scale"
    from graphlathe.tools.bench.measure import Measured

    measured = Measured(3.0, 10, {"phases": {"a": [1.0, 0.5], "b": [2.0, 1.0]}, "blocks": 4})
    rows = _phases("m", measured)
    assert [row["step"] for row in rows] == ["a", "b", "all of: a, b"]
    assert rows[-1] == {
        "model": "m",
        "step": "all of: a, b",
        "seconds": 3.0,
        "peak_bytes": 10,
        "blocks": 4,
        "cpu_seconds": 1.5,
    }


@pytest.mark.slow
def test_small_path(tmp_path: Path) -> None:
    """Folder, drop-layers, ONNX, ONNX Runtime: equal to the module without these layers."""
    pytest.importorskip("transformers", reason="checkpoints are read through transformers")
    pytest.importorskip("onnxruntime", reason="the result runs in ONNX Runtime")
    assert check_small(str(tmp_path / "model"))["error"] <= 1e-5
