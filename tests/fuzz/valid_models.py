"""Small valid models that use much of what files can hold, to be damaged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from graphlathe.ir.from_onnx import from_onnx

NAMES = ("control", "layers")


def write_valid(folder: Path) -> None:
    """A folder for each model: ``model.onnx``, the external data of its weight ``w``, and the program in ``saved``."""
    for name, model in zip(NAMES, (_control(), _layers()), strict=True):
        place = folder / name
        place.mkdir()
        weight = next(t for t in model.graph.initializer if t.name == "w")
        (place / "data.bin").write_bytes(bytes(64) + weight.raw_data)
        length = len(weight.raw_data)
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "data.bin"), ("offset", "64"), ("length", str(length))):
            weight.external_data.add(key=key, value=value)
        (place / "model.onnx").write_bytes(model.SerializeToString())
        program = from_onnx(place / "model.onnx")
        sizes = [d.dim_value or 2 for d in model.graph.input[0].type.tensor_type.shape.dim]
        assert all(value.isfinite().all() for value in program.run({"x": torch.ones(sizes)}).values())
        program.save(place / "saved")


def _initializers(constants: Mapping[str, np.ndarray[Any, Any]], weight: np.ndarray[Any, Any]) -> list[TensorProto]:
    return [numpy_helper.from_array(array, name) for name, array in (constants | {"w": weight}).items()]


def _control() -> onnx.ModelProto:
    """Functions, branches, loops, shape arithmetic."""
    branch = helper.make_graph(
        [helper.make_node("Relu", ["h"], ["b0"])], "then", [], [helper.make_tensor_value_info("b0", 1, None)]
    )
    other = helper.make_graph(
        [helper.make_node("Neg", ["h"], ["b1"])], "else", [], [helper.make_tensor_value_info("b1", 1, None)]
    )
    body = helper.make_graph(
        [helper.make_node("Add", ["c_in", "one"], ["c_out"]), helper.make_node("Identity", ["go"], ["go_out"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("c_in", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("c_out", TensorProto.FLOAT, None),
        ],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="first"),
        helper.make_node("Twice", ["m"], ["t"], domain="local"),
        helper.make_node("Add", ["t", "bias"], ["h"]),
        helper.make_node("If", ["yes"], ["f"], then_branch=branch, else_branch=other),
        helper.make_node("Loop", ["trips", "yes", "f"], ["l"], body=body),
        helper.make_node("Shape", ["l"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"], axis=0),
        helper.make_node("Concat", ["n", "minus"], ["to"], axis=0),
        helper.make_node("Reshape", ["l", "to"], ["r"]),
        helper.make_node("Expand", ["one", "to3"], ["e"]),
        helper.make_node("Add", ["r", "e"], ["a"]),
        helper.make_node("Softmax", ["a"], ["y"], axis=-1),
    ]
    twice = helper.make_function(
        "local", "Twice", ["p"], ["q"], [helper.make_node("Add", ["p", "p"], ["q"])], [helper.make_opsetid("", 17)]
    )
    constants = {
        "bias": np.ones(3, np.float32),
        "one": np.ones(1, np.float32),
        "yes": np.array(True),
        "trips": np.array(2),
        "zero": np.array([0]),
        "minus": np.array([-1]),
        "to3": np.array([1, 3]),
    }
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        _initializers(constants, np.arange(12, dtype=np.float32).reshape(4, 3)),
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, functions=[twice], opset_imports=opsets, ir_version=8)


def _layers() -> onnx.ModelProto:
    """Layers with many attributes, quantised and other operators, and operators that make tensors of computed sizes."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], kernel_shape=[3], pads=[1, 1], strides=[1], dilations=[1], group=2),
        helper.make_node("BatchNormalization", ["c", "four", "four", "four", "four"], ["n"], epsilon=1e-3),
        helper.make_node("MaxPool", ["n"], ["p"], kernel_shape=[2], strides=[2], ceil_mode=1),
        helper.make_node("QuantizeLinear", ["p", "scale", "point"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "point"], ["d"]),
        helper.make_node("Resize", ["d", "", "scales"], ["r"], mode="linear"),
        helper.make_node("LayerNormalization", ["r", "eight"], ["l"], axis=-1),
        helper.make_node("Transpose", ["l"], ["u"], perm=[1, 0, 2]),
        helper.make_node("LSTM", ["u", "lw", "lr"], ["", "h"], hidden_size=4, direction="forward"),
        helper.make_node("Squeeze", ["h", "zero"], ["s"]),
        helper.make_node(
            "MatMulNBits", ["s", "nb", "ns"], ["m"], domain="com.microsoft", K=4, N=4, bits=4, block_size=16
        ),
        helper.make_node("Pad", ["m", "pads"], ["pd"], mode="constant"),
        helper.make_node("Slice", ["pd", "starts", "ends", "axes", "steps"], ["sl"]),
        helper.make_node("Tile", ["sl", "repeats"], ["t"]),
        helper.make_node("ConstantOfShape", ["to"], ["k"]),
        helper.make_node("Range", ["from_", "limit", "delta"], ["ra"]),
        helper.make_node("Cast", ["ra"], ["rf"], to=TensorProto.FLOAT),
        helper.make_node("OneHot", ["ra", "depth", "onoff"], ["oh"], axis=-1),
        helper.make_node("ReduceSum", ["oh", "zero"], ["rs"], keepdims=0),
        helper.make_node("Split", ["rs", "parts"], ["sa", "sb"], axis=0),
        helper.make_node("Einsum", ["t", "eye"], ["e"], equation="ij,jk->ik"),
        helper.make_node("Add", ["e", "k"], ["a1"]),
        helper.make_node("Add", ["a1", "rf"], ["a2"]),
        helper.make_node("Concat", ["sa", "sb"], ["sc"], axis=0),
        helper.make_node("Add", ["a2", "sc"], ["a3"]),
        helper.make_node("CumSum", ["a3", "last"], ["cs"], exclusive=1),
        helper.make_node("TopK", ["cs", "two"], ["y", ""], axis=-1),
    ]
    rng = np.random.default_rng(0)
    integers = {
        "zero": [0], "pads": [0, 2, 0, 2], "starts": [1], "ends": [7], "axes": [1], "steps": [2],
        "repeats": [1, 2], "to": [1, 6], "from_": 0, "limit": 6, "delta": 1, "depth": 6, "parts": [2, 4], "last": -1,
        "two": [2],
    }  # fmt: skip
    constants = {name: np.array(value, np.int64) for name, value in integers.items()} | {
        "four": np.ones(4, np.float32),
        "scales": np.array([1, 1, 2], np.float32),
        "eight": np.ones(8, np.float32),
        "scale": np.array(0.1, np.float32),
        "point": np.array(0, np.int8),
        "lw": rng.standard_normal((1, 16, 8)).astype(np.float32),
        "lr": rng.standard_normal((1, 16, 4)).astype(np.float32),
        "nb": rng.integers(0, 255, (4, 1, 8)).astype(np.uint8),
        "ns": np.ones(4, np.float32),
        "onoff": np.array([0, 1], np.float32),
        "eye": np.eye(6, dtype=np.float32),
    }
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        _initializers(constants, rng.standard_normal((4, 2, 3)).astype(np.float32)),
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)
