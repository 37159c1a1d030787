"""Attention and rotary embeddings: heads, groups of heads, and the channels inside a head."""

from __future__ import annotations

import numpy as np

from ..types import expr_of
from .pointwise import broadcast
from .relate import Relate, rule, same_size


@rule("scaled_dot_product_attention", "graphlathe.attention")
def _attention(r: Relate) -> None:
    q, k, v, y = r.args["query"], r.args["key"], r.args["value"], r.results[0]
    mask = r.args.get("attn_mask", r.args.get("mask"))
    if mask is not None:
        _mask(r, mask, q, k)
    r.tie((q, -1), (k, -1))
    r.sum((q, -1), q, k)
    r.role((q, -1), "query and key channel")
    r.tie((v, -1), (y, -1))
    r.role((v, -1), "value channel")
    r.tie((q, -2), (y, -2))
    for node in (k, v):
        r.pin((node, -2), "attention is normalized over it")
    broadcast(r, (), y)
    for node in (q, k, v):
        for dim in range(r.rank(node) - 3):
            place = dim - r.rank(node)
            if same_size(r.shape(node)[dim], r.shape(y)[place]):
                r.tie((node, dim), (y, place))
    if r.rank(y) < 3:
        return
    r.role((q, -3), "head")
    r.tie((q, -3), (y, -3))
    sinks = r.args.get("sinks")
    if sinks is not None:
        r.tie((sinks, 0), (q, -3))
    heads = expr_of(r.shape(q)[-3])
    for node in (k, v):
        own = expr_of(r.shape(node)[-3])
        if own == heads:
            r.tie((node, -3), (q, -3))
        elif isinstance(own, int) and isinstance(heads, int) and heads % own == 0:
            shared = r.space.inner(heads // own)
            axis = r.axis((node, -3))
            r.junction((q, -3), [shared] if axis is None else [axis, shared])
        else:
            r.pin((q, -3), "its heads do not divide among those of keys and values")
            r.pin((node, -3), "its heads do not divide the queries'")


def _mask(r: Relate, mask: object, q: object, k: object) -> None:
    """A mask is aligned with the scores [..., heads, queries, keys]."""
    from torch import fx

    assert isinstance(mask, fx.Node) and isinstance(q, fx.Node) and isinstance(k, fx.Node)
    for dim in range(1, r.rank(mask) + 1):
        source = (k, -2) if dim == 1 else (q, -dim)
        if dim > r.rank(source[0]):
            continue
        if same_size(r.shape(mask)[-dim], r.shape(source[0])[source[1]]):
            r.tie((mask, -dim), source)


@rule("graphlathe.rotary_embedding")
def _rotary(r: Relate) -> None:
    x, y, rotated = r.args["x"], r.results[0], int(r.args["rotary_dim"])
    r.ties(x, y, ((d, d) for d in range(r.rank(x))))
    half = rotated // 2
    pair = np.arange(half, dtype=np.int64)
    first, second = (2 * pair, 2 * pair + 1) if r.args["interleaved"] else (pair, pair + half)
    r.tie((x, -1), (x, -1), first, second)
    for table in (r.args["cos"], r.args["sin"]):
        broadcast(r, (table,), y, last=1)
        width = expr_of(r.shape(table)[-1])
        whole = np.arange(rotated, dtype=np.int64)
        if width == rotated:
            r.tie((table, -1), (x, -1), whole, whole)
        else:
            r.tie((table, -1), (x, -1), pair, first)


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "_safe_softmax")
def _softmax(r: Relate) -> None:
    x, y = r.args["self"], r.results[0]
    r.ties(x, y, ((d, d) for d in range(r.rank(x))))
    over = r.dim(x, r.args["dim"])
    r.pin((x, over), f"{r.name} is taken over it")
    if over == r.rank(x) - 1 and r.rank(x) > 2:
        r.role((x, -3), "head")
