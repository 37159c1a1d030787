"""The other tools of the compression suites: their packages, and what of each is run where.

They are installed into a folder of their own, beside the torch and transformers of this environment; nothing here
depends on them. Each is used as its documentation recommends, which the files of the steps quote by name. What cannot
be installed or imported is a row with that reason.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ...ir.errors import GraphlatheError
from .compress_methods import PACKAGE, Method

FOLDER = Path("build") / "peers-compress"
PACKAGES: dict[str, tuple[str, ...]] = {
    "torch_pruning": ("torch-pruning==1.6.1",),
    "torch_kirigami": ("torch-kirigami==0.2.1",),
    "onnxsim": ("onnxsim==0.8.1",),
    "optipfair": ("optipfair==0.4.2",),
    "llmcompressor": (
        "llmcompressor==0.14.0.1",
        "compressed-tensors==0.19.0",
        "auto-round==0.15.1",
        "loguru==0.7.3",
        "nvidia-ml-py==13.615.71",
        "datasets==5.2.0",
        "pyarrow==26.0.1",
        "dill==0.4.1",
        "multiprocess==0.70.19",
        "xxhash==4.1.0",
        "pandas==3.1.1",
        "python-dateutil==4.0.0",
        "pytz==2026.6",
        "tzdata==2026.6",
        "six==1.17.0",
    ),
    "skimage": ("scikit-image==0.26.0",),
    "sklearn": ("scikit-learn==1.9.1",),
}
"""What is installed, by the module that is imported; the last two are read for their photos only."""

BY = {
    "torch_pruning": "Torch-Pruning 1.6.1",
    "torch_kirigami": "torch-kirigami 0.2.1",
    "onnxsim": "onnxsim 0.8.1",
    "optipfair": "optipfair 0.4.2",
    "llmcompressor": "llm-compressor 0.14.0.1",
}


def install(given: Path | None = None) -> tuple[Path, dict[str, str]]:
    """Install what is missing, each package by itself; answer with the folder, and by package why one failed."""
    folder = (given or FOLDER).absolute()
    failed: dict[str, str] = {}
    for module, packages in PACKAGES.items():
        if (folder / module).is_dir():
            continue
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *packages]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
            failed[module] = f"not installed: {lines[-1]}"
    return folder, failed


def load_peer(folder: str, name: str) -> ModuleType:
    """Import a tool from the folder; what this environment has itself comes first.

    Raises:
        GraphlatheError: it is not there, or its import fails.
    """
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise GraphlatheError(
            f"'{name}' cannot be imported: {type(error).__name__}: {' '.join(str(error).split())[:160]}",
            remedy=f"install it into '{folder}', or name another folder with --peers",
        ) from error


def peer(package: str, label: str, function: str, **more: Any) -> Method:
    """A method of another tool; its step is in ``compress_<package>.py``."""
    keys = ("sparse", "models", "levels", "trained")
    settings = {key: more.pop(key) for key in keys if key in more}
    step = f"{PACKAGE}.compress_{package}:{function}"
    return Method(label, BY[package], step, more, **settings)


def _passthrough(choice: str, label: str, **settings: Any) -> Method:
    step = f"{PACKAGE}.compress_passthrough:passthrough"
    return Method(label, "passthrough (mergekit)", step, {"choice": choice}, **settings)


_LANGUAGE = ("smollm2-135m",)
_PASSTHROUGH = (
    _passthrough("order", "passthrough, block influence"),
    _passthrough("window", "passthrough, best window"),
    _passthrough("tried", "passthrough, best of all windows"),
)


def _sparse() -> tuple[Method, ...]:
    return tuple(
        peer("llmcompressor", label, "sparsify", modifier=modifier, sparse=True, models=_LANGUAGE)
        for label, modifier in (("Wanda", "WandaPruningModifier"), ("SparseGPT", "SparseGPTModifier"))
    )


PEERS: dict[str, tuple[Method, ...]] = {
    "compress-depth": (
        *_PASSTHROUGH,
        peer("optipfair", "least important layers", "depth"),
        peer("onnxsim", "transformer blocks", "prune", kinds=["blocks"]),
    ),
    "compress-width": (
        peer("torch_pruning", "MLP, group magnitude", "prune", parts=["mlp"], importance="magnitude"),
        peer("torch_pruning", "MLP, activation", "prune", parts=["mlp"], importance="activation"),
        peer("torch_pruning", "MLP, Taylor", "prune", parts=["mlp"], importance="taylor", models=_LANGUAGE),
        peer("optipfair", "MLP, peak-to-peak with data", "width"),
        peer("torch_kirigami", "MLP, group magnitude", "prune", parts=["mlp"]),
        peer("onnxsim", "structured Wanda", "prune", kinds=["structured"]),
        *_sparse(),
    ),
    "compress-heads": (
        peer("torch_pruning", "heads, group magnitude", "prune", parts=["heads"], importance="magnitude"),
        peer("torch_pruning", "heads, Taylor", "prune", parts=["heads"], importance="taylor", models=_LANGUAGE),
        peer("torch_kirigami", "heads, group magnitude", "prune", parts=["heads"]),
        peer("onnxsim", "attention heads, Wanda", "prune", kinds=["heads"]),
        *_sparse(),
    ),
    "compress-combined": (
        *_PASSTHROUGH,
        peer("torch_pruning", "its LLM example", "prune", parts=["hidden", "mlp", "heads"], importance="magnitude"),
        peer("torch_pruning", "MLP and heads, Taylor", "prune", parts=["mlp", "heads"], importance="taylor"),
        peer("optipfair", "depth, then MLP", "both"),
        peer("torch_kirigami", "whole model, group magnitude", "prune", parts=["mlp", "heads"]),
        peer("onnxsim", "blocks, heads and structured Wanda", "prune", kinds=["blocks", "heads", "structured"]),
        *_sparse(),
    ),
    "compress-vision": (
        peer("torch_pruning", "group magnitude", "prune_vision", importance="magnitude"),
        peer("torch_pruning", "group magnitude, global isomorphic", "prune_vision", importance="isomorphic"),
        peer("torch_kirigami", "group magnitude", "prune"),
        peer("onnxsim", "structured Wanda", "prune", kinds=["structured"]),
    ),
}
"""The other tools' methods by suite."""


def peers_of(suite: str) -> tuple[Method, ...]:
    """The other tools' methods in a suite."""
    return PEERS[suite]
