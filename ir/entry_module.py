"""An entry as a `torch.nn.Module`, for whatever runs or captures modules. Weights are shared, not copied."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from .execute import subgraph_module
from .program import Entry, Program


class EntryModule(nn.Module):
    """A module whose positional inputs and outputs are an entry's, in order.

    Attributes:
        weight_names: from the module's buffers (``weight_0``...) to the program's weights, whose names may be anything.
    """

    def __init__(self, program: Program, entry: Entry) -> None:
        super().__init__()
        self.weight_names: dict[str, str] = {}
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        for node in entry.graph.nodes:
            new = graph.node_copy(node, env.__getitem__)
            env[node] = new
            if node.op != "get_attr":
                continue
            name = str(node.target)
            if name in program.subgraphs:
                new.target = f"graph_{name}"
                self.add_module(new.target, subgraph_module(name, program.subgraphs, program.weights))
            else:
                new.target = f"weight_{len(self.weight_names)}"
                self.weight_names[new.target] = name
                self.register_buffer(new.target, program.weights[name].tensor())
        self.body = fx.GraphModule(self, graph)

    def forward(self, *inputs: torch.Tensor) -> tuple[Any, ...]:
        """Run the graph on the inputs, in order."""
        return self.body(*inputs)
