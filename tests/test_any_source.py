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
from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.ir.structure import Structure, structure
from graphlathe.tools import zoo
from tests.ir.site_truth import BLOCKS, truth_of
from tests.zoo_files import UNWRITTEN, WRITTEN_WRONG, from_older_file, older_file
from tests.zoo_programs import zoo_parameters

CONVOLUTIONS = {"convnext", "convnextv2"}
TRANSFORMERS = [n for n in zoo.names() if zoo.get(n).family not in ("ssm", "cnn", "plain") and n not in CONVOLUTIONS]


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
def test_sites_from_the_older_exporter(name: str) -> None:
    if name in UNWRITTEN or name in WRITTEN_WRONG:
        pytest.skip(f"the older exporter: {UNWRITTEN.get(name, 'a file that ONNX Runtime cannot run')}")
    program = from_older_file(name).clone()
    example = older_file(name).inputs(zoo.get(name).trace_sizes)
    assert_sites(name, raised(program, {k: v for k, v in example.items() if k in program.main.inputs}))
