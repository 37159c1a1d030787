"""Products of two activations in one spelling: ``matmul``.

``einsum`` of two operands that is a batched product becomes permutations and a ``matmul``; ``baddbmm`` becomes a
``matmul``, a factor and a sum.
"""

from __future__ import annotations

import string
from typing import Any, cast

import torch
from torch import fx

from ...ir.rewrite import Rewriter, is_op
from .arguments import argument

aten = torch.ops.aten


def spell_products(rewriter: Rewriter) -> int:
    """Rewrite every product of one graph; returns how many."""
    hits = 0
    for node in list(rewriter.graph.nodes):
        new = None
        if is_op(node, aten.einsum):
            new = _einsum(rewriter, node)
        elif is_op(node, aten.baddbmm):
            new = _baddbmm(rewriter, node)
        if new is not None:
            rewriter.replace(node, new)
            hits += 1
    return hits


def _baddbmm(rewriter: Rewriter, node: fx.Node) -> fx.Node:
    """``beta * input + alpha * (a @ b)``."""
    beta, alpha = argument(node, "beta"), argument(node, "alpha")
    source, a, b = node.args[:3]
    with rewriter.before(node):
        product = rewriter.call(aten.matmul.default, a, b, like=node)
        if alpha != 1:
            product = rewriter.call(aten.mul.Tensor, product, alpha, like=node)
        if beta == 0:
            return product
        if beta != 1:
            source = rewriter.call(aten.mul.Tensor, source, beta, like=node)
        return rewriter.call(aten.add.Tensor, product, source, like=node)


def _einsum(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """Two operands that share batch labels, have one label each, and are summed over one label."""
    equation, operands = node.args[:2]
    parts = _parse(str(equation), operands)
    if parts is None or not isinstance(operands, (list, tuple)) or len(operands) != 2:
        return None
    (left, right), out = parts
    a, b = cast("tuple[fx.Node, fx.Node]", operands)
    batch = [c for c in out if c in left and c in right]
    rows, columns = [c for c in out if c not in right], [c for c in out if c not in left]
    summed = [c for c in left if c in right and c not in out]
    if not len(rows) == len(columns) == len(summed) == 1 or not batch:
        return None
    if set(left) - {*batch, *rows, *summed} or set(right) - {*batch, *columns, *summed}:
        return None  # a label that only one operand has and that is summed
    if not _same_batch(a, left, b, right, batch):
        return None
    with rewriter.before(node):
        x = _permuted(rewriter, a, [left.index(c) for c in (*batch, *rows, *summed)])
        y = _permuted(rewriter, b, [right.index(c) for c in (*batch, *summed, *columns)])
        product = rewriter.call(aten.matmul.default, x, y, like=node)
        made = [*batch, *rows, *columns]
        return _permuted(rewriter, product, [made.index(c) for c in out])


def _parse(equation: str, operands: Any) -> tuple[list[str], str] | None:
    """The labels of both operands and of the result, with one label for each axis that an ellipsis stands for."""
    text = equation.replace(" ", "")
    if "->" not in text or not isinstance(operands, (list, tuple)) or len(operands) != 2:
        return None
    inputs, out = text.split("->")
    terms = inputs.split(",")
    if "..." in text:
        free = "".join(c for c in string.ascii_uppercase if c not in text)
        hidden = [x.meta["val"].dim() - len(term.replace("...", "")) for x, term in zip(operands, terms, strict=True)]
        if not all("..." in term for term in (*terms, out)) or len(set(hidden)) != 1:
            return None
        terms, out = ([t.replace("...", free[: hidden[0]]) for t in terms], out.replace("...", free[: hidden[0]]))
    plain = all(len(set(term)) == len(term) for term in (*terms, out))
    return (terms, out) if len(terms) == 2 and plain else None


def _same_batch(a: fx.Node, left: str, b: fx.Node, right: str, batch: list[str]) -> bool:
    return all(str(a.meta["val"].shape[left.index(c)]) == str(b.meta["val"].shape[right.index(c)]) for c in batch)


def _permuted(rewriter: Rewriter, x: Any, order: list[int]) -> fx.Node:
    return x if order == sorted(order) else rewriter.call(aten.permute.default, x, order, like=x)
