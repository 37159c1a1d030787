"""Which linear layers are found, the same ones from PyTorch and ONNX, and why others are left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphlathe.ir.from_onnx import from_onnx
from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.ir.structure import structure
from graphlathe.ir.to_onnx import export_onnx
from graphlathe.passes.search.biases import bias_of
from graphlathe.passes.search.consumers import input_rows, output_rows, weight_matrix
from graphlathe.passes.search.linear_sites import LinearSite, linear_sites
from graphlathe.tools import zoo
from tests.zoo_programs import traced


class Residual(nn.Module):
    """A stack of two residual blocks around a function, between two layers."""

    def __init__(self, inner: Callable[..., Tensor], **layers: Any) -> None:
        super().__init__()
        self.inner = inner
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 5)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, 8] to [batch, tokens, 5]."""
        x = self.first(x)
        for block in range(2):
            x = x + self.inner(self, x.tanh(), block)
        return self.head(x)


def found(program: Program, **options: Any) -> tuple[list[LinearSite], dict[str, int]]:
    return linear_sites(program, structure(program), **options)


def of(inner: Callable[..., Tensor], **layers: Any) -> Program:
    return trace(Residual(inner, **layers).eval(), (torch.randn(2, 3, 8),))


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_the_same_layers_from_pytorch_and_from_onnx(name: str, tmp_path: Path) -> None:
    program = traced(name)
    again = from_onnx(export_onnx(program, tmp_path / "model.onnx"))
    ours, theirs = (
        [(s.index, s.inputs, s.outputs, s.block, s.label, len(s.consumers)) for s in found(p)[0]]
        for p in (program, again)
    )
    assert ours == theirs
    each = {"llama": 7, "bert": 6, "gpt2": 4}[name]
    assert [site[0] for site in ours] == list(range(3 * each))
    assert [site[3] for site in ours] == [block for block in range(3) for _ in range(each)]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("from_file", [False, True])
def test_a_site_is_the_product_that_its_operators_compute(name: str, from_file: bool, tmp_path: Path) -> None:
    program = traced(name)
    if from_file:
        program = from_onnx(export_onnx(program, tmp_path / "model.onnx"))
    feeds = traced(name).feeds(**zoo.get(name).example())
    values: dict[Any, Tensor] = {}
    program.run(feeds, observe=lambda node, value: values.__setitem__(node, value))
    sites = found(program)[0]
    for site in sites:
        for consumer in site.consumers:
            matrix = weight_matrix(program, consumer)
            assert matrix.shape == (site.outputs, site.inputs)
            expected = input_rows(consumer, values[consumer.operand]) @ matrix.T
            bias = bias_of(consumer)
            if consumer.bias is not None and bias is not None:
                expected = expected + program.weights[bias].tensor()
            torch.testing.assert_close(output_rows(consumer, values[consumer.node]), expected, rtol=1e-4, atol=1e-5)


def test_heads_and_what_lies_outside_are_left_out_with_reasons() -> None:
    program = of(lambda m, x, i: m.layers[i](x), layers=nn.ModuleList(nn.Linear(8, 8) for _ in range(2)))
    sites, blocked = found(program)
    assert [(s.index, s.block, s.label) for s in sites] == [
        (1, 0, "linear 1 of block 0"),
        (2, 1, "linear 2 of block 1"),
    ]
    assert blocked == {"a map to an output": 1, "outside of the blocks of a residual stream": 1}
    more, blocked = found(program, outside=True)
    assert [(s.index, s.block, s.label) for s in more] == [
        (0, None, "linear 0"),
        *((s.index, s.block, s.label) for s in sites),
    ]
    assert blocked == {"a map to an output": 1}


def test_a_weight_of_two_operators_is_one_site() -> None:
    program = of(lambda m, x, i: m.layer(x), layer=nn.Linear(8, 8))
    sites, _ = found(program)
    assert len(sites) == 1
    assert len(sites[0].consumers) == 2
    assert sites[0].block is None


@pytest.mark.parametrize(
    ("inner", "reason"),
    [
        (lambda m, x, i: m.layer(x) * m.layer.weight[0], "read by something else"),
        (lambda m, x, i: m.layer(x).tanh() @ m.layer.weight, "in two orders"),
        (lambda m, x, i: nn.functional.linear(x, m.layer.weight * 2), "computed from what is stored"),
        (lambda m, x, i: torch.einsum("bsi,oi->bso", x, m.layer.weight), "that einsum multiplies by"),
        (lambda m, x, i: m.conv(x.mT).mT, "over more than one place"),
        (lambda m, x, i: m.grouped(x.mT).mT, "several groups"),
    ],
)
def test_what_cannot_be_changed_has_a_reason(inner: Callable[..., Tensor], reason: str) -> None:
    layers = {"layer": nn.Linear(8, 8), "conv": nn.Conv1d(8, 8, 3, padding=1), "grouped": nn.Conv1d(8, 8, 1, groups=2)}
    sites, blocked = found(of(inner, **layers))
    assert not sites
    assert any(reason in each for each in blocked), blocked


def test_convolutions_over_single_places_are_linear() -> None:
    program = of(lambda m, x, i: m.conv(x.mT).mT, conv=nn.Conv1d(8, 8, 1))
    sites, _ = found(program)
    assert [(s.inputs, s.outputs, len(s.consumers)) for s in sites] == [(8, 8, 2)]


def test_a_weight_without_numbers_is_left_out() -> None:
    program = of(lambda m, x, i: m.layer(x), layer=nn.Linear(8, 8)).clone()
    name = found(program)[0][0].weight
    program.weights[name] = type(program.weights[name]).from_tensor(torch.empty(8, 8, device="meta"))
    sites, blocked = found(program)
    assert not sites
    assert blocked["a weight without numbers"] == 1
