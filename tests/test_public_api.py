"""The front door: which names there are, and that importing it is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import graphlathe

NAMES = {
    "Effect",
    "ExportError",
    "GraphlatheError",
    "ImportModelError",
    "InputError",
    "Pass",
    "PipelineError",
    "PostconditionError",
    "PreconditionError",
    "Program",
    "Rule",
    "UnsupportedOpError",
    "VerifyError",
    "__version__",
    "compile",
    "kernels",
    "load",
    "optimize",
    "option",
    "passes",
    "register",
    "structure",
    "trace",
}


def test_the_names_are_these() -> None:
    """A change here is a change for users: say so in CHANGELOG.md."""
    assert set(graphlathe.__all__) == NAMES
    assert dir(graphlathe) == sorted(NAMES)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_name_loads(name: str) -> None:
    assert getattr(graphlathe, name) is not None


def test_what_type_checkers_see_is_what_there_is() -> None:
    tree = ast.parse(Path(graphlathe.__file__).read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If))
    seen = {alias.asname for n in block.body if isinstance(n, ast.ImportFrom) for alias in n.names}
    assert seen == NAMES - {"__version__"}


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(AttributeError, match="no attribute 'optimise'; it has"):
        _ = graphlathe.optimise


HEAVY = ("transformers", "onnx", "onnxruntime", "onnxscript", "onnx_ir", "networkx", "scipy", "triton", "rich", "typer")


def test_importing_is_cheap() -> None:
    code = f"import sys, graphlathe; print([m for m in {('torch', *HEAVY)!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
    code = f"""
import sys, torch
before = set(sys.modules)
import graphlathe
graphlathe.optimize, graphlathe.trace, graphlathe.Program, graphlathe.passes.Canonicalize
print([m for m in {HEAVY!r} if m in sys.modules and m not in before])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
