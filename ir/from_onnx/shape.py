"""Operators that move data without computing: reshape, transpose, slice, concatenate, pad; shapes and ranges."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ImportModelError
from .registry import operator
from .values import Host, Number


@operator("Shape")
def shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Host:
    return Host(tuple(x.shape)[start:end], torch.int64)


@operator("Size")
def size(x: Tensor) -> Host:
    return Host((x.numel(),), torch.int64, is_scalar=True)


@operator("Reshape", host=("target",))
def reshape(x: Tensor, target: Host, *, allowzero: int = 0) -> Tensor:
    """A size of 0 copies the input's (unless ``allowzero``), one of -1 is inferred."""
    sizes = [x.shape[i] if is_number(d, 0) and not allowzero else d for i, d in enumerate(target.items)]
    return x.reshape(sizes)


def is_number(size: Number, number: int) -> bool:
    """Whether a size is this plain number (a symbolic one is not, and asking would make a guard)."""
    return isinstance(size, int) and size == number


@operator("Flatten")
def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    axis = axis + x.dim() if axis < 0 else axis
    outer: Number = 1
    for length in x.shape[:axis]:
        outer = outer * length
    return x.reshape(outer, -1)


@operator("Squeeze", host=("axes_input",))
def squeeze(x: Tensor, axes_input: Host | None = None, *, axes: Sequence[int] | None = None) -> Tensor:
    which = axes if axes_input is None else axes_input.items
    return x.squeeze() if which is None else x.squeeze(tuple(which))


@operator("Unsqueeze", host=("axes_input",))
def unsqueeze(x: Tensor, axes_input: Host | None = None, *, axes: Sequence[int] = ()) -> Tensor:
    which = axes if axes_input is None else axes_input.items
    rank = x.dim() + len(which)
    for axis in sorted(a % rank for a in which):
        x = x.unsqueeze(axis)
    return x


@operator("Transpose")
def transpose(x: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    return x.permute(list(perm) if perm is not None else list(range(x.dim()))[::-1])


@operator("Concat")
def concat(*values: Tensor, axis: int) -> Tensor:
    return torch.cat(values, axis)


@operator("Split", host=("sizes",))
def split_(
    x: Tensor,
    sizes: Host | None = None,
    *,
    axis: int = 0,
    num_outputs: int | None = None,
    split: Sequence[int] | None = None,
    n_outputs: int,
) -> Any:
    """Without sizes, into equal parts, of which the last may be shorter."""
    lengths = split if sizes is None else sizes.items
    if lengths is not None:
        return torch.split(x, list(lengths), axis)
    count = num_outputs or n_outputs
    width = (x.shape[axis] + count - 1) // count
    return torch.split(x, [width] * (count - 1) + [x.shape[axis] - width * (count - 1)], axis)


@operator("Slice")
def slice_by_attributes(
    x: Tensor, *, starts: Sequence[int], ends: Sequence[int], axes: Sequence[int] | None = None
) -> Tensor:
    """Before opset 10."""
    hosts = [None if v is None else Host(tuple(v), torch.int64) for v in (starts, ends, axes)]
    return slice_(x, *hosts)  # type: ignore[arg-type]


@operator("Slice", since=10, host=("starts", "ends", "axes", "steps"))
def slice_(x: Tensor, starts: Host, ends: Host, axes: Host | None = None, steps: Host | None = None) -> Tensor:
    """Bounds beyond the end are clamped; a negative step walks backward."""
    which = axes.items if axes is not None else range(len(starts.items))
    strides = steps.items if steps is not None else [1] * len(starts.items)
    for axis, start, end, step in zip(which, starts.items, ends.items, strides, strict=True):
        if step < 0:
            x, start, end, step = _flipped(x, axis, start, end, step)
        x = torch.ops.aten.slice.Tensor(x, axis, _bounded(start), _bounded(end), step)
    return x


def _bounded(bound: Number) -> Number:
    return max(min(bound, sys.maxsize), -sys.maxsize) if isinstance(bound, int) else bound


def _flipped(x: Tensor, axis: int, start: Number, end: Number, step: int) -> tuple[Tensor, Number, Number, int]:
    """The same elements of the flipped tensor, with a positive step."""
    length = x.shape[axis]
    # A start before the first element is the first element.
    first = length - 1 - start if start >= 0 else -1 - start if start == -1 else torch.sym_min(-1 - start, length - 1)
    last = sys.maxsize if isinstance(end, int) and end < -(2**30) else length - 1 - end if end >= 0 else -1 - end
    return x.flip(axis), torch.sym_max(first, 0), last, -step


@operator("Expand", host=("target",))
def expand(x: Tensor, target: Host) -> Tensor:
    """Both shapes broadcast against each other, so that the result may be larger than the target."""
    return x.expand(broadcast_shape(tuple(x.shape), target.items))


def broadcast_shape(a: Sequence[Number], b: Sequence[Number]) -> list[Number]:
    """The broadcast of two shapes; two symbolic sizes must be equal."""
    rank = max(len(a), len(b))
    result: list[Number] = []
    for x, y in zip([1] * (rank - len(a)) + [*a], [1] * (rank - len(b)) + [*b], strict=True):
        if is_number(x, 1) or is_number(y, 1):
            result.append(y if is_number(x, 1) else x)
        else:
            torch._check(x == y)
            result.append(y if isinstance(y, int) else x)
    return result


@operator("Tile", since=6, host=("repeats",))
def tile(x: Tensor, repeats: Host) -> Tensor:
    return x.repeat(*repeats.items)


@operator("Pad")
def pad_by_attributes(
    x: Tensor,
    *,
    pads: Sequence[int] = (),
    paddings: Sequence[int] = (),
    mode: str = "constant",
    value: float = 0.0,
) -> Tensor:
    """Before opset 11."""
    return pad(x, Host(tuple(pads or paddings), torch.int64), Host((value,), torch.float32), mode=mode)


@operator("Pad", since=11, host=("pads", "axes"), known=("value",))
def pad(
    x: Tensor, pads: Host, value: Tensor | Host | None = None, axes: Host | None = None, *, mode: str = "constant"
) -> Tensor:
    """``pads`` holds all begins, then all ends; torch wants pairs, last dimension first. Negative ones crop."""
    which = [a % x.dim() for a in axes.items] if axes is not None else list(range(x.dim()))
    pairs: dict[int, tuple[Number, Number]] = {
        a: (pads.items[i], pads.items[i + len(which)]) for i, a in enumerate(which)
    }
    padded = [a for a, pair in pairs.items() if not all(is_number(p, 0) for p in pair)]
    if not padded:
        return x
    flat = [p for axis in range(x.dim() - 1, min(padded) - 1, -1) for p in pairs.get(axis, (0, 0))]
    if mode == "constant":
        if isinstance(value, Tensor):
            inside = F.pad(torch.ones_like(x, dtype=torch.bool), flat, value=False)
            return torch.where(inside, F.pad(x, flat), value)
        fill = 0 if value is None else value.item
        return F.pad(x, flat, value=bool(fill) if x.dtype == torch.bool else fill)
    for axis in sorted(padded):
        x = _pad_by_index(x, axis, *pairs[axis], mode=mode)
    return x


def _pad_by_index(x: Tensor, axis: int, before: Number, after: Number, mode: str) -> Tensor:
    """Pad one axis by repeating its elements: the first and last, all in a circle, or mirrored."""
    length = x.shape[axis]
    spatial = x.dim() - axis
    common = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}[mode]
    if spatial == 1 and x.is_floating_point() and x.dim() in (2, 3) and all(_is_natural(p) for p in (before, after)):
        return F.pad(x, [before, after], mode=common)
    places = torch.arange(-before, length + after, device=x.device)
    if mode == "edge":
        places = places.clamp(0, length - 1)
    elif mode == "wrap":
        places = places % length
    else:
        period = torch.sym_max(2 * (length - 1), 1)
        places = places % period
        places = torch.minimum(places, period - places) if not is_number(length, 1) else places * 0
    return torch.index_select(x, axis, places)


def _is_natural(number: Number) -> bool:
    return isinstance(number, int) and number >= 0


@operator("DepthToSpace")
def depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """Depth, column, row; or column, row, depth."""
    if mode == "CRD":
        return F.pixel_shuffle(x, blocksize)
    n, c, h, w = x.shape
    parts = x.reshape(n, blocksize, blocksize, c // blocksize**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(n, c // blocksize**2, h * blocksize, w * blocksize)


@operator("SpaceToDepth")
def space_to_depth(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    if mode == "CRD":
        return F.pixel_unshuffle(x, blocksize)
    n, c, h, w = x.shape
    parts = x.reshape(n, c, h // blocksize, blocksize, w // blocksize, blocksize).permute(0, 3, 5, 1, 2, 4)
    return parts.reshape(n, c * blocksize**2, h // blocksize, w // blocksize)


@operator("Range", host=("start", "limit", "delta"))
def range_(start: Host, limit: Host, delta: Host) -> Tensor:
    return torch.arange(start.item, limit.item, delta.item, dtype=start.dtype)


@operator("ConstantOfShape", host=("target",))
def constant_of_shape(target: Host, *, value: Host | None = None) -> Tensor:
    if value is None:
        return torch.zeros(list(target.items), dtype=torch.float32)
    return torch.full(list(target.items), value.items[0], dtype=value.dtype)


@operator("EyeLike")
def eye_like(x: Tensor, *, dtype: torch.dtype | None = None, k: int = 0) -> Tensor:
    rows, columns = torch.arange(x.shape[0]).unsqueeze(1), torch.arange(x.shape[1])
    return (columns - rows == k).to(dtype or x.dtype)


@operator("Trilu", host=("k",))
def trilu(x: Tensor, k: Host | None = None, *, upper: int = 1) -> Tensor:
    offset = 0 if k is None else k.item
    if not isinstance(offset, int):
        raise ImportModelError("the diagonal of Trilu depends on a dynamic size", expected="a constant")
    return torch.triu(x, offset) if upper else torch.tril(x, offset)
