"""A model in which one residual block does nothing: a scorer of blocks must find it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ...ir.from_torch import trace
from ...ir.program import Program
from ..base import Case, Pass, Stats

USELESS = 2
_WIDTH, _BLOCKS, _VOCABULARY = 16, 4, 29


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(_WIDTH)
        self.up = nn.Linear(_WIDTH, 2 * _WIDTH)
        self.down = nn.Linear(2 * _WIDTH, _WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] to the same shape."""
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Stack(nn.Module):
    """Residual blocks between an embedding and an output head.

    Args:
        blocks: modules that keep [batch, tokens, width].
        width: of the stream.
        vocabulary: number of ids, and of logits.
    """

    def __init__(self, blocks: Iterable[nn.Module], width: int, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[batch, tokens] ids to [batch, tokens, vocabulary] logits."""
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def identity_block_case(settings: Pass) -> Case:
    """Four blocks, of which number `USELESS` has a zero output projection; ``settings`` must remove that one."""
    generator = torch.Generator().manual_seed(7)
    model = Stack((_Block() for _ in range(_BLOCKS)), _WIDTH, _VOCABULARY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        useless = model.blocks[USELESS]
        assert isinstance(useless, _Block)
        useless.down.weight.zero_()
        useless.down.bias.zero_()
    ids = torch.randint(0, _VOCABULARY, (2, 9), generator=generator)
    program: Program = trace(model, {"ids": ids}, dynamic={"ids": {0: "B", 1: "S"}})

    def found(_: Program, stats: Stats) -> bool:
        return [site["index"] for site in stats.plan["sites"] if site["removed"]] == [USELESS]

    return Case(settings, program, [{"ids": ids}], found)
