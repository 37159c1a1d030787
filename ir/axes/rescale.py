"""Let norms keep dividing by the number of channels that there were.

Zeroing channels of a residual stream and cutting them differ in one place: an RMSNorm takes the mean of d squares in
the first case, of d' in the second. With ``s`` the sum of the squares that stay,

    x / sqrt(s / d + eps) * gain  =  x / sqrt(s / d' + eps * d / d') * (gain * sqrt(d / d'))

so that a gain times ``sqrt(d / d')`` and an epsilon times ``d / d'`` make cutting exact. Where the norm is spelled out,
the mean of squares times ``d' / d`` does the same. LayerNorm has no such form: it also subtracts the mean from the
channels that were zero, which then are not. Source: the rescaling by ``sqrt(d / d')`` is that of PAT (pruning-aware
tuning), which leaves epsilon as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from ..errors import PreconditionError
from ..flow import op_name
from ..program import ORIGIN, Program
from ..rewrite import Rewriter
from ..weights import Weight
from .groups import ChannelGroup
from .relate import bind
from .rules import relate
from .space import Count, Index, Space, Sum, tensor_shape
from .zero import why_not_zero

aten = torch.ops.aten

_RMS = {"rms_norm", "_fused_rms_norm"}
_LAYER = {"layer_norm", "native_layer_norm"}


def rescale_norms(program: Program, group: ChannelGroup, keep: Sequence[int], rewriter: Rewriter) -> list[str]:
    """Change norms so that cutting the group afterwards is what zeroing its atoms is now.

    Until the cut, the program computes something else. Values that are new are added to ``group.places``, so that the
    group still fits the program; it may be cut together with others that were found with it.

    Args:
        program: the program in which the group was found; it is changed in place.
        group: the group that will be cut.
        keep: the atoms that will stay.
        rewriter: makes the changes; one of the group's entry.

    Returns:
        Why cutting is still not zeroing: an entry for each operator that counts the channels and could not be changed.
        Those compute their statistics over the channels that stay.

    Raises:
        PreconditionError: the group cannot be cut, or ``keep`` names no atoms of it. The program is as it was.
    """
    if not group.prunable or not keep or not set(keep) <= set(range(group.size)):
        what = f"the group cannot be cut: {group.reason}" if group.reason else f"cannot keep {list(keep)}"
        raise PreconditionError(what, pass_name=rewriter.made_by, expected=f"some of {group.size} units")
    return _Rescale(program, group, keep, rewriter).run()


class _Rescale:
    def __init__(self, program: Program, group: ChannelGroup, keep: Sequence[int], rewriter: Rewriter) -> None:
        self.program, self.group, self.rewriter = program, group, rewriter
        self.stays = np.array([atom in set(keep) for atom in range(group.size)] + [True])  # the last is label -1
        self.space = Space()
        nodes = {node.name: node for node in rewriter.graph.nodes}
        self.atoms: dict[int, Index] = {}
        for (name, dim), label in group.places.items():
            axis = self.space.axis(nodes[name], dim) if name in nodes else None
            if axis is None or self.space.size[axis] != len(label):
                raise PreconditionError(
                    f"the group was found in another graph: dimension {dim} of %{name} is not of size {len(label)}",
                    pass_name=rewriter.made_by,
                    remedy="find the groups again after every change",
                )
            self.atoms[axis] = label
        self.gains: dict[tuple[fx.Node, float], fx.Node] = {}

    def run(self) -> list[str]:
        exact: dict[fx.Node, float] = {}
        missed: list[str] = []
        counting = [(node, why, ratio) for node, why in self._counting() if (ratio := self._ratio(node)) != 1.0]
        for node, why, ratio in counting:
            obstacle = self._obstacle(node)
            if obstacle:
                missed.append(f"{why} (%{node.name}), and {obstacle}")
            else:
                exact[node] = ratio
        norms = {node: ratio for node, ratio in exact.items() if op_name(node) in _RMS}
        for node, ratio in exact.items():
            if node in norms:
                self._norm(node, ratio, norms)
            else:
                self._mean(node, ratio)
        return missed

    def _counting(self) -> Iterator[tuple[fx.Node, str]]:
        """The operators that count channels of the group, and how."""
        for node in self.rewriter.graph.nodes:
            if node.op == "call_function":
                relate(self.space, node)
        seen: set[fx.Node] = set()
        for relation in self.space.relations:
            if isinstance(relation, Count) and relation.node not in seen:
                inner = self.space.place[relation.axis] is None
                if relation.axis in self.atoms or (inner and self._of_input(relation.node)):
                    seen.add(relation.node)
                    yield relation.node, relation.reason

    def _of_input(self, node: fx.Node) -> bool:
        return any(
            (n.name, d) in self.group.places for n in node.all_input_nodes for d in range(len(tensor_shape(n) or ()))
        )

    def _kept(self, label: Index) -> Any:
        return self.stays[label]

    def _ratio(self, node: fx.Node) -> float:
        """The share of what an operator counts that stays; not 1 where channels of some groups of a norm go."""
        args = bind(node)
        x: fx.Node = args["input"] if "input" in args else args["self"]
        rank = len(tensor_shape(x) or ())
        if "normalized_shape" in args:
            dims = list(range(rank - len(args["normalized_shape"]), rank))
        elif op_name(node) in ("group_norm", "native_group_norm"):
            groups = int(args["num_groups"] if "num_groups" in args else args["group"])
            label = self.group.places.get((x.name, 1))
            if label is not None:
                mask = self._kept(label).reshape(groups, -1)
                share = mask[mask.any(axis=1)].mean() if mask.any() else 1.0
                if share != 1.0:
                    return float(share)
            dims = list(range(2, rank))
        else:
            given = args.get("dim")
            given = [given] if isinstance(given, int) else given
            dims = [d % rank for d in given] if given else list(range(rank))
        places = self.group.places
        shares = [float(self._kept(places[x.name, d]).mean()) for d in dims if (x.name, d) in places]
        return math.prod(shares)

    def _obstacle(self, node: fx.Node) -> str:
        """Why an operator cannot be made to count the channels that are gone; empty if it can."""
        name, args = op_name(node), bind(node)
        if name in _LAYER:
            return "no other weights make it center over those that are gone too"
        if name in _RMS:
            x = args["input"]
            if isinstance(args["eps"], fx.Node):
                return "its epsilon is a value"
        elif name == "mean":
            x = args["self"]
            if not _is_square(x):
                return "it is not a mean of squares"
        else:
            return "it is no RMS norm"
        relation = Sum(node, next(a for a in self.atoms if self.space.place[a] is not None), (x,))
        return why_not_zero(self.space, self.atoms, [relation])

    def _norm(self, node: fx.Node, ratio: float, norms: dict[fx.Node, float]) -> None:
        args = bind(node)
        x, shape = args["input"], args["normalized_shape"]
        eps = _default_eps(x) if args["eps"] is None else float(args["eps"])
        gain = self._gain(node, args["weight"], math.sqrt(1 / ratio), norms)
        self.rewriter.set_args(node, [x, shape, gain, eps / ratio], {})

    def _gain(self, node: fx.Node, gain: fx.Node | None, factor: float, norms: dict[fx.Node, float]) -> fx.Node:
        """The gain times a factor: the weight itself where only norms that change alike read it."""
        rewriter = self.rewriter
        if gain is None:
            return self._new_gain(node, factor)  # each its own: they may differ in size
        if (gain, factor) in self.gains:
            return self.gains[gain, factor]
        if gain.op == "get_attr":
            name = str(gain.target)
            scaled = self.program.weights[name].scale(factor)
            if self._only_read_by(name, {n for n, ratio in norms.items() if math.sqrt(1 / ratio) == factor}):
                new = rewriter.weight(name, scaled)
            else:
                new = rewriter.weight(rewriter.fresh_weight_name(f"{name}_rescaled"), scaled)
        else:
            with rewriter.before(node):
                new = rewriter.call(aten.mul.Tensor, gain, factor, like=gain)
        self._take_place(new, gain)
        self.gains[gain, factor] = new
        return new

    def _new_gain(self, node: fx.Node, factor: float) -> fx.Node:
        args = bind(node)
        x, shape = args["input"], args["normalized_shape"]
        sizes = [int(size) for size in x.meta["val"].shape[-len(shape) :]]
        base = f"{node.meta.get(ORIGIN) or 'norm'}.rescaled"
        value = torch.full(sizes, factor, dtype=x.meta["val"].dtype)
        new = self.rewriter.weight(self.rewriter.fresh_weight_name(base), Weight.from_tensor(value))
        first = len(tensor_shape(x) or ()) - len(shape)
        for dim in range(len(shape)):
            if (x.name, first + dim) in self.group.places:
                self.group.places[new.name, dim] = self.group.places[x.name, first + dim]
        return new

    def _only_read_by(self, name: str, norms: set[fx.Node]) -> bool:
        """Whether nothing but these norms reads a weight, and they as their gain."""
        for graph in self.program.graphs.values():
            for weight in graph.find_nodes(op="get_attr"):
                if weight.target == name and not all(
                    user in norms and bind(user)["weight"] is weight and user.all_input_nodes.count(weight) == 1
                    for user in weight.users
                ):
                    return False
        return True

    def _mean(self, node: fx.Node, ratio: float) -> None:
        readers = list(node.users)
        with self.rewriter.after(node):
            new = self.rewriter.call(aten.mul.Tensor, node, ratio, like=node)
        for reader in readers:
            self.rewriter.replace_in(reader, node, new)
        self._take_place(new, node)

    def _take_place(self, new: fx.Node, old: fx.Node) -> None:
        """A value that is new is cut where the one that it was made from is."""
        for (name, dim), label in list(self.group.places.items()):
            if name == old.name:
                self.group.places[new.name, dim] = label


def _is_square(node: fx.Node) -> bool:
    while op_name(node) in ("_to_copy", "to") and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    match op_name(node):
        case "pow":
            return bool(node.args[1] == 2)
        case "mul" | "multiply":
            return node.args[0] is node.args[1]
        case name:
            return name == "square"


def _default_eps(x: fx.Node) -> float:
    """What PyTorch adds where none is given: the epsilon of the type that it computes in."""
    dtype = x.meta["val"].dtype
    return torch.finfo(torch.float32 if dtype.itemsize < 4 else dtype).eps


__all__ = ["rescale_norms"]
