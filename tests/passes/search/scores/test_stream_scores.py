"""Scores of blocks by how they change their stream, against the eager streams; windows against all windows."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from graphlathe.ir.errors import PreconditionError
from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.ir.structure import structure
from graphlathe.passes.base import Context
from graphlathe.passes.search.scores import SCORES, best_window
from graphlathe.passes.search.units import Unit, removable_units


class Blocks(nn.Module):
    """Residual layers; also gives the stream's values for the reference."""

    def __init__(self, depth: int = 5) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))

    def values(self, x: Tensor) -> list[Tensor]:
        """The stream before the first layer and after each."""
        found = [x]
        for layer in self.layers:
            found.append(found[-1] + torch.tanh(layer(found[-1])))
        return found

    def forward(self, x: Tensor) -> Tensor:
        """The last value, turned once more, so that every block ends inside."""
        return torch.sigmoid(self.values(x)[-1])


@cache
def blocks() -> tuple[Blocks, Program, tuple[Unit, ...], tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model = Blocks().double()
    data = tuple(torch.randn(2, 3, 4, dtype=torch.float64) for _ in range(2))
    program = trace(model, (data[0],))
    return model, program, tuple(removable_units(structure(program), "block")), data


def streams() -> list[list[Tensor]]:
    """By position: the stream's value at each point."""
    model, _, _, data = blocks()
    with torch.no_grad():
        whole = [torch.cat([model.values(x)[i].reshape(-1, 4) for x in data]) for i in range(6)]
    return [[value[p] for value in whole] for p in range(len(whole[0]))]


def context() -> Context:
    return Context(calibration=[{"x": x} for x in blocks()[3]])


@pytest.mark.parametrize("name", ["norm-ratio", "l2", "block-influence"])
def test_scores_are_means_over_positions(name: str) -> None:
    _, program, units, _ = blocks()
    assert len(units) == 5
    found = SCORES[name](program, units, (), context())
    for unit in range(5):
        total = 0.0
        for values in streams():
            a, b = values[unit], values[unit + 1]
            total += {
                "l2": float((b - a).norm()),
                "norm-ratio": float((b - a).norm() / b.norm()),
                "block-influence": 1 - float(a @ b / a.norm() / b.norm()),
            }[name]
        assert found[unit] == pytest.approx(total / len(streams()), rel=1e-9)


@pytest.mark.parametrize("name", ["norm-ratio", "l2"])
def test_dropped_units_are_read_from_before_them(name: str) -> None:
    model, program, units, data = blocks()
    found = SCORES[name](program, units[1:], units[:1], context())
    shorter = Blocks(4).double()
    shorter.layers = model.layers[1:]
    other = trace(shorter, (data[0],))
    expected = SCORES[name](other, removable_units(structure(other), "block"), (), context())
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-12)


def test_a_block_that_does_nothing_has_no_length() -> None:
    model = Blocks(3).double()
    for parameter in model.layers[1].parameters():
        parameter.data.zero_()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    program = trace(model, (x,))
    units = removable_units(structure(program), "block")
    for name in ("norm-ratio", "l2"):
        found = SCORES[name](program, units, (), Context(calibration=[{"x": x}, {"x": x * 0}]))
        assert found[1] == 0.0 < min(found[0], found[2])


@pytest.mark.parametrize("k", [1, 2, 4])
def test_windows(k: int) -> None:
    _, program, units, _ = blocks()
    chosen, scores = best_window(program, units, k, context())
    expected: dict[int, float] = {}
    for start in range(6 - k):
        cosines = [float(v[start] @ v[start + k] / v[start].norm() / v[start + k].norm()) for v in streams()]
        expected[start] = 1 - sum(cosines) / len(cosines)
    assert scores == pytest.approx(expected, rel=1e-9)
    best = min(expected, key=expected.__getitem__)
    assert chosen == list(range(best, best + k))


def test_a_window_is_not_the_sum_of_its_blocks() -> None:
    """Two blocks that undo each other turn the stream much alone, and together not at all."""

    class Turns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(x)
            return torch.sigmoid(x)

    torch.manual_seed(1)
    model = Turns().double()
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    model.layers[1].weight.data = turn - torch.eye(4)
    model.layers[2].weight.data = turn.T - torch.eye(4)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    program = trace(model, (x,))
    units = removable_units(structure(program), "block")
    ctx = Context(calibration=[{"x": x}])
    influence = SCORES["block-influence"](program, units, (), ctx)
    assert sorted(influence, key=influence.__getitem__)[:2] != [1, 2]
    chosen, scores = best_window(program, units, 2, ctx)
    assert chosen == [1, 2] and scores[1] == pytest.approx(0, abs=1e-12)


def test_windows_that_do_not_exist_are_refused() -> None:
    _, program, units, _ = blocks()
    for k in (0, 6):
        with pytest.raises(PreconditionError, match=f"no {k} neighbouring") as error:
            best_window(program, units, k, context())
        assert error.value.expected == "a number from 1 to 5"
    with pytest.raises(PreconditionError, match="no 3 neighbouring") as error:
        best_window(program, [*units[:2], *units[3:]], 3, context())
    assert error.value.expected == "a number from 1 to 2"
