"""Sessions: one interface over all back ends, checked calls, carried state, shared weights."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from graphlathe.ir.errors import ExportError, GraphlatheError, InputError
from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Outputs, Program
from graphlathe.ir.weights import Weight
from graphlathe.passes.optimize import optimize
from graphlathe.runtime.compile import BACKENDS, compile
from graphlathe.runtime.guards import UnreadableGuardError, holds
from graphlathe.runtime.onnxruntime_backend import open_onnx
from graphlathe.runtime.torch_backend import TorchSession

RUNNING = ("onnxruntime", "torch")


class Model(nn.Module):
    """Two outputs, a boolean weight, and a size guard (the length must be a multiple of four)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 300)
        self.register_buffer("mask", torch.rand(2000) > 0.5)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.linear(x) * scale
        pooled = y.unflatten(1, (-1, 4)).sum(2)
        return {"y": y, "pooled": pooled, "masked": y.flatten()[:300] * self.mask[:300]}


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    example = {"x": torch.randn(2, 8, 8), "scale": torch.tensor(2.0)}
    return trace(Model().eval(), example, dynamic={"x": {0: "B", 1: "S"}})


def inputs(batch: int = 3, length: int = 12) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch * 100 + length)
    return {"x": torch.randn(batch, length, 8, generator=generator), "scale": torch.tensor(0.5)}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, want in expected.items():
        got = actual[name]
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("backend", RUNNING)
def test_a_session_computes_what_the_program_computes(program: Program, backend: str) -> None:
    with compile(program, backend) as session:
        assert session.inputs == ("x", "scale")
        for given in (inputs(), inputs(1, 8), inputs(2, 40)):
            assert_same(session.run(given), program.run(given))


def test_arrays_and_views_are_taken_as_they_are(program: Program) -> None:
    given = inputs()
    expected = program.run(given)
    session = compile(program, threads=1)
    frozen = {name: value.numpy().copy() for name, value in given.items()}
    for array in frozen.values():
        array.flags.writeable = False
    assert_same(session.run(frozen), expected)
    strided = {**given, "x": given["x"].transpose(1, 2).contiguous().transpose(1, 2)}
    assert not strided["x"].is_contiguous()
    assert_same(session.run(strided), expected)


@pytest.mark.parametrize("backend", RUNNING)
def test_a_session_is_called_as_the_program_is(program: Program, backend: str) -> None:
    given = inputs()
    result = compile(program, backend)(given["x"], scale=given["scale"])
    assert isinstance(result, Outputs)
    assert_same(result, program.run(given))


def test_a_bare_output_comes_back_bare() -> None:
    program = trace(nn.Linear(3, 2), (torch.randn(4, 3),))
    x = torch.randn(4, 3)
    for backend in RUNNING:
        assert torch.allclose(compile(program, backend)(x), program(x), rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 8)}, "rank 3"),
        ({"x": torch.randn(2, 8, 7)}, "size 7 in dimension 2"),
        ({"x": torch.randn(2, 8, 8, dtype=torch.float64)}, "dtype torch.float64"),
        ({"x": torch.randn(2, 9, 8)}, "outside what tracing assumed|cannot|size 9"),
        ({"x": [1.0]}, "is a list"),
        ({"y": torch.randn(2)}, "unknown input 'y'"),
    ],
)
def test_calls_outside_the_signature_are_refused(
    program: Program, backend: str, change: dict[str, object], message: str
) -> None:
    session = compile(program, backend)
    with pytest.raises(InputError, match=message):
        session.run({**inputs(2, 8), **change})
    with pytest.raises(InputError, match="missing input 'scale'"):
        session.run({"x": inputs()["x"]})


def test_null_returns_zeros_of_the_right_kind(program: Program) -> None:
    expected = program.run(inputs(5, 16))
    got = compile(program, "null").run(inputs(5, 16))
    assert {n: (v.shape, v.dtype, v.any().item()) for n, v in got.items()} == {
        n: (v.shape, v.dtype, False) for n, v in expected.items()
    }
    meta = compile(program, "null", meta=True).run({**inputs(), "x": torch.empty(1 << 30, 400, 8, device="meta")})
    assert meta["y"].shape == (1 << 30, 400, 300)
    assert meta["y"].is_meta


def test_null_refuses_a_program_without_its_weights(program: Program) -> None:
    broken = program.clone()
    del broken.weights["linear.weight"]
    with pytest.raises(GraphlatheError, match=r"no weight 'linear\.weight'"):
        compile(broken, "null")


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ("onnxrutime", {}, "did you mean 'onnxruntime'"),
        ("onnxruntime", {"thread": 1}, "did you mean 'threads'"),
        ("onnxruntime", {"threads": 0}, "positive integer"),
        ("onnxruntime", {"provider": "gpu"}, "one of: cpu, cuda"),
        ("onnxruntime", {"optimization": "al"}, "did you mean 'all'"),
        ("onnxruntime", {"opset": 7}, "opset 7"),
        ("torch", {"device": "cuda:77"}, "no device 'cuda:77'"),
        ("null", {"threads": 1}, "no option 'threads'"),
    ],
)
def test_unknown_backends_and_options_are_named(
    program: Program, backend: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(GraphlatheError, match=message):
        compile(program, backend, **options)


def test_an_unknown_entry_is_named(program: Program) -> None:
    with pytest.raises(GraphlatheError, match="did you mean 'main'"):
        compile(program, entry="mian")


def test_a_missing_provider_says_what_to_install(program: Program) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(GraphlatheError, match=r"no CUDAExecutionProvider[\s\S]*graphlathe\[gpu\]"):
        compile(program, provider="cuda")


def test_a_missing_onnxruntime_names_the_extra(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(GraphlatheError, match=r"graphlathe\[cpu\]"):
        compile(program, "onnxruntime")


def test_a_closed_session_says_so(program: Program) -> None:
    for backend in BACKENDS:
        session = compile(program, backend)
        session.close()
        session.close()
        with pytest.raises(GraphlatheError, match="closed"):
            session.run(inputs())


def test_large_weights_are_shared_not_copied(program: Program) -> None:
    session = compile(program, optimization="none")
    given = inputs()
    before = session.run(given)["masked"]
    mask = program.weights["mask"].tensor()
    original = mask.clone()
    try:
        mask.zero_()
        assert before.any()
        assert not session.run(given)["masked"].any()
    finally:
        mask.copy_(original)
    assert torch.equal(session.run(given)["masked"], before)


def test_weights_outlive_the_program() -> None:
    torch.manual_seed(1)
    program = trace(nn.Linear(64, 64), (torch.randn(2, 64),))
    x = torch.randn(2, 64)
    expected, session = program(x), compile(program)
    program.weights = {name: Weight.from_tensor(torch.full(w.shape, torch.nan)) for name, w in program.weights.items()}
    _ = [torch.randn(64, 64) for _ in range(50)]
    assert torch.allclose(session(x), expected, rtol=1e-5)


def test_a_profile_needs_a_folder(program: Program, tmp_path: Path) -> None:
    with pytest.raises(GraphlatheError, match="whose folder does not exist"):
        compile(program, "onnxruntime", profile=str(tmp_path / "nowhere" / "p"))


def test_a_profile_is_written(program: Program, tmp_path: Path) -> None:
    session = compile(program, profile=str(tmp_path / "run"))
    session.run(inputs())
    session.close()
    [path] = tmp_path.glob("run*.json")
    assert any(event.get("cat") == "Node" for event in json.loads(path.read_text()))


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.full((3,), 10.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total.add_(x)
        return self.total * 2


@pytest.mark.parametrize("backend", RUNNING)
def test_state_is_carried_and_reset(backend: str) -> None:
    program = trace(Counter(), {"x": torch.ones(3)})
    [pair] = program.main.state
    session = compile(program, backend)
    first = program.main.outputs[0]
    x = torch.tensor([1.0, 2.0, 3.0])
    assert session.run({"x": x})[first].tolist() == [22, 24, 26]
    assert session.run({"x": x})[first].tolist() == [24, 28, 32]
    assert session(x=x)[first].tolist() == [26, 32, 38]
    assert session.run({"x": x, pair.input: torch.zeros(3)})[first].tolist() == [2, 4, 6]
    assert session.run({"x": x})[first].tolist() == [4, 8, 12]
    session.reset()
    assert session.run({"x": x})[first].tolist() == [22, 24, 26]


@pytest.mark.parametrize("backend", RUNNING)
def test_state_without_a_first_value_is_given_once(backend: str) -> None:
    program = trace(Counter(), {"x": torch.ones(3)})
    [pair] = program.main.state
    program.main.state = (replace(pair, initial=None),)
    session = compile(program, backend)
    x = torch.ones(3)
    with pytest.raises(InputError, match=f"missing input '{pair.input}'"):
        session(x)
    assert session(x, **{pair.input: torch.zeros(3)})[0].tolist() == [2, 2, 2]
    assert session(x)[0].tolist() == [4, 4, 4]


class Placing(nn.Module):
    """Creates tensors by name of a device, by default, and in the body of a condition."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def double(x: torch.Tensor) -> torch.Tensor:
            return x * torch.full((3,), 2.0)

        y = x + torch.zeros(3) + torch.arange(3, device="cpu")
        return torch.cond(x.sum() > 0, double, lambda x: x - torch.ones(3), (y,))


@pytest.mark.parametrize("canonical", [False, True])
def test_creation_follows_the_device(canonical: bool) -> None:
    """The device ``meta`` computes nothing, but complains of mixed devices as CUDA does."""
    program = trace(Placing(), (torch.ones(3),))
    if canonical:
        program = optimize(program, passes="canonicalize")
    session = TorchSession(program, "main", device="meta")
    graphs = [m.graph for m in session._call.modules() if isinstance(m, torch.fx.GraphModule)]
    assert len(graphs) == 3
    created = [n for g in graphs for n in g.nodes if "full" in str(n.target) or "arange" in str(n.target)]
    assert created and all(n.kwargs["device"] == torch.device("meta") for n in created)

    class Straight(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.zeros(3) + torch.arange(3)

    straight = trace(Straight(), (torch.ones(3),))
    straight = optimize(straight, passes="canonicalize") if canonical else straight
    assert TorchSession(straight, "main", device="meta")(torch.ones(3)).device.type == "meta"


def test_a_file_is_opened_with_its_state_and_guards(program: Program, tmp_path: Path) -> None:
    path = program.export_onnx(tmp_path / "m.onnx")
    with open_onnx(path, threads=1) as session:
        assert_same(session.run(inputs()), program.run(inputs()))
        assert_same(session(*inputs().values()), program.run(inputs()))
        with pytest.raises(InputError, match="outside what the model was traced for"):
            session.run(inputs(2, 9))
        with pytest.raises(InputError, match=r"dtype torch\.float64"):
            session.run({**inputs(), "x": inputs()["x"].double()})
        with pytest.raises(InputError, match="size 7 in dimension 2"):
            session.run({**inputs(), "x": torch.randn(2, 8, 7)})
    counter = trace(Counter(), {"x": torch.ones(3)})
    with open_onnx(counter.export_onnx(tmp_path / "state.onnx")) as session:
        assert session(torch.ones(3)).popitem()[1].tolist() == [11, 11, 11]
        session.reset()
        values = [next(iter(session.run({"x": torch.ones(3)}).values()))[0].item() for _ in range(2)]
        assert values == [22, 24]


def test_a_foreign_file_is_opened(tmp_path: Path) -> None:
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    ports = [helper.make_tensor_value_info(n, kind, ["N", 2]) for n in ("a", "b", "c")]
    graph = helper.make_graph([helper.make_node("Add", ["a", "b"], ["c"])], "g", ports[:2], ports[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, tmp_path / "f.onnx")
    session = open_onnx(tmp_path / "f.onnx")
    a = np.ones((3, 2), np.float32)
    assert torch.equal(session.run({"a": a, "b": a})["c"], torch.full((3, 2), 2.0))
    with pytest.raises(InputError, match="size 4 in dimension 0"):
        session.run({"a": a, "b": torch.ones(4, 2)})


def test_a_file_that_is_missing_or_broken_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GraphlatheError, match="no file"):
        open_onnx(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(GraphlatheError, match="refuses the model"):
        open_onnx(tmp_path / "bad.onnx")
    with pytest.raises(GraphlatheError, match="no option 'opset'"):
        open_onnx(tmp_path / "bad.onnx", opset=18)


def test_a_program_that_cannot_be_exported_is_refused() -> None:
    program = trace(nn.Linear(64, 64).to("meta"), (torch.randn(2, 64, device="meta"),))
    with pytest.raises(ExportError, match="no numbers"):
        compile(program, "onnxruntime")


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)  # Inductor's own import
def test_torch_compile_computes_the_same(program: Program) -> None:
    session = compile(program, "torch", compile=True)
    for given in (inputs(), inputs(2, 16)):
        assert_same(session.run(given), program.run(given))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("S % 4 == 0", True),
        ("S <= 7", False),
        ("-(-S // 3) == 3", True),
        ("1 <= S <= 8 and B != 3", True),
        ("not (B == 2 or S < 8)", False),
        ("max(B, S) == 8", True),
        ("math.floor(S / 3) == 2", True),
    ],
)
def test_guards_are_evaluated(text: str, expected: bool) -> None:
    assert holds(text, {"S": 8, "B": 2}) is expected


@pytest.mark.parametrize("text", ["__import__('os')", "S.real", "Z == 1", "S ==", "[S]", "S / 0 == 1", "'a' == 'a'"])
def test_guards_that_are_not_arithmetic_are_refused(text: str) -> None:
    with pytest.raises(UnreadableGuardError):
        holds(text, {"S": 8})
