"""The operator against one product at a time, through a gradient, a trace and ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

import graphlathe
from graphlathe.ir.cost import cost
from graphlathe.kernels import expert_linear


def operands(tokens: int = 7, top_k: int = 2, experts: int = 4, shared_row: bool = False) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 1 if shared_row else top_k, 6, generator=generator)
    weight = torch.randn(experts, 6, 5, generator=generator)
    indices = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
    return x, weight, indices, torch.randn(experts, 5, generator=generator)


def reference(
    x: torch.Tensor, weight: torch.Tensor, indices: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    rows = []
    for t in range(indices.shape[0]):
        for j in range(indices.shape[1]):
            expert = int(indices[t, j])
            row = x[t, min(j, x.shape[1] - 1)] @ weight[expert]
            rows.append(row if bias is None else row + bias[expert])
    return torch.stack(rows).reshape(*indices.shape, -1)


@pytest.mark.parametrize("shared_row", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_each_row_meets_the_matrix_of_its_expert(shared_row: bool, biased: bool) -> None:
    x, weight, indices, bias = operands(shared_row=shared_row)
    given = (x, weight, indices, bias) if biased else (x, weight, indices)
    torch.testing.assert_close(expert_linear(*given), reference(*given))


def test_an_expert_that_nobody_chose_takes_no_part() -> None:
    x, weight, _, _ = operands()
    indices = torch.zeros(7, 2, dtype=torch.int64)
    weight[1:] = torch.nan
    assert expert_linear(x, weight, indices).isfinite().all()


def test_gradients_are_those_of_the_products() -> None:
    x, weight, indices, bias = (t.double() if t.is_floating_point() else t for t in operands(tokens=3))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def function(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return expert_linear(x, weight, indices, bias)

    assert torch.autograd.gradcheck(function, leaves)


class Mixture(torch.nn.Module):
    def __init__(self, biased: bool) -> None:
        super().__init__()
        _, weight, _, bias = operands()
        self.weight = torch.nn.Parameter(weight)
        self.bias = torch.nn.Parameter(bias) if biased else None

    def forward(self, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return expert_linear(x, self.weight, indices, self.bias)


@pytest.mark.parametrize("biased", [False, True])
def test_a_file_carries_it_as_a_function_that_runs_and_is_read_back(biased: bool, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    x, _, indices, _ = operands()
    module = Mixture(biased)
    program = graphlathe.trace(module, (x, indices), dynamic={"x": {0: "T"}, "indices": {0: "T"}})
    assert cost(program, {"T": 7}).macs == 7 * 2 * 6 * 5
    path = program.export_onnx(tmp_path / "m.onnx")
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    (function,) = proto.functions
    assert (function.domain, function.name) == ("graphlathe", "BiasedExpertLinear" if biased else "ExpertLinear")
    assert {node.domain for node in function.node} == {""}, "standard operators only"
    session = onnxruntime.InferenceSession(str(path))
    for tokens in (7, 1, 12):
        x, _, indices, _ = operands(tokens)
        (actual,) = session.run(None, {"x": x.numpy(), "indices": indices.numpy()})
        torch.testing.assert_close(torch.from_numpy(actual), module(x, indices))
    back = graphlathe.load(path)
    assert [n.target for n in back.graph.nodes if n.op == "call_function"] == [expert_linear]
    torch.testing.assert_close(back(x, indices), module(x, indices))
