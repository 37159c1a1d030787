"""Quantised operators equal ONNX Runtime's, keep their form through export, and round as they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphlathe import kernels
from graphlathe.ir.from_onnx import from_onnx
from graphlathe.kernels.quantization import ROUNDINGS, rounded
from tests.onnx_nodes import assert_node_agrees, operators_of

R = np.random.default_rng(0)
_X = (R.standard_normal((2, 6, 4)) * 3).astype(np.float32)


def _scales(*shape: int) -> np.ndarray:
    return R.uniform(0.02, 0.1, shape).astype(np.float32)


def _integers(dtype: Any, *shape: int) -> np.ndarray:
    bounds = np.iinfo(dtype)
    return R.integers(bounds.min, bounds.max, shape, endpoint=True).astype(dtype)


_PLACES = [((), {}), ((1,), {}), ((6,), {"axis": 1}), ((4,), {"axis": -1}), ((2, 3, 4), {"axis": 1, "block_size": 2})]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16])
@pytest.mark.parametrize(("shape", "options"), _PLACES)
def test_quantize_and_dequantize(dtype: Any, shape: tuple[int, ...], options: dict[str, int], tmp_path: Path) -> None:
    parameters = {"scale": _scales(*shape), "zero": _integers(dtype, *shape)}
    open_batch: dict[str, Any] = {} if "block_size" in options else {"shapes": {"x": ["N", 6, 4]}}
    program = assert_node_agrees(
        tmp_path, "QuantizeLinear", {"x": _X, **parameters}, atol=0, stored=["scale", "zero"], **open_batch, **options
    )
    assert operators_of(program)[-1] == "graphlathe.quantize"
    stored = _integers(dtype, 2, 6, 4)
    program = assert_node_agrees(
        tmp_path, "DequantizeLinear", {"x": stored, **parameters}, stored=["scale", "zero"], **open_batch, **options
    )
    assert operators_of(program)[-1] == "graphlathe.dequantize"


def test_without_a_zero_point(tmp_path: Path) -> None:
    scale = _scales(6)
    assert_node_agrees(tmp_path, "QuantizeLinear", {"x": _X, "scale": scale}, atol=0, axis=1)
    kind = onnx.TensorProto.INT8
    assert_node_agrees(tmp_path, "QuantizeLinear", {"x": _X, "scale": scale}, atol=0, axis=1, output_dtype=kind)
    assert_node_agrees(tmp_path, "DequantizeLinear", {"x": _integers(np.int32, 2, 6), "s": _scales()})


@pytest.mark.parametrize("x", [_X, np.abs(_X), -np.abs(_X), np.zeros((3,), np.float32)], ids=str)
def test_dynamic_quantization(x: np.ndarray, tmp_path: Path) -> None:
    program = assert_node_agrees(tmp_path, "DynamicQuantizeLinear", {"x": x}, outputs=("y", "scale", "zero"), atol=0)
    assert "graphlathe.dynamic_quantize" in operators_of(program)


@pytest.mark.parametrize("b_shape", [(), (3,)])
@pytest.mark.parametrize("kind", [np.uint8, np.int8])
def test_matrix_products(kind: Any, b_shape: tuple[int, ...], tmp_path: Path) -> None:
    a, b = _integers(np.uint8, 2, 4, 7), _integers(kind, 7, 3)
    zeros = {"az": _integers(np.uint8), "bz": _integers(kind, *b_shape)}
    shapes = {"a": ["N", "M", 7]}
    assert_node_agrees(
        tmp_path, "MatMulInteger", {"a": a, "b": b, **zeros}, atol=0, shapes=shapes, stored=["b", *zeros]
    )
    assert_node_agrees(
        tmp_path,
        "QLinearMatMul",
        {"a": a, "as": _scales(), "az": zeros["az"], "b": b, "bs": _scales(*b_shape), "bz": zeros["bz"]}
        | {"ys": np.array(4.0, np.float32), "yz": _integers(np.uint8)},
        atol=0,
        shapes=shapes,
        stored=["b", "bs", "bz"],
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"pads": [1, 0, 1, 2], "strides": [2, 1]}, {"group": 2, "dilations": [2, 1]}, {"auto_pad": "SAME_LOWER"}],
    ids=str,
)
def test_convolutions(options: dict[str, Any], tmp_path: Path) -> None:
    x, w = _integers(np.uint8, 2, 4, 6, 5), _integers(np.int8, 6, 4 // options.get("group", 1), 3, 3)
    zeros = {"xz": _integers(np.uint8), "wz": np.array(0, np.int8)}
    program = assert_node_agrees(
        tmp_path, "ConvInteger", {"x": x, "w": w.view(np.uint8), "xz": zeros["xz"]}, atol=0, **options
    )
    assert "graphlathe.integer_conv" in operators_of(program)
    inputs = {"x": x, "xs": _scales(), "xz": zeros["xz"], "w": w, "ws": _scales(6), "wz": np.zeros(6, np.int8)}
    inputs |= {"ys": np.array(2.0, np.float32), "yz": _integers(np.uint8), "b": R.integers(-999, 999, 6, np.int32)}
    program = assert_node_agrees(tmp_path, "QLinearConv", inputs, atol=0, stored=["w", "ws", "wz", "b"], **options)
    assert "graphlathe.quantized_conv" in operators_of(program)


def test_an_exported_operator_is_the_same_operator(tmp_path: Path) -> None:
    """What we write is ONNX's operator, and reads as ours again."""
    inputs = {"x": _X, "scale": _scales(6), "zero": _integers(np.int8, 6)}
    first = assert_node_agrees(tmp_path, "QuantizeLinear", inputs, atol=0, stored=["scale", "zero"], axis=1)
    again = from_onnx(tmp_path / "again.onnx")
    assert [n.op_type for n in onnx.load(tmp_path / "again.onnx").graph.node] == ["QuantizeLinear"]
    assert operators_of(again) == operators_of(first) == ["graphlathe.quantize"]


@given(st.floats(-100, 100, width=32), st.sampled_from(ROUNDINGS))
def test_rounding(number: float, rounding: str) -> None:
    result = float(rounded(torch.tensor(number, dtype=torch.float64), rounding))
    distance = abs(result - number)
    assert result == int(result)
    if rounding == "toward-zero":
        assert abs(result) <= abs(number) < abs(result) + 1
    elif distance == 0.5:
        assert result % 2 == 0 if rounding == "half-even" else abs(result) > abs(number)
    else:
        assert distance < 0.5


def test_rounding_is_carried_by_the_operator() -> None:
    x, scale = torch.tensor([0.5, 1.5, -0.5, -2.5, 200.0]), torch.tensor(1.0)
    by_rule = {r: kernels.quantize(x, scale, dtype=torch.int8, rounding=r).tolist() for r in ROUNDINGS}
    assert by_rule == {
        "half-even": [0, 2, 0, -2, 127],
        "half-away": [1, 2, -1, -3, 127],
        "toward-zero": [0, 1, 0, -2, 127],
    }
    with pytest.raises(ValueError, match="half-even, half-away"):
        kernels.quantize(x, scale, dtype=torch.int8, rounding="up")
