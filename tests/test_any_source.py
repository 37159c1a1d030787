"""A transformer is the same to a pass wherever it came from: PyTorch, our ONNX, or the older exporter's.

For each source: attention, experts, rotary embeddings and the like are raised without changing a result, and the sites
that are then found are those that the model's configuration asks for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest
import torch

import graphlathe
from graphlathe.ir.errors import ImportModelError
from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.ir.structure import Structure, structure
from graphlathe.tools import zoo
from graphlathe.tools.zoo.legacy_onnx import write_legacy_onnx
from tests.ir.site_truth import BLOCKS, truth_of
from tests.zoo_programs import zoo_parameters

CONVOLUTIONS = {"convnext", "convnextv2"}
TRANSFORMERS = [n for n in zoo.names() if zoo.get(n).family not in ("ssm", "cnn", "plain") and n not in CONVOLUTIONS]
UNWRITTEN: dict[str, str] = {
    **dict.fromkeys(("deepseek_v3", "gpt_oss", "granitemoe", "mixtral", "olmoe", "phimoe", "qwen2_moe"), "aten::histc"),
    "dinov2_registers": "aten::_upsample_bicubic2d_aa",
    "fnet": "aten::fft_fftn",
    "glm": "All tensors must have the same rank",
    "whisper": "aten::diff",
}
"""What the older exporter cannot write, and its reason."""
BROKEN = {"cohere"}
"""What it writes with reshapes that cannot be: ONNX Runtime cannot run these files, either."""


@cache
def eager(name: str) -> Program:
    """The zoo model with attention spelled out."""
    model = zoo.get(name)
    module = model.module()
    module.set_attn_implementation("eager")  # type: ignore[operator]
    return trace(module, model.example(), dynamic=model.dynamic or None)


def raised(program: Program, example: Mapping[str, torch.Tensor]) -> Structure:
    """The sites after raising, which level 3 verifies against the program before it."""
    result = graphlathe.optimize(program, dict(example), passes=["raise"], verify=3, progress=False, costs=False)
    return structure(result)


def assert_sites(name: str, found: Structure) -> None:
    """Heads, heads of keys and values, head_dim and MLP widths are the configuration's, and so are the blocks."""
    truth = truth_of(name, zoo.get(name).module())
    assert tuple(len(stream.blocks) for stream in found.streams) == BLOCKS[name]
    assert Counter((a.heads, a.kv_heads, a.head_dim) for a in found.attention) == truth.attention
    assert Counter(m.width for m in found.mlps) == truth.mlps
    assert not found.missing, [str(m) for m in found.missing]


@pytest.mark.parametrize("name", zoo_parameters(TRANSFORMERS, quick=("llama", "bert", "t5")))
def test_sites_from_torch(name: str) -> None:
    assert_sites(name, raised(eager(name).clone(), zoo.get(name).example()))


@pytest.mark.parametrize("name", zoo_parameters(TRANSFORMERS, quick=("mixtral",)))
def test_sites_from_our_onnx(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    eager(name).export_onnx(path)
    assert_sites(name, raised(graphlathe.load(path), zoo.get(name).example()))


@pytest.mark.parametrize("name", zoo_parameters(TRANSFORMERS, quick=("gpt2",)))
def test_sites_from_the_older_exporter(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    if name in UNWRITTEN:
        with pytest.raises(Exception, match=UNWRITTEN[name]):
            write_legacy_onnx(zoo.get(name), path)
        return
    written = write_legacy_onnx(zoo.get(name), path)
    if name in BROKEN:
        with pytest.raises(ImportModelError, match="Reshape failed on shapes"):
            graphlathe.load(path)
        return
    example = written.inputs(zoo.get(name).trace_sizes)
    program = graphlathe.load(path)
    assert_sites(name, raised(program, {k: v for k, v in example.items() if k in program.main.inputs}))
