"""Zoo models as ONNX files for tests: each is written and imported once per process, like the traced ones."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from graphlathe.ir.from_onnx import from_onnx
from graphlathe.ir.program import Program
from graphlathe.tools import zoo
from graphlathe.tools.zoo.legacy_onnx import LegacyFile, write_legacy_onnx

from .zoo_programs import traced

MIXTURES = ("mixtral", "qwen2_moe", "olmoe", "phimoe", "granitemoe", "gpt_oss", "deepseek_v3", "granitemoehybrid")
UNWRITTEN: dict[str, str] = {
    **dict.fromkeys((*MIXTURES, "jamba", "minimax"), "aten::histc"),
    "glm": "All tensors must have the same rank",
    "qwen3_next": "linalg_solve_triangular",
    "fnet": "fft_fftn",
    "dinov2_registers": "_upsample_bicubic2d_aa",
    "whisper": "aten::diff",
    "plain_transformer": "_transformer_encoder_layer_fwd",
    "plain_transformer_prenorm": "_transformer_encoder_layer_fwd",
}
"""What the older exporter cannot write, with the reason that it gives."""
WRITTEN_WRONG = {"cohere"}
"""What it writes with a reshape that does not fit: ONNX Runtime does not run the file either."""


@cache
def _folder() -> Path:
    """Where the files stay, since imported weights are read from them when they are needed."""
    folder = tempfile.mkdtemp(prefix="graphlathe-zoo-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@cache
def from_our_file(name: str) -> Program:
    """The traced zoo model ``name``, exported and imported again (clone it before changing it)."""
    return from_onnx(traced(name).export_onnx(_folder() / f"{name}.onnx"))


@cache
def older_file(name: str) -> LegacyFile:
    """The zoo model ``name`` as the older exporter writes it, which raises its own errors where it cannot."""
    return write_legacy_onnx(zoo.get(name), _folder() / f"{name}-older.onnx")


@cache
def from_older_file(name: str) -> Program:
    """The zoo model ``name``, imported from the older exporter's file (clone it before changing it)."""
    return from_onnx(older_file(name).path)
