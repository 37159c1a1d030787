"""Every zoo model comes back from ONNX: from our file, and from one of PyTorch's older exporter, with equal outputs."""

from __future__ import annotations

import pytest
import torch

from graphlathe.ir.errors import ImportModelError
from graphlathe.tools import zoo
from tests.zoo_files import UNWRITTEN, WRITTEN_WRONG, from_older_file, from_our_file, older_file
from tests.zoo_programs import over_zoo, traced


def assert_same(actual: list[torch.Tensor], expected: list[torch.Tensor], tol: float = 2e-5) -> None:
    """Equal shapes and types, and numbers but for the order of sums."""
    assert len(actual) >= len(expected)
    for ours, theirs in zip(actual, expected, strict=False):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        finite = torch.isfinite(theirs)
        assert torch.equal(finite, torch.isfinite(ours))
        a, b = ours[finite].double(), theirs[finite].double()
        if b.numel():
            assert (a - b).abs().max() <= tol * b.abs().max()


@over_zoo(quick=("fnet",))
def test_our_file(name: str) -> None:
    """Names of inputs and dimensions are kept, and dynamic ones stay so: equal at sizes that no trace saw."""
    model, original = zoo.get(name), traced(name)
    program = from_our_file(name)
    assert program.main.inputs == original.main.inputs
    assert program.main.outputs == original.main.outputs
    assert set(program.main.dims.by_name) == set(original.main.dims.by_name)
    for sizes in (model.trace_sizes, *model.unseen_sizes):
        inputs = model.inputs(sizes)
        assert_same(list(program.run(inputs).values()), list(original.run(inputs).values()))


@over_zoo(quick=("gpt_neo",))
def test_file_of_the_older_exporter(name: str) -> None:
    """The same for its chains of sizes: all dimensions that it declares dynamic stay dynamic."""
    model = zoo.get(name)
    if name in UNWRITTEN:
        with pytest.raises(Exception, match=UNWRITTEN[name]):
            older_file(name)
        return
    written = older_file(name)
    if name in WRITTEN_WRONG:
        runtime = pytest.importorskip("onnxruntime", reason="it shows that the file is wrong")
        feeds = {key: value.numpy() for key, value in written.inputs(model.trace_sizes).items()}
        options = runtime.SessionOptions()
        options.log_severity_level = 4
        with pytest.raises(Exception, match="cannot be reshaped"):
            runtime.InferenceSession(str(written.path), options, providers=["CPUExecutionProvider"]).run(None, feeds)
        with pytest.raises(ImportModelError, match=r"Reshape failed .*self_attn/Reshape"):
            from_older_file(name)
        return
    program = from_older_file(name)
    declared = {size for axes in model.dynamic.values() for size in axes.values()}
    assert set(program.main.dims.by_name) == declared
    for sizes in (model.trace_sizes, *model.unseen_sizes):
        inputs = {key: value for key, value in written.inputs(sizes).items() if key in program.main.inputs}
        assert_same(list(program.run(inputs).values()), written.expected(sizes))
