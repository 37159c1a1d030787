"""Random models through everything: import, passes, text, export; each step equal to an independent reference."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnx.reference import ReferenceEvaluator
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented

from graphlathe.ir.errors import ImportModelError, InputError
from graphlathe.ir.from_onnx import from_onnx
from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.ir.text import parse_program, print_program
from graphlathe.ir.verify import verify
from graphlathe.passes import registry
from graphlathe.passes.base import Context

from .fx_programs import FxCase
from .onnx_graphs import EXAMPLE, Case

PASSES = ("canonicalize", "raise")
TOLERANCE = {np.dtype(np.float32): 3e-5, np.dtype(np.float64): 1e-10}
Run = Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]


def check_onnx(case: Case) -> None:
    """A random ONNX model: all steps give what ONNX's reference evaluator gives."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(case.model.SerializeToString())
        reference = ReferenceEvaluator(case.model)

        def expected(feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
            with np.errstate(all="ignore"):
                return [np.asarray(value) for value in reference.run(None, dict(feeds))]

        def static() -> Program:
            return from_onnx(path, sizes={"N": EXAMPLE}, static=True)

        def dynamic() -> Program:
            program = from_onnx(path)
            try:
                program.check_feeds({name: torch.from_numpy(np.array(a)) for name, a in case.feeds.items()})
            except InputError:  # one trace cannot take all sizes, and the importer kept one at others
                return static()
            return program

        program = _imported(dynamic, static, case, expected)
        check_program(program, expected, _samples(program, case), case.magnitude, Path(folder))


def check_fx(case: FxCase) -> None:
    """A random FX program: all steps give what it gives itself."""
    example = tuple(torch.from_numpy(np.array(array)) for array in case.feeds.values())
    dynamic = {name: {0: "N"} for name in case.symbolic} or None
    program = _imported(
        lambda: trace(case.module, example, dynamic=dynamic), lambda: trace(case.module, example), case, case.run
    )
    with tempfile.TemporaryDirectory() as folder:
        check_program(program, case.run, _samples(program, case), case.magnitude, Path(folder))


def _samples(program: Program, case: Case | FxCase) -> list[dict[str, np.ndarray]]:
    """The example's inputs, and others of other sizes where there are symbolic ones."""
    others = (1, 5) if program.main.dims.by_name else ()
    return [case.feeds, *(case.resized(size, seed) for seed, size in enumerate(others))]


def _imported(
    dynamic: Callable[[], Program], static: Callable[[], Program], case: Case | FxCase, expected: Run
) -> Program:
    """The program; at the example's size only if the reference takes no other one, whatever is declared."""
    try:
        return dynamic()
    except ImportModelError:
        if not case.symbolic:
            raise
        if "Split" in getattr(case, "operators", ()):
            return static()  # the evaluator splits at any size, whatever the parts add up to
        try:
            for size in (4, 7):
                expected(case.resized(size, size))
        except Exception:
            return static()
        raise


def check_program(
    program: Program, expected: Run, samples: list[dict[str, np.ndarray]], magnitude: float, folder: Path
) -> None:
    """All steps after a front end, on each sample that the reference takes.

    Args:
        program: what the front end gave.
        expected: the reference.
        samples: inputs; the first are those that the model was made with, which must work.
        magnitude: the largest number on the way.
        folder: where to write files.
    """
    verify(program, 2)
    results = {}
    for number, feeds in enumerate(samples):
        try:
            results[number] = expected(feeds)
        except Exception:  # the model takes no such size
            assert number, "the reference fails on the example"
    stages: list[tuple[str, Program]] = [("import", program)]
    for name in PASSES:
        after = stages[-1][1].clone()
        registry.get(name)().run(after, Context())
        verify(after, 1)
        stages.append((name, after))
    text = print_program(stages[-1][1])
    parsed = parse_program(text, stages[-1][1].weights)
    assert print_program(parsed) == text, "the text form is not stable"
    stages.append(("text", parsed))
    for stage, one in stages:
        for number, values in results.items():
            run = _run(one, samples[number], number > 0)
            if run is not None:
                _compare(stage, run, values, samples[number], magnitude)
    _check_export(stages[-1][1], results, samples, magnitude, folder)


def _run(program: Program, feeds: Mapping[str, np.ndarray], may_refuse: bool) -> list[np.ndarray] | None:
    try:
        found = program.run({name: torch.from_numpy(np.array(array)) for name, array in feeds.items()})
    except InputError:
        if may_refuse:
            return None
        raise
    return [value.numpy() if isinstance(value, torch.Tensor) else np.asarray(value) for value in found.values()]


def _check_export(
    program: Program,
    results: Mapping[int, list[np.ndarray]],
    samples: list[dict[str, np.ndarray]],
    magnitude: float,
    folder: Path,
) -> None:
    path = folder / "exported.onnx"
    program.export_onnx(path)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except NotImplemented:
        return  # ONNX Runtime has many operators in single precision only
    known = {port.name for port in session.get_inputs()}
    for number, values in results.items():
        if number and _run(program, samples[number], may_refuse=True) is None:
            continue
        found = session.run(None, {name: array for name, array in samples[number].items() if name in known})
        _compare("export", [np.asarray(value) for value in found], values, samples[number], magnitude)


def _compare(
    stage: str, found: list[np.ndarray], expected: list[np.ndarray], feeds: Mapping[str, np.ndarray], magnitude: float
) -> None:
    where = f"after {stage}, at {[list(a.shape) for a in feeds.values()]}"
    assert len(found) == len(expected), where
    for place, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape, f"{where}: output {place} has shape {a.shape}, not {b.shape}"
        assert a.dtype == b.dtype, f"{where}: output {place} is {a.dtype}, not {b.dtype}"
        if a.dtype.kind != "f":
            assert (a == b).all(), f"{where}: output {place}: {a} is not {b}"
            continue
        bound = TOLERANCE[a.dtype] * max(magnitude, float(np.abs(b[np.isfinite(b)]).max(initial=0)))
        with np.errstate(invalid="ignore"):
            same = (a == b) | (np.isnan(a) & np.isnan(b)) | (np.abs(a - b) <= bound)
        assert same.all(), f"{where}: output {place}: {a[~same][:4]} is not {b[~same][:4]} (bound {bound:.2g})"
