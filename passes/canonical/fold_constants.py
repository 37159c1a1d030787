"""Constant folding: what depends on weights and literals alone is computed once, here.

    %i = aten.arange(8)                     %0 = weight "mask.ge" : bool[8, 8]
    %c = aten.unsqueeze(%i, 1)
    %m = aten.ge(%c, %i)
    ... %m ...                              ... %0 ...

Bounded in size: a result may take at most ``max_bytes``, and never more than the weights that it replaces unless it is
tiny; nothing on the way there may be large either. Views and casts of a weight that nothing else reads become
lazy weights at any size: nothing is computed. Quantised storage (8-bit and smaller) is not expanded: a model that came
with it keeps it. Random and effectful operators stay, and so do ``full``, ``zeros``, ``ones`` on their own: they are
constants in their shortest form. What fails when it is computed stays too, and fails when the program runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.fx.node import map_arg

from ...ir.errors import PostconditionError
from ...ir.program import ORIGIN, Program
from ...ir.rewrite import Rewriter, has_effect, is_op, is_random
from ...ir.views import permutation
from ...ir.weights import Weight
from ..base import Context, Effect, Pass, Prop, Stats, option
from .arguments import argument
from .layout import COMPOSED_VIEWS

aten = torch.ops.aten

TINY_BYTES = 16 << 10
"""Results of at most this size are folded even when they are larger than what they are computed from."""

QUANTISED_NUMEL = 64
"""Integer weights of 8 bits with more elements than this are taken for quantised storage."""

_LITERALS = (aten.full, aten.zeros, aten.ones, aten.scalar_tensor, aten.empty)
_UNFIXED = (
    aten.empty,
    aten.empty_like,
    aten.new_empty,
    aten.empty_strided,
    aten.new_empty_strided,
)
_NUMBERS = (int, float, bool)


@dataclass(frozen=True, kw_only=True)
class FoldConstants(Pass):
    """Compute what depends on weights and literals alone, bounded in size."""

    name: ClassVar[str] = "fold-constants"
    effect: ClassVar[Effect] = Effect.EXACT
    breaks: ClassVar[frozenset[Prop]] = frozenset()

    max_bytes: int = option(1 << 20, ge=0, help="largest result, in bytes")

    def run(self, program: Program, ctx: Context) -> Stats:
        """Fold the largest constant subgraphs of every graph."""
        stats = Stats()
        for name in program.graphs:
            rewriter = Rewriter(program, self.name, name)
            _Folder(rewriter, self.max_bytes, stats).fold()
            if rewriter.mutations:
                rewriter.erase_dead()
        return stats


class _Folder:
    def __init__(self, rewriter: Rewriter, max_bytes: int, stats: Stats) -> None:
        self.rewriter = rewriter
        self.program = rewriter.program
        self.max_bytes = max_bytes
        self.stats = stats
        self.constant: dict[fx.Node, int] = {}  # constant nodes, with the bytes of the weights that they stand on
        self.computed: dict[fx.Node, Any] = {}

    def fold(self) -> None:
        for node in list(self.rewriter.graph.nodes):
            # A size that is fixed is known without computing anything, whatever it is a size of.
            if node.op == "call_function" and isinstance(node.meta.get("val"), _NUMBERS) and _pure(node):
                self.rewriter.replace_with_number(node, node.meta["val"])
                self.stats.hits += 1
        nodes = list(self.rewriter.graph.nodes)
        for node in nodes:
            standing_on = self._constant_on(node)
            if standing_on is not None:
                self.constant[node] = standing_on
        worth = {node for node in self.constant if node.op == "call_function" and self._allowed(node)}
        for node in nodes:
            if node in worth and any(user not in worth for user in node.users):
                self._replace(node)

    def _constant_on(self, node: fx.Node) -> int | None:
        """For a constant node, the bytes of the weights below it; None for any other node."""
        if node.op == "get_attr":
            weight = self.program.weights.get(str(node.target))
            if weight is None or weight.is_meta or _quantised(weight):
                return None
            return weight.nbytes
        if node.op != "call_function" or not _pure(node) or not _static(node.meta.get("val")):
            return None
        below = [self.constant.get(operand) for operand in node.all_input_nodes]
        if any(b is None for b in below):
            return None
        # A step may be larger than the result that is kept, but must not be large.
        if _nbytes(node.meta["val"]) > 4 * max(self.max_bytes, TINY_BYTES) and not _reads_lazily(node):
            return None
        big = [a for a in node.all_input_nodes if a.op == "get_attr" and _nbytes(a.meta["val"]) > 4 * self.max_bytes]
        if big and not _reads_lazily(node):
            return None
        return sum(b for b in below if b is not None)

    def _allowed(self, node: fx.Node) -> bool:
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor) or is_op(node, *_LITERALS):
            return False
        self.stats.attempts += 1
        if _lazy_weight(self.program, node) is not None:
            return True
        size = _nbytes(value)
        if size > self.max_bytes:
            self.stats.miss("the result is too large")
            return False
        if size > max(self.constant[node], TINY_BYTES):
            self.stats.miss("the result is larger than what it is computed from")
            return False
        return True

    def _replace(self, node: fx.Node) -> None:
        value = node.meta["val"]
        # Even where others read the weight below: the numbers are shared, and equal expressions are known as equal.
        weight = _lazy_weight(self.program, node, shared=True)
        if weight is None:
            try:
                result = self._compute(node)
            except (IndexError, RuntimeError) as error:
                self.stats.miss(f"it cannot be computed: {(str(error).splitlines() or [''])[0]}", node)
                return
            # A view would keep the whole tensor below it alive.
            owned = (
                result.untyped_storage().nbytes() == result.numel() * result.element_size() and result.is_contiguous()
            )
            weight = Weight.from_tensor(result if owned else result.clone(memory_format=torch.contiguous_format))
        if tuple(weight.shape) != tuple(value.shape) or weight.dtype != value.dtype:
            raise PostconditionError(
                f"folding gave {weight.dtype} {list(weight.shape)}",
                pass_name=FoldConstants.name,
                node=node.name,
                origin=node.meta.get(ORIGIN),
                expected=f"{value.dtype} {list(value.shape)}",
            )
        name = self.rewriter.fresh_weight_name(_weight_name(node))
        self.rewriter.replace(node, self.rewriter.weight(name, weight))
        self.stats.hits += 1

    def _compute(self, node: fx.Node) -> Any:
        """Evaluate a constant node without recursion (chains may be long); small results are kept for its siblings."""
        stack = [node]
        local: dict[fx.Node, Any] = {}
        while stack:
            top = stack[-1]
            if top in self.computed or top in local:
                stack.pop()
                continue
            missing = [a for a in top.all_input_nodes if a not in self.computed and a not in local]
            if missing:
                stack.extend(missing)
                continue
            stack.pop()
            if top.op == "get_attr":
                local[top] = self.program.weights[str(top.target)].tensor()
                continue

            def read(n: fx.Node) -> Any:
                return self.computed[n] if n in self.computed else local[n]

            with torch.no_grad():
                value = top.target(
                    *map_arg(top.args, read),
                    **map_arg(top.kwargs, read),
                )  # type: ignore[operator]
            (self.computed if _nbytes(top.meta["val"]) <= TINY_BYTES else local)[top] = value
        return self.computed[node] if node in self.computed else local[node]


def _pure(node: fx.Node) -> bool:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        fixed = not is_random(node) and not has_effect(node) and not is_op(node, *_UNFIXED)
        return target.namespace == "aten" and fixed
    return getattr(target, "__module__", "") in ("_operator", "torch", "math")


def _static(value: Any) -> bool:
    """Whether a value is made of tensors whose shapes hold no symbol."""
    leaves = pytree.tree_leaves(value)
    return bool(leaves) and all(
        isinstance(leaf, torch.Tensor) and all(isinstance(s, int) for s in leaf.shape) for leaf in leaves
    )


def _nbytes(value: Any) -> int:
    return sum(math.prod(t.shape) * t.element_size() for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor))


def _quantised(weight: Weight) -> bool:
    return weight.dtype.itemsize == 1 and weight.dtype is not torch.bool and weight.numel > QUANTISED_NUMEL


def _reads_lazily(node: fx.Node) -> bool:
    """Whether a node only views its input, so that a large one costs nothing."""
    return permutation(node) is not None or is_op(node, *COMPOSED_VIEWS, aten.slice, aten.select, aten.narrow)


def _lazy_weight(program: Program, node: fx.Node, *, shared: bool = False) -> Weight | None:
    """The weight expression of a chain of views and casts over a weight, which others may read if it is ``shared``."""
    chain: list[Callable[[Weight], Weight]] = []
    at = node
    while at.op == "call_function":
        step = _lazy_step(at)
        if step is None or (at is not node and len(at.users) != 1 and not shared):
            return None
        chain.append(step)
        at = at.all_input_nodes[0]
    if at.op != "get_attr" or not chain or (len(at.users) != 1 and not shared):
        return None
    base = program.weights.get(str(at.target))
    if base is None or _quantised(base) or _nbytes(node.meta["val"]) > base.nbytes:
        return None
    for step in reversed(chain):
        base = step(base)
    return base


def _lazy_step(node: fx.Node) -> Callable[[Weight], Weight] | None:
    value = node.meta.get("val")
    if len(node.all_input_nodes) != 1 or not isinstance(value, torch.Tensor) or not _static(value):
        return None
    dims = permutation(node)
    if dims is not None:
        return lambda w: w.permute(dims)
    if is_op(node, *COMPOSED_VIEWS) and node.target is not aten.view.dtype:
        return lambda w: w.reshape(value.shape)
    if node.target is aten._to_copy.default and set(node.kwargs) == {"dtype"}:
        return lambda w: w.cast(value.dtype)
    if is_op(node, aten.slice):
        rank = value.dim()
        size = node.all_input_nodes[0].meta["val"].shape
        dim = argument(node, "dim") % rank
        start, stop, step = (
            argument(node, "start"),
            argument(node, "end"),
            argument(node, "step"),
        )
        start, stop, step = slice(start, stop, step).indices(size[dim])
        return lambda w: w.slice(dim, start, max(start, stop), step)
    return None


def _weight_name(node: fx.Node) -> str:
    """``module.path.op``: where the value was computed, and by what."""
    operation = getattr(getattr(node.target, "overloadpacket", None), "__name__", None) or node.name
    origin = re.sub(r"[^0-9A-Za-z_.]+", ".", str(node.meta.get(ORIGIN) or "")).strip(".")
    return f"{origin}.{operation}" if origin else f"constant.{operation}"
