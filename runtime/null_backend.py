"""A back end that checks everything and computes nothing, for programs at sizes that do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ..ir.errors import GraphlatheError
from ..ir.program import Program
from .session import ProgramSession


class NullSession(ProgramSession):
    """Returns zeros of the right shapes and types.

    Args:
        program: the program.
        entry: which entry.
        meta: return meta tensors, which take no memory, instead of zeros.

    Raises:
        GraphlatheError: the graph is not well formed, or reads a weight that is not there.
    """

    def __init__(self, program: Program, entry: str, *, meta: bool = False) -> None:
        super().__init__(program, entry)
        self.device = "meta" if meta else "cpu"
        try:
            self.entry.graph.lint()
        except RuntimeError as error:
            raise GraphlatheError(f"the graph is not well formed: {error}") from error
        for node in self.entry.graph.find_nodes(op="get_attr"):
            if str(node.target) not in program.weights and str(node.target) not in program.subgraphs:
                raise GraphlatheError(f"no weight '{node.target}' in the program", node=node.name)

    def _execute(self, feeds: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> dict[str, Any]:
        return {name: self._zeros(name, sizes) for name in self.outputs}

    def _zeros(self, name: str, sizes: Mapping[str, int]) -> Any:
        value = self.entry.output_values[self.entry.outputs.index(name)]
        if not isinstance(value, fx.Node):
            return value
        dtype = self.output_dtype(name)
        if dtype is None:
            return self.entry.dims.evaluate(value.meta["val"], sizes)
        shape = self.output_shape(name, sizes)
        if shape is None:
            raise GraphlatheError(
                f"the shape of output '{name}' depends on data",
                node=value.name,
                remedy="use another backend, which computes it",
            )
        return torch.zeros(shape, dtype=dtype, device=self.device)
