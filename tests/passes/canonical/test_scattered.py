"""Buffers filled part by part become concatenations, and only those that are filled completely."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from graphlathe.ir.from_torch import trace
from graphlathe.ir.verify import verify
from graphlathe.passes.base import Context
from graphlathe.passes.canonical.canonicalize import Canonicalize
from tests.passes.rewriting import operators


def halves(a: Tensor, b: Tensor) -> Tensor:
    out = torch.zeros(a.shape[0], 7)
    out[:, :4] = a
    out[:, 4:] = b
    return out


def from_the_end(a: Tensor, b: Tensor) -> Tensor:
    out = torch.full((a.shape[0], 7), 5.0)
    out[:, 3:7] = a
    out[:, :3] = b
    return out


def three(a: Tensor, b: Tensor) -> Tensor:
    out = a.new_zeros(a.shape[0], 10)
    out[:, :3] = b
    out[:, 3:7] = a
    out[:, 7:] = b * 2
    return out


def rows(a: Tensor, b: Tensor) -> Tensor:
    """As an imported ScatterND: at stored numbers, with the axis brought to the front."""
    out = torch.zeros(7, a.shape[0])
    out = out.index_put((torch.arange(4),), a.t())
    return out.index_put((torch.arange(4, 7),), b.t()).t()


def a_hole(a: Tensor, b: Tensor) -> Tensor:
    out = torch.ones(a.shape[0], 8)
    out[:, :4] = a
    out[:, 5:] = b
    return out


def overlapping(a: Tensor, b: Tensor) -> Tensor:
    out = torch.zeros(a.shape[0], 6)
    out[:, :4] = a
    out[:, 3:] = b
    return out


def read_between(a: Tensor, b: Tensor) -> Tensor:
    out = torch.zeros(a.shape[0], 7)
    out[:, :4] = a
    first = out.sum()
    out[:, 4:] = b
    return out + first


def every_other(a: Tensor, b: Tensor) -> Tensor:
    out = torch.zeros(a.shape[0], 8)
    out[:, ::2] = a
    out[:, 1::2] = a + 1
    return out


def other_type(a: Tensor, b: Tensor) -> Tensor:
    out = torch.zeros(a.shape[0], 7, dtype=torch.float64)
    out[:, :4] = a
    out[:, 4:] = b
    return out


def mixed_rows(a: Tensor, b: Tensor) -> Tensor:
    out = torch.zeros(7, a.shape[0])
    out = out.index_put((torch.tensor([1, 0, 2, 3]),), a.t())
    return out.index_put((torch.arange(4, 7),), b.t())


class Filled(nn.Module):
    def __init__(self, fill: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.fill = fill

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.fill(a, b)


def canonical(fill: Callable[[Tensor, Tensor], Tensor]) -> list[str]:
    torch.manual_seed(0)
    example = (torch.randn(2, 4), torch.randn(2, 3))
    program = trace(Filled(fill), example, dynamic={"a": {0: "B"}, "b": {0: "B"}})
    before = program.clone()
    Canonicalize().run(program, Context())
    verify(program, 3, reference=before, feeds=[program.feeds(*example)])
    assert torch.equal(program(*example), fill(*example))
    return operators(program)


@pytest.mark.parametrize("fill", [halves, from_the_end, three, rows], ids=lambda f: f.__name__)
def test_completely_filled(fill: Callable[[Tensor, Tensor], Tensor]) -> None:
    found = canonical(fill)
    assert found.count("cat") == 1
    assert not {"slice_scatter", "index_put", "full"} & set(found)


@pytest.mark.parametrize("fill", [a_hole, overlapping, read_between, every_other, mixed_rows], ids=lambda f: f.__name__)
def test_something_of_before_is_left_or_read(fill: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert "cat" not in canonical(fill)


def test_parts_of_another_type_are_converted() -> None:
    canonical(other_type)
