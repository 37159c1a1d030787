"""Tensors read back as functions of their coordinates, held against the tensors themselves."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import sympy
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sympy.core.function import AppliedUndef
from torch import Tensor, nn

from graphlathe.ir.coordinates import coordinate, is_condition
from graphlathe.ir.errors import GraphlatheError
from graphlathe.ir.from_torch import trace
from graphlathe.ir.index_functions import IndexFunctions
from graphlathe.ir.program import Program

X0, X1, X2 = (coordinate(i) for i in range(3))
SIZES = (2, 5)  # batch, sequence: the second one is dynamic


class Steps(nn.Module):
    """Runs steps, each on values before it; returns all values but the inputs."""

    def __init__(self, steps: Sequence[Step]) -> None:
        super().__init__()
        self.steps = list(steps)

    def forward(self, seen: Tensor, scale: Tensor) -> list[Tensor]:
        values = [seen, scale, torch.arange(seen.shape[1]), torch.arange(1, seen.shape[1] + 1)]
        for step in self.steps:
            values.append(step(values))
        return values[2:]


@dataclass(frozen=True)
class Step:
    """One operator on values before it, by number."""

    text: str
    run: Callable[..., Tensor]
    operands: tuple[int, ...]

    def __call__(self, values: Sequence[Tensor]) -> Tensor:
        return self.run(*(values[i] for i in self.operands))

    def __repr__(self) -> str:
        return f"{self.text}{self.operands}"


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "row": lambda x: x.unsqueeze(0),
    "column": lambda x: x.unsqueeze(-1),
    "middle": lambda x: x.unsqueeze(x.dim() // 2),
    "transpose": lambda x: x.transpose(-1, -2),
    "permute": lambda x: x.permute(list(reversed(range(x.dim())))),
    "flatten": lambda x: x.reshape(-1) if x.dim() == 2 else x.flatten(-2),
    "select": lambda x: x.select(-1, -1),
    "first": lambda x: x.select(0, 0),
    "slice": lambda x: x[..., 1:],
    "every other": lambda x: x[..., ::2],
    "not the last": lambda x: x[..., :-1],
    "neg": lambda x: -x,
    "abs": lambda x: (x - 2).abs(),
    "half": lambda x: x // 2,
    "scaled": lambda x: x * 0.5,
    "shifted": lambda x: x + 3,
    "rsub": lambda x: 1 - x,
    "float": lambda x: x.float(),
    "bool": lambda x: x.bool(),
    "integer": lambda x: x.bool().long(),
    "not": torch.logical_not,
    "small": lambda x: x < 2,
    "one": lambda x: x == 1,
    "hidden": lambda x: (1.0 - x.float()) * -10000.0,
    "lowest": lambda x: torch.zeros_like(x, dtype=torch.float32).masked_fill(x.bool(), -1e9),
    "tril": lambda x: x.tril(),
    "triu": lambda x: x.triu(1),
    "repeat": lambda x: x.repeat(*[1] * (x.dim() - 1), 2),
    "expand": lambda x: x[None].expand(3, *x.shape),
    "counted": lambda x: torch.ones_like(x, dtype=torch.long).cumsum(-1),
    "full": lambda x: torch.full_like(x, 7),
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ne": lambda a, b: a != b,
    "and": lambda a, b: a.bool() & b.bool(),
    "or": lambda a, b: torch.logical_or(a, b),
    "where": lambda a, b: torch.where(b.bool(), a, -1),
    "masked": lambda a, b: a.masked_fill(b.bool(), 5),
    "cat": lambda a, b: torch.cat([a, b], -1),
}
ALL = UNARY | BINARY


@st.composite
def programs(draw: st.DrawFn) -> list[Step]:
    """Steps that PyTorch accepts, whose results stay small."""
    batch, length = SIZES
    values = Steps([])(torch.ones(batch, length, dtype=torch.bool), torch.ones(batch, length))
    values = [torch.ones(batch, length, dtype=torch.bool), torch.ones(batch, length), *values]
    steps: list[Step] = []
    for name in draw(st.lists(st.sampled_from([*UNARY, *BINARY, *BINARY]), min_size=2, max_size=9)):
        operands = tuple(draw(st.integers(0, len(values) - 1)) for _ in range(2 if name in BINARY else 1))
        step = Step(name, ALL[name], operands)
        try:
            result = step(values)
        except (RuntimeError, IndexError):
            continue  # shapes or types that do not fit
        if result.dim() <= 3 and 0 < result.numel() <= 400:
            values.append(result)
            steps.append(step)
    return steps


def value_at(value: Any, place: Sequence[int], known: dict[Any, Any], leaves: dict[Any, Tensor]) -> Any:
    """An expression's number at coordinates, with sizes and unknown functions filled in."""
    known = known | {coordinate(i): sympy.Integer(c) for i, c in enumerate(place)}
    value = sympy.sympify(value).xreplace(known)
    while unknown := value.atoms(AppliedUndef):
        inner = {f: leaves[f.func][tuple(int(a) for a in f.args)].item() for f in unknown}
        value = value.xreplace({f: sympy.sympify(+v) for f, v in inner.items()})
    return value


def specialised(steps: list[Step]) -> Program | None:
    """The traced steps; None where they fix the length."""
    batch, length = SIZES
    try:
        return trace(
            Steps(steps),
            (torch.ones(batch, length, dtype=torch.bool), torch.ones(batch, length)),
            dynamic={"seen": {1: "S"}, "scale": {1: "S"}},
        )
    except GraphlatheError:
        return None


@settings(max_examples=50)
@given(programs(), st.randoms(use_true_random=False))
def test_every_value_is_what_the_expression_says(steps: list[Step], rng: random.Random) -> None:
    """At the traced length, and at another one."""
    program = specialised(steps)
    assume(program is not None)
    assert program is not None
    functions = IndexFunctions(program)
    for size in (SIZES[1], 7):
        torch.manual_seed(size)
        inputs = (torch.rand(SIZES[0], size) < 0.6, torch.randn(SIZES[0], size))
        try:
            values = Steps(steps)(*inputs)
        except RuntimeError:
            continue  # these sizes do not fit
        placeholders = dict(zip(program.main.placeholders, inputs, strict=True))
        symbols = {dim.symbol: sympy.Integer(size) for dim in program.main.dims.by_name.values()}
        for node, value in zip(program.main.output_values, values, strict=True):
            expression = functions.read(node)
            used = {f.func for f in sympy.sympify(expression).atoms(AppliedUndef)}
            if not all(functions.leaves.get(f) in placeholders for f in used):
                continue  # an operator that it takes as it is
            leaves = {f: placeholders[functions.leaves[f]] for f in used}
            places = list(product(*(range(n) for n in value.shape)))
            for place in rng.sample(places, min(6, len(places))):
                found = value_at(expression, place, symbols, leaves)
                wanted = value[place].item()
                what = (node.format_node(), expression, place)
                if value.dtype is torch.bool:
                    assert is_condition(expression), what
                    assert found in (sympy.true, sympy.false), what
                    assert bool(found) == wanted, what
                else:
                    assert float(found) == pytest.approx(wanted, rel=1e-5), what
