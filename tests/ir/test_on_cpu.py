"""Models and data on an accelerator: programs are held on the CPU, with the same ties, and the module stays as it is.

Where there is no GPU, the copying is tested by declaring the CPU to be one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from graphlathe import compile, optimize
from graphlathe.ir import on_cpu
from graphlathe.ir.errors import ImportModelError
from graphlathe.ir.from_torch import trace
from graphlathe.ir.on_cpu import module_on_cpu, values_on_cpu
from graphlathe.tools import zoo

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Tied(nn.Module):
    """A tied head, a buffer that is a view of a weight, and a constant of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 6)
        self.head = nn.Linear(6, 13, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("first", self.embed.weight.detach()[:1])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.embed(ids) + self.first + places[:, None] / 10
        return self.head(self.norm(x.mT).mT)


@pytest.fixture
def cpu_is_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_cpu, "_HERE", frozenset({"meta"}))


@pytest.mark.usefixtures("cpu_is_elsewhere")
def test_a_copy_keeps_ties_and_shared_memory() -> None:
    model = Tied().eval()
    model.embed.weight.requires_grad_(False)
    made: Any = module_on_cpu(model)
    assert made is not model and made.head.weight is made.embed.weight
    assert made.first.untyped_storage().data_ptr() == made.embed.weight.untyped_storage().data_ptr()
    assert isinstance(made.norm.weight, nn.Parameter) and made.norm.weight.requires_grad
    assert not made.embed.weight.requires_grad and not isinstance(made.first, nn.Parameter)
    for name, value in model.state_dict().items():
        assert torch.equal(made.state_dict()[name], value)
    ids = torch.arange(10).reshape(2, 5)
    assert torch.equal(made(ids), model(ids))


def test_a_traced_copy_is_the_same_program(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(10).reshape(2, 5)
    model = Tied().eval()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(on_cpu, "_HERE", frozenset({"meta"}))
        made = module_on_cpu(model)
    dynamic = {"ids": {0: "B", 1: "S"}}
    assert trace(made, ids, dynamic=dynamic).fingerprint() == trace(model, ids, dynamic=dynamic).fingerprint()


def test_nothing_is_copied_that_is_here() -> None:
    model, ids = Tied(), torch.arange(4)
    assert module_on_cpu(model) is model
    assert values_on_cpu({"a": [ids, 3]})["a"][0] is ids
    with torch.device("meta"):
        assert module_on_cpu(hollow := Tied()) is hollow


@pytest.mark.usefixtures("cpu_is_elsewhere")
def test_what_cannot_be_copied_says_what_to_do() -> None:
    model = Tied()
    model.handle = (each for each in ())  # generators cannot be copied
    with pytest.raises(ImportModelError, match="Tied lies on cpu and cannot be copied") as caught:
        module_on_cpu(model)
    assert "before tracing" in str(caught.value.remedy)


def test_an_export_made_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    exported = torch.export.export(Tied().eval(), (torch.arange(10).reshape(2, 5),))
    monkeypatch.setattr(on_cpu, "_HERE", frozenset({"meta"}))
    with pytest.raises(ImportModelError, match="exported on cpu") as caught:
        trace(exported)
    assert "move_to_device_pass" in str(caught.value.remedy)


@needs_gpu
@pytest.mark.parametrize("name", ["llama", "bert", "t5", "mixtral", "mamba", "resnet", "swin"])
def test_a_model_on_a_gpu(name: str) -> None:
    """It is traced, changed by data on the GPU, and runs there again."""
    model = zoo.get(name)
    module = model.module()
    want = trace(module, model.example(), dynamic=model.dynamic or None)
    there = {key: value.cuda() if torch.is_tensor(value) else value for key, value in model.example().items()}
    program = trace(module.cuda(), there, dynamic=model.dynamic or None)
    assert all(p.is_cuda for p in module.parameters())
    assert program.fingerprint() == want.fingerprint()
    result = optimize(program, passes="canonicalize", calibration=[there])
    session = compile(result, "torch", device="cuda")
    got, expected = session.run(result.feeds(**there)), want.run(want.feeds(**model.example()))
    for key, value in expected.items():
        assert got[key].is_cuda
        torch.testing.assert_close(got[key].cpu(), value, rtol=1e-3, atol=1e-4)


@needs_gpu
def test_an_export_made_on_a_gpu_is_refused() -> None:
    exported = torch.export.export(Tied().eval().cuda(), (torch.arange(10).reshape(2, 5).cuda(),))
    with pytest.raises(ImportModelError, match="exported on cuda:0"):
        trace(exported)
