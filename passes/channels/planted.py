"""Models in which it is known which channels can go without a trace."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ...ir.from_torch import trace
from ...ir.program import Program
from ..base import Case, Pass, Stats

WIDTH, HIDDEN, CLASSES = 24, 16, 11  # wider than the hidden layer, so that its channels are independent
CONSTANT = (1, 4, 6, 7, 10, 11, 13, 15)
"""Hidden channels that are the same for every input."""
PAIR = (3, 12)
"""Two hidden channels of which one is three times the other."""


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] to the same shape."""
        return x + self.down(torch.relu(self.up(self.norm(x))))


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.block = _Residual()
        self.second = _Residual()
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] to [batch, tokens, classes]."""
        return self.head(self.second(self.block(self.first(x))))


def _drawn(change: Callable[[_Residual], None]) -> tuple[Program, list[dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(11)
    model = _Model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        for block in (model.block, model.second):
            block.up.weight.mul_(0.5)
            block.up.bias.copy_(block.up.bias.abs() + 0.5)  # no channel is silent: that would be as good an answer
            change(block)
    batches = [{"x": torch.randn(3, 40, WIDTH, generator=generator)} for _ in range(2)]
    return trace(model, batches[0], dynamic={"x": {0: "B", 1: "S"}}), batches


def model_case() -> tuple[Program, list[dict[str, torch.Tensor]]]:
    """The model with nothing planted in it, and data."""
    return _drawn(lambda block: None)


def constant_channels_case(settings: Pass) -> Case:
    """Half of the hidden channels of both MLPs are constant: ``settings`` must remove these, and lose nothing."""

    def change(block: _Residual) -> None:
        block.up.weight[list(CONSTANT)] = 0.0
        block.up.bias[list(CONSTANT)] = torch.linspace(0.5, 2.0, len(CONSTANT))

    program, batches = _drawn(change)

    def found(after: Program, stats: Stats) -> bool:
        removed = [tuple(site["removed"]) for site in stats.plan["sites"] if site["kind"] == "mlp"]
        return removed == [CONSTANT] * 2 and _same(program, after, batches)

    return Case(settings, program, batches, found)


def proportional_channels_case(settings: Pass) -> Case:
    """One hidden channel of each MLP is a multiple of another: ``settings`` must remove one of the two."""
    one, other = PAIR

    def change(block: _Residual) -> None:
        block.up.weight[other] = 3 * block.up.weight[one]
        block.up.bias[other] = 3 * block.up.bias[one]
        # Their readers are proportional as well, so that a factor for the one that stays is enough.
        block.down.weight[:, other] = 2 * block.down.weight[:, one]

    program, batches = _drawn(change)

    def found(after: Program, stats: Stats) -> bool:
        removed = [site["removed"] for site in stats.plan["sites"] if site["kind"] == "mlp"]
        return all(len(r) == 1 and r[0] in PAIR for r in removed) and _same(program, after, batches)

    return Case(settings, program, batches, found)


def _same(before: Program, after: Program, batches: list[dict[str, torch.Tensor]], tolerance: float = 2e-3) -> bool:
    """Whether outputs agree; the damping of a fit leaves a trace, far below what any other channel would leave."""
    for batch in batches:
        a, b = before.run(batch)["output"], after.run(batch)["output"]
        if float((a - b).abs().max()) > tolerance * float(a.abs().max()):
            return False
    return True
