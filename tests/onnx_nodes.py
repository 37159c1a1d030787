"""One ONNX node, imported and exported again: all equal to what ONNX Runtime makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh
import pytest
import torch

from graphlathe.ir.from_onnx import from_onnx
from graphlathe.ir.program import Program
from graphlathe.ir.to_onnx import export_onnx

MICROSOFT = "com.microsoft"
Given = Mapping[str, np.ndarray | None]


def run_file(model: Path | bytes, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs of a file, or of what would be in it, in ONNX Runtime, as it is."""
    runtime = pytest.importorskip("onnxruntime", reason="the reference is ONNX Runtime")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(None, {port.name: feeds[port.name] for port in session.get_inputs()})


def write_node(
    path: Path,
    operator: str,
    inputs: Given,
    *,
    outputs: Sequence[str] = ("y",),
    stored: Sequence[str] = (),
    shapes: Mapping[str, Sequence[Any]] | None = None,
    domain: str = "",
    version: int = 21,
    **attributes: Any,
) -> None:
    """Write a model of one node.

    Args:
        path: where.
        operator: its name.
        inputs: numbers by name, in order; None where one is left out.
        outputs: their names, "" where one is left out.
        stored: which inputs are initializers.
        shapes: shapes of inputs, with names for dynamic dimensions; else those of the numbers.
        domain: the operator's.
        version: of the standard domain's operators.
        attributes: the node's.
    """
    names = [name if value is not None else "" for name, value in inputs.items()]
    node = oh.make_node(operator, names, list(outputs), name="node", domain=domain, **attributes)
    given = {name: value for name, value in inputs.items() if value is not None}
    ports = [
        oh.make_tensor_value_info(name, oh.np_dtype_to_tensor_dtype(value.dtype), (shapes or {}).get(name, value.shape))
        for name, value in given.items()
        if name not in stored
    ]
    graph = oh.make_graph(
        [node],
        "test",
        ports,
        [onnx.ValueInfoProto(name=name) for name in outputs if name],
        [nh.from_array(given[name], name) for name in stored],
    )
    sets = [oh.make_opsetid("", version)] + ([oh.make_opsetid(domain, 1)] if domain else [])
    onnx.save(oh.make_model(graph, opset_imports=sets, ir_version=10), str(path))


def assert_node_agrees(
    folder: Path,
    operator: str,
    inputs: Given,
    *,
    atol: float = 1e-5,
    expected: Sequence[np.ndarray] | None = None,
    **options: Any,
) -> Program:
    """Import a model of one node, run it, export it, run that: both within ``atol`` of ONNX Runtime's (or the given)
    outputs.

    Args:
        folder: for the files.
        operator: its name.
        inputs: numbers by name, in order; None where one is left out.
        atol: the largest difference allowed.
        expected: the outputs, where ONNX Runtime has no kernel for the node.
        options: of `write_node`.
    """
    path, again = folder / "node.onnx", folder / "again.onnx"
    write_node(path, operator, inputs, **options)
    feeds = {
        name: value for name, value in inputs.items() if value is not None and name not in options.get("stored", ())
    }
    wanted = run_file(path, feeds) if expected is None else expected
    program = from_onnx(path)
    ours = program.run({name: torch.from_numpy(feeds[name]) for name in program.main.inputs})
    export_onnx(program, again)
    for source, actual in (("ours", [t.numpy() for t in ours.values()]), ("exported", run_file(again, feeds))):
        assert len(actual) == len(wanted)
        for value, reference in zip(actual, wanted, strict=True):
            assert value.dtype == reference.dtype, source
            # The differences of unsigned integers would wrap.
            value, reference = (v.astype(np.int64) if v.dtype.kind == "u" else v for v in (value, reference))
            np.testing.assert_allclose(value, reference, rtol=1e-5, atol=atol, err_msg=source)
    return program


def operators_of(program: Program) -> list[str]:
    """Names of a program's operators, in order."""
    return [str(n.target).removesuffix(".default") for n in program.graph.nodes if n.op == "call_function"]
