"""A model in which one head of each attention says nearly everything: a ranking of heads must find it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ...ir.from_torch import trace
from ...ir.program import Program
from ..base import Case, Pass, Stats
from ..layers.planted import Stack

LOUD = (2, 0)
"""For each block the head that matters."""

_WIDTH, _HEADS, _VOCABULARY = 16, 4, 29
_QUIET = 1e-3


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.query, self.key, self.value, self.output = (nn.Linear(_WIDTH, _WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(_WIDTH, 2 * _WIDTH), nn.Linear(2 * _WIDTH, _WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] to the same shape."""
        h = self.norm1(x)
        q, k, v = (m(h).unflatten(-1, (_HEADS, -1)).transpose(1, 2) for m in (self.query, self.key, self.value))
        x = x + self.output(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def loud_head_case(settings: Pass) -> Case:
    """Two blocks of four heads, of which `LOUD` write into the stream; ``settings`` must keep those."""
    generator = torch.Generator().manual_seed(7)
    model = Stack((_Block() for _ in LOUD), _WIDTH, _VOCABULARY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        for block, loud in zip(model.blocks, LOUD, strict=True):
            assert isinstance(block, _Block)
            size = _WIDTH // _HEADS
            factors = torch.full((_HEADS,), _QUIET)
            factors[loud] = 1.0
            block.output.weight.mul_(factors.repeat_interleave(size))
    ids = torch.randint(0, _VOCABULARY, (2, 9), generator=generator)
    program: Program = trace(model, {"ids": ids}, dynamic={"ids": {0: "B", 1: "S"}})

    def found(_: Program, stats: Stats) -> bool:
        return [row["kept"] for row in stats.plan["heads"]] == [[head] for head in LOUD]

    return Case(settings, program, [{"ids": ids}], found)
