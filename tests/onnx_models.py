"""Hand-made ONNX models, imported and compared with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh
import torch

from graphlathe.ir.from_onnx import from_onnx
from graphlathe.ir.program import Program
from tests.onnx_nodes import run_file

F, I = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64  # noqa: E741 - short names for tables of cases

Port = tuple[str, int, list[Any]]


def model_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[Port],
    outputs: Sequence[str],
    constants: Mapping[str, np.ndarray] | None = None,
    opset: int = 20,
) -> onnx.ModelProto:
    """A model of nodes: inputs as (name, element type, shape), outputs of types to infer, constants as initializers."""
    graph = oh.make_graph(
        list(nodes),
        "test",
        [oh.make_tensor_value_info(*port) for port in inputs],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [nh.from_array(np.asarray(value), name) for name, value in (constants or {}).items()],
    )
    return oh.make_model(graph, opset_imports=[oh.make_opsetid("", opset)], ir_version=10)


def typed(model: onnx.ModelProto) -> onnx.ModelProto:
    """ONNX Runtime wants the outputs' types, which shape inference finds (but for functions: those are float here)."""
    inferred = onnx.shape_inference.infer_shapes(model)
    for output in inferred.graph.output:
        if not output.type.HasField("tensor_type"):
            output.CopyFrom(oh.make_tensor_value_info(output.name, F, None))
    return inferred


def reference(model: onnx.ModelProto, feeds: Mapping[str, torch.Tensor]) -> list[np.ndarray]:
    """The outputs in ONNX Runtime, as the model is."""
    return run_file(typed(model).SerializeToString(), {name: value.numpy() for name, value in feeds.items()})


def import_model(model: onnx.ModelProto, folder: Path, **options: Any) -> Program:
    """Write the model to a file, and import that."""
    onnx.save(model, str(folder / "model.onnx"))
    return from_onnx(folder / "model.onnx", **options)


def assert_model_agrees(
    model: onnx.ModelProto, folder: Path, *feeds: Mapping[str, torch.Tensor], **options: Any
) -> Program:
    """Import, and compare with ONNX Runtime at every given input."""
    program = import_model(model, folder, **options)
    for feed in feeds:
        actual = program.run(feed)
        for (name, value), expected in zip(actual.items(), reference(model, feed), strict=True):
            assert list(value.shape) == list(expected.shape), name
            assert str(value.dtype).removeprefix("torch.") == str(expected.dtype), name
            scale = float(np.abs(expected[np.isfinite(expected)]).max(initial=1.0)) if expected.dtype != bool else 1.0
            torch.testing.assert_close(value, torch.from_numpy(expected), rtol=0, atol=1e-5 * scale, equal_nan=True)
    return program


def operator_nodes(program: Program) -> list[torch.fx.Node]:
    return [node for node in program.graph.nodes if node.op == "call_function"]


def numbers(*shape: int) -> torch.Tensor:
    return torch.linspace(-2, 2, int(np.prod(shape))).reshape(shape)


def reshape_chain() -> onnx.ModelProto:
    """What exporters write for ``x.view(B, S, heads, -1)``: twelve nodes of shape arithmetic."""
    nodes = [
        oh.make_node("Shape", ["x"], ["shape"]),
        oh.make_node("Gather", ["shape", "zero"], ["b"]),
        oh.make_node("Gather", ["shape", "one"], ["s"]),
        oh.make_node("Gather", ["shape", "two"], ["width"]),
        oh.make_node("Div", ["width", "heads"], ["size"]),
        oh.make_node("Unsqueeze", ["b", "axes"], ["b1"]),
        oh.make_node("Unsqueeze", ["s", "axes"], ["s1"]),
        oh.make_node("Unsqueeze", ["heads", "axes"], ["h1"]),
        oh.make_node("Cast", ["size"], ["size32"], to=onnx.TensorProto.INT32),
        oh.make_node("Cast", ["size32"], ["size64"], to=I),
        oh.make_node("Unsqueeze", ["size64", "axes"], ["d1"]),
        oh.make_node("Concat", ["b1", "s1", "h1", "d1"], ["target"], axis=0),
        oh.make_node("Reshape", ["x", "target"], ["y"]),
    ]
    constants = {"zero": 0, "one": 1, "two": 2, "heads": 4}
    arrays = {name: np.array(value, np.int64) for name, value in constants.items()} | {"axes": np.array([0], np.int64)}
    return model_of(nodes, [("x", F, ["B", "S", 24])], ["y"], arrays)
