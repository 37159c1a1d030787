"""PyTorch itself: the graph as a module over the program's own weights, through ``torch.compile`` if asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..ir.entry_module import EntryModule
from ..ir.errors import GraphlatheError
from ..ir.program import Program
from .session import ProgramSession


class TorchSession(ProgramSession):
    """Runs the graph's generated code.

    Args:
        program: the program. On the CPU its weights are shared, elsewhere they are copied once.
        entry: which entry.
        compile: whether to go through ``torch.compile``; compilation happens at the first call.
        device: where to run; inputs are moved there, outputs stay there.

    Raises:
        GraphlatheError: the device does not exist, or a weight has no numbers.
    """

    def __init__(self, program: Program, entry: str, *, compile: bool = False, device: str = "cpu") -> None:
        super().__init__(program, entry)
        try:
            self.device = torch.device(device)
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise GraphlatheError(
                f"no device '{device}': {str(error).splitlines()[0]}", remedy="device='cpu' always works"
            ) from error
        module = EntryModule(program, self.entry).body.to(self.device)
        # Constants that creation operators place on the traced device would clash with inputs on another one.
        if self.device.type != "cpu":
            _move_creation(module, self.device)
        self._call: Any = torch.compile(module, dynamic=True) if compile else module

    def _execute(self, feeds: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> dict[str, Any]:
        with torch.no_grad():
            values = self._call(*[value.to(self.device) for value in feeds.values()])
        return {n: v for n, v in zip(self.entry.outputs, values, strict=True) if v is not None}

    def close(self) -> None:
        """Free the module; weights live on as long as the program does."""
        self._call = None
        super().close()


def _move_creation(module: torch.fx.GraphModule, device: torch.device) -> None:
    for node in module.graph.nodes:
        if isinstance(node.kwargs.get("device"), torch.device):
            node.kwargs = {**node.kwargs, "device": device}
    module.recompile()
