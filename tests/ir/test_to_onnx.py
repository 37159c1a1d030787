"""Export to ONNX: the same numbers in ONNX Runtime (its optimizer off), names kept, files complete or absent."""

from __future__ import annotations

import json
import operator
import os
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from torch import nn

from graphlathe.ir.errors import ExportError, InputError
from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.ir.to_onnx import export_onnx, to_onnx_model
from graphlathe.ir.to_onnx import write as write_module
from graphlathe.ir.to_onnx.write import Layout
from graphlathe.ir.weights import Weight
from graphlathe.runtime.compile import compile
from graphlathe.tools import zoo
from tests.zoo_programs import over_zoo, traced

# Models that the stock exporter refuses, with its reason; everything else in the zoo exports and runs equal.
REFUSED: dict[str, str] = {}

QUICK = ("bert", "mixtral", "plain_residual_cnn")


def run_file(path: Path, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    values = session.run(None, {name: value.numpy() for name, value in feeds.items()})
    return dict(zip(names, map(torch.as_tensor, values), strict=True))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tol: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    finite = torch.isfinite(expected)
    assert torch.equal(finite, torch.isfinite(actual))
    a, b = actual[finite].double(), expected[finite].double()
    if b.numel():
        assert (a - b).abs().max() <= tol * b.abs().max()


def assert_same(program: Program, path: Path, *inputs: dict[str, torch.Tensor]) -> None:
    for given in inputs:
        feeds = program.feeds(**given)
        expected = program.run(feeds)
        actual = run_file(path, feeds)
        for name, value in actual.items():
            assert_close(value, torch.as_tensor(expected[name]))


@over_zoo(quick=QUICK)
def test_a_zoo_model_runs_equal_at_the_traced_and_an_unseen_size(name: str, tmp_path: Path) -> None:
    model, program = zoo.get(name), traced(name)
    path = tmp_path / "model.onnx"
    if name in REFUSED:
        with pytest.raises(ExportError):
            export_onnx(program, path)
        return
    result = to_onnx_model(program, fallback=False)
    assert result.fallback_reason is None
    export_onnx(program, path, fallback=False)
    onnx.checker.check_model(str(path), full_check=True)
    proto = onnx.load(path)
    assert tuple(value.name for value in proto.graph.input) == program.main.inputs
    assert tuple(value.name for value in proto.graph.output) == program.main.outputs
    assert {value.name for value in proto.graph.initializer} <= program.used_weights()
    sizes = [model.trace_sizes, *(model.unseen_sizes[:1] if model.dynamic else ())]
    assert_same(program, path, *[model.inputs(size) for size in sizes])


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 16)
        self.second = nn.Linear(16, 4, bias=False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = torch.relu(self.first(x))
        return {"hidden": hidden, "result": self.second(hidden).reshape(x.shape[0] * x.shape[1], 4)}


def small() -> Program:
    torch.manual_seed(0)
    return trace(Small().eval(), {"x": torch.randn(2, 3, 4)}, dynamic={"x": {0: "batch", 1: "time"}})


def test_names_of_ports_weights_and_dimensions_are_kept(tmp_path: Path) -> None:
    program = small()
    graph = onnx.load(export_onnx(program, tmp_path / "m.onnx")).graph
    assert {w.name for w in graph.initializer} == {"first.weight", "first.bias", "second.weight"}
    [x] = graph.input
    assert (x.name, [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim]) == ("x", ["batch", "time", 4])
    shapes = {o.name: [d.dim_param or d.dim_value for d in o.type.tensor_type.shape.dim] for o in graph.output}
    assert shapes == {"hidden": ["batch", "time", 16], "result": ["batch*time", 4]}


def test_the_translation_reads_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    program = small()

    def refuse(self: Weight) -> torch.Tensor:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Weight, "tensor", refuse)
    assert len(list(to_onnx_model(program).model.graph)) > 3


@pytest.mark.parametrize("opset", range(18, 24))
def test_every_supported_opset_gives_a_valid_equal_file(opset: int, tmp_path: Path) -> None:
    program = small()
    path = export_onnx(program, tmp_path / "m.onnx", opset=opset)
    onnx.checker.check_model(str(path), full_check=True)
    assert {o.domain: o.version for o in onnx.load(path).opset_import} == {"": opset}
    assert_same(program, path, {"x": torch.randn(2, 3, 4)}, {"x": torch.randn(5, 1, 4)})


class Changed(nn.Module):
    """An operator whose ONNX form changed between opsets."""

    def forward(self, x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        return nn.functional.grid_sample(x, grid, align_corners=False)


@pytest.mark.parametrize("opset", [18, 20, 23])
def test_operators_that_changed_are_converted(opset: int, tmp_path: Path) -> None:
    inputs = {"x": torch.randn(1, 2, 5, 5), "grid": torch.rand(1, 3, 3, 2) * 2 - 1}
    program = trace(Changed(), inputs)
    path = export_onnx(program, tmp_path / "m.onnx", opset=opset)
    onnx.checker.check_model(str(path), full_check=True)
    [node] = [n for n in onnx.load(path).graph.node if n.op_type == "GridSample"]
    mode = next(onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == "mode")
    assert mode == (b"bilinear" if opset < 20 else b"linear")
    assert_same(program, path, inputs)


@pytest.mark.parametrize("opset", [17, 24])
def test_other_opsets_are_refused(opset: int) -> None:
    with pytest.raises(ExportError, match=r"not supported[\s\S]*18 to 23"):
        to_onnx_model(small(), opset=opset)


class Ports(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.arange(6.0).reshape(2, 3))

    def forward(self, x: torch.Tensor) -> dict[str, object]:
        y = x + self.table
        return {"same": x, "weight": self.table, "y": y, "again": y, "number": 7, "x": x * 2}


def test_outputs_that_are_inputs_weights_constants_or_each_other(tmp_path: Path) -> None:
    program = trace(Ports(), {"x": torch.randn(2, 3)})
    x = torch.randn(2, 3)
    result = to_onnx_model(program)
    path = export_onnx(program, tmp_path / "m.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    got, want = run_file(path, {"x": x}), program.run({"x": x})
    assert list(got) == ["same", "weight", "y", "again", *(["number"] if "number" in want else []), "x.out"]
    assert any("'x.out'" in note for note in result.notes)
    for name in ("same", "weight", "y", "again"):
        assert torch.equal(got[name], want[name])
    assert torch.equal(got["x.out"], want["x"])
    if "number" in want:
        assert got["number"] == 7


class Arithmetic(nn.Module):
    """Size arithmetic with negative intermediate results, where ONNX's division differs from Python's."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        n = x.shape[0]
        up = -(-n // 3)
        shift = (2 - n) % 5
        return x.new_zeros(up), x.new_ones(shift + 1), x[: max(n - 4, 1)]


def test_repeating_nothing(tmp_path: Path) -> None:
    class Repeat(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.repeat_interleave(2, dim=1)

    for shape in ((4, 3, 0), (4, 0, 3), (4, 3, 2)):
        program = trace(Repeat(), {"x": torch.randn(shape)})
        assert_same(program, export_onnx(program, tmp_path / "m.onnx"), {"x": torch.randn(shape)})


def test_division_of_sizes_rounds_as_in_python(tmp_path: Path) -> None:
    program = trace(Arithmetic(), {"x": torch.randn(7)}, dynamic={"x": {0: "N"}})
    path = export_onnx(program, tmp_path / "m.onnx")
    for n in (7, 8, 9, 10, 11):
        got = run_file(path, {"x": torch.randn(n)})
        assert [len(v) for v in got.values()] == [-(-n // 3), (2 - n) % 5 + 1, max(n - 4, 1)]


class Promotion(nn.Module):
    def forward(self, i: torch.Tensor, f: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return i + 1.5, i * f, i / 2, torch.sqrt(i), (i > 1.5), f + i.shape[0], i.to(torch.bool).sum()


def test_operands_are_promoted_as_in_pytorch(tmp_path: Path) -> None:
    inputs = {"i": torch.arange(6), "f": torch.randn(6)}
    program = trace(Promotion(), inputs, dynamic={"i": {0: "N"}, "f": {0: "N"}})
    path = export_onnx(program, tmp_path / "m.onnx")
    assert_same(program, path, inputs, {"i": torch.arange(4), "f": torch.randn(4)})


@pytest.mark.parametrize("kind", ["none", "causal", "bool", "float"])
@pytest.mark.parametrize("groups", [1, 2])
def test_attention_is_pytorchs_even_where_everything_is_masked(kind: str, groups: int, tmp_path: Path) -> None:
    class Attention(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            chosen = {"bool": mask, "float": torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)}.get(kind)
            return nn.functional.scaled_dot_product_attention(
                q, k, k * 2, attn_mask=chosen, is_causal=kind == "causal", enable_gqa=groups > 1
            )

    def inputs(length: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(length)
        mask = torch.rand(2, 1, length, length, generator=generator) > 0.4
        mask[0, :, 1] = False
        q, k = (torch.randn(2, heads, length, 8, generator=generator) for heads in (4, 4 // groups))
        return {"q": q, "k": k, "mask": mask}

    dynamic = {"q": {2: "S"}, "k": {2: "S"}, "mask": {2: "S", 3: "S"}}
    program = trace(Attention(), inputs(6), dynamic=dynamic)
    path = export_onnx(program, tmp_path / "m.onnx", fallback=False)
    onnx.checker.check_model(str(path), full_check=True)
    for length in (6, 19):
        feeds = {name: inputs(length)[name] for name in program.main.inputs}
        assert_same(program, path, feeds)


def test_a_mask_is_made_into_numbers_once(tmp_path: Path) -> None:
    """Layers that share a mask share what it adds, and select nothing as large as their scores."""

    class Layers(nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            for _ in range(3):
                x = torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)
            return x

    program = trace(Layers(), (torch.randn(2, 4, 5, 8), torch.rand(2, 1, 5, 5) > 0.4))
    path = tmp_path / "m.onnx"
    program.export_onnx(path)
    selections = [node for node in onnx.load(path).graph.node if node.op_type == "Where"]
    assert sum("mask" in node.input for node in selections) == 1
    assert len(selections) == 1 + 3


def test_bfloat16_weights_are_written_bit_by_bit(tmp_path: Path) -> None:
    module = nn.Embedding(40, 32, dtype=torch.bfloat16)
    program = trace(module, (torch.tensor([1, 2]),))
    path = export_onnx(program, tmp_path / "m.onnx")
    [weight] = onnx.load(path).graph.initializer
    assert weight.data_type == onnx.TensorProto.BFLOAT16
    assert weight.raw_data == module.weight.detach().view(torch.uint16).numpy().tobytes()


def test_a_tied_weight_is_written_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(50, 8)
            self.head = nn.Linear(8, 50, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids))

    program = trace(Tied(), {"ids": torch.tensor([[1, 2]])})
    path = export_onnx(program, tmp_path / "m.onnx")
    proto = onnx.load(path)
    assert len(proto.graph.initializer) == 1
    metadata = {p.key: p.value for p in proto.metadata_props}
    assert set(json.loads(metadata["graphlathe.tied"]).items()) == set(program.tied.items())
    assert_same(program, path, {"ids": torch.tensor([[3, 4]])})


def test_metadata_says_what_made_the_file(tmp_path: Path) -> None:
    program = small()
    program.history.append("drop-layers{ratio=0.2}")
    metadata = {p.key: p.value for p in onnx.load(export_onnx(program, tmp_path / "m.onnx")).metadata_props}
    assert metadata["graphlathe.pipeline"] == "drop-layers{ratio=0.2}"
    assert metadata["graphlathe.version"]
    assert "1 <= batch" in metadata["graphlathe.guards"].splitlines()
    assert not onnx.load(export_onnx(program, tmp_path / "n.onnx", metadata=False)).metadata_props


def test_external_data_lies_beside_the_file_on_page_boundaries(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(64, 65), nn.Linear(65, 64))
    program = trace(module, (torch.randn(2, 64),))
    path = export_onnx(program, tmp_path / "m.onnx", external_data=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    onnx.checker.check_model(str(path), full_check=True)
    stored = onnx.load(path, load_external_data=False).graph.initializer
    places = {w.name: {e.key: e.value for e in w.external_data} for w in stored}
    assert {name for name, place in places.items() if place} == {"0.weight", "1.weight"}
    assert {place["location"] for place in places.values() if place} == {"m.onnx.data"}
    assert all(int(place["offset"]) % 4096 == 0 for place in places.values() if place)
    assert_same(program, path, {program.main.inputs[0]: torch.randn(2, 64)})


def test_a_model_above_two_gigabytes_goes_to_a_data_file_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_module, "INLINE_LIMIT", 20_000)
    program = trace(nn.Linear(128, 128), (torch.randn(2, 128),))
    path = export_onnx(program, tmp_path / "m.onnx")
    assert path.stat().st_size < 20_000 < path.with_name("m.onnx.data").stat().st_size
    assert_same(program, path, {program.main.inputs[0]: torch.randn(2, 128)})
    with pytest.raises(ExportError, match="2 GiB"):
        export_onnx(program, tmp_path / "n.onnx", external_data=False)
    assert not (tmp_path / "n.onnx").exists()


def test_the_stream_is_what_onnx_itself_would_write(tmp_path: Path) -> None:
    model = to_onnx_model(small()).model
    ours = onnx.ModelProto.FromString(b"".join(Layout(model, None).chunks()))
    theirs = onnx_ir.serde.serialize_model(model)
    for proto in (ours, theirs):
        proto.graph.ClearField("value_info")
        for node in proto.graph.node:
            node.ClearField("metadata_props")
    assert [w.raw_data for w in ours.graph.initializer] == [w.raw_data for w in theirs.graph.initializer]
    assert list(ours.graph.node) == list(theirs.graph.node)
    assert list(ours.graph.output) == list(theirs.graph.output)


def test_a_full_disk_leaves_nothing_and_the_old_file_whole(tmp_path: Path) -> None:
    program = trace(nn.Linear(512, 512), (torch.randn(2, 512),))
    for external in (False, True):
        path = tmp_path / "m.onnx"
        path.write_bytes(b"old")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            with pytest.raises(ExportError, match=r"cannot write[\s\S]*free space"):
                export_onnx(program, path, external_data=external)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert path.read_bytes() == b"old"
        assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_a_failure_between_the_files_leaves_no_temporary_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(ExportError, match="No space left"):
        export_onnx(small(), tmp_path / "m.onnx", external_data=True)
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_and_a_folder_as_target_are_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no folder"):
        export_onnx(small(), tmp_path / "nowhere" / "m.onnx")
    with pytest.raises(ExportError, match="is a folder"):
        export_onnx(small(), tmp_path)


def test_a_file_is_not_overwritten_while_its_weights_are_read(tmp_path: Path) -> None:
    program = small()
    data = tmp_path / "m.onnx.data"
    weight = program.weights["first.weight"]
    data.write_bytes(weight.tensor().numpy().tobytes())
    program.weights["first.weight"] = Weight.from_file(data, 0, weight.shape, weight.dtype)
    path = export_onnx(program, tmp_path / "other.onnx", external_data=True)
    assert_same(program, path, {"x": torch.randn(2, 3, 4)})
    with pytest.raises(ExportError, match="holds the weights"):
        write_module.write_model(to_onnx_model(program).model, data)
    assert data.stat().st_size == weight.nbytes


def test_a_meta_weight_has_no_numbers_to_write(tmp_path: Path) -> None:
    program = small()
    program.weights["first.weight"] = Weight.from_tensor(torch.empty(16, 4, device="meta"))
    with pytest.raises(ExportError, match=r"'first\.weight' has no numbers"):
        export_onnx(program, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.0, 3.0, 4.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled = x * self.scale
        return torch.cond(scaled.sum() > 0, lambda v: v.sin(), lambda v: v.cos() - 1, (scaled,))


def conditional() -> Program:
    return trace(Conditional(), {"x": torch.ones(2, 3)}, dynamic={"x": {0: "rows"}})


def test_control_flow_falls_back_to_the_stock_exporter_and_says_so(tmp_path: Path) -> None:
    program = conditional()
    result = to_onnx_model(program)
    assert result.fallback_reason is not None
    assert "cond" in result.fallback_reason
    assert "PyTorch's own exporter" in result.notes[0]
    notes: list[str] = []
    path = export_onnx(program, tmp_path / "m.onnx", notes=notes)
    assert notes == list(result.notes)
    graph = onnx.load(path).graph
    assert [i.name for i in graph.input] == ["x"]
    assert [d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == ["rows", 3]
    assert [o.name for o in graph.output] == list(program.main.outputs)
    assert "scale" in {w.name for w in graph.initializer}
    for x in (torch.ones(2, 3), -torch.ones(5, 3)):
        assert_same(program, path, {"x": x})


def test_assumptions_of_a_decomposition_become_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphlathe.ir.to_onnx import lower
    from graphlathe.runtime.compile import compile

    def halves(x: torch.Tensor) -> torch.Tensor:
        return x * x if x.shape[0] % 2 == 0 else x * 0

    class Square(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.aten.diff(x)

    program = trace(Square(), {"x": torch.randn(6, 4)}, dynamic={"x": {0: "N"}})
    assert not to_onnx_model(program).guards
    monkeypatch.setitem(lower._INSTEAD, torch.ops.aten.diff.default, halves)
    program = trace(Square(), {"x": torch.randn(6, 4)}, dynamic={"x": {0: "N"}})
    result = to_onnx_model(program)
    assert len(result.guards) == 1
    assert "N" in result.model.metadata_props["graphlathe.guards"]
    session = compile(trace(Square(), {"x": torch.randn(6, 4)}, dynamic={"x": {0: "N"}}), optimization="none")
    with pytest.raises(InputError, match="N=5"):
        session.run({"x": torch.randn(5, 4)})


def test_without_fallback_the_operator_is_named() -> None:
    with pytest.raises(ExportError, match=r"cannot export cond[\s\S]*node %\w+"):
        to_onnx_model(conditional(), fallback=False)


def test_an_operator_that_nobody_can_export_is_named() -> None:
    @torch.library.custom_op("graphlathe_test::opaque", mutates_args=())
    def opaque(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    opaque.register_fake(torch.empty_like)

    class Opaque(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return opaque(x)

    program = trace(Opaque(), {"x": torch.ones(2)})
    with pytest.raises(ExportError, match=r"graphlathe_test\.opaque[\s\S]*the stock exporter fails"):
        to_onnx_model(program)


def test_decompositions_are_counted_and_shared_between_equal_calls() -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.aten.diff(x) + torch.ops.aten.diff(x * 2)

    result = to_onnx_model(trace(Twice(), {"x": torch.randn(3, 5)}))
    assert result.decomposed == {"aten.diff.default": 2}


def test_sizes_are_read_once_and_nothing_unused_remains() -> None:
    graph = to_onnx_model(traced("bert")).model.graph
    shapes = [(n.op_type, n.inputs[0].name, n.attributes["start"].value) for n in graph if n.op_type == "Shape"]
    assert len(shapes) == len(set(shapes))
    outputs = {v.name for v in graph.outputs}
    assert all(any(v.uses() or v.name in outputs for v in n.outputs) for n in graph)
    casts = [n for n in graph if n.op_type == "Cast"]
    assert all(n.inputs[0].dtype != n.attributes["to"].value for n in casts)


def test_the_stock_exporter_computes_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = Small().eval(), torch.randn(2, 3, 4)
    stock = tmp_path / "stock.onnx"
    exported = torch.export.export(module, (x,), strict=False)
    from graphlathe.ir.to_onnx.fallback import quiet

    with quiet():
        torch.onnx.export(
            exported, (), stock, dynamo=True, verbose=False, input_names=["x"], output_names=["hidden", "result"]
        )
    ours = run_file(export_onnx(small(), tmp_path / "m.onnx"), {"x": x})
    theirs = run_file(stock, {"x": x})
    for name, value in theirs.items():
        assert_close(ours[name], value, 1e-6)


def test_numbers_as_functions_of_sizes() -> None:
    from graphlathe.ir.to_onnx.recorder import Recorder
    from graphlathe.ir.to_onnx.symbolic import Numbers

    numbers = Numbers(Recorder(20))
    assert numbers.supports(operator.floordiv)
    assert not numbers.supports(torch.relu)


def test_threads_may_export_at_once() -> None:
    program = traced("plain_transformer_prenorm")
    expected = onnx_ir.serde.serialize_model(to_onnx_model(program).model).SerializeToString(deterministic=True)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: to_onnx_model(program.clone()).model, range(8)))
    for model in results:
        assert onnx_ir.serde.serialize_model(model).SerializeToString(deterministic=True) == expected


class Shadows(nn.Module):
    """Weights that are called as an input and as an output are."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor(3.0))
        self.register_buffer("output", torch.tensor(5.0))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x * mask + self.mask + self.output


def test_weights_called_as_inputs_and_outputs(tmp_path: Path) -> None:
    program = trace(Shadows(), (torch.ones(3), torch.ones(3)))
    path = program.export_onnx(tmp_path / "m.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    given = {"x": torch.arange(3.0), "mask": torch.tensor([1.0, 2, 4])}
    assert_same(program, path, given)
    assert torch.allclose(compile(program, "onnxruntime").run(given)["output"], Shadows()(**given))


class Operators(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: nn.functional.avg_pool2d(x, 2, divisor_override=3),
        lambda x: nn.functional.avg_pool2d(x, [2, 3], 1, 1, divisor_override=5),
        lambda x: x.squeeze(1),
        lambda x: x.squeeze((0, 1)),
        lambda x: torch.sub(x, 1, alpha=3),
        lambda x: (x > 0) + (x < -1),
        lambda x: (x > 0) * (x > 1),
    ],
    ids=["divisor", "divisor and padding", "squeeze", "squeezes", "sub", "or", "and"],
)
def test_operators_that_onnx_has_otherwise(function: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 2, 6, 6)
    program = trace(Operators(function), (x,))
    assert_same(program, program.export_onnx(tmp_path / "m.onnx", fallback=False), {"x": x})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("eps", [None, 0.1])
@pytest.mark.parametrize("weight", [False, True])
def test_root_mean_square_norms_of_dynamic_sizes(
    dtype: torch.dtype, eps: float | None, weight: bool, tmp_path: Path
) -> None:
    """PyTorch's own decomposition writes in place where there is no weight and sizes are symbols."""
    torch.manual_seed(0)
    x, scale = torch.randn(2, 3, 4, 6, dtype=dtype), torch.randn(4, 6, dtype=dtype) if weight else None
    program = trace(
        Operators(lambda x: nn.functional.rms_norm(x, (4, 6), scale, eps)), (x,), dynamic={"x": {0: "B", 1: "S"}}
    )
    path = program.export_onnx(tmp_path / "m.onnx", fallback=False)
    for given in (x, torch.randn(3, 1, 4, 6, dtype=dtype)):
        tol = 2e-3 if dtype is torch.float16 else 1e-5
        assert_close(run_file(path, {"x": given})["output"], program.run({"x": given})["output"], tol)


def test_embedding_bags_go_through_the_stock_exporter(tmp_path: Path) -> None:
    model = nn.EmbeddingBag(9, 4, mode="sum")
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    program = trace(model, (ids,))
    with pytest.raises(ExportError, match="embedding bags"):
        program.export_onnx(tmp_path / "m.onnx", fallback=False)


def test_text_has_no_place_in_a_file(tmp_path: Path) -> None:
    class Text(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
            return x + 1, "words"

    with pytest.raises(ExportError, match="no value for 'words'"):
        trace(Text(), (torch.ones(2),)).export_onnx(tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_right_at_some_sizes_only_is_refused(tmp_path: Path) -> None:
    x = torch.randn(1, 2, 6, 6)
    program = trace(nn.AdaptiveAvgPool2d(3), (x,), dynamic={"input": {2: "H"}})
    with pytest.raises(ExportError, match=r"only be right where .*H % 3"):
        program.export_onnx(tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []
    session = compile(program, "onnxruntime")
    assert_close(session(x), nn.AdaptiveAvgPool2d(3)(x))
    with pytest.raises(InputError, match="H=7"):
        session(torch.randn(1, 2, 7, 6))
    path = trace(nn.AdaptiveAvgPool2d(3), (x,)).export_onnx(tmp_path / "static.onnx")
    assert_same(program, path, {"input": x})
