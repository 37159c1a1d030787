"""``gated_activation``: equal to its formula, whole in a graph, costed, differentiable and exportable."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import graphlathe
from graphlathe.ir.errors import InputError
from graphlathe.kernels import gated_activation
from graphlathe.kernels.gated_activation import ACTIVATIONS

FORMULAS = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp(min=0),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_it_is_the_product(name: str) -> None:
    gate, up = torch.randn(2, 2, 3, 7, dtype=torch.float64)
    torch.testing.assert_close(gated_activation(gate, up, activation=name), FORMULAS[name](gate) * up)


def test_every_activation_has_a_formula_here() -> None:
    assert set(FORMULAS) == set(ACTIVATIONS)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(InputError, match="no activation 'swish'"):
        gated_activation(torch.ones(2), torch.ones(2), activation="swish")


class _Gated(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(6, 4)
        self.up = torch.nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.graphlathe.gated_activation(self.gate(x), self.up(x), activation="silu")


def test_a_graph_keeps_it_whole_and_everything_else_knows_it() -> None:
    model = _Gated().eval()
    x = torch.randn(2, 6)
    program = graphlathe.trace(model, (x,), dynamic={"x": {0: "B"}})
    assert 'graphlathe.gated_activation(%0, %1, activation="silu")' in program.to_text()
    assert not program.cost().unknown
    assert program.cost({"B": 1}).macs == 2 * 6 * 4
    for rows in (x, torch.randn(5, 6)):
        torch.testing.assert_close(program(rows), F.silu(model.gate(rows)) * model.up(rows))
    model(x).sum().backward()
    assert model.gate.weight.grad is not None and model.gate.weight.grad.any()


def test_export_writes_its_parts(tmp_path: object) -> None:
    model = _Gated().eval()
    program = graphlathe.trace(model, (torch.randn(2, 6),))
    path = program.export_onnx(f"{tmp_path}/gated.onnx")
    again = graphlathe.load(path)
    x = torch.randn(2, 6)
    torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-6)
