"""Products of two activations in one spelling: ``matmul``.

``einsum`` of two operands that is a batched product becomes permutations and a ``matmul``; ``baddbmm`` becomes a
``matmul``, a factor and a sum.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

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
    if not isinstance(operands, (list, tuple)) or len(operands) != 2:
        return None
    a: Any
    b: Any
    a, b = operands
    parts = einsum_labels(str(equation), [a, b])
    if parts is None:
        return None
    (left, right), out = parts
    batch = [c for c in out if c in left and c in right]
    rows, columns = [c for c in out if c not in right], [c for c in out if c not in left]
    summed = [c for c in left if c in right and c not in out]
    if not len(rows) == len(columns) == len(summed) == 1 or not batch:
        return None
    if set(left) - {*batch, *rows, *summed} or set(right) - {*batch, *columns, *summed}:
        return None  # a label that only one operand has and that is summed
    if not _same_sizes(a, left, b, right, [*batch, *summed]):
        return None  # an operand is broadcast
    with rewriter.before(node):
        x = _permuted(rewriter, a, [left.index(c) for c in (*batch, *rows, *summed)])
        y = _permuted(rewriter, b, [right.index(c) for c in (*batch, *summed, *columns)])
        product = rewriter.call(aten.matmul.default, x, y, like=node)
        made = [*batch, *rows, *columns]
        return _permuted(rewriter, product, [made.index(c) for c in out])


def einsum_labels(equation: str, operands: Sequence[fx.Node]) -> tuple[list[str], str] | None:
    """The labels of each operand and of the result, with one label for each axis that an ellipsis stands for.

    Args:
        equation: of an einsum, with an explicit result.
        operands: its operands.

    Returns:
        One letter for each axis; None if a term repeats a label, or the ellipsis is summed over.
    """
    text = equation.replace(" ", "")
    if "->" not in text:
        return None
    inputs, out = text.split("->")
    terms = inputs.split(",")
    free = "".join(c for c in string.ascii_uppercase if c not in text)
    hidden = [x.meta["val"].dim() - len(term.replace("...", "")) for x, term in zip(operands, terms, strict=True)]
    if any(hidden) and "..." not in out:
        return None
    # Aligned on the right, as broadcasting is.
    terms = [
        term.replace("...", free[max(hidden) - count : max(hidden)]) for term, count in zip(terms, hidden, strict=True)
    ]
    out = out.replace("...", free[: max(hidden)])
    return (terms, out) if all(len(set(term)) == len(term) for term in (*terms, out)) else None


def _same_sizes(a: fx.Node, left: str, b: fx.Node, right: str, labels: list[str]) -> bool:
    return all(str(a.meta["val"].shape[left.index(c)]) == str(b.meta["val"].shape[right.index(c)]) for c in labels)


def _permuted(rewriter: Rewriter, x: Any, order: list[int]) -> fx.Node:
    return x if order == sorted(order) else rewriter.call(aten.permute.default, x, order, like=x)
