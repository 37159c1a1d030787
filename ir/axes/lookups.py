"""Rows that are looked up by number: embeddings, gathers and indexing."""

from __future__ import annotations

import torch
from torch import fx

from .pointwise import broadcast
from .relate import Relate, rule, same_size

_BY_NUMBER = "its elements are looked up by number"


@rule("embedding")
def _embedding(r: Relate) -> None:
    weight, indices, y = r.args["weight"], r.args["indices"], r.results[0]
    r.pin((weight, 0), _BY_NUMBER)
    r.tie((weight, 1), (y, -1))
    r.ties(indices, y, ((d, d) for d in range(r.rank(indices))))


@rule("index_select")
def _index_select(r: Relate) -> None:
    x, index, y = r.args["self"], r.args["index"], r.results[0]
    dim = r.dim(x, r.args["dim"])
    r.pin((x, dim), _BY_NUMBER)
    r.ties(x, y, ((d, d) for d in range(r.rank(x)) if d != dim))
    if r.rank(index):
        r.tie((index, 0), (y, dim))


@rule("gather")
def _gather(r: Relate) -> None:
    x, index, y = r.args["self"], r.args["index"], r.results[0]
    dim = r.dim(x, r.args["dim"])
    r.pin((x, dim), _BY_NUMBER)
    r.ties(index, y, ((d, d) for d in range(r.rank(y))))
    for d in range(r.rank(x)):
        if d != dim and same_size(r.shape(x)[d], r.shape(y)[d]):
            r.tie((x, d), (y, d))


@rule("index")
def _index(r: Relate) -> None:
    x, y = r.args["self"], r.results[0]
    indices: list[fx.Node | None] = list(r.args["indices"])
    given = [d for d, index in enumerate(indices) if index is not None]
    tensors = [index for index in indices if index is not None]
    if any(t.meta["val"].dtype in (torch.bool, torch.uint8) for t in tensors):
        return
    if not given or given != list(range(given[0], given[-1] + 1)):
        return
    rank = max(r.rank(t) for t in tensors)
    for d in range(r.rank(x)):
        if d in given:
            r.pin((x, d), _BY_NUMBER)
        else:
            r.tie((x, d), (y, d if d < given[0] else d - len(given) + rank))
    for t in tensors:
        for d in range(r.rank(t)):
            place = given[0] + rank - r.rank(t) + d
            if same_size(r.shape(t)[d], r.shape(y)[place]):
                r.tie((t, d), (y, place))


@rule("masked_scatter")
def _masked_scatter(r: Relate) -> None:
    broadcast(r, (r.args["self"], r.args["mask"]), r.results[0])
    for d in range(r.rank(r.results[0])):
        r.pin((r.results[0], d), "masked_scatter counts elements in order")


@rule("scatter", "scatter_add")
def _scatter(r: Relate) -> None:
    x, y = r.args["self"], r.results[0]
    r.ties(x, y, ((d, d) for d in range(r.rank(x))))
    dim = r.dim(x, r.args["dim"])
    r.pin((x, dim), _BY_NUMBER)
    operands: list[fx.Node] = [o for o in (r.args["index"], r.args.get("src")) if isinstance(o, fx.Node)]
    for operand in operands:
        for d in range(r.rank(operand)):
            if d != dim and same_size(r.shape(operand)[d], r.shape(x)[d]):
                r.tie((operand, d), (y, d))


@rule("index_put")
def _index_put(r: Relate) -> None:
    x, values, y = r.args["self"], r.args["values"], r.results[0]
    indices: list[fx.Node | None] = list(r.args["indices"])
    first = indices[0]
    if len(indices) != 1 or first is None or first.meta["val"].dtype is torch.bool:
        return
    r.tie((x, 0), (y, 0))
    r.pin((x, 0), _BY_NUMBER)
    for d in range(1, r.rank(x)):
        r.tie((x, d), (y, d))
        # Behind the index, the dimensions of what is written are those of the target.
        place = d - r.rank(x)
        if -place <= r.rank(values) and same_size(r.shape(values)[place], r.shape(x)[d]):
            r.tie((values, place), (y, d))
