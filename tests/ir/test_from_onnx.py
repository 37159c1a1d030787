"""ONNX import: against ONNX Runtime on hand-made models, round trips of our own exports, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh
import pytest
import torch

from graphlathe.ir.errors import GraphlatheError, ImportModelError, InputError, UnsupportedOpError
from graphlathe.ir.from_onnx import from_onnx, supported
from graphlathe.ir.from_torch import trace
from graphlathe.ir.load import load
from graphlathe.ir.program import ORIGIN, Program
from graphlathe.ir.weights import FileSource
from graphlathe.tools.zoo import get

onnxruntime = pytest.importorskip("onnxruntime", reason="the reference is ONNX Runtime")

F, I = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64  # noqa: E741 - short names for tables of cases
B = onnx.TensorProto.BOOL

Port = tuple[str, int, list[Any]]


def _model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[Port],
    outputs: Sequence[str],
    constants: Mapping[str, np.ndarray] | None = None,
    opset: int = 20,
) -> onnx.ModelProto:
    graph = oh.make_graph(
        list(nodes),
        "test",
        [oh.make_tensor_value_info(*port) for port in inputs],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [nh.from_array(np.asarray(value), name) for name, value in (constants or {}).items()],
    )
    return oh.make_model(graph, opset_imports=[oh.make_opsetid("", opset)], ir_version=10)


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    """ONNX Runtime wants the outputs' types, which shape inference finds (but for functions: those are float here)."""
    inferred = onnx.shape_inference.infer_shapes(model)
    for output in inferred.graph.output:
        if not output.type.HasField("tensor_type"):
            output.CopyFrom(oh.make_tensor_value_info(output.name, F, None))
    return inferred


def _reference(model: onnx.ModelProto, feeds: Mapping[str, torch.Tensor]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        _inferred(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {name: value.numpy() for name, value in feeds.items()})


def _import(model: onnx.ModelProto, folder: Path, **options: Any) -> Program:
    onnx.save(model, str(folder / "model.onnx"))
    return from_onnx(folder / "model.onnx", **options)


def _check(model: onnx.ModelProto, folder: Path, *feeds: Mapping[str, torch.Tensor], **options: Any) -> Program:
    """Import, and compare with ONNX Runtime at every given input."""
    program = _import(model, folder, **options)
    for feed in feeds:
        actual = program.run(feed)
        for (name, value), expected in zip(actual.items(), _reference(model, feed), strict=True):
            assert list(value.shape) == list(expected.shape), name
            assert str(value.dtype).removeprefix("torch.") == str(expected.dtype), name
            scale = float(np.abs(expected[np.isfinite(expected)]).max(initial=1.0)) if expected.dtype != bool else 1.0
            torch.testing.assert_close(value, torch.from_numpy(expected), rtol=0, atol=1e-5 * scale, equal_nan=True)
    return program


def _operators(program: Program) -> list[torch.fx.Node]:
    return [node for node in program.graph.nodes if node.op == "call_function"]


def _numbers(*shape: int) -> torch.Tensor:
    return torch.linspace(-2, 2, int(np.prod(shape))).reshape(shape)


# Every case: operator, attributes, other inputs (constants), the outputs' count, and the opset. The first input is a
# float tensor of shape [N, 4, 6] with a dynamic N, at sizes 3 (traced or not) and 5.
_CASES: list[tuple[str, dict[str, Any], list[np.ndarray | None], int, int]] = [
    ("Add", {}, [np.float32(0.5)], 1, 20),
    ("Sub", {}, [np.arange(6, dtype=np.float32)], 1, 20),
    ("Div", {}, [np.float32(3)], 1, 20),
    ("Pow", {}, [np.float32(2)], 1, 20),
    ("Pow", {}, [np.int64(3)], 1, 20),
    ("Mod", {"fmod": 1}, [np.float32(0.7)], 1, 20),
    ("Max", {}, [np.float32(0.1), np.zeros((4, 1), np.float32)], 1, 20),
    ("Mean", {}, [np.ones((4, 1), np.float32)], 1, 20),
    ("Less", {}, [np.float32(0.3)], 1, 20),
    ("GreaterOrEqual", {}, [np.zeros((4, 1), np.float32)], 1, 20),
    ("Clip", {}, [np.float32(-0.5), np.float32(0.8)], 1, 20),
    ("Clip", {}, [None, np.float32(0.8)], 1, 20),
    ("Cast", {"to": I}, [], 1, 20),
    ("IsInf", {"detect_negative": 0}, [], 1, 20),
    ("LeakyRelu", {"alpha": 0.3}, [], 1, 20),
    ("Elu", {"alpha": 0.5}, [], 1, 20),
    ("Selu", {}, [], 1, 20),
    ("Celu", {"alpha": 0.5}, [], 1, 20),
    ("HardSigmoid", {"alpha": 0.3}, [], 1, 20),
    ("HardSwish", {}, [], 1, 20),
    ("ThresholdedRelu", {"alpha": 0.4}, [], 1, 20),
    ("PRelu", {}, [np.full((4, 1), 0.2, np.float32)], 1, 20),
    ("Gelu", {}, [], 1, 20),
    ("Gelu", {"approximate": "tanh"}, [], 1, 20),
    ("Softplus", {}, [], 1, 20),
    ("Mish", {}, [], 1, 20),
    ("Erf", {}, [], 1, 20),
    ("Round", {}, [], 1, 20),
    ("Reshape", {}, [np.array([0, -1], np.int64)], 1, 20),
    ("Reshape", {}, [np.array([-1, 2, 12], np.int64)], 1, 20),
    ("Flatten", {"axis": 2}, [], 1, 20),
    ("Flatten", {"axis": -3}, [], 1, 20),
    ("Transpose", {}, [], 1, 20),
    ("Transpose", {"perm": [2, 0, 1]}, [], 1, 20),
    ("Unsqueeze", {}, [np.array([0, -1], np.int64)], 1, 20),
    ("Concat", {"axis": -1}, [], 1, 20),
    ("Split", {"axis": 2}, [np.array([1, 5], np.int64)], 2, 20),
    ("Split", {"axis": 2, "num_outputs": 4}, [], 4, 20),
    ("Split", {"axis": 1}, [], 2, 13),
    ("Slice", {}, [np.array([1, 0], np.int64), np.array([-1, 2**62], np.int64), np.array([2, 1], np.int64)], 1, 20),
    ("Slice", {}, [np.array([-1]), np.array([-(2**62)]), np.array([2]), np.array([-2])], 1, 20),
    ("Slice", {}, [np.array([4]), np.array([1]), np.array([-1]), np.array([-1])], 1, 20),
    ("Expand", {}, [np.array([2, 1, 1, 6], np.int64)], 1, 20),
    ("Tile", {}, [np.array([1, 2, 3], np.int64)], 1, 20),
    ("Pad", {}, [np.array([0, 1, 2, 0, 0, 1], np.int64), np.float32(7)], 1, 20),
    ("Pad", {}, [np.array([1, 2], np.int64), None, np.array([2], np.int64)], 1, 20),
    ("Pad", {"mode": "reflect"}, [np.array([0, 0, 2, 0, 0, 1], np.int64)], 1, 20),
    ("Pad", {"mode": "edge"}, [np.array([0, 1, 2, 0, 0, 1], np.int64)], 1, 20),
    ("Trilu", {"upper": 0}, [np.int64(-1)], 1, 20),
    ("Trilu", {}, [], 1, 20),
    ("Gather", {"axis": 1}, [np.array([[0, -1], [2, 1]], np.int64)], 1, 20),
    ("Gather", {"axis": -1}, [np.int64(-2)], 1, 20),
    ("TopK", {"axis": 1}, [np.array([2], np.int64)], 2, 20),
    ("ReduceMean", {"keepdims": 0}, [np.array([-1], np.int64)], 1, 20),
    ("ReduceMean", {"axes": [1, 2]}, [], 1, 13),
    ("ReduceSum", {}, [np.array([1], np.int64)], 1, 13),
    ("ReduceSum", {"keepdims": 0}, [], 1, 20),
    ("ReduceSum", {"noop_with_empty_axes": 1}, [], 1, 20),
    ("ReduceMax", {}, [np.array([1, 2], np.int64)], 1, 20),
    ("ReduceProd", {"keepdims": 0}, [np.array([1, 2], np.int64)], 1, 20),
    ("ReduceL1", {}, [np.array([2], np.int64)], 1, 20),
    ("ReduceL2", {}, [np.array([2], np.int64)], 1, 20),
    ("ReduceSumSquare", {}, [np.array([2], np.int64)], 1, 20),
    ("ReduceLogSumExp", {}, [np.array([1], np.int64)], 1, 20),
    ("ArgMax", {"axis": 2}, [], 1, 20),
    ("ArgMin", {"axis": 1, "keepdims": 0}, [], 1, 20),
    ("CumSum", {}, [np.int64(1)], 1, 20),
    ("CumSum", {"exclusive": 1, "reverse": 1}, [np.int64(-1)], 1, 20),
    ("Softmax", {"axis": 1}, [], 1, 20),
    ("LogSoftmax", {}, [], 1, 20),
    ("MatMul", {}, [np.linspace(-1, 1, 18, dtype=np.float32).reshape(6, 3)], 1, 20),
    ("Einsum", {"equation": "nij,jk->nki"}, [np.linspace(-1, 1, 18, dtype=np.float32).reshape(6, 3)], 1, 20),
    ("LayerNormalization", {"axis": 1, "epsilon": 1e-3}, [np.ones((4, 6), np.float32) * 2], 1, 20),
    ("LayerNormalization", {}, [np.arange(6, dtype=np.float32), np.ones(6, np.float32)], 3, 20),
    ("BatchNormalization", {"epsilon": 1e-3}, [np.linspace(0.1, k, 4, dtype=np.float32) for k in (1, 2, 3, 4)], 1, 20),
    ("InstanceNormalization", {}, [np.linspace(0.1, k, 4, dtype=np.float32) for k in (1, 2)], 1, 20),
    ("GroupNormalization", {"num_groups": 2}, [np.linspace(0.1, k, 4, dtype=np.float32) for k in (1, 2)], 1, 21),
    ("Conv", {"pads": [1, 1], "strides": [2]}, [np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 4, 3)], 1, 20),
    ("Conv", {"pads": [2, 0], "group": 2}, [np.linspace(-1, 1, 12, dtype=np.float32).reshape(2, 2, 3)], 1, 20),
    (
        "Conv",
        {"auto_pad": "SAME_UPPER", "strides": [2]},
        [np.ones((1, 4, 3), np.float32), np.ones(1, np.float32)],
        1,
        20,
    ),
    (
        "ConvTranspose",
        {"strides": [2], "pads": [1, 1]},
        [np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 2, 3)],
        1,
        20,
    ),
    ("MaxPool", {"kernel_shape": [3], "pads": [1, 0], "strides": [2]}, [], 1, 20),
    ("MaxPool", {"kernel_shape": [2], "ceil_mode": 1, "strides": [2]}, [], 1, 20),
    ("AveragePool", {"kernel_shape": [3], "pads": [1, 1]}, [], 1, 20),
    ("AveragePool", {"kernel_shape": [3], "pads": [1, 0], "count_include_pad": 1}, [], 1, 20),
    ("GlobalAveragePool", {}, [], 1, 20),
    ("GlobalMaxPool", {}, [], 1, 20),
    ("Dropout", {}, [], 1, 20),
    ("EyeLike", {"k": 1}, [], 1, 20),
]


@pytest.mark.parametrize("case", _CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(_CASES)])
def test_operator_agrees_with_onnx_runtime(case: Any, tmp_path: Path) -> None:
    name, attributes, others, outputs, opset = case
    names = ["x", *(f"c{i}" if value is not None else "" for i, value in enumerate(others))]
    results = [f"y{i}" for i in range(outputs)]
    constants = {f"c{i}": value for i, value in enumerate(others) if value is not None}
    nodes = [oh.make_node(name, names, results, **attributes)]
    shape: list[Any] = ["N", 4, 6]
    if name == "EyeLike":  # of rank two only
        nodes = [oh.make_node("Flatten", ["x"], ["flat"]), oh.make_node(name, ["flat"], results, **attributes)]
    model = _model(nodes, [("x", F, shape)], results, constants, opset)
    program = _check(model, tmp_path, {"x": _numbers(3, 4, 6)}, {"x": _numbers(5, 4, 6)})
    assert list(program.main.dims.by_name) == ["N"]
    assert all(node.meta[ORIGIN] for node in _operators(program) if "sym_size" not in str(node.target))


def test_cases_name_known_operators() -> None:
    assert {case[0] for case in _CASES} <= set(supported())


@pytest.mark.parametrize(
    ("name", "attributes", "indices", "updates"),
    [
        ("GatherND", {}, [[0, 1], [1, -1]], None),
        ("GatherND", {"batch_dims": 1}, [[[0, 2]], [[-1, 1]]], None),
        ("GatherElements", {"axis": 1}, [[[0, 1, -1]], [[1, 0, 0]]], None),
        ("ScatterND", {}, [[0, 1], [1, 0]], np.ones((2, 3), np.float32)),
        ("ScatterND", {"reduction": "add"}, [[0, 1], [0, 1]], np.ones((2, 3), np.float32)),
        ("ScatterElements", {"axis": 1}, [[[0, 1, -1]], [[1, 0, 0]]], np.full((2, 1, 3), 9, np.float32)),
        (
            "ScatterElements",
            {"axis": 1, "reduction": "max"},
            [[[0, 1, -1]], [[1, 0, 0]]],
            np.zeros((2, 1, 3), np.float32),
        ),
    ],
)
def test_indexing(
    name: str, attributes: dict[str, Any], indices: Any, updates: np.ndarray | None, tmp_path: Path
) -> None:
    inputs = ["x", "i", *(["u"] if updates is not None else [])]
    ports: list[Port] = [("x", F, [2, 2, 3]), ("i", I, list(np.asarray(indices).shape))]
    feeds = {"x": _numbers(2, 2, 3), "i": torch.tensor(indices)}
    if updates is not None:
        ports.append(("u", F, list(updates.shape)))
        feeds["u"] = torch.from_numpy(updates)
    _check(_model([oh.make_node(name, inputs, ["y"], **attributes)], ports, ["y"]), tmp_path, feeds)


def test_one_hot(tmp_path: Path) -> None:
    constants = {"depth": np.array([4], np.int64), "values": np.array([2, 5], np.float32)}
    model = _model(
        [oh.make_node("OneHot", ["i", "depth", "values"], ["y"], axis=1)], [("i", I, ["N", 2])], ["y"], constants
    )
    _check(model, tmp_path, {"i": torch.tensor([[0, 3], [-1, 1], [2, 2]])})


@pytest.mark.parametrize(
    ("attributes", "scales"),
    [
        ({"mode": "linear"}, [1, 1, 2, 1.5]),
        ({"mode": "linear", "coordinate_transformation_mode": "align_corners"}, [1, 1, 2, 3]),
        ({"mode": "cubic"}, [1, 1, 2, 3]),
        ({"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}, [1, 1, 2, 3]),
        ({"mode": "nearest", "nearest_mode": "round_prefer_ceil"}, [1, 1, 2, 3]),
    ],
)
def test_resize(attributes: dict[str, Any], scales: list[float], tmp_path: Path) -> None:
    """Scales, and sizes that follow the input's."""
    node = oh.make_node("Resize", ["x", "", "scales"], ["y"], **attributes)
    ports: list[Port] = [("x", F, ["N", 2, "H", 6])]
    model = _model([node], ports, ["y"], {"scales": np.array(scales, np.float32)})
    _check(model, tmp_path, {"x": _numbers(2, 2, 4, 6)}, {"x": _numbers(1, 2, 7, 6)})
    nodes = [
        oh.make_node("Shape", ["x"], ["shape"]),
        oh.make_node("Mul", ["shape", "factors"], ["sizes"]),
        oh.make_node("Resize", ["x", "", "", "sizes"], ["y"], **attributes),
    ]
    model = _model(nodes, ports, ["y"], {"factors": np.array([1, 1, 2, 3], np.int64)})
    _check(model, tmp_path, {"x": _numbers(2, 2, 4, 6)}, {"x": _numbers(1, 2, 7, 6)})


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("coordinates", ["half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners"])
def test_resize_that_torch_lacks(mode: str, coordinates: str, tmp_path: Path) -> None:
    """Rounding that is not torch's, a factor below one, rows of one element."""
    node = oh.make_node("Resize", ["x", "", "scales"], ["y"], mode=mode, coordinate_transformation_mode=coordinates)
    scales = np.array([1, 1, 2, 0.25], np.float32)
    model = _model([node], [("x", F, ["N", 2, "H", 4])], ["y"], {"scales": scales})
    _check(model, tmp_path, {"x": _numbers(2, 2, 4, 4)}, {"x": _numbers(1, 2, 7, 4)})


def test_integer_division_truncates(tmp_path: Path) -> None:
    model = _model([oh.make_node("Div", ["a", "b"], ["y"])], [("a", I, ["N"]), ("b", I, ["N"])], ["y"])
    _check(model, tmp_path, {"a": torch.tensor([7, -7, 7, -7]), "b": torch.tensor([2, 2, -2, -2])})


def test_gemm_forms(tmp_path: Path) -> None:
    """A plain one is a linear layer; scaled or transposed ones are computed."""
    weight, bias = _numbers(5, 6).numpy(), _numbers(5).numpy()
    constants = {"w": weight, "wt": weight.T.copy(), "b": bias, "m": _numbers(1, 5).numpy()}
    nodes = [
        oh.make_node("Gemm", ["x", "w", "b"], ["y0"], transB=1),
        oh.make_node("Gemm", ["x", "wt", "b"], ["y1"]),
        oh.make_node("Gemm", ["x", "wt", "m"], ["y2"], alpha=0.5, beta=2.0),
        oh.make_node("Gemm", ["x", "w"], ["y3"], transB=1),
    ]
    model = _model(nodes, [("x", F, ["N", 6])], ["y0", "y1", "y2", "y3"], constants)
    program = _check(model, tmp_path, {"x": _numbers(3, 6)}, {"x": _numbers(1, 6)})
    assert sum(n.target is torch.ops.aten.linear.default for n in program.graph.nodes) == 2


def test_attention_and_rms_normalization(tmp_path: Path) -> None:
    """Operators of opset 23, which ONNX Runtime may lack: the reference is ONNX's own evaluator."""
    from onnx.reference import ReferenceEvaluator

    nodes = [
        oh.make_node("Attention", ["q", "k", "k"], ["a"], q_num_heads=4, kv_num_heads=2, is_causal=1),
        oh.make_node("RMSNormalization", ["a", "scale"], ["y"], epsilon=1e-3),
    ]
    constants = {"scale": np.linspace(0.5, 2, 16, dtype=np.float32)}
    model = _model(nodes, [("q", F, ["N", 5, 16]), ("k", F, ["N", 5, 8])], ["y"], constants, opset=23)
    program = _import(model, tmp_path)
    feeds = {"q": _numbers(3, 5, 16), "k": _numbers(3, 5, 8)}
    typed = oh.make_model(model.graph, opset_imports=model.opset_import, ir_version=10)
    typed.graph.output[0].CopyFrom(oh.make_tensor_value_info("y", F, None))
    (expected,) = ReferenceEvaluator(typed).run(None, {k: v.numpy() for k, v in feeds.items()})
    torch.testing.assert_close(program.run(feeds)["y"], torch.from_numpy(expected), rtol=1e-5, atol=1e-5)


def _reshape_chain() -> onnx.ModelProto:
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
    return _model(nodes, [("x", F, ["B", "S", 24])], ["y"], arrays)


def test_shape_arithmetic_disappears(tmp_path: Path) -> None:
    """The chain becomes one reshape with symbolic sizes, and no weight."""
    program = _check(_reshape_chain(), tmp_path, {"x": _numbers(2, 3, 24)}, {"x": _numbers(5, 1, 24)})
    targets = [str(node.target) for node in _operators(program)]
    assert [target for target in targets if "sym_size" not in target] == ["aten.reshape.default"]
    assert program.weights == {}
    assert [program.main.dims.format(d) for d in program.outputs[0].shape] == ["B", "S", "4", "6"]


def test_known_numbers_stay_known_through_a_cast(tmp_path: Path) -> None:
    """Exporters cast the bounds of Clip to the type of what is clipped."""
    nodes = [
        oh.make_node("CastLike", ["low", "x"], ["l"]),
        oh.make_node("CastLike", ["high", "x"], ["h"]),
        oh.make_node("Clip", ["x", "l", "h"], ["y"]),
    ]
    model = _model(nodes, [("x", F, ["n", 3])], ["y"], {"low": np.array(0), "high": np.array(6.0)})
    program = _import(model, tmp_path)
    assert [str(node.target) for node in _operators(program)] == ["aten.clamp.default"]
    x = torch.tensor([[-1.0, 3.0, 7.0]])
    assert torch.equal(program.run({"x": x})["y"], x.clamp(0, 6))


def test_sizes_that_become_data(tmp_path: Path) -> None:
    """A size that a real operator consumes is a tensor there, still symbolic."""
    nodes = [
        oh.make_node("Shape", ["x"], ["shape"]),
        oh.make_node("Cast", ["shape"], ["floats"], to=F),
        oh.make_node("ReduceSum", ["x", "axes"], ["total"], keepdims=0),
        oh.make_node("Div", ["total", "floats"], ["y"]),
        oh.make_node("Range", ["zero", "count", "one"], ["r"]),
        oh.make_node("Size", ["x"], ["count"]),
    ]
    nodes = [*nodes[:4], nodes[5], nodes[4]]
    constants = {"axes": np.array([0], np.int64), "zero": np.int64(0), "one": np.int64(1)}
    model = _model(nodes, [("x", F, ["N", 2])], ["y", "r"], constants)
    _check(model, tmp_path, {"x": _numbers(3, 2)}, {"x": _numbers(7, 2)})


def test_known_vectors_that_become_data(tmp_path: Path) -> None:
    """Numbers that only the host ever had become a constant of the program when an operator consumes them."""
    nodes = [
        oh.make_node("Concat", ["a", "b"], ["ab"], axis=0),
        oh.make_node("Mul", ["ab", "two"], ["twice"]),
        oh.make_node("Add", ["x", "twice"], ["y"]),
        oh.make_node("Slice", ["twice", "one", "last"], ["middle"]),
        oh.make_node("Mul", ["x", "middle"], ["z"]),
    ]
    constants = {"a": [3, -1], "b": [5], "one": [1], "last": [2], "two": [2]}
    arrays = {name: np.array(value, np.int64) for name, value in constants.items()}
    program = _check(
        _model(nodes, [("x", I, ["N", 3])], ["y", "z"], arrays), tmp_path, {"x": torch.arange(6).reshape(2, 3)}
    )
    assert not any(weight.is_meta for weight in program.weights.values())


def test_long_vectors_and_attributes_are_read_when_a_shape_needs_them(tmp_path: Path) -> None:
    """A vector too long for the host at first, of each kind of storage, and a tensor attribute."""
    fill = nh.from_array(np.array([2.5], np.float32), "fill")
    nodes = [
        oh.make_node("Split", ["x", "sizes"], [f"part{i}" for i in range(70)], axis=1),
        oh.make_node("Shape", ["part3"], ["shape"]),
        oh.make_node("ConstantOfShape", ["shape"], ["same"], value=fill),
        oh.make_node("Add", ["part3", "same"], ["y"]),
    ]
    sizes = np.arange(70, dtype=np.int64)
    model = _model(nodes, [("x", F, ["N", int(sizes.sum())])], ["y"], {"sizes": sizes})
    _check(model, tmp_path, {"x": _numbers(2, int(sizes.sum()))})
    del model.graph.initializer[:]
    model.graph.initializer.append(oh.make_tensor("sizes", I, [70], sizes.tolist()))
    _check(model, tmp_path, {"x": _numbers(2, int(sizes.sum()))})


def test_choice_by_size_becomes_a_guard(tmp_path: Path) -> None:
    """``Where`` on a comparison of sizes is decided once; sizes that decide otherwise are refused."""
    nodes = [
        oh.make_node("Shape", ["x"], ["shape"], start=0, end=1),
        oh.make_node("Less", ["shape", "limit"], ["small"]),
        oh.make_node("Where", ["small", "shape", "limit"], ["end"]),
        oh.make_node("Slice", ["x", "zero", "end"], ["y"]),
    ]
    constants = {"limit": np.array([8], np.int64), "zero": np.array([0], np.int64)}
    model = _model(nodes, [("x", F, ["N", 2])], ["y"], constants)
    program = _check(model, tmp_path, {"x": _numbers(5, 2)}, {"x": _numbers(7, 2)}, sizes={"N": 4})
    with pytest.raises(InputError, match="N"):
        program.run({"x": _numbers(9, 2)})


def test_if_with_a_known_condition(tmp_path: Path) -> None:
    outputs = [oh.make_tensor_value_info("r", F, None)]
    branches = {
        "then_branch": oh.make_graph([oh.make_node("Neg", ["x"], ["r"])], "then", [], outputs),
        "else_branch": oh.make_graph([oh.make_node("Abs", ["x"], ["r"])], "else", [], outputs),
    }
    nodes = [
        oh.make_node("Shape", ["x"], ["shape"], start=1, end=2),
        oh.make_node("Equal", ["shape", "two"], ["is_two"]),
        oh.make_node("Squeeze", ["is_two"], ["condition"]),
        oh.make_node("If", ["condition"], ["y"], **branches),
    ]
    constants = {"two": np.array([2], np.int64)}
    _check(_model(nodes, [("x", F, ["N", 2])], ["y"], constants), tmp_path, {"x": _numbers(3, 2)})
    _check(_model(nodes, [("x", F, ["N", 3])], ["y"], constants), tmp_path, {"x": _numbers(3, 3)})


def test_functions_are_inlined(tmp_path: Path) -> None:
    function = oh.make_function(
        "own", "Twice", ["a"], ["b"], [oh.make_node("Add", ["a", "a"], ["b"])], [oh.make_opsetid("", 20)]
    )
    model = _model([oh.make_node("Twice", ["x"], ["y"], domain="own")], [("x", F, ["N"])], ["y"])
    model.opset_import.append(oh.make_opsetid("own", 1))
    model.functions.append(function)
    program = _import(model, tmp_path)
    assert torch.equal(program.run({"x": _numbers(4)})["y"], 2 * _numbers(4))


def test_names_and_origins(tmp_path: Path) -> None:
    """Inputs, outputs and weights keep names that are no identifiers; nodes know the ONNX node they came from."""
    node = oh.make_node("MatMul", ["input:0", "layer/w.1"], ["out put"], name="layer/MatMul")
    model = _model([node], [("input:0", F, ["batch size", 3])], ["out put"], {"layer/w.1": _numbers(3, 2).numpy()})
    program = _import(model, tmp_path)
    assert (program.main.inputs, program.main.outputs) == (("input:0",), ("out put",))
    assert list(program.weights) == ["layer/w.1"]
    assert list(program.main.dims.by_name) == ["batch_size"]
    (matmul,) = _operators(program)
    assert matmul.meta[ORIGIN] == "layer/MatMul"
    assert torch.equal(program.run({"input:0": _numbers(4, 3)})["out put"], _numbers(4, 3) @ _numbers(3, 2))
    assert torch.equal(program.clone().run({"input:0": _numbers(4, 3)})["out put"], _numbers(4, 3) @ _numbers(3, 2))


def test_unnamed_dynamic_dimension_and_static(tmp_path: Path) -> None:
    model = _model([oh.make_node("Relu", ["x"], ["y"])], [("x", F, [None, 3])], ["y"])
    assert list(_import(model, tmp_path).main.dims.by_name) == ["x_0"]
    fixed = _import(model, tmp_path, sizes={"x_0": 4}, static=True)
    assert fixed.inputs[0].shape == (4, 3)
    assert not fixed.main.dims.by_name
    with pytest.raises(ImportModelError, match="static=True"):
        _import(model, tmp_path, static=True)
    with pytest.raises(ImportModelError, match="no dynamic dimension 'q'"):
        _import(model, tmp_path, sizes={"q": 4})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.uint8, torch.bool])
def test_stored_types(dtype: torch.dtype, tmp_path: Path) -> None:
    """Raw, typed-field and external storage of each element type give the same numbers."""
    values = (torch.arange(6) % 2 if dtype == torch.bool else torch.arange(6)).reshape(2, 3).to(dtype)
    kind = {torch.bfloat16: onnx.TensorProto.BFLOAT16}.get(dtype) or oh.np_dtype_to_tensor_dtype(
        np.dtype(str(dtype).removeprefix("torch."))
    )
    raw = onnx.TensorProto(
        name="raw", data_type=kind, dims=[2, 3], raw_data=values.reshape(-1).view(torch.uint8).numpy().tobytes()
    )
    typed = oh.make_tensor("typed", kind, [2, 3], values.double().flatten().tolist())
    outside = onnx.TensorProto(name="outside", data_type=kind, dims=[2, 3], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in {"location": "data/w.bin", "offset": "7", "length": str(len(raw.raw_data))}.items():
        outside.external_data.add(key=key, value=value)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "w.bin").write_bytes(b"x" * 7 + raw.raw_data)
    nodes = [oh.make_node("Expand", [name, "shape"], [f"{name}_out"]) for name in ("raw", "typed", "outside")]
    nodes.insert(0, oh.make_node("Shape", ["x"], ["shape"]))
    model = _model(nodes, [("x", F, ["N", 2, 3])], ["raw_out", "typed_out", "outside_out"])
    model.graph.initializer.extend([raw, typed, outside])
    program = _import(model, tmp_path)
    assert isinstance(program.weights["outside"].source, FileSource)
    for value in program.run({"x": torch.zeros(4, 2, 3)}).values():
        assert torch.equal(value, values.expand(4, 2, 3))


def _external(folder: Path, location: str, size: int = 24) -> onnx.ModelProto:
    model = _model([oh.make_node("Add", ["x", "w"], ["y"])], [("x", F, ["N", 6])], ["y"])
    tensor = onnx.TensorProto(name="w", data_type=F, dims=[6], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    tensor.external_data.add(key="length", value=str(size))
    model.graph.initializer.append(tensor)
    return model


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "sub/../../secret.bin", "link.bin"])
def test_external_data_outside_the_folder(location: str, tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(24))
    inside = tmp_path / "model"
    (inside / "sub").mkdir(parents=True)
    (inside / "link.bin").symlink_to(tmp_path / "secret.bin")
    with pytest.raises(ImportModelError, match="outside the model's folder"):
        _import(_external(inside, location), inside)


def test_external_data_missing_or_short(tmp_path: Path) -> None:
    with pytest.raises(ImportModelError, match=r"'w\.bin' of initializer 'w' is missing"):
        _import(_external(tmp_path, "w.bin"), tmp_path)
    (tmp_path / "w.bin").write_bytes(bytes(20))
    with pytest.raises(ImportModelError, match="truncated: 20 bytes"):
        _import(_external(tmp_path, "w.bin"), tmp_path)
    with pytest.raises(ImportModelError, match="has 20 bytes"):
        _import(_external(tmp_path, "w.bin", 20), tmp_path)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("length", "many", "the data of initializer 'w' has the length 'many'"),
        ("length", "", "the data of initializer 'w' has the length ''"),
        ("length", "-24", "the data of initializer 'w' has the length '-24'"),
        ("length", "9" * 400, "the data of initializer 'w' has the length '9999"),
        ("length", "23", "has 23 bytes"),
        ("offset", "-8", "the data of initializer 'w' has the offset '-8'"),
        ("offset", "1e3", "the data of initializer 'w' has the offset '1e3'"),
        ("offset", "8", "truncated: 24 bytes"),
        ("offset", str(2**62), "truncated: 24 bytes"),
        ("location", "", "has no data"),
        ("location", ".", r"'\.' of initializer 'w' is missing"),
        ("location", "w\0.bin", "which is no path"),
        ("location", "n" * 5000, "which is no path"),
    ],
)
def test_external_data_at_places_that_make_no_sense(key: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(24))
    model = _external(tmp_path, "w.bin")
    data = model.graph.initializer[-1].external_data
    kept = {entry.key: entry.value for entry in data} | {key: text}
    del data[:]
    for name, value in kept.items():
        data.add(key=name, value=value)
    with pytest.raises(ImportModelError, match=message):
        _import(model, tmp_path)


def test_external_data_in_a_folder_below_or_behind_a_link_inside(tmp_path: Path) -> None:
    """What stays in the folder is read, however it is spelled."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "w.bin").write_bytes(np.arange(6, dtype=np.float32).tobytes())
    (tmp_path / "link.bin").symlink_to(tmp_path / "sub" / "w.bin")
    for location in ("sub/w.bin", "./sub/../sub/w.bin", "link.bin"):
        program = _import(_external(tmp_path, location), tmp_path)
        assert torch.equal(program.run({"x": torch.zeros(2, 6)})["y"], torch.arange(6.0).expand(2, 6))


def test_truncated_and_empty_files(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    _import(_reshape_chain(), tmp_path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ImportModelError, match=r"cannot read|holds no graph"):
        from_onnx(path)
    path.write_bytes(b"")
    with pytest.raises(ImportModelError, match="holds no graph"):
        from_onnx(path)
    with pytest.raises(ImportModelError, match="no file"):
        from_onnx(tmp_path / "nothing.onnx")


def test_unsupported_operators_are_all_named(tmp_path: Path) -> None:
    nodes = [
        oh.make_node("StringNormalizer", ["x"], ["a"], name="find"),
        oh.make_node("ImageDecoder", ["x"], ["b"]),
        oh.make_node("Own", ["x"], ["c"], domain="elsewhere"),
    ]
    model = _model(nodes, [("x", F, ["N"])], ["a", "b", "c"])
    model.opset_import.append(oh.make_opsetid("elsewhere", 1))
    with pytest.raises(
        UnsupportedOpError, match=r"StringNormalizer .*2 other operators.*ImageDecoder, elsewhere::Own.*%find"
    ):
        _import(model, tmp_path)


def _refused(change: Callable[[onnx.ModelProto], None]) -> onnx.ModelProto:
    model = _model([oh.make_node("Relu", ["x"], ["y"], name="act")], [("x", F, ["N"])], ["y"])
    change(model)
    return model


def _unknown_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 99


def _dangling(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "nowhere"


def _attribute(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.append(oh.make_attribute("slope", 0.5))


def _no_rank(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.ClearField("shape")


def _data_dependent(model: onnx.ModelProto) -> None:
    model.graph.node[0].CopyFrom(oh.make_node("Expand", ["x", "shape"], ["y"], name="grow"))
    model.graph.input.append(oh.make_tensor_value_info("shape", I, [2]))


def _wrong_shapes(model: onnx.ModelProto) -> None:
    model.graph.node[0].CopyFrom(oh.make_node("MatMul", ["x", "w"], ["y"], name="product"))
    model.graph.initializer.append(nh.from_array(np.ones((2, 2, 3), np.float32), "w"))
    model.graph.input[0].CopyFrom(oh.make_tensor_value_info("x", F, ["N", 5]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_unknown_opset, "uses opset 99"),
        (_dangling, "nothing computes the value 'nowhere'"),
        (_attribute, "attribute 'slope'"),
        (_no_rank, "has no rank"),
        (_data_dependent, "'target' of Expand is computed from data"),
        (_wrong_shapes, "MatMul failed on shapes"),
    ],
)
def test_bad_models(change: Callable[[onnx.ModelProto], None], message: str, tmp_path: Path) -> None:
    with pytest.raises(GraphlatheError, match=message):
        _import(_refused(change), tmp_path)


def test_dimension_that_is_not_dynamic(tmp_path: Path) -> None:
    """A file that declares a dimension dynamic, and then reshapes to a fixed size: refused, or guarded, never wrong."""
    constants = {"shape": np.array([4, 3], np.int64)}
    model = _model([oh.make_node("Reshape", ["x", "shape"], ["y"])], [("x", F, ["N", 3])], ["y"], constants)
    with pytest.raises(ImportModelError):
        _import(model, tmp_path)
    assert _import(model, tmp_path, sizes={"N": 4}, static=True).inputs[0].shape == (4, 3)


def _same(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, value in expected.items():
        error = (actual[name] - value).abs().max()
        assert error <= 1e-5 * value.abs().max(), f"{name}: {error}"


def _round_trip(name: str, folder: Path) -> None:
    zoo = get(name)
    module = zoo.module()
    original = trace(module, zoo.example(), dynamic=zoo.dynamic)
    path = original.export_onnx(folder / f"{name}.onnx")
    program = from_onnx(path)
    assert program.main.inputs == original.main.inputs
    assert set(program.main.dims.by_name) == set(original.main.dims.by_name)
    texts = {original.main.dims.format_expr(g.expr) for g in original.main.dims.guards}
    assert texts <= {program.main.dims.format_expr(g.expr) for g in program.main.dims.guards}
    for sizes in (zoo.trace_sizes, *zoo.unseen_sizes):
        inputs = zoo.inputs(sizes)
        _same(program.run(inputs), original.run(inputs))
    shared = [
        n for n in program.weights if n in original.weights and program.weights[n].shape == original.weights[n].shape
    ]
    assert shared
    for weight in shared:
        assert torch.equal(program.weights[weight].tensor(), original.weights[weight].tensor())


@pytest.mark.parametrize("name", ["llama", "bert", "vit", "resnet"])
def test_round_trip_of_our_exports(name: str, tmp_path: Path) -> None:
    """torch -> ONNX -> program: names, dimensions, guards and weights survive; equal at sizes no trace saw."""
    _round_trip(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "qwen3_moe", "t5", "mamba2", "convnext", "clip", "gemma2", "whisper"])
def test_round_trip_of_more_exports(name: str, tmp_path: Path) -> None:
    _round_trip(name, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PyTorch's exporter uses what PyTorch deprecated
def test_foreign_export(tmp_path: Path) -> None:
    """What PyTorch's own exporter writes, optimized, with dimension names of its own."""
    zoo = get("llama")
    module = zoo.module()
    dynamic = {name: {axis: torch.export.Dim.DYNAMIC for axis in axes} for name, axes in zoo.dynamic.items()}
    exported = torch.onnx.export(module, (), kwargs=zoo.example(), dynamo=True, dynamic_shapes=dynamic, verbose=False)
    exported.save(str(tmp_path / "model.onnx"))
    program = from_onnx(tmp_path / "model.onnx")
    assert len(program.main.dims.by_name) == 2
    for sizes in (zoo.trace_sizes, *zoo.unseen_sizes):
        inputs = zoo.inputs(sizes)
        with torch.no_grad():
            expected = module(**inputs).logits
        (actual,) = program.run(inputs).values()
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_embedded_weights_stay_in_the_file(tmp_path: Path) -> None:
    """Large raw data is mapped from the model file itself, at whatever offset, next to small and typed data."""
    torch.manual_seed(0)
    arrays = {
        "big": np.random.default_rng(0).normal(size=(64, 65)).astype(np.float32),
        "small": np.ones((65, 3), np.float32),
    }
    nodes = [oh.make_node("MatMul", ["x", "big"], ["h"]), oh.make_node("MatMul", ["h", "small"], ["g"])]
    nodes.append(oh.make_node("Add", ["g", "typed"], ["y"]))
    model = _model(nodes, [("x", F, [2000, 64])], ["y"], arrays)
    typed = np.linspace(0, 1, 3 * 2000, dtype=np.float32).reshape(2000, 3)
    model.graph.initializer.append(oh.make_tensor("typed", F, [2000, 3], typed.flatten().tolist()))
    program = _check(model, tmp_path, {"x": _numbers(2000, 64)})
    assert isinstance(program.weights["big"].source, FileSource)
    assert program.weights["big"].source.path.name == "model.onnx"
    for name, value in {**arrays, "typed": typed}.items():
        assert torch.equal(program.weights[name].tensor(), torch.from_numpy(value))


def test_embedded_weight_of_a_wrong_length(tmp_path: Path) -> None:
    model = _model([oh.make_node("Add", ["x", "w"], ["y"])], [("x", F, ["N", 2000])], ["y"])
    model.graph.initializer.append(onnx.TensorProto(name="w", data_type=F, dims=[2000], raw_data=bytes(7996)))
    with pytest.raises(ImportModelError, match="'w' has 7996 bytes"):
        _import(model, tmp_path)


@pytest.mark.parametrize("keep", [1, 3, 500, 9_000, -1])
def test_every_truncation_is_noticed(keep: int, tmp_path: Path) -> None:
    model = _model(
        [oh.make_node("Add", ["x", "w"], ["y"])], [("x", F, ["N", 4000])], ["y"], {"w": np.ones(4000, np.float32)}
    )
    _import(model, tmp_path)
    path = tmp_path / "model.onnx"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ImportModelError, match="truncated"):
        from_onnx(path)


def test_recorded_guards_choose_sizes_and_are_checked(tmp_path: Path) -> None:
    """Guards that our export wrote come back: they pick the example's sizes, and refuse what they exclude."""
    model = _model([oh.make_node("Relu", ["x"], ["y"])], [("x", F, ["B", "S"])], ["y"])
    model.metadata_props.add(key="graphlathe.guards", value="S % 48 == 0\n2 <= B <= 9\nB + 40 < S")
    program = _import(model, tmp_path)
    assert program.main.dims.by_name["S"].hint % 48 == 0
    assert (program.main.dims.by_name["B"].min, program.main.dims.by_name["B"].max) == (2, 9)
    assert program.run({"x": _numbers(3, 96)})["y"].shape == (3, 96)
    for shape in ((3, 50), (1, 48), (8, 48)):
        with pytest.raises(InputError):
            program.run({"x": _numbers(*shape)})
    model.metadata_props[0].value = "S == 2*S"
    with pytest.raises(ImportModelError, match="no sizes were found"):
        _import(model, tmp_path)
    model.metadata_props[0].value = "__import__('os')"
    with pytest.raises(ImportModelError, match="cannot be read"):
        _import(model, tmp_path)


def _array(values: Any, dtype: Any) -> np.ndarray:
    return np.array(values, dtype=dtype)


_HALF = np.float16
_Q = torch.tensor
# Operator, attributes, opset, the input, and constants: what ONNX says and PyTorch's namesake does otherwise.
_SEMANTICS: dict[str, tuple[str, dict[str, Any], int, torch.Tensor, list[np.ndarray]]] = {
    "where of halves": ("Where", {}, 20, _Q([True, False]), [_HALF(1.5), _HALF(-2)]),
    "where of int32": ("Where", {}, 20, _Q([True, False]), [np.int32(1), np.int32(-2)]),
    "where of doubles": ("Where", {}, 20, _Q([True, False]), [np.float64(1), np.float64(-2)]),
    "where of a row": ("Where", {}, 20, _Q(True), [_array([1.0], np.float32), np.float32(-2)]),
    "an integer to a fraction": ("Pow", {}, 20, _Q([1, 2, 3]), [np.float32(1.5)]),
    "an integer to fractions": ("Pow", {}, 20, _Q([1, 2, 3]), [_array([1.5, 2, 0], np.float32)]),
    "product of int32": ("ReduceProd", {}, 18, _Q([[1, 2], [3, 4]], dtype=torch.int32), [_array([1], np.int64)]),
    "L1 of int32": ("ReduceL1", {}, 18, _Q([[1, -2], [3, 4]], dtype=torch.int32), [_array([1], np.int64)]),
    "squares of int32": ("ReduceSumSquare", {}, 18, _Q([[1, 2]], dtype=torch.int32), [_array([1], np.int64)]),
    "running sum of unequal numbers": ("CumSum", {"exclusive": 1}, 20, _Q([1.0, 1e20, 1.0]), [np.int64(0)]),
    "running sum of infinities": ("CumSum", {"exclusive": 1}, 20, _Q([1.0, torch.inf, 1.0]), [np.int64(0)]),
    "running sum from the end": (
        "CumSum",
        {"exclusive": 1, "reverse": 1},
        20,
        torch.arange(6.0).reshape(2, 3),
        [np.int64(1)],
    ),
    "slice from before the start": (
        "Slice",
        {},
        20,
        torch.arange(5.0),
        [_array([-100], np.int64), _array([-200], np.int64), _array([0], np.int64), _array([-1], np.int64)],
    ),
    "slice backward": (
        "Slice",
        {},
        20,
        torch.arange(5.0),
        [_array([-2], np.int64), _array([-200], np.int64), _array([0], np.int64), _array([-2], np.int64)],
    ),
    "uneven pool": ("MaxPool", {"kernel_shape": [2], "pads": [1, 0], "strides": [2]}, 20, _numbers(1, 2, 5), []),
}


@pytest.mark.parametrize("name", _SEMANTICS)
def test_semantics_that_differ_from_torch(name: str, tmp_path: Path) -> None:
    operator, attributes, opset, x, constants = _SEMANTICS[name]
    inputs = ["x", *(f"c{i}" for i in range(len(constants)))]
    kind = oh.np_dtype_to_tensor_dtype(x.numpy().dtype)
    nodes = [oh.make_node(operator, inputs, ["y"], **attributes)]
    model = _model(
        nodes, [("x", kind, list(x.shape))], ["y"], {f"c{i}": value for i, value in enumerate(constants)}, opset
    )
    _check(model, tmp_path, {"x": x})


def test_ties_go_to_the_lower_index(tmp_path: Path) -> None:
    x = torch.tensor([[1.0, 2, 2, 2, 0, 2], [0, 0, 0, 0, 0, 0]])
    for largest in (0, 1):
        nodes = [oh.make_node("TopK", ["x", "k"], ["values", "indices"], largest=largest)]
        model = _model(nodes, [("x", F, ["N", 6])], ["values", "indices"], {"k": np.array([3], np.int64)})
        program = _check(model, tmp_path, {"x": x}, {"x": x.repeat(2, 1)})
        again = load(program.export_onnx(tmp_path / "again.onnx")).run({"x": x})
        assert all(torch.equal(again[name], value) for name, value in program.run({"x": x}).items())


def test_forms_that_torch_lacks_are_spelled_out(tmp_path: Path) -> None:
    """Uneven padding of a pool that counts a part of a window."""
    node = oh.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2], pads=[1, 0], strides=[2], ceil_mode=1)
    model = _model([node], [("x", F, ["N", 1, 4])], ["y"])
    _check(model, tmp_path, {"x": -_numbers(2, 1, 4).abs()})


@pytest.mark.parametrize("condition", [True, False])
def test_branches_may_use_one_name_for_two_constants(condition: bool, tmp_path: Path) -> None:
    def branch(number: float) -> onnx.GraphProto:
        constant = oh.make_node("Constant", [], ["c"], value=nh.from_array(np.float32(number)))
        return oh.make_graph(
            [constant, oh.make_node("Add", ["x", "c"], ["sum"])],
            "branch",
            [],
            [oh.make_tensor_value_info("sum", F, [3])],
        )

    nodes = [oh.make_node("If", ["condition"], ["y"], then_branch=branch(1), else_branch=branch(10))]
    _check(
        _model(nodes, [("x", F, [3])], ["y"], {"condition": np.array(condition)}), tmp_path, {"x": torch.arange(3.0)}
    )


def test_inputs_whose_names_look_alike(tmp_path: Path) -> None:
    model = _model([oh.make_node("Sub", ["in.1", "in_1"], ["y"])], [("in.1", F, [2]), ("in_1", F, [2])], ["y"])
    _check(model, tmp_path, {"in.1": torch.ones(2), "in_1": torch.arange(2.0)})


def test_minus_one_is_a_dynamic_dimension(tmp_path: Path) -> None:
    program = _check(_model([oh.make_node("Relu", ["x"], ["y"])], [("x", F, [-1, 3])], ["y"]), tmp_path)
    assert [dim.name for dim in program.main.dims.by_name.values()] == ["x_0"]


def _spoiled(change: Callable[[onnx.ModelProto], None]) -> onnx.ModelProto:
    model = _model([oh.make_node("Add", ["x", "w"], ["y"])], [("x", F, [2, 3])], ["y"], {"w": np.ones((2, 3), "f")})
    change(model)
    return model


def _set(tensor: Any, **fields: Any) -> None:
    for name, value in fields.items():
        setattr(tensor, name, value)


_DAMAGE: dict[str, Callable[[onnx.ModelProto], None]] = {
    "negative": lambda m: m.graph.initializer[0].dims.__setitem__(0, -2),
    "huge": lambda m: (
        m.graph.initializer[0].dims.__setitem__(0, 2**32),
        m.graph.initializer[0].dims.__setitem__(1, 2**32),
    ),
    "kind": lambda m: _set(m.graph.initializer[0], data_type=99),
    "short": lambda m: (
        _set(m.graph.initializer[0], raw_data=b""),
        m.graph.initializer[0].ClearField("raw_data"),
        m.graph.initializer[0].float_data.append(1.0),
    ),
    "state": lambda m: m.metadata_props.add(key="graphlathe.state", value='[{"input": "no", "output": "y"}]'),
}


@pytest.mark.parametrize("change", _DAMAGE.values(), ids=_DAMAGE.keys())
def test_damaged_files_are_told_in_one_message(change: Callable[[onnx.ModelProto], Any], tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(_spoiled(change).SerializeToString())
    with pytest.raises(ImportModelError):
        load(tmp_path / "model.onnx")
