"""Tiny residual models in float64, and what every test of a pass that compresses does with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from graphlathe.ir.errors import PreconditionError
from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.ir.verify import verify
from graphlathe.passes.base import Batch, Context, Pass, Stats
from graphlathe.passes.manager import PassManager

WIDTH, CLASSES = 6, 11  # as many classes as an output needs to be taken for logits


class Mlp(nn.Module):
    """x + down(relu(up(norm(x))))."""

    def __init__(self, hidden: int, bias: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, hidden)
        self.down = nn.Linear(hidden, WIDTH, bias=bias)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """What ``down`` reads."""
        return torch.relu(self.up(self.norm(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.hidden(x))


class Attention(nn.Module):
    """x + o(attention(norm(x))), with query heads that share key and value heads."""

    def __init__(self, heads: int, groups: int, dim: int = 2) -> None:
        super().__init__()
        self.heads, self.groups, self.dim = heads, groups, dim
        self.norm = nn.LayerNorm(WIDTH)
        self.q = nn.Linear(WIDTH, heads * dim)
        self.k = nn.Linear(WIDTH, groups * dim)
        self.v = nn.Linear(WIDTH, groups * dim)
        self.o = nn.Linear(heads * dim, WIDTH)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """What ``o`` reads."""
        x = self.norm(x)
        q, k, v = (m(x).unflatten(-1, (-1, self.dim)).transpose(1, 2) for m in (self.q, self.k, self.v))
        each = self.heads // self.groups
        k, v = (t.repeat_interleave(each, 1) if each > 1 else t for t in (k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.o(self.hidden(x))


class Stack(nn.Module):
    """A linear map, blocks, and a linear head."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def stack(*blocks: nn.Module, seed: int = 0) -> Stack:
    """The blocks with random weights, in float64."""
    generator = torch.Generator().manual_seed(seed)
    model = Stack(*blocks).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.6)
    return model


def data(count: int = 3, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Batches of float64 [batch, tokens, width]."""
    generator = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(3, 7, WIDTH, generator=generator, dtype=torch.float64)} for _ in range(count)]


def program_of(model: nn.Module) -> Program:
    """The model as a program, for batches of the size of `data`."""
    return trace(model, data(1)[0])


def hidden_rows(model: Stack, batches: Sequence[Batch]) -> list[list[torch.Tensor]]:
    """For each block, what its last linear map reads on each batch: float64 [rows, hidden]."""
    found: list[list[torch.Tensor]] = [[] for _ in model.blocks]
    with torch.no_grad():
        for batch in batches:
            x = model.first(batch["x"])
            for number, block in enumerate(model.blocks):
                found[number].append(block.hidden(x).flatten(0, 1))
                x = block(x)
    return found


def divergence(got: torch.Tensor, want: torch.Tensor) -> float:
    """Mean KL(want || got) of distributions over the last dimension, in float64."""
    p, q = torch.log_softmax(want.double(), -1), torch.log_softmax(got.double(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def run(
    program: Program, settings: Pass, batches: Sequence[Batch] | None, original: Program | None = None
) -> tuple[Program, Stats]:
    """A copy after the pass; verified, and the pass's own law checked."""
    changed = program.clone()
    context = Context(calibration=batches, original=original)
    settings.check(changed, context)
    stats = settings.run(changed, context)
    verify(changed, 2)
    settings.ensure(program, changed, stats)
    return changed, stats


def best_damping(
    batches: Sequence[Batch], fit: Callable[[Sequence[Batch], float], Callable[[Sequence[Batch]], float]]
) -> float:
    """The damping with which fits on every other batch do best on the batches between.

    Args:
        batches: the data.
        fit: ``(batches, damping) -> (other batches -> squared error per row)``.
    """
    halves = batches[::2], batches[1::2]

    def error(damping: float) -> float:
        return fit(halves[0], damping)(halves[1]) + fit(halves[1], damping)(halves[0])

    return min((0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0), key=error)


def removed(stats: Stats, *kinds: str) -> list[list[int]]:
    """What the plan removes, site by site."""
    return [site["removed"] for site in stats.plan["sites"] if not kinds or site["kind"] in kinds]


def refused(
    program: Program, settings: Pass, batches: Sequence[Batch] | None, match: str, **options: Any
) -> PreconditionError:
    """The refusal: of this pass, with what to do, and nothing is changed."""
    before = program.fingerprint(), program.to_text(), program.mutations
    with pytest.raises(PreconditionError, match=match) as caught:
        PassManager(settings, calibration=batches, **options).run(program)
    assert caught.value.pass_name == settings.name
    assert caught.value.remedy or caught.value.expected
    assert before == (program.fingerprint(), program.to_text(), program.mutations)
    return caught.value
