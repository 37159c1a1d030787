"""The layers that compressing passes ask for: embeddings, heads, linear maps, stages of convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .flow import Flow, is_pointwise, is_view, op_name, tensor_of
from .projections import Projection, linear_map

_DEPTH = 24


@dataclass(frozen=True, eq=False)
class EmbeddingSite:
    """A table whose rows are looked up.

    Attributes:
        node: the lookup.
        weight: the node of the table.
        rows, width: its size.
        tokens: whether the rows are looked up by what an input holds (token ids, segments), not by positions.
    """

    node: fx.Node
    weight: fx.Node
    rows: int
    width: int
    tokens: bool

    def __str__(self) -> str:
        what = "an input" if self.tokens else "positions"
        return f"embedding %{self.node.name} [{self.rows}, {self.width}] of {what}"


@dataclass(frozen=True, eq=False)
class HeadSite:
    """A linear map from which an output comes.

    Attributes:
        projection: the map.
        output: the output's name.
        tied: the embedding whose table is its weight, or None.
    """

    projection: Projection
    output: str
    tied: EmbeddingSite | None

    def __str__(self) -> str:
        tied = f", tied to %{self.tied.node.name}" if self.tied is not None else ""
        return f"head {self.projection} for '{self.output}'{tied}"


@dataclass(frozen=True, eq=False)
class ConvStage:
    """Successive convolutions that work at one resolution.

    Attributes:
        convolutions: the operators, in graph order.
        resolution: the sizes of their results along the spatial axes.
        channels: output channels of the last one.
    """

    convolutions: tuple[fx.Node, ...]
    resolution: tuple[Any, ...]
    channels: int

    def __str__(self) -> str:
        size = "x".join(map(str, self.resolution))
        return f"stage of {len(self.convolutions)} convolutions at {size}, {self.channels} channels"


def find_linear(flow: Flow) -> list[Projection]:
    """All linear maps of activations by a weight, in graph order (convolutions are no part of this)."""
    found = (linear_map(node) for node in flow.nodes if not op_name(node).startswith("conv"))
    return [m for m in found if m is not None and flow.data.get(m.node)]


def find_embeddings(flow: Flow) -> list[EmbeddingSite]:
    """All lookups of rows in a table of weights."""
    found: list[EmbeddingSite] = []
    for node in flow.nodes:
        name = op_name(node)
        if name in ("embedding", "embedding_bag", "_embedding_bag", "index_select"):
            table, index = node.args[0], node.args[2 if name == "index_select" else 1]
        elif name == "index" and len(node.args[1]) == 1:  # type: ignore[arg-type]
            table, index = node.args[0], node.args[1][0]  # type: ignore[index]
        else:
            continue
        if not isinstance(table, fx.Node) or table.op != "get_attr" or not isinstance(index, fx.Node):
            continue
        shape = table.meta["val"].shape
        if len(shape) != 2 or not table.meta["val"].dtype.is_floating_point:
            continue
        direct = _is_content(index)
        if not direct and _is_chosen(index):
            continue  # a bias by expert
        found.append(EmbeddingSite(node, table, int(shape[0]), int(shape[1]), direct))
    return found


def _is_chosen(index: fx.Node) -> bool:
    """Whether an index is a choice that the model made: of experts, of the best scores."""
    seen, stack = {index}, [index]
    while stack and len(seen) < _DEPTH:
        node = stack.pop()
        if op_name(node) in ("topk", "argmax", "sort"):
            return True
        fresh = [a for a in node.all_input_nodes if a not in seen and a.op == "call_function"]
        seen.update(fresh)
        stack.extend(fresh)
    return False


def _is_content(index: fx.Node) -> bool:
    """Whether an index is an input through rearrangements and casts only."""
    current: Any = index
    for _ in range(_DEPTH):
        if current.op == "placeholder":
            return True
        if current.op != "call_function" or not (is_view(current) or op_name(current) in ("clamp", "clip", "where")):
            return False
        operands = [a for a in current.all_input_nodes if tensor_of(a) is not None]
        if not operands:
            return False
        current = operands[-1] if op_name(current) == "where" else operands[0]
    return False


def find_heads(flow: Flow, embeddings: Sequence[EmbeddingSite]) -> list[HeadSite]:
    """The linear maps that end the way to an output, through rearrangements and elementwise operators."""
    by_table = {str(e.weight.target): e for e in embeddings}
    found: list[HeadSite] = []
    seen: set[fx.Node] = set()
    for name, value in zip(flow.entry.outputs, flow.entry.output_values, strict=True):
        current: Any = value
        for _ in range(_DEPTH):
            if not isinstance(current, fx.Node) or current.op != "call_function":
                break
            projection = linear_map(current)
            if projection is not None:
                if current not in seen:
                    seen.add(current)
                    found.append(HeadSite(projection, name, by_table.get(str(projection.weight.target))))
                break
            if not (is_view(current) or is_pointwise(current) or op_name(current) in ("softmax", "log_softmax")):
                break
            operands = [a for a in current.all_input_nodes if flow.data.get(a)]
            if len(operands) != 1:
                break
            current = operands[0]
    return found


def find_stages(flow: Flow) -> list[ConvStage]:
    """Runs of spatial convolutions (kernel larger than 1) whose results have one resolution."""
    found: list[ConvStage] = []
    run: list[fx.Node] = []
    sizes: tuple[Any, ...] = ()
    for node in flow.nodes:
        name = op_name(node)
        value = tensor_of(node)
        if not (name.startswith("conv") and name.endswith("d")) or value is None or not flow.data.get(node):
            continue
        here = tuple(value.shape[2:])
        if run and tuple(map(str, here)) != tuple(map(str, sizes)):
            found.append(_stage(run, sizes))
            run = []
        run.append(node)
        sizes = here
    return [*found, _stage(run, sizes)] if run else found


def _stage(run: Sequence[fx.Node], sizes: tuple[Any, ...]) -> ConvStage:
    value = run[-1].meta["val"]
    assert isinstance(value, torch.Tensor)
    return ConvStage(tuple(run), sizes, int(value.shape[1]))
