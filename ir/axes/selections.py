"""Operators that pick, join, repeat or reorder whole dimensions or runs of their elements."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from ..types import expr_of
from ..views import permutation
from .pointwise import broadcast
from .relate import Relate, rule, same_size
from .space import static_size


@rule("permute", "transpose", "t", "mT", "numpy_T")
def _permute(r: Relate) -> None:
    order = permutation(r.node)
    if order is not None:
        r.ties(r.args["self"], r.results[0], ((source, dim) for dim, source in enumerate(order)))


def others(r: Relate, x: fx.Node, y: fx.Node, dim: int) -> None:
    """Tie all dimensions but ``dim``."""
    r.ties(x, y, ((d, d) for d in range(r.rank(x)) if d != dim))


def _run(r: Relate, x: fx.Node, y: fx.Node, dim: int, start: int, step: int = 1) -> None:
    """Elements ``start, start + step...`` of x are y."""
    axis = r.space.axis(y, dim)
    size = static_size(r.shape(y)[dim])
    if r.space.axis(x, dim) is None and axis is None:
        return
    place = np.arange(size, dtype=np.int64)
    if axis is None:
        r.pin((x, dim), f"{r.name} picks it alone", start + step * place)
    else:
        r.tie((x, dim), (y, dim), start + step * place, place)


@rule("slice")
def _slice(r: Relate) -> None:
    x, y, dim = r.args["self"], r.results[0], r.dim(r.args["self"], r.args["dim"])
    others(r, x, y, dim)
    size = expr_of(r.shape(x)[dim])
    if same_size(r.shape(x)[dim], r.shape(y)[dim]):
        r.tie((x, dim), (y, dim))
        return
    start, step = r.args["start"], r.args["step"]
    sizes = (size, expr_of(r.shape(y)[dim]), step, start or 0)
    if not all(isinstance(s, int) for s in sizes):
        return
    start = 0 if start is None else max(0, min(size, start + size if start < 0 else start))
    _run(r, x, y, dim, start, step)


@rule("narrow")
def _narrow(r: Relate) -> None:
    x, y, dim = r.args["self"], r.results[0], r.dim(r.args["self"], r.args["dim"])
    others(r, x, y, dim)
    if all(isinstance(s, int) for s in (r.args["start"], *map(expr_of, (r.shape(x)[dim], r.shape(y)[dim])))):
        _run(r, x, y, dim, r.args["start"] % int(r.shape(x)[dim]))


@rule("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "tensor_split")
def _split(r: Relate) -> None:
    x = r.args["self"]
    dim, start = r.dim(x, r.args["dim"]), 0
    pieces: list[Any] = [v.shape[dim] for v in r.node.meta["val"]]
    static = isinstance(expr_of(r.shape(x)[dim]), int) and all(isinstance(p, int) for p in pieces)
    if not static:
        r.pin((x, dim), f"{r.name} cuts it at places that are not known")
    for place, size in enumerate(pieces):
        y = r.results.get(place)
        if y is not None:
            others(r, x, y, dim)
            if static:
                _run(r, x, y, dim, start)
        start += int(size) if static else 0
    r.free((x, dim))
    for d in range(r.rank(x)):
        r.free((x, d))


@rule("select", "unbind")
def _select(r: Relate) -> None:
    x = r.args["self"]
    dim = r.dim(x, r.args["dim"])
    r.pin((x, dim), f"{r.name} picks its elements by number")
    for d in range(r.rank(x)):
        r.free((x, d))
        if d != dim:
            for y in r.results.values():
                r.tie((x, d), (y, d - (d > dim)))


@rule("cat", "concat", "concatenate")
def _concatenate(r: Relate) -> None:
    y, start = r.results[0], 0
    dim = r.dim(y, r.args["dim"])
    operands = [x for x in r.args["tensors"] if r.rank(x) == r.rank(y)]
    static = all(isinstance(expr_of(r.shape(x)[dim]), int) for x in operands)
    for x in operands:
        others(r, x, y, dim)
        if not static:
            continue
        size = int(r.shape(x)[dim])
        place = np.arange(size, dtype=np.int64)
        if r.space.axis(x, dim) is not None:
            r.tie((x, dim), (y, dim), place, place + start)
        elif size:
            r.pin((y, dim), f"{r.name} takes it from a dimension of a single element", place + start)
        start += size


@rule("stack")
def _stack(r: Relate) -> None:
    y = r.results[0]
    dim = r.dim(y, r.args["dim"])
    r.pin((y, dim), f"{r.name} numbers its operands along it")
    for x in r.args["tensors"]:
        r.ties(x, y, ((d, d + (d >= dim)) for d in range(r.rank(x))))


@rule("expand", "expand_as")
def _expand(r: Relate) -> None:
    x, y = r.args["self"], r.results[0]
    broadcast(r, (x,), y)
    if r.name == "expand_as":
        broadcast(r, (r.args["other"],), y)
    for d in range(r.rank(y)):
        r.free((y, d))


@rule("repeat", "tile")
def _repeat(r: Relate) -> None:
    x, y = r.args["self"], r.results[0]
    offset = r.rank(y) - r.rank(x)
    for d in range(r.rank(y)):
        r.free((y, d))
        inner = r.space.axis(x, d - offset) if d >= offset else None
        if d >= offset and same_size(r.shape(x)[d - offset], r.shape(y)[d]):
            r.tie((x, d - offset), (y, d))
        elif inner is not None:
            _times(r, (y, d), (x, d - offset), outside=True)
        elif d >= offset and expr_of(r.shape(x)[d - offset]) != 1:
            r.pin((y, d), f"{r.name} repeats a dimension of symbolic size")


def _times(r: Relate, flat: tuple[fx.Node, int], part: tuple[fx.Node, int], *, outside: bool) -> None:
    """``flat`` is ``part`` repeated as a whole (``outside``) or element by element."""
    axis, whole = r.axis(part), r.axis(flat)
    count, size = expr_of(r.shape(flat[0])[flat[1]]), expr_of(r.shape(part[0])[part[1]])
    if outside and axis is not None and whole is not None and not isinstance(count, int) and isinstance(size, int):
        r.tie(flat, part)  # repeated a symbolic number of times: positions modulo its size
        return
    if not isinstance(count, int) or not isinstance(size, int) or axis is None or whole is None:
        r.pin(flat, f"{r.name} repeats it")
        r.pin(part, f"{r.name} repeats it")
        return
    times = r.space.inner(count // size)
    r.junction(flat, [times, axis] if outside else [axis, times])


@rule("repeat_interleave")
def _repeat_interleave(r: Relate) -> None:
    if "self" not in r.args or not isinstance(r.args.get("repeats"), int) or r.args["dim"] is None:
        return
    x, y = r.args["self"], r.results[0]
    dim = r.dim(x, r.args["dim"])
    others(r, x, y, dim)
    if same_size(r.shape(x)[dim], r.shape(y)[dim]):
        r.tie((x, dim), (y, dim))
    elif r.space.axis(x, dim) is None:
        r.free((y, dim))
    else:
        _times(r, (y, dim), (x, dim), outside=False)


@rule("roll", "flip", "tril", "triu", "cumsum", "cumprod", "topk", "sort", "argsort", "logcumsumexp", "diff")
def _ordered(r: Relate) -> None:
    x = r.args["self"]
    given = r.args.get("dims", r.args.get("dim"))
    if r.name in ("tril", "triu"):
        given = [-2, -1]
    if given is None or (isinstance(given, (list, tuple)) and not given):
        return
    over = {r.dim(x, d) for d in (given if isinstance(given, (list, tuple)) else [given])}
    for y in r.results.values():
        for d in range(r.rank(x)):
            if d not in over:
                r.tie((x, d), (y, d))
    for node in (x, *r.results.values()):
        for d in over:
            r.pin((node, d), f"{r.name} depends on the order along it")


@rule("constant_pad_nd", "pad")
def _pad(r: Relate) -> None:
    x, y, widths = r.args["self"], r.results[0], r.args["pad"]
    for d in range(r.rank(x)):
        place = 2 * (r.rank(x) - 1 - d)
        pair = widths[place : place + 2]
        if all(isinstance(w, int) and w == 0 for w in pair):
            r.tie((x, d), (y, d))
        else:
            r.pin((x, d), f"{r.name} adds to it")
            r.pin((y, d), f"{r.name} adds to it")


@rule("slice_scatter", "select_scatter")
def _scatter(r: Relate) -> None:
    x, source, y = r.args["self"], r.args["src"], r.results[0]
    dim = r.dim(x, r.args["dim"])
    r.ties(x, y, ((d, d) for d in range(r.rank(x))))
    gone = r.name == "select_scatter"
    for d in range(r.rank(x)):
        if d != dim:
            r.tie((source, d - (gone and d > dim)), (y, d))
    if not gone and same_size(r.shape(source)[dim], r.shape(x)[dim]):
        r.tie((source, dim), (y, dim))
    else:
        r.pin((x, dim), f"{r.name} writes to it by number")
