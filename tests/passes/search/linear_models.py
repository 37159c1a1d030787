"""Small models with linear layers in blocks, for tests of levels of weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.passes.base import Context

WIDTH, HIDDEN = 12, 20


class Residual(nn.Module):
    """Residual blocks around a function of the module, the input and the block's number."""

    def __init__(self, inner: Callable[..., Tensor], blocks: int, layers: dict[str, Any]) -> None:
        super().__init__()
        self.inner, self.blocks = inner, blocks
        self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, WIDTH] to [batch, tokens, 5]."""
        x = self.first(x)
        for block in range(self.blocks):
            x = x + self.inner(self, x.tanh(), block)
        return self.head(x)


def program_of(
    inner: Callable[..., Tensor], *, blocks: int = 2, dtype: torch.dtype = torch.float32, **layers: Any
) -> Program:
    """The model as a program, with numbers drawn from a fixed seed."""
    model = Residual(inner, blocks, layers)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    example = torch.randn(2, 3, WIDTH, generator=generator, dtype=dtype)
    return trace(model.to(dtype).eval(), (example,), dynamic={"x": {0: "B", 1: "S"}})


def mlps(dtype: torch.dtype = torch.float32, blocks: int = 2) -> Program:
    """Blocks of two linear layers each: sites 1 and 2, 3 and 4..."""
    ups = nn.ModuleList(nn.Linear(WIDTH, HIDDEN) for _ in range(blocks))
    downs = nn.ModuleList(nn.Linear(HIDDEN, WIDTH, bias=False) for _ in range(blocks))
    inner = lambda m, x, i: m.downs[i](m.ups[i](x).relu())  # noqa: E731 - a model in a line
    return program_of(inner, blocks=blocks, dtype=dtype, ups=ups, downs=downs)


def batches(dtype: torch.dtype = torch.float32, seed: int = 3, count: int = 2) -> list[dict[str, Tensor]]:
    """Calibration data of another size than the example."""
    generator = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(3, 15, WIDTH, generator=generator, dtype=dtype)} for _ in range(count)]


def data(dtype: torch.dtype = torch.float32) -> Context:
    """A context with calibration data."""
    return Context(calibration=batches(dtype))
