"""ONNX import of whole graphs: sizes, guards, branches, functions, names, and round trips of exports."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh
import pytest
import torch

from graphlathe.ir.errors import ImportModelError, InputError
from graphlathe.ir.from_onnx import from_onnx
from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import ORIGIN
from graphlathe.tools.zoo import get
from tests.onnx_models import (
    F,
    I,
    assert_model_agrees,
    import_model,
    model_of,
    numbers,
    operator_nodes,
    reshape_chain,
)


def test_shape_arithmetic_disappears(tmp_path: Path) -> None:
    """The chain becomes one reshape with symbolic sizes, and no weight."""
    program = assert_model_agrees(reshape_chain(), tmp_path, {"x": numbers(2, 3, 24)}, {"x": numbers(5, 1, 24)})
    targets = [str(node.target) for node in operator_nodes(program)]
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
    model = model_of(nodes, [("x", F, ["n", 3])], ["y"], {"low": np.array(0), "high": np.array(6.0)})
    program = import_model(model, tmp_path)
    assert [str(node.target) for node in operator_nodes(program)] == ["aten.clamp.default"]
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
    model = model_of(nodes, [("x", F, ["N", 2])], ["y", "r"], constants)
    assert_model_agrees(model, tmp_path, {"x": numbers(3, 2)}, {"x": numbers(7, 2)})


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
    program = assert_model_agrees(
        model_of(nodes, [("x", I, ["N", 3])], ["y", "z"], arrays), tmp_path, {"x": torch.arange(6).reshape(2, 3)}
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
    model = model_of(nodes, [("x", F, ["N", int(sizes.sum())])], ["y"], {"sizes": sizes})
    assert_model_agrees(model, tmp_path, {"x": numbers(2, int(sizes.sum()))})
    del model.graph.initializer[:]
    model.graph.initializer.append(oh.make_tensor("sizes", I, [70], sizes.tolist()))
    assert_model_agrees(model, tmp_path, {"x": numbers(2, int(sizes.sum()))})


def test_choice_by_size_becomes_a_guard(tmp_path: Path) -> None:
    """``Where`` on a comparison of sizes is decided once; sizes that decide otherwise are refused."""
    nodes = [
        oh.make_node("Shape", ["x"], ["shape"], start=0, end=1),
        oh.make_node("Less", ["shape", "limit"], ["small"]),
        oh.make_node("Where", ["small", "shape", "limit"], ["end"]),
        oh.make_node("Slice", ["x", "zero", "end"], ["y"]),
    ]
    constants = {"limit": np.array([8], np.int64), "zero": np.array([0], np.int64)}
    model = model_of(nodes, [("x", F, ["N", 2])], ["y"], constants)
    program = assert_model_agrees(model, tmp_path, {"x": numbers(5, 2)}, {"x": numbers(7, 2)}, sizes={"N": 4})
    with pytest.raises(InputError, match="N"):
        program.run({"x": numbers(9, 2)})


def test_recorded_guards_choose_sizes_and_are_checked(tmp_path: Path) -> None:
    """Guards that our export wrote come back: they pick the example's sizes, and refuse what they exclude."""
    model = model_of([oh.make_node("Relu", ["x"], ["y"])], [("x", F, ["B", "S"])], ["y"])
    model.metadata_props.add(key="graphlathe.guards", value="S % 48 == 0\n2 <= B <= 9\nB + 40 < S")
    program = import_model(model, tmp_path)
    assert program.main.dims.by_name["S"].hint % 48 == 0
    assert (program.main.dims.by_name["B"].min, program.main.dims.by_name["B"].max) == (2, 9)
    assert program.run({"x": numbers(3, 96)})["y"].shape == (3, 96)
    for shape in ((3, 50), (1, 48), (8, 48)):
        with pytest.raises(InputError):
            program.run({"x": numbers(*shape)})
    model.metadata_props[0].value = "S == 2*S"
    with pytest.raises(ImportModelError, match="no sizes were found"):
        import_model(model, tmp_path)
    model.metadata_props[0].value = "__import__('os')"
    with pytest.raises(ImportModelError, match="cannot be read"):
        import_model(model, tmp_path)


def test_dimension_that_is_not_dynamic(tmp_path: Path) -> None:
    """A file that declares a dimension dynamic, and then reshapes to a fixed size: refused, or guarded, never wrong."""
    constants = {"shape": np.array([4, 3], np.int64)}
    model = model_of([oh.make_node("Reshape", ["x", "shape"], ["y"])], [("x", F, ["N", 3])], ["y"], constants)
    with pytest.raises(ImportModelError):
        import_model(model, tmp_path)
    assert import_model(model, tmp_path, sizes={"N": 4}, static=True).inputs[0].shape == (4, 3)


def test_unnamed_dynamic_dimension_and_static(tmp_path: Path) -> None:
    model = model_of([oh.make_node("Relu", ["x"], ["y"])], [("x", F, [None, 3])], ["y"])
    assert list(import_model(model, tmp_path).main.dims.by_name) == ["x_0"]
    fixed = import_model(model, tmp_path, sizes={"x_0": 4}, static=True)
    assert fixed.inputs[0].shape == (4, 3)
    assert not fixed.main.dims.by_name
    with pytest.raises(ImportModelError, match="static=True"):
        import_model(model, tmp_path, static=True)
    with pytest.raises(ImportModelError, match="no dynamic dimension 'q'"):
        import_model(model, tmp_path, sizes={"q": 4})


def test_minus_one_is_a_dynamic_dimension(tmp_path: Path) -> None:
    program = assert_model_agrees(model_of([oh.make_node("Relu", ["x"], ["y"])], [("x", F, [-1, 3])], ["y"]), tmp_path)
    assert [dim.name for dim in program.main.dims.by_name.values()] == ["x_0"]


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
    assert_model_agrees(model_of(nodes, [("x", F, ["N", 2])], ["y"], constants), tmp_path, {"x": numbers(3, 2)})
    assert_model_agrees(model_of(nodes, [("x", F, ["N", 3])], ["y"], constants), tmp_path, {"x": numbers(3, 3)})


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
    assert_model_agrees(
        model_of(nodes, [("x", F, [3])], ["y"], {"condition": np.array(condition)}), tmp_path, {"x": torch.arange(3.0)}
    )


def test_functions_are_inlined(tmp_path: Path) -> None:
    function = oh.make_function(
        "own", "Twice", ["a"], ["b"], [oh.make_node("Add", ["a", "a"], ["b"])], [oh.make_opsetid("", 20)]
    )
    model = model_of([oh.make_node("Twice", ["x"], ["y"], domain="own")], [("x", F, ["N"])], ["y"])
    model.opset_import.append(oh.make_opsetid("own", 1))
    model.functions.append(function)
    program = import_model(model, tmp_path)
    assert torch.equal(program.run({"x": numbers(4)})["y"], 2 * numbers(4))


def test_names_and_origins(tmp_path: Path) -> None:
    """Inputs, outputs and weights keep names that are no identifiers; nodes know the ONNX node they came from."""
    node = oh.make_node("MatMul", ["input:0", "layer/w.1"], ["out put"], name="layer/MatMul")
    model = model_of([node], [("input:0", F, ["batch size", 3])], ["out put"], {"layer/w.1": numbers(3, 2).numpy()})
    program = import_model(model, tmp_path)
    assert (program.main.inputs, program.main.outputs) == (("input:0",), ("out put",))
    assert list(program.weights) == ["layer/w.1"]
    assert list(program.main.dims.by_name) == ["batch_size"]
    (matmul,) = operator_nodes(program)
    assert matmul.meta[ORIGIN] == "layer/MatMul"
    assert torch.equal(program.run({"input:0": numbers(4, 3)})["out put"], numbers(4, 3) @ numbers(3, 2))
    assert torch.equal(program.clone().run({"input:0": numbers(4, 3)})["out put"], numbers(4, 3) @ numbers(3, 2))


def test_inputs_whose_names_look_alike(tmp_path: Path) -> None:
    model = model_of([oh.make_node("Sub", ["in.1", "in_1"], ["y"])], [("in.1", F, [2]), ("in_1", F, [2])], ["y"])
    assert_model_agrees(model, tmp_path, {"in.1": torch.ones(2), "in_1": torch.arange(2.0)})


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
