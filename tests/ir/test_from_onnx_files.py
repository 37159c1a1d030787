"""ONNX import, how files store things, and which are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh
import pytest
import torch

from graphlathe.ir.errors import GraphlatheError, ImportModelError, UnsupportedOpError
from graphlathe.ir.from_onnx import from_onnx
from graphlathe.ir.load import load
from graphlathe.ir.weights import FileSource
from tests.onnx_models import (
    F,
    I,
    assert_model_agrees,
    import_model,
    model_of,
    numbers,
    reshape_chain,
)


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
    model = model_of(nodes, [("x", F, ["N", 2, 3])], ["raw_out", "typed_out", "outside_out"])
    model.graph.initializer.extend([raw, typed, outside])
    program = import_model(model, tmp_path)
    assert isinstance(program.weights["outside"].source, FileSource)
    for value in program.run({"x": torch.zeros(4, 2, 3)}).values():
        assert torch.equal(value, values.expand(4, 2, 3))


def _external(folder: Path, location: str, size: int = 24) -> onnx.ModelProto:
    model = model_of([oh.make_node("Add", ["x", "w"], ["y"])], [("x", F, ["N", 6])], ["y"])
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
        import_model(_external(inside, location), inside)


def test_external_data_missing_or_short(tmp_path: Path) -> None:
    with pytest.raises(ImportModelError, match=r"'w\.bin' of initializer 'w' is missing"):
        import_model(_external(tmp_path, "w.bin"), tmp_path)
    (tmp_path / "w.bin").write_bytes(bytes(20))
    with pytest.raises(ImportModelError, match="truncated: 20 bytes"):
        import_model(_external(tmp_path, "w.bin"), tmp_path)
    with pytest.raises(ImportModelError, match="has 20 bytes"):
        import_model(_external(tmp_path, "w.bin", 20), tmp_path)


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
        import_model(model, tmp_path)


def test_external_data_in_a_folder_below_or_behind_a_link_inside(tmp_path: Path) -> None:
    """What stays in the folder is read, however it is spelled."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "w.bin").write_bytes(np.arange(6, dtype=np.float32).tobytes())
    (tmp_path / "link.bin").symlink_to(tmp_path / "sub" / "w.bin")
    for location in ("sub/w.bin", "./sub/../sub/w.bin", "link.bin"):
        program = import_model(_external(tmp_path, location), tmp_path)
        assert torch.equal(program.run({"x": torch.zeros(2, 6)})["y"], torch.arange(6.0).expand(2, 6))


def test_embedded_weights_stay_in_the_file(tmp_path: Path) -> None:
    """Large raw data is mapped from the model file itself, at whatever offset, next to small and typed data."""
    torch.manual_seed(0)
    arrays = {
        "big": np.random.default_rng(0).normal(size=(64, 65)).astype(np.float32),
        "small": np.ones((65, 3), np.float32),
    }
    nodes = [oh.make_node("MatMul", ["x", "big"], ["h"]), oh.make_node("MatMul", ["h", "small"], ["g"])]
    nodes.append(oh.make_node("Add", ["g", "typed"], ["y"]))
    model = model_of(nodes, [("x", F, [2000, 64])], ["y"], arrays)
    typed = np.linspace(0, 1, 3 * 2000, dtype=np.float32).reshape(2000, 3)
    model.graph.initializer.append(oh.make_tensor("typed", F, [2000, 3], typed.flatten().tolist()))
    program = assert_model_agrees(model, tmp_path, {"x": numbers(2000, 64)})
    assert isinstance(program.weights["big"].source, FileSource)
    assert program.weights["big"].source.path.name == "model.onnx"
    for name, value in {**arrays, "typed": typed}.items():
        assert torch.equal(program.weights[name].tensor(), torch.from_numpy(value))


def test_embedded_weight_of_a_wrong_length(tmp_path: Path) -> None:
    model = model_of([oh.make_node("Add", ["x", "w"], ["y"])], [("x", F, ["N", 2000])], ["y"])
    model.graph.initializer.append(onnx.TensorProto(name="w", data_type=F, dims=[2000], raw_data=bytes(7996)))
    with pytest.raises(ImportModelError, match="'w' has 7996 bytes"):
        import_model(model, tmp_path)


def test_truncated_and_empty_files(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    import_model(reshape_chain(), tmp_path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ImportModelError, match=r"cannot read|holds no graph"):
        from_onnx(path)
    path.write_bytes(b"")
    with pytest.raises(ImportModelError, match="holds no graph"):
        from_onnx(path)
    with pytest.raises(ImportModelError, match="no file"):
        from_onnx(tmp_path / "nothing.onnx")


@pytest.mark.parametrize("keep", [1, 3, 500, 9_000, -1])
def test_every_truncation_is_noticed(keep: int, tmp_path: Path) -> None:
    model = model_of(
        [oh.make_node("Add", ["x", "w"], ["y"])], [("x", F, ["N", 4000])], ["y"], {"w": np.ones(4000, np.float32)}
    )
    import_model(model, tmp_path)
    path = tmp_path / "model.onnx"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ImportModelError, match="truncated"):
        from_onnx(path)


def test_unsupported_operators_are_all_named(tmp_path: Path) -> None:
    nodes = [
        oh.make_node("StringNormalizer", ["x"], ["a"], name="find"),
        oh.make_node("ImageDecoder", ["x"], ["b"]),
        oh.make_node("Own", ["x"], ["c"], domain="elsewhere"),
    ]
    model = model_of(nodes, [("x", F, ["N"])], ["a", "b", "c"])
    model.opset_import.append(oh.make_opsetid("elsewhere", 1))
    with pytest.raises(
        UnsupportedOpError, match=r"StringNormalizer .*2 other operators.*ImageDecoder, elsewhere::Own.*%find"
    ):
        import_model(model, tmp_path)


def _refused(change: Callable[[onnx.ModelProto], None]) -> onnx.ModelProto:
    model = model_of([oh.make_node("Relu", ["x"], ["y"], name="act")], [("x", F, ["N"])], ["y"])
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
        import_model(_refused(change), tmp_path)


def _spoiled(change: Callable[[onnx.ModelProto], None]) -> onnx.ModelProto:
    model = model_of([oh.make_node("Add", ["x", "w"], ["y"])], [("x", F, [2, 3])], ["y"], {"w": np.ones((2, 3), "f")})
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
