"""Numbers are found in every spelling, with the rounding of their type; nothing else is taken for one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphlathe.ir.rewrite import Rewriter
from graphlathe.ir.text import parse_program
from graphlathe.ir.weights import Weight
from graphlathe.passes.canonical.constants import scalar_of

aten = torch.ops.aten
TEXT = "program @main(%x: f32[B, 1], %one: f32[1]) -> (%out) {\n  dim B = 2 in [1, inf]\n  return (%x,)\n}\n"


@pytest.fixture
def rewriter() -> Rewriter:
    return Rewriter(parse_program(TEXT), "test")


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int64])
def test_a_weight_of_one_element_is_a_number(rewriter: Rewriter, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    value = torch.tensor(3.1, dtype=dtype)
    node = rewriter.weight("c", Weight.from_tensor(value.reshape(shape)))
    assert scalar_of(rewriter.program, node) == value.item()


def test_a_weight_is_read_through_its_steps(rewriter: Rewriter) -> None:
    weight = Weight.from_tensor(torch.arange(6.0)).slice(0, 4, 5).scale(0.5)
    assert scalar_of(rewriter.program, rewriter.weight("c", weight)) == 2.0


def test_literals_have_the_rounding_of_their_type(rewriter: Rewriter) -> None:
    with rewriter.before(rewriter.entry.output_node):
        half = rewriter.call(aten.full.default, [1], 0.1, dtype=torch.float16)
        tensor = rewriter.call(aten.scalar_tensor.default, 0.1)
        row = rewriter.call(aten.full.default, [2], 0.1)
        truth = rewriter.call(aten.full.default, [], True, dtype=torch.bool)
    assert scalar_of(rewriter.program, half) == torch.tensor(0.1, dtype=torch.float16).item()
    assert scalar_of(rewriter.program, tensor) == torch.tensor(0.1).item()
    assert scalar_of(rewriter.program, row) is None
    assert scalar_of(rewriter.program, truth) is None


@pytest.mark.parametrize("value", [None, True, "1", [1.0], 1j])
def test_other_arguments_are_no_numbers(rewriter: Rewriter, value: Any) -> None:
    assert scalar_of(rewriter.program, value) is None


def test_what_may_change_is_no_number(rewriter: Rewriter) -> None:
    program = rewriter.program
    for placeholder in program.main.placeholders:
        assert scalar_of(program, placeholder) is None
    for name, tensor in [
        ("meta", torch.empty((), device="meta")),
        ("pair", torch.ones(2)),
        ("truth", torch.tensor(True)),
    ]:
        assert scalar_of(program, rewriter.weight(name, Weight.from_tensor(tensor))) is None
    assert scalar_of(program, 2) == 2.0
    assert scalar_of(program, float("-inf")) == float("-inf")
