"""`optimize`: every kind of model goes in, bad input is refused with one message, nothing of the caller's changes."""

from __future__ import annotations

import tempfile
from collections import UserDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graphlathe as gl
from graphlathe.passes.optimize import Optimized
from graphlathe.passes.pipeline import parse_pipeline
from tests.passes.example_passes import Approximate


class Net(nn.Module):
    """A linear layer and a relu, of keyword inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 9, bias=False)

    def forward(self, x: torch.Tensor, scale: torch.Tensor, negate: bool = False) -> torch.Tensor:
        y = torch.relu(self.linear(x.clone())) * scale
        return -y if negate else y


X, SCALE = torch.randn(4, 6), torch.rand(4, 1)
EXAMPLE = {"x": X, "scale": SCALE}
DYNAMIC = {"x": {0: "B"}, "scale": {0: "B"}}


@pytest.fixture(scope="module")
def program() -> gl.Program:
    return gl.trace(Net(), EXAMPLE, dynamic=DYNAMIC)


def assert_optimized(result: Optimized) -> None:
    assert isinstance(result, gl.Program)
    assert torch.equal(result(X, SCALE), Net()(X, SCALE))
    assert result.history == ["canonicalize"]
    assert result.report.rows[0].mutations > 0


def test_a_module(program: gl.Program) -> None:
    model = Net().train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert_optimized(gl.optimize(model, EXAMPLE, passes="canonicalize", dynamic=DYNAMIC))
    assert_optimized(gl.optimize(model, (X, SCALE), passes="canonicalize"))
    assert model.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_module_with_arguments_that_tracing_fixes() -> None:
    result = gl.optimize(Net(), {**EXAMPLE, "negate": True}, passes="canonicalize")
    assert torch.equal(result(X, SCALE), -Net()(X, SCALE))


def test_a_program_stays_as_it_is(program: gl.Program) -> None:
    text, weights = program.to_text(), dict(program.weights)
    result = gl.optimize(program, EXAMPLE, passes="canonicalize")
    assert_optimized(result)
    with pytest.raises(gl.PostconditionError):
        gl.optimize(program, EXAMPLE, passes=["canonicalize", Approximate()], budget={"relative": 0.1})
    assert program.to_text() == text
    assert program.weights == weights
    assert all(result.weights[name] is weights[name] for name in result.weights)


def test_an_exported_program_and_files(program: gl.Program, tmp_path: Path) -> None:
    exported = torch.export.export(Net(), (X, SCALE))
    assert_optimized(gl.optimize(exported, (X, SCALE), passes="canonicalize"))
    folder = program.save(tmp_path / "saved")
    assert_optimized(gl.optimize(folder, EXAMPLE, passes="canonicalize"))
    assert_optimized(gl.optimize(str(folder), passes="canonicalize"))


def test_example_inputs_as_one_tensor() -> None:
    result = gl.optimize(nn.Sequential(nn.Linear(6, 3), nn.ReLU()), X, passes="canonicalize")
    assert result.report.rows[0].error == 0.0


def test_calibration_of_every_form_is_read_once(program: gl.Program) -> None:
    batches: list[Any] = [
        (X, SCALE),
        [X[:2], SCALE[:2]],
        {"x": X[:1], "scale": SCALE[:1]},
        UserDict({"x": X[:3], "scale": SCALE[:3]}),
        {"x": X.numpy(), "scale": np.asarray(SCALE)},
    ]
    drawn = 0

    def generator() -> Any:
        nonlocal drawn
        for batch in batches:
            drawn += 1
            yield batch

    result = gl.optimize(program, passes=[Approximate(factor=2.0), Approximate(factor=2.0)], calibration=generator())
    assert drawn == len(batches)
    assert result.report.drift is not None
    assert result.report.drift.batches == len(batches)
    assert result.report.drift.relative == pytest.approx(3.0)


BAD_CALIBRATION: dict[str, tuple[Any, str]] = {
    "empty": ([], "the calibration data is empty"),
    "one tensor": (X, "calibration is a Tensor"),
    "one batch": (EXAMPLE, "calibration is a dict"),
    "a number": (3, "calibration is a int"),
    "wrong shape": ([EXAMPLE, {"x": X[:, :5], "scale": SCALE}], "calibration batch 1: input 'x' has size 5"),
    "wrong dtype": ([{"x": X.double(), "scale": SCALE}], "calibration batch 0: input 'x' has dtype torch.float64"),
    "missing": ([{"x": X}], "calibration batch 0: missing input 'scale'"),
    "unknown": ([{**EXAMPLE, "y": X}], "calibration batch 0: unknown input 'y'"),
    "not a batch": (["text"], "calibration batch 0: got a str"),
}


@pytest.mark.parametrize(("calibration", "message"), BAD_CALIBRATION.values(), ids=BAD_CALIBRATION.keys())
def test_bad_calibration(program: gl.Program, calibration: Any, message: str) -> None:
    with pytest.raises(gl.ir.errors.InputError, match=message):
        gl.optimize(program, passes="cse", calibration=calibration)


def test_bad_examples(program: gl.Program) -> None:
    with pytest.raises(gl.ir.errors.InputError, match="example_inputs: missing input 'scale'"):
        gl.optimize(program, (X,), passes="cse")
    with pytest.raises(gl.ir.errors.InputError, match="level 3 compares outputs"):
        gl.optimize(program, passes="cse", verify=3)


def test_bad_models(tmp_path: Path) -> None:
    with pytest.raises(gl.ImportModelError, match="cannot optimize a int"):
        gl.optimize(3, passes="cse")
    with pytest.raises(gl.ImportModelError, match="needs example_inputs"):
        gl.optimize(Net(), passes="cse")
    with pytest.raises(gl.ImportModelError):
        gl.optimize(tmp_path / "missing.onnx", passes="cse")


def test_a_wrong_pipeline_is_said_before_anything_slow() -> None:
    class Untraceable(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("traced")

    for options in ({"passes": "csee"}, {"passes": "cse", "budget": {"x": 1.0}}):
        with pytest.raises(gl.GraphlatheError, match=r"did you mean 'cse'|unknown budget"):
            gl.optimize(Untraceable(), (X,), **options)  # type: ignore[arg-type]


def test_evaluate_is_asked_before_and_after(program: gl.Program) -> None:
    result = gl.optimize(
        program, EXAMPLE, passes=Approximate(factor=2.0), evaluate=lambda p: float(p(X, SCALE).abs().sum())
    )
    before, after = result.report.metric_before, result.report.metric_after
    assert before is not None
    assert after == pytest.approx(2 * before)


def test_plan(program: gl.Program) -> None:
    result = gl.optimize(program, EXAMPLE, passes=["cse", Approximate(factor=2.0)])
    assert result.plan == {"test-approximate{factor=2.0}": {"factor": 2.0}}


def test_export_by_suffix(program: gl.Program, tmp_path: Path) -> None:
    result = gl.optimize(program, EXAMPLE, passes="canonicalize")
    saved = result.export(tmp_path / "folder")
    assert torch.equal(gl.load(saved)(X, SCALE), result(X, SCALE))
    with pytest.raises(gl.ExportError, match=r"cannot write a '\.tflite' file"):
        result.export(tmp_path / "model.tflite")
    with pytest.raises(gl.ExportError, match="no option opset"):
        result.export(tmp_path / "folder", opset=20)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder"]


def test_export_onnx_carries_the_pipeline_and_the_report(program: gl.Program, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    result = gl.optimize(program, EXAMPLE, passes="repeat(cse,dce),canonicalize")
    model = onnx.load(result.export(tmp_path / "model.onnx"))
    metadata = {p.key: p.value for p in model.metadata_props}
    assert metadata["graphlathe.pipeline"] == ",".join(result.history)
    parse_pipeline(metadata["graphlathe.pipeline"])
    assert '"pipeline": "repeat(cse,dce),canonicalize"' in metadata["graphlathe.report"]


def test_shortcuts_for_instruments(program: gl.Program, tmp_path: Path) -> None:
    result = gl.optimize(
        program, passes="remove-noops,cse,dce", dump_dir=tmp_path, stop_after="cse", disable=["remove-noops"]
    )
    assert result.history == ["cse"]
    assert (tmp_path / "001_cse.txt").exists()
    with pytest.raises(gl.PostconditionError):
        gl.optimize(program, EXAMPLE, passes=Approximate(), budget={"drift": 0.0}, reproduce=tmp_path / "reproducer")
    assert (tmp_path / "reproducer" / "command.txt").exists()


def test_arguments_that_would_be_ignored_are_refused(program: gl.Program) -> None:
    with pytest.raises(gl.InputError, match="dynamic= is for tracing a module; this is a Program"):
        gl.optimize(program, EXAMPLE, passes="cse", dynamic=DYNAMIC)
    with pytest.raises(gl.PipelineError, match=r"cannot stop after 'csee'.*did you mean 'cse'"):
        gl.optimize(program, passes="cse", stop_after="csee")
    with pytest.raises(gl.PipelineError, match="cannot disable 'nope'"):
        gl.optimize(program, passes="cse", disable=["nope"])


def test_wrong_kinds_of_arguments_are_named(program: gl.Program) -> None:
    with pytest.raises(gl.InputError, match="the budget is a float"):
        gl.optimize(program, passes="cse", budget=0.1)  # type: ignore[arg-type]
    with pytest.raises(gl.InputError, match="evaluate returned a NoneType"):
        gl.optimize(program, passes="cse", evaluate=lambda p: None)  # type: ignore[arg-type,return-value]
    for function in (gl.structure, gl.compile):
        with pytest.raises(gl.InputError, match="got a Net") as caught:
            function(Net())  # type: ignore[arg-type]
        assert "trace" in str(caught.value.remedy)
    with pytest.raises(gl.ImportModelError, match="example_inputs is a int"):
        gl.trace(Net(), 3)  # type: ignore[arg-type]
    assert gl.trace(nn.ReLU(), torch.ones(1, 8)).inputs[0].shape == (1, 8)


class Choosy(nn.Module):
    """Arguments of every kind, between one another: None, numbers, a list of numbers, an unread tensor."""

    def forward(
        self, x: torch.Tensor, mask: Any, flags: list[int], unread: torch.Tensor, pair: dict[str, Any]
    ) -> torch.Tensor:
        assert mask is None
        return x * flags[1] + pair["y"] * pair["factor"]


def test_what_was_traced_with_can_be_called_with() -> None:
    values = (X, None, [1, 2], torch.ones(2), {"factor": 3, "y": X + 1})
    names = ("x", "mask", "flags", "unread", "pair")
    expected = Choosy()(*values)
    for inputs in (values, dict(zip(names, values, strict=True))):
        result = gl.optimize(Choosy(), inputs, passes="canonicalize", calibration=[inputs])
        again = gl.Program.load(result.save(Path(tempfile.mkdtemp()) / "saved"))
        for callee in (result, again, result.compile("torch"), result.compile("onnxruntime")):
            assert torch.allclose(callee(*values), expected, rtol=1e-6)
            assert torch.allclose(callee(**dict(zip(names, values, strict=True))), expected, rtol=1e-6)
        with pytest.raises(gl.InputError, match=r"'flags\.1' was fixed to 2"):
            result(X, None, [1, 3], torch.ones(2), values[-1])
        with pytest.raises(gl.InputError, match="'mask' was fixed to None"):
            result(X, torch.ones(3), *values[2:])


def test_inputs_may_be_called_anything() -> None:
    class Named(nn.Module):
        def forward(self, entry: torch.Tensor, program: torch.Tensor) -> torch.Tensor:
            return entry - program

    result = gl.optimize(Named(), {"entry": X, "program": X * 2}, passes="canonicalize")
    for callee in (result, result.compile("torch"), result.compile("onnxruntime")):
        assert torch.equal(callee(entry=X, program=X * 2), -X)


@pytest.mark.parametrize("backend", [None, "torch", "onnxruntime"])
def test_outputs_are_the_callers_to_write_into(backend: str | None) -> None:
    """Copies that a pass removes come back where a caller could tell: inputs, weights, strides, equal outputs."""

    class Copies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(4, 6))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return x.clone(), self.w.clone(), x.transpose(0, 1).contiguous(), torch.relu(x), torch.relu(x)

    model = Copies()
    result = gl.optimize(model, (X,), passes="canonicalize")
    callee = result if backend is None else result.compile(backend)
    x = X.clone()
    outputs = list(callee(x).values())
    expected = [value.detach() for value in model(X)]
    outputs[2].view(-1)
    for index, output in enumerate(outputs):
        output.add_(index + 1)
    assert torch.equal(x, X) and bool((model.w == 1).all())
    assert all(torch.equal(o, e + (i + 1)) for i, (o, e) in enumerate(zip(outputs, expected, strict=True)))


@pytest.mark.parametrize(
    ("count", "budget", "expected"), [(-1, None, "at least 0"), (0, {"drift": 1.0}, "at least 1 with a budget")]
)
def test_drift_batches_that_make_no_sense(count: int, budget: dict[str, float] | None, expected: str) -> None:
    with pytest.raises(gl.InputError, match=f"drift_batches is {count}") as caught:
        gl.optimize(Net(), passes="canonicalize", drift_batches=count, budget=budget)
    assert caught.value.expected == expected
