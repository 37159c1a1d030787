"""PyTorch itself: the graph as a module over the program's own weights, through ``torch.compile`` if asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..ir.entry_module import EntryModule
from ..ir.errors import GraphlatheError
from ..ir.execute import as_traced, memory_of, own_memory
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
            for part in module.modules():
                if isinstance(part, torch.fx.GraphModule):
                    _move_creation(part, self.device)
        self._held = {place for buffer in module.buffers() for place in memory_of(buffer)}
        self._call: Any = torch.compile(module, dynamic=True) if compile else module

    def _execute(self, feeds: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> dict[str, Any]:
        with torch.no_grad():
            moved = [as_traced(value).to(self.device) for value in feeds.values()]
            values = self._call(*moved)
        values = own_memory(values, self._held.union(*map(memory_of, moved)))
        return {n: v for n, v in zip(self.entry.outputs, values, strict=True) if v is not None}

    def close(self) -> None:
        """Free the module; weights live on as long as the program does."""
        self._call = None
        super().close()


def _move_creation(module: torch.fx.GraphModule, device: torch.device) -> None:
    """Let creation operators (``arange``, ``full``) and copies to a device use this device."""
    for node in module.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        names = [argument.name for argument in node.target._schema.arguments]
        if "device" not in names:
            continue
        position = names.index("device")
        if position < len(node.args):
            node.args = (*node.args[:position], device, *node.args[position + 1 :])
        elif node.kwargs.get("device") is not None or "self" not in names:
            # Without a device, what reads a tensor (``zeros_like``) follows it, and what reads none takes the CPU.
            node.kwargs = {**node.kwargs, "device": device}
    module.recompile()
