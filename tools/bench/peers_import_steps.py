"""The work of suite ``peers-import``: cases through one importer, in a process of its own."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .onnx_cases import Case
from .onnx_coverage_steps import (
    Outcome,
    array_of,
    difference_of,
    import_and_run,
    inputs_of,
    line_of,
    run_each,
    tensor_of,
)

STATES = ("passed", "specialised", "wrong", "refused", "failed", "crashed")
"""How a case can end; `peers_import` says what they mean."""

_MOST_MISSING = 20


@dataclass(frozen=True)
class Peer:
    """Another importer.

    Attributes:
        package: its name in the registry.
        version: which one is measured.
        module: its name in Python.
        convert: how a model is imported, given the module and the model; the result is called with tensors.
    """

    package: str
    version: str
    module: str
    convert: Callable[[Any, Any], Callable[..., Any]]


PEERS = (
    Peer("onnx2torch", "1.5.15", "onnx2torch", lambda module, model: module.convert(model)),
    # "experimental" takes batches of more than one element.
    Peer("onnx2pytorch", "0.6.0", "onnx2pytorch", lambda module, model: module.ConvertModel(model, experimental=True)),
)


def run_peer(names: Sequence[str], log: str, peer: str, folder: str) -> int:
    """Run cases with one importer (``graphlathe`` or a module of `PEERS`), whose packages lie in ``folder``."""
    if peer == "graphlathe":
        return run_each(names, log, _ours)
    sys.path.insert(0, folder)
    _import_torchvision()
    chosen = next(each for each in PEERS if each.module == peer)
    module = importlib.import_module(chosen.module)
    return run_each(names, log, lambda case, _: _theirs(case, chosen, module))


def _import_torchvision() -> None:
    """The importers import torchvision, whose compiled operators may be built for another torch.

    Then what it wants to exist is declared: only tests that compute with these operators fail for it.
    """
    library = torch.library.Library("torchvision", "FRAGMENT")
    for _ in range(_MOST_MISSING):
        try:
            importlib.import_module("torchvision")
            return
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
            library.define(f"{missing[1]}(Tensor x) -> Tensor")
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[name]


def _ours(case: Case, folder: Path) -> Outcome:
    path = folder / "case.onnx"
    path.write_bytes(case.model().SerializeToString())
    result = import_and_run(case, path)
    if isinstance(result, Outcome):
        result.state = {"unsupported": "refused", "error": "failed"}.get(result.state, result.state)
        return result
    return Outcome(case.name, "specialised" if result[1] else "passed")


def _theirs(case: Case, peer: Peer, module: Any) -> Outcome:
    try:
        call = peer.convert(module, case.model())
    except Exception as error:
        return Outcome(case.name, "refused", line_of(error))
    try:
        for inputs, expected in case.data():
            with torch.no_grad():
                outputs = call(*(tensor_of(array) for array in inputs[: len(inputs_of(case))]))
            several = outputs if isinstance(outputs, (list, tuple)) else [outputs]
            difference = difference_of([array_of(value.detach()) for value in several], expected, case)
            if difference:
                return Outcome(case.name, "wrong", difference)
    except Exception as error:
        return Outcome(case.name, "failed", line_of(error))
    return Outcome(case.name, "passed")
