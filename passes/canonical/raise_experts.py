"""Mixtures of experts that sort their tokens become linear maps that name each token's experts.

Grouped products want rows sorted by expert: the chosen experts are sorted, rows are gathered in that order, multiplied
group by group, scaled by their weights, and put back. All that bookkeeping goes:

    %sorted = aten.sort(%experts)...; %rows = aten.index(%x, [%order // k]); %ends = cumsum(histc(...))
    %a = grouped_mm(%rows, %w1, %ends)              %a = graphlathe.expert_linear(%x, %w1, %experts)
    %b = aten.silu(%a)                              %b = aten.silu(%a)
    %c = grouped_mm(%b, %w2, %ends)                 %c = graphlathe.expert_linear(%b, %w2, %experts)
    %back = aten.index(%c, [%inverse])

Experts that gather a whole matrix for each row, ``w[experts] @ x[..., None]``, are written with the same operator.
Whatever stands between the products (activations, gates, biases looked up by expert) is kept, one row per token and
expert, in the order of the tokens.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.fx.node import map_arg

from ...ir.flow import is_pointwise
from ...ir.program import Program
from ...ir.rewrite import Rewriter, is_op
from ...kernels import expert_linear
from ..base import Context, Effect, Pass, Stats

aten = torch.ops.aten

_VIEWS = (aten.reshape, aten.view, aten._unsafe_view, aten.flatten)
_ON_CHANNELS = (aten.slice, aten.chunk, aten.split, aten.split_with_sizes)


class _NotSorted(Exception):
    """Why a grouped product was left."""


@dataclass(frozen=True, kw_only=True)
class RaiseExperts(Pass):
    """Write experts that work on sorted tokens as linear maps that choose an expert for each token."""

    name: ClassVar[str] = "raise-experts"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, program: Program, ctx: Context) -> Stats:
        """Visit every sort whose result orders grouped products."""
        stats = Stats()
        for name in program.graphs:
            rewriter = Rewriter(program, self.name, name)
            sorts: dict[fx.Node, list[fx.Node]] = {}
            for node in list(rewriter.graph.nodes):
                if is_grouped_product(node):
                    stats.attempts += 1
                    try:
                        sorts.setdefault(_sort_of(node), []).append(node)
                    except _NotSorted as reason:
                        stats.miss(str(reason), node)
            for sort, products in sorts.items():
                try:
                    _Unsorted(rewriter, sort).rewrite()
                    stats.hits += len(products)
                except _NotSorted as reason:
                    for product in products:
                        stats.miss(str(reason), product)
            for node in list(rewriter.graph.nodes):
                found = None if node._erased else _gathered_weights(node)
                if found is not None:
                    stats.attempts += 1
                    stats.hits += 1
                    with rewriter.before(node):
                        rewriter.replace(node, _one_expert_each(rewriter, node, *found))
            rewriter.erase_dead()
        return stats


def is_grouped_product(node: fx.Node) -> bool:
    """Whether a node multiplies groups of rows by a matrix each; libraries bring their own such operators."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    return target._opname in ("_grouped_mm", "grouped_mm", "grouped_mm_fallback")


def _source(node: Any, *through: Any) -> Any:
    while is_op(node, *through):
        node = node.args[0]
    return node


def _sort_of(product: fx.Node) -> fx.Node:
    """The sort of the experts from which the group's ends were counted."""
    ends: Any = product.args[2] if len(product.args) > 2 else product.kwargs.get("offs")
    counted = _source(ends, aten._to_copy, aten.to, aten.cumsum, aten.histc, aten.bincount)
    if isinstance(counted, fx.Node) and counted.target is operator.getitem:
        sort: Any = counted.args[0]
        if is_op(sort, aten.sort) and counted.args[1] == 0:
            return sort
    raise _NotSorted("its groups are not counted from a sort of the chosen experts")


def _gathered_weights(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, bool] | None:
    """``w[i] @ x`` for each row: the rows, the weight, the experts, and whether the weight is [out, in]."""
    if not is_op(node, aten.squeeze) or not is_op(node.args[0], aten.matmul):
        return None
    product: Any = node.args[0]
    left, right = product.args[:2]
    for gathered, column, is_left in ((left, right, True), (right, left, False)):
        if not is_op(gathered, aten.index) or not is_op(column, aten.unsqueeze) or len(gathered.args[1]) != 1:
            continue
        table, index = gathered.args[0], gathered.args[1][0]
        axis = -1 if is_left else 1
        squeezed = node.args[1] if isinstance(node.args[1], int) else None
        dims = {axis % 3, axis}
        rows: Any = column.args[0]
        if table.op != "get_attr" or index.meta["val"].dim() != 1 or rows.meta["val"].dim() != 2:
            continue
        if column.args[1] in dims and squeezed in dims and index.meta["val"].dtype is not torch.bool:
            return rows, table, index, is_left
    return None


def _one_expert_each(
    rewriter: Rewriter, node: fx.Node, x: fx.Node, weight: fx.Node, index: fx.Node, out_in: bool
) -> fx.Node:
    """Rows that have one expert each are tokens with a top-1 choice."""
    call = rewriter.call
    if out_in:
        weight = call(aten.transpose.int, weight, 1, 2, like=weight)
    rows, chosen = (call(aten.unsqueeze.default, t, 1, like=node) for t in (x, index))
    return call(aten.squeeze.dim, call(expert_linear, rows, weight, chosen, like=node), 1, like=node)


class _Unsorted:
    """Rewrites one mixture: values with rows in sorted order get a counterpart [tokens, top_k, ...]."""

    def __init__(self, rewriter: Rewriter, sort: fx.Node) -> None:
        self.rewriter = rewriter
        self.sort = sort
        flat: Any = sort.args[0]
        self.indices = _source(flat, *_VIEWS)
        shape = self.indices.meta["val"].shape
        if len(shape) != 2 or not isinstance(shape[1], int):
            raise _NotSorted("the chosen experts are no table [tokens, top_k]")
        self.top_k = shape[1]
        picked = {u.args[1]: u for u in sort.users}
        self.experts, self.order = picked.get(0), picked.get(1)
        if self.order is None:
            raise _NotSorted("the order of the sorted rows is not used")
        self.inverse = _inverse(self.order)
        self.made: dict[fx.Node, fx.Node] = {}

    def rewrite(self) -> None:
        """Replace what is put back in the order of the tokens."""
        backs: list[fx.Node] = []
        position = {node: i for i, node in enumerate(self.rewriter.graph.nodes)}
        assert self.order is not None
        reached: set[fx.Node] = set()
        stack = [u for u in (*self.order.users, *(self.experts.users if self.experts is not None else ()))]
        while stack:
            node = stack.pop()
            if node in reached or not self._is_sorted(node):
                continue
            reached.add(node)
            stack.extend(node.users)
        if not any(map(self._is_back, reached)):
            raise _NotSorted("the rows are not put back in the order of the tokens by an index")
        for node in sorted(reached, key=position.__getitem__):
            with self.rewriter.before(node):
                if self._is_back(node):
                    source = self.made.get(node.args[0])  # type: ignore[arg-type]
                    if source is None:
                        raise _NotSorted("something unknown is put back in the order of the tokens")
                    width = source.meta["val"].shape[-1]
                    self.made[node] = self.rewriter.call(aten.reshape.default, source, [-1, width], like=node)
                    backs.append(node)
                else:
                    new = self._translated(node)
                    if new is not None:
                        self.made[node] = new
        for node in backs:
            self.rewriter.replace(node, self.made[node])

    def _is_back(self, node: fx.Node) -> bool:
        return is_op(node, aten.index) and self.inverse is not None and list(node.args[1]) == [self.inverse]  # type: ignore[arg-type]

    def _is_sorted(self, node: fx.Node) -> bool:
        """Whether a value belongs to the sorted part: everything up to where rows are put back."""
        return node.op == "call_function" and not any(self._is_back(a) for a in node.all_input_nodes)

    def _translated(self, node: fx.Node) -> fx.Node | None:
        call = self.rewriter.call
        args: Any = node.args
        if is_op(node, aten.index) and len(args[1]) == 1:
            found = self._gathered(node, args[0], args[1][0])
            if found is not None:
                return found
        sources = [a for a in node.all_input_nodes if a in self.made]
        if not sources:
            return None  # counts of rows, or the order itself
        if is_grouped_product(node):
            return call(expert_linear, self.made[args[0]], args[1], self.indices, like=node)
        if node.target is operator.getitem:
            return call(operator.getitem, self.made[args[0]], args[1], like=node)
        if is_op(node, aten.unsqueeze) and args[1] in (-1, node.meta["val"].dim() - 1):
            return call(aten.unsqueeze.default, self.made[args[0]], -1, like=node)
        if is_op(node, *_ON_CHANNELS):
            return self._on_channels(node)
        if is_pointwise(node) or is_op(node, aten._to_copy):
            others = [a for a in node.all_input_nodes if a not in self.made]
            if any(isinstance(a.meta["val"], torch.Tensor) and a.meta["val"].dim() > 1 for a in others):
                raise _NotSorted(f"sorted rows meet other values at {node.target}")
            new = map_arg((args, dict(node.kwargs)), lambda a: self.made.get(a, a))
            return call(node.target, *new[0], like=node, **new[1])  # type: ignore[arg-type]
        raise _NotSorted(f"sorted rows go through {node.target}")

    def _gathered(self, node: fx.Node, source: fx.Node, index: Any) -> fx.Node | None:
        """Rows picked for sorted places: of the tokens, of their weights, or of a table by expert."""
        call, rank = self.rewriter.call, source.meta["val"].dim()
        if index is self.experts:
            return call(aten.index.Tensor, source, [self.indices], like=node)
        if index is self.order and rank == 1:
            flat = _source(source, *_VIEWS)
            if flat.meta["val"].dim() == 2 and flat.meta["val"].shape[1] == self.top_k:
                return flat
            return call(aten.reshape.default, source, [-1, self.top_k], like=node)
        if is_op(index, aten.floor_divide, aten.div) and list(index.args[:2]) == [self.order, self.top_k] and rank == 2:
            return call(aten.unsqueeze.default, source, 1, like=node)
        return None

    def _on_channels(self, node: fx.Node) -> fx.Node:
        args = list(node.args)
        rank = self.made[node.args[0]].meta["val"].dim() - 1  # type: ignore[index]
        place = 1 if is_op(node, aten.slice) else 2
        axis: Any = args[place] if len(args) > place else node.kwargs.get("dim", 0)
        if axis % rank != rank - 1:
            raise _NotSorted(f"sorted rows are cut by {node.target}")
        args[place : place + 1] = [-1]
        return self.rewriter.call(node.target, self.made[args[0]], *args[1:], like=node)  # type: ignore[arg-type]


def _inverse(order: fx.Node) -> fx.Node | None:
    """The permutation that undoes an order: written by an index, or sorted again."""
    for user in order.users:
        if is_op(user, aten.index_put) and list(user.args[1]) == [order] and is_op(user.args[2], aten.arange):  # type: ignore[arg-type]
            return user
        if is_op(user, aten.scatter) and user.args[2] is order and is_op(user.args[3], aten.arange):
            return user
        if is_op(user, aten.argsort) and user.args[0] is order:
            return user
    return None
