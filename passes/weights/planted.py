"""A model in which one linear layer has exactly low rank: a factorization must find it, and lose nothing."""

from __future__ import annotations

import torch
from torch import nn

from ...ir.from_torch import trace
from ...ir.program import Program
from ..base import Case, Pass, Stats

WIDTH, HIDDEN, CLASSES, RANK = 12, 16, 11, 2
PLANTED = 3
"""The number of the layer of low rank among all linear layers: the second block's first one."""


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] to the same shape."""
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(_Residual() for _ in range(2))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] to [batch, tokens, classes]."""
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def low_rank_case(settings: Pass) -> Case:
    """One of four layers in blocks has rank `RANK`: ``settings`` must factorise it to that rank, and no other."""
    generator = torch.Generator().manual_seed(13)
    model = _Model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        block = model.blocks[1]
        assert isinstance(block, _Residual)
        left, right = (torch.randn(n, RANK, generator=generator) for n in (HIDDEN, WIDTH))
        block.up.weight.copy_(left @ right.T * 0.3)
    batches = [{"x": torch.randn(3, 40, WIDTH, generator=generator)} for _ in range(2)]
    program = trace(model, batches[0], dynamic={"x": {0: "B", 1: "S"}})

    def found(after: Program, stats: Stats) -> bool:
        changed = {site["index"]: site["level"] for site in stats.plan["sites"] if site["level"]}
        rank = f"rank={RANK} shape={HIDDEN}x{WIDTH}"
        return changed == {PLANTED: rank} and all(_same(program, after, batch) for batch in batches)

    return Case(settings, program, batches, found)


def _same(before: Program, after: Program, batch: dict[str, torch.Tensor]) -> bool:
    a, b = before.run(batch)["output"], after.run(batch)["output"]
    return float((a - b).abs().max()) <= 1e-4 * float(a.abs().max())
