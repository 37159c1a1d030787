"""The torch back end: the graph as generated Python code, weights shared with the program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from ..ir.execute import subgraph_module
from ..ir.program import Entry, Program, copy_graph
from .session import ProgramSession


def graph_module(program: Program, entry: Entry, device: torch.device | str = "cpu") -> fx.GraphModule:
    """An entry as a ``GraphModule``: inputs in the entry's order, a tuple of outputs; weights are attributes ``w0``...

    Weights on the CPU are views of the program's own storage.
    """
    graph = copy_graph(entry.graph)
    root: dict[str, Any] = {}
    for number, node in enumerate(graph.find_nodes(op="get_attr")):
        name = str(node.target)
        if name in program.subgraphs:
            root[name] = subgraph_module(name, program.subgraphs, program.weights).to(device)
            continue
        # A buffer, not a parameter: nothing here is trained. Short names cannot collide with each other's prefixes.
        node.target = f"w{number}"
        root[node.target] = program.weights[name].tensor().to(device)
    module = fx.GraphModule(root, graph, class_name="Program")
    return module.eval()


class TorchSession(ProgramSession):
    """Runs the graph in PyTorch.

    Args:
        program: the program.
        entry: which entry.
        device: where weights and inputs live.
        inductor: whether to compile with ``torch.compile`` (minutes at the first run).
    """

    def __init__(self, program: Program, entry: str = "main", *, device: str = "cpu", inductor: bool = False) -> None:
        super().__init__(program, entry)
        self.device = torch.device(device)
        module: nn.Module = graph_module(program, self.entry, self.device)
        self._call: Callable[..., Any] = torch.compile(module, dynamic=True) if inductor else module

    def compute(self, feeds: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> dict[str, Any]:
        """Run the generated code."""
        with torch.no_grad():
            values = self._call(*(feeds[name].to(self.device) for name in self.inputs))
        return dict(zip(self.outputs, values, strict=True))

    def close(self) -> None:
        """Let go of the weights."""
        self._call = _closed


def _closed(*_: Any) -> Any:
    raise RuntimeError("the session is closed")
