"""ONNX import, operator by operator: against ONNX Runtime, or ONNX's own evaluator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx.helper as oh
import pytest
import torch

from graphlathe.ir.from_onnx import supported
from graphlathe.ir.load import load
from graphlathe.ir.program import ORIGIN
from tests.onnx_models import (
    F,
    I,
    Port,
    assert_model_agrees,
    import_model,
    model_of,
    numbers,
    operator_nodes,
)

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
    model = model_of(nodes, [("x", F, shape)], results, constants, opset)
    program = assert_model_agrees(model, tmp_path, {"x": numbers(3, 4, 6)}, {"x": numbers(5, 4, 6)})
    assert list(program.main.dims.by_name) == ["N"]
    assert all(node.meta[ORIGIN] for node in operator_nodes(program) if "sym_size" not in str(node.target))


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
    feeds = {"x": numbers(2, 2, 3), "i": torch.tensor(indices)}
    if updates is not None:
        ports.append(("u", F, list(updates.shape)))
        feeds["u"] = torch.from_numpy(updates)
    assert_model_agrees(model_of([oh.make_node(name, inputs, ["y"], **attributes)], ports, ["y"]), tmp_path, feeds)


def test_one_hot(tmp_path: Path) -> None:
    constants = {"depth": np.array([4], np.int64), "values": np.array([2, 5], np.float32)}
    model = model_of(
        [oh.make_node("OneHot", ["i", "depth", "values"], ["y"], axis=1)], [("i", I, ["N", 2])], ["y"], constants
    )
    assert_model_agrees(model, tmp_path, {"i": torch.tensor([[0, 3], [-1, 1], [2, 2]])})


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
    model = model_of([node], ports, ["y"], {"scales": np.array(scales, np.float32)})
    assert_model_agrees(model, tmp_path, {"x": numbers(2, 2, 4, 6)}, {"x": numbers(1, 2, 7, 6)})
    nodes = [
        oh.make_node("Shape", ["x"], ["shape"]),
        oh.make_node("Mul", ["shape", "factors"], ["sizes"]),
        oh.make_node("Resize", ["x", "", "", "sizes"], ["y"], **attributes),
    ]
    model = model_of(nodes, ports, ["y"], {"factors": np.array([1, 1, 2, 3], np.int64)})
    assert_model_agrees(model, tmp_path, {"x": numbers(2, 2, 4, 6)}, {"x": numbers(1, 2, 7, 6)})


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("coordinates", ["half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners"])
def test_resize_that_torch_lacks(mode: str, coordinates: str, tmp_path: Path) -> None:
    """Rounding that is not torch's, a factor below one, rows of one element."""
    node = oh.make_node("Resize", ["x", "", "scales"], ["y"], mode=mode, coordinate_transformation_mode=coordinates)
    scales = np.array([1, 1, 2, 0.25], np.float32)
    model = model_of([node], [("x", F, ["N", 2, "H", 4])], ["y"], {"scales": scales})
    assert_model_agrees(model, tmp_path, {"x": numbers(2, 2, 4, 4)}, {"x": numbers(1, 2, 7, 4)})


def test_integer_division_truncates(tmp_path: Path) -> None:
    model = model_of([oh.make_node("Div", ["a", "b"], ["y"])], [("a", I, ["N"]), ("b", I, ["N"])], ["y"])
    assert_model_agrees(model, tmp_path, {"a": torch.tensor([7, -7, 7, -7]), "b": torch.tensor([2, 2, -2, -2])})


def test_gemm_forms(tmp_path: Path) -> None:
    """A plain one is a linear layer; scaled or transposed ones are computed."""
    weight, bias = numbers(5, 6).numpy(), numbers(5).numpy()
    constants = {"w": weight, "wt": weight.T.copy(), "b": bias, "m": numbers(1, 5).numpy()}
    nodes = [
        oh.make_node("Gemm", ["x", "w", "b"], ["y0"], transB=1),
        oh.make_node("Gemm", ["x", "wt", "b"], ["y1"]),
        oh.make_node("Gemm", ["x", "wt", "m"], ["y2"], alpha=0.5, beta=2.0),
        oh.make_node("Gemm", ["x", "w"], ["y3"], transB=1),
    ]
    model = model_of(nodes, [("x", F, ["N", 6])], ["y0", "y1", "y2", "y3"], constants)
    program = assert_model_agrees(model, tmp_path, {"x": numbers(3, 6)}, {"x": numbers(1, 6)})
    assert sum(n.target is torch.ops.aten.linear.default for n in program.graph.nodes) == 2


def test_attention_and_rms_normalization(tmp_path: Path) -> None:
    """Operators of opset 23, which ONNX Runtime may lack: the reference is ONNX's own evaluator."""
    from onnx.reference import ReferenceEvaluator

    nodes = [
        oh.make_node("Attention", ["q", "k", "k"], ["a"], q_num_heads=4, kv_num_heads=2, is_causal=1),
        oh.make_node("RMSNormalization", ["a", "scale"], ["y"], epsilon=1e-3),
    ]
    constants = {"scale": np.linspace(0.5, 2, 16, dtype=np.float32)}
    model = model_of(nodes, [("q", F, ["N", 5, 16]), ("k", F, ["N", 5, 8])], ["y"], constants, opset=23)
    program = import_model(model, tmp_path)
    feeds = {"q": numbers(3, 5, 16), "k": numbers(3, 5, 8)}
    typed = oh.make_model(model.graph, opset_imports=model.opset_import, ir_version=10)
    typed.graph.output[0].CopyFrom(oh.make_tensor_value_info("y", F, None))
    (expected,) = ReferenceEvaluator(typed).run(None, {k: v.numpy() for k, v in feeds.items()})
    torch.testing.assert_close(program.run(feeds)["y"], torch.from_numpy(expected), rtol=1e-5, atol=1e-5)


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
    "uneven pool": ("MaxPool", {"kernel_shape": [2], "pads": [1, 0], "strides": [2]}, 20, numbers(1, 2, 5), []),
}


@pytest.mark.parametrize("name", _SEMANTICS)
def test_semantics_that_differ_from_torch(name: str, tmp_path: Path) -> None:
    operator, attributes, opset, x, constants = _SEMANTICS[name]
    inputs = ["x", *(f"c{i}" for i in range(len(constants)))]
    kind = oh.np_dtype_to_tensor_dtype(x.numpy().dtype)
    nodes = [oh.make_node(operator, inputs, ["y"], **attributes)]
    model = model_of(
        nodes, [("x", kind, list(x.shape))], ["y"], {f"c{i}": value for i, value in enumerate(constants)}, opset
    )
    assert_model_agrees(model, tmp_path, {"x": x})


def test_ties_go_to_the_lower_index(tmp_path: Path) -> None:
    x = torch.tensor([[1.0, 2, 2, 2, 0, 2], [0, 0, 0, 0, 0, 0]])
    for largest in (0, 1):
        nodes = [oh.make_node("TopK", ["x", "k"], ["values", "indices"], largest=largest)]
        model = model_of(nodes, [("x", F, ["N", 6])], ["values", "indices"], {"k": np.array([3], np.int64)})
        program = assert_model_agrees(model, tmp_path, {"x": x}, {"x": x.repeat(2, 1)})
        again = load(program.export_onnx(tmp_path / "again.onnx")).run({"x": x})
        assert all(torch.equal(again[name], value) for name, value in program.run({"x": x}).items())


def test_forms_that_torch_lacks_are_spelled_out(tmp_path: Path) -> None:
    """Uneven padding of a pool that counts a part of a window."""
    node = oh.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2], pads=[1, 0], strides=[2], ceil_mode=1)
    model = model_of([node], [("x", F, ["N", 1, 4])], ["y"])
    assert_model_agrees(model, tmp_path, {"x": -numbers(2, 1, 4).abs()})
