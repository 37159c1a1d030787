"""The work of suite ``onnx-coverage``: one case through import, run, export and ONNX Runtime."""

from __future__ import annotations

import faulthandler
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...ir.errors import DataDependentError, GraphlatheError, ImportModelError
from ...ir.from_onnx import from_onnx
from ...ir.program import Program
from ...ir.to_onnx import export_onnx
from .onnx_cases import Case, cases, same

STATES = ("passed", "specialised", "wrong", "export", "error", "unsupported", "crashed")
"""How a case can end: equal outputs from us and from our export; the same, with an input fixed to the example's value;
other numbers; equal outputs, but not from our export; an error that is no message of ours; a message of ours that says
what is missing; or the end of the process."""

CASE_SECONDS = 300.0

_NO_KERNEL = ("NOT_IMPLEMENTED", "Unexpected input data type", "bfloat16", "can't be converted to MLDataType")
"""What ONNX Runtime says where it has no kernel for a type, or cannot be given a tensor of it."""


@dataclass
class Outcome:
    """How a case ended.

    Attributes:
        name: the case.
        state: one of `STATES`.
        reason: why it did not pass; for a specialised one, the inputs that were fixed.
        runtime: what ran our export: ``onnxruntime``, or ``reference`` where it has no kernel for a type.
        seconds: how long it took.
    """

    name: str
    state: str
    reason: str = ""
    runtime: str = ""
    seconds: float = 0.0


def run_cases(names: Sequence[str], log: str) -> int:
    """Run cases in turn; each line of the log is a name when it starts, and its outcome when it ends."""
    return run_each(names, log, run_case)


def run_each(names: Sequence[str], log: str, run: Callable[[Case, Path], Outcome]) -> int:
    """Run a function on cases in turn, with a folder for its files; how many there were."""
    torch.set_num_threads(1)
    known = cases()
    with open(log, "a", encoding="utf-8") as file, tempfile.TemporaryDirectory(prefix="graphlathe-onnx-") as folder:
        for name in names:
            print(json.dumps({"started": name}), file=file, flush=True)
            faulthandler.dump_traceback_later(CASE_SECONDS, exit=True)
            start = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outcome = run(known[name], Path(folder))
            faulthandler.cancel_dump_traceback_later()
            outcome.name, outcome.seconds = name, time.perf_counter() - start
            print(json.dumps(asdict(outcome)), file=file, flush=True)
    return len(names)


def run_case(case: Case, folder: Path) -> Outcome:
    """Import a case's model, run it, export it, run the export; compare both with the outputs to expect."""
    path = folder / "case.onnx"
    path.write_bytes(case.model().SerializeToString())
    inputs, expected = case.data()[0]
    ports = inputs_of(case)
    imported = import_and_run(case, path)
    if isinstance(imported, Outcome):
        return imported
    program, fixed = imported
    target = folder / "again.onnx"
    try:
        export_onnx(program, target)
        given = {name: inputs[ports.index(name)] for name in program.main.inputs}
        outputs, runtime = _run_file(target, given)
        difference = difference_of(outputs, expected, case)
    except Exception as error:
        return Outcome(case.name, "export", line_of(error))
    if difference:
        return Outcome(case.name, "export", f"{runtime}: {difference}", runtime)
    return Outcome(case.name, "specialised" if fixed else "passed", ", ".join(fixed), runtime)


def inputs_of(case: Case) -> list[str]:
    """Names of the model's inputs that are no initializers."""
    graph = case.model().graph
    stored = {tensor.name for tensor in graph.initializer}
    return [port.name for port in graph.input if port.name not in stored]


def import_and_run(case: Case, path: Path) -> Outcome | tuple[Program, list[str]]:
    """The program and the inputs that had to be fixed; or why it is not equal."""
    ports = inputs_of(case)
    feeds = {name: tensor_of(array) for name, array in zip(ports, case.data()[0][0], strict=False)}
    try:
        program, fixed = import_case(path, feeds)
    except ImportModelError as error:
        # A failure inside an operator is wrapped for users; it is no statement that something is unsupported.
        wrapped = isinstance(error.__cause__, Exception) and not isinstance(error.__cause__, GraphlatheError)
        return Outcome(case.name, "error" if wrapped else "unsupported", line_of(error))
    except Exception as error:
        return Outcome(case.name, "error", f"import: {line_of(error)}")
    try:
        for ins, outs in case.data():
            given = {name: tensor_of(array) for name, array in zip(ports, ins, strict=False)}
            actual = program.run({name: value for name, value in given.items() if name in program.main.inputs})
            difference = difference_of([array_of(value) for value in actual.values()], outs, case)
            if difference:
                return Outcome(case.name, "wrong", difference)
    except Exception as error:
        return Outcome(case.name, "error", f"run: {line_of(error)}")
    return program, fixed


def import_case(path: Path, feeds: dict[str, torch.Tensor]) -> tuple[Program, list[str]]:
    """Import with all inputs open; where a shape, axis or count is fed, with those inputs fixed, and which they are.

    A dimension that is empty in the example, which no program holds open, is fixed at that.

    Raises:
        ImportModelError: it cannot be imported.
    """
    fixed: dict[str, torch.Tensor] = {}
    while True:
        try:
            program = from_onnx(path, values=fixed)
            empty = _empty(program, feeds)
            if empty:
                program = from_onnx(path, values=fixed, sizes=empty, static=True)
            return program, [*fixed, *empty]
        except DataDependentError as error:
            more = [name for name in error.inputs if name in feeds and name not in fixed]
            if not more:
                raise
            fixed |= {name: feeds[name] for name in more}


def _empty(program: Program, feeds: dict[str, torch.Tensor]) -> dict[str, int]:
    """Sizes of all dynamic dimensions, where one of them is 0 in the example; else none."""
    sizes: dict[str, int] = {}
    for name, node in zip(program.main.inputs, program.main.placeholders, strict=True):
        for declared, actual in zip(node.meta["val"].shape, feeds[name].shape, strict=True):
            if not isinstance(declared, int):
                sizes[program.main.dims.format(declared)] = actual
    return sizes if 0 in sizes.values() else {}


def _run_file(path: Path, feeds: dict[str, np.ndarray]) -> tuple[Sequence[Any], str]:
    """Run an ONNX file in ONNX Runtime; where that has no kernel for a type, in onnx's reference evaluator."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return session.run(None, feeds), "onnxruntime"
    except Exception as error:
        text = str(error)
        if not any(sign in text for sign in _NO_KERNEL):
            raise
    from onnx.reference import ReferenceEvaluator

    return list(ReferenceEvaluator(str(path)).run(None, feeds)), "reference"


def difference_of(actual: Sequence[Any], expected: Sequence[np.ndarray], case: Case) -> str | None:
    """What is wrong with a model's outputs, or None."""
    if len(actual) < len(expected):
        return f"{len(actual)} outputs instead of {len(expected)}"
    for index, (ours, theirs) in enumerate(zip(actual, expected, strict=False)):
        difference = same(np.asarray(ours), theirs, case)
        if difference:
            return f"output {index}: {difference}"
    return None


def tensor_of(array: np.ndarray) -> torch.Tensor:
    """The same numbers in torch."""
    array = np.ascontiguousarray(array).reshape(array.shape)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def array_of(tensor: torch.Tensor) -> np.ndarray:
    """The same numbers in numpy."""
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def line_of(error: BaseException) -> str:
    """An error's type and first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
