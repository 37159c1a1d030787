"""Budgets: what a program costs in the unit that is bounded, and what each change saves.

| unit | counted |
|---|---|
| ``params`` | elements of the weights that are read |
| ``bytes`` | their bytes |
| ``macs`` | multiply-accumulates of one run at the sizes of the first calibration batch |
| ``ms`` | measured milliseconds of one run in ONNX Runtime at these sizes, see `milliseconds` |

What a level saves is counted alone, with everything else as it was. Where two changes meet (a convolution both of whose
sides are cut) they save less than both together; passes therefore measure the program that they made, and choose again
with a tighter limit where it is not small enough.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sympy import Integer
from torch import fx
from torch.fx.node import map_arg

from ...ir.axes.space import Index
from ...ir.cost_rules import macs_of
from ...ir.dims import size_expr
from ...ir.execute import needed
from ...ir.program import Program
from ..base import Context
from .biases import bias_type, own_bias, why_no_bias
from .correct import correction_size
from .refit import why_not_fitted
from .sites import ChannelSite
from .units import Unit

UNITS = ("params", "bytes", "macs", "ms")


class Meter:
    """Counts a program, and what changes of it save, in one unit.

    Args:
        program: the program before any change.
        unit: ``params``, ``bytes`` or ``macs`` (milliseconds are measured, see `milliseconds`).
        sizes: sizes of the dynamic dimensions, for MACs.
    """

    def __init__(self, program: Program, unit: str, sizes: Mapping[str, int]) -> None:
        self.program = program
        self.unit = unit
        self.sizes = dict(sizes)
        self._macs: dict[str, int] = {}
        if unit == "macs":
            self._macs = {node.node: int(node.macs) for node in program.cost(self.sizes).nodes}
        self.total = self.measure(program)

    def measure(self, program: Program) -> int:
        """What a program costs."""
        if self.unit == "macs":
            return int(program.cost(self.sizes).macs)
        return program.parameter_count if self.unit == "params" else program.weight_nbytes

    def weight(self, name: str) -> int:
        """What a weight costs; nothing when operators are counted."""
        weight = self.program.weights[name]
        return {"params": weight.numel, "bytes": weight.nbytes}.get(self.unit, 0)

    def cut(self, site: ChannelSite, removed: Sequence[int]) -> float:
        """What cutting atoms of a site saves."""
        gone = np.asarray(removed, dtype=np.int64)
        if not len(gone):
            return 0.0
        saved = 0.0
        if self.unit != "macs":
            left: dict[str, float] = {}
            for member in site.group.members:
                size = self.program.weights[member.weight].shape[member.dim]
                share = len(np.unique(member.index[gone])) / size
                left[member.weight] = left.get(member.weight, 1.0) * (1 - share)
            return sum(self.weight(name) * (1 - share) for name, share in left.items())
        shares = {place: _left(label, gone) for place, label in site.group.places.items()}
        touched = {name for name, _ in shares}
        for node in self.program.entries[site.group.entry].graph.nodes:
            macs = self._macs.get(node.name)
            if macs and any(n.name in touched for n in (node, *node.all_input_nodes)):
                saved += macs * (1 - self._share(node, shares))
        return saved

    def _share(self, node: fx.Node, left: Mapping[tuple[str, int], Fraction]) -> float:
        """The share of an operator's MACs that is left when some dimensions of its values shrink."""
        before, after = (int(macs_of(self._resized(node, shares)) or 0) for shares in ({}, left))
        return after / before if before else 1.0

    def _resized(self, node: fx.Node, left: Mapping[tuple[str, int], Fraction]) -> fx.Node:
        """An operator of its own graph with what the rules for costs look at: plain sizes, some of them smaller."""
        graph = fx.Graph()
        operands: dict[fx.Node, fx.Node] = {}
        for value in node.all_input_nodes:
            operands[value] = graph.placeholder(value.name)
            operands[value].meta = {"val": self._shape(value, left)}
        args, kwargs = map_arg((node.args, node.kwargs), operands.__getitem__)
        assert callable(node.target)
        new = graph.call_function(node.target, args, kwargs)
        new.meta = {"val": self._shape(node, left)}
        return new

    def _shape(self, node: fx.Node, left: Mapping[tuple[str, int], Fraction]) -> Any:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return value
        sizes = [int(self._number(size_expr(size))) for size in value.shape]
        shape = tuple(int(size * left.get((node.name, dim), 1)) for dim, size in enumerate(sizes))
        return SimpleNamespace(shape=shape, dtype=value.dtype)

    def _number(self, expr: Any) -> Any:
        return expr.xreplace({symbol: self._size(symbol) for symbol in expr.free_symbols})

    def _size(self, symbol: Any) -> Any:
        dims = self.program.main.dims.by_name
        return next(
            (Integer(self.sizes.get(name, dim.hint)) for name, dim in dims.items() if dim.symbol == symbol), Integer(1)
        )

    def biases(self, sites: Sequence[ChannelSite]) -> int:
        """What biases cost that compensation may add to the consumers of sites."""
        bare = {
            consumer.node: bias_type(consumer)
            for site in sites
            for consumer in site.consumers
            if not why_not_fitted(self.program, site, consumer)
            and own_bias(self.program, consumer) is None
            and not why_no_bias(consumer)
        }
        return sum(size * {"params": 1, "bytes": dtype.itemsize}.get(self.unit, 0) for size, dtype in bare.values())

    def correction(self, unit: Unit, rank: int) -> int:
        """What a map of low rank in the place of a dropped unit costs, see `correct`."""
        size = correction_size(unit, rank)
        if self.unit == "macs" and size:
            *positions, width = self._shape(unit.by, {}).shape
            return (size - width) * math.prod(positions)  # the bias is no product
        return size * {"params": 1, "bytes": unit.by.meta["val"].dtype.itemsize}.get(self.unit, 0)

    def drop(self, units: Sequence[Unit]) -> float:
        """What dropping units of a stream saves."""
        alias = {unit.replaced: unit.by for unit in units}
        graph = self.program.graph
        gone = needed(graph) - needed(graph, (), alias)
        if self.unit == "macs":
            return float(sum(self._macs.get(node.name, 0) for node in gone))
        kept = {str(n.target) for n in needed(graph, (), alias) if n.op == "get_attr"}
        return float(sum(self.weight(name) for name in {str(n.target) for n in gone if n.op == "get_attr"} - kept))

    def whole(self, sites: Sequence[ChannelSite], units: Sequence[Unit]) -> float:
        """What some sites and units cost together, each weight and operator counted once."""
        graph = self.program.graph
        gone = needed(graph) - needed(graph, (), {unit.replaced: unit.by for unit in units})
        if self.unit == "macs":
            names = {node.name for node in gone}
            places = {name for site in sites for name, _ in site.group.places}
            for node in graph.nodes:
                if node.name in places or any(n.name in places for n in node.all_input_nodes):
                    names.add(node.name)
            return float(sum(self._macs.get(name, 0) for name in names))
        weights = {member.weight for site in sites for member in site.group.members}
        weights |= {str(node.target) for node in gone if node.op == "get_attr"}
        return float(sum(self.weight(name) for name in weights))


def sizes_of(program: Program, ctx: Context) -> dict[str, int]:
    """Sizes of the dynamic dimensions: those of the first calibration batch, else of the example that was traced."""
    traced = {name: dim.hint for name, dim in program.main.dims.by_name.items()}
    if not ctx.calibration:
        return traced
    return traced | program.check_feeds(program.feeds(**ctx.calibration[0]))


def _left(label: Index, gone: Index) -> Fraction:
    """The share of a dimension that stays."""
    return Fraction(int((~np.isin(label, gone)).sum()), len(label))
