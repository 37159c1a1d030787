"""The null back end: everything is checked, nothing is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ..ir.program import Program
from .session import ProgramSession


class NullSession(ProgramSession):
    """Zeros of the right shape and dtype, for tests of passes and callers at sizes that do not fit.

    Args:
        program: the program.
        entry: which entry.
        device: where the zeros live; ``meta`` takes no memory.
    """

    def __init__(self, program: Program, entry: str = "main", *, device: str = "cpu") -> None:
        super().__init__(program, entry)
        self.device = device

    def compute(self, feeds: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> dict[str, Any]:
        """Evaluate each output's symbolic shape; sizes that depend on data take their example's."""
        result: dict[str, Any] = {}
        for name, node in zip(self.entry.outputs, self.entry.output_values, strict=True):
            if isinstance(node, fx.Node):
                value = node.meta["val"]
                if isinstance(value, torch.Tensor):
                    shape = [self.entry.dims.evaluate(size, sizes) for size in value.shape]
                    result[name] = torch.zeros(shape, dtype=value.dtype, device=self.device)
                else:
                    result[name] = self.entry.dims.evaluate(value, sizes)
        return result

    def close(self) -> None:
        """There is nothing to free."""
