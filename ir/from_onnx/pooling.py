"""Pooling. What torch has a word for stays one call; uneven padding, dilated means and the like are spelled out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import operator
from .values import Host

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
# Their stubs take no `return_indices` that is known at run time only.
_MAX_POOL: dict[int, Callable[..., Any]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE_POOL: dict[int, Callable[..., Any]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def padding_of(
    x: Tensor,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int] | None,
    auto_pad: str,
) -> list[tuple[Any, Any]]:
    """Begin and end padding of each spatial dimension."""
    spatial = x.dim() - 2
    if auto_pad in ("NOTSET", "VALID"):
        values = list(pads) if pads and auto_pad == "NOTSET" else [0] * (2 * spatial)
        return list(zip(values[:spatial], values[spatial:], strict=True))
    result: list[tuple[Any, Any]] = []
    for i in range(spatial):
        size = x.shape[2 + i]
        total: Any = torch.sym_max(
            (-(-size // strides[i]) - 1) * strides[i] + (kernel[i] - 1) * dilations[i] + 1 - size, 0
        )
        small = total // 2
        result.append((small, total - small) if auto_pad == "SAME_UPPER" else (total - small, small))
    return result


def symmetric(padding: Sequence[tuple[Any, Any]]) -> list[int] | None:
    """The padding as one number per dimension, or None when begin and end differ (or are not plain numbers)."""
    if all(isinstance(b, int) and isinstance(e, int) and b == e for b, e in padding):
        return [b for b, _ in padding]
    return None


def padded(x: Tensor, padding: Sequence[tuple[Any, Any]], value: float = 0.0) -> Tensor:
    """The tensor with its spatial dimensions padded."""
    return F.pad(x, [p for pair in reversed(padding) for p in pair], value=value)


@dataclass(frozen=True)
class Windows:
    """Where the windows of a pool lie, by spatial dimension.

    Attributes:
        kernel, strides, dilations: one number each.
        padding: before and after.
        overhang: how far the last window reaches beyond the padding, which it does with ``ceil_mode`` only.
        plain: whether the padding is even and torch computes the same number of windows.
    """

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    padding: list[tuple[Any, Any]]
    overhang: list[Any]
    ceil: bool
    plain: bool

    @property
    def extents(self) -> list[tuple[Any, Any]]:
        """The padding, and the overhang."""
        return [(begin, end + more) for (begin, end), more in zip(self.padding, self.overhang, strict=True)]


def windows_of(
    x: Tensor,
    kernel: Sequence[int],
    strides: Sequence[int] | None,
    dilations: Sequence[int] | None,
    pads: Sequence[int] | None,
    auto_pad: str,
    ceil_mode: int,
) -> Windows:
    """Place the windows. With ``ceil_mode``, a window that would start in the end padding is left out."""
    spatial = x.dim() - 2
    strides, dilations = list(strides or [1] * spatial), list(dilations or [1] * spatial)
    padding = padding_of(x, kernel, strides, dilations, pads, auto_pad)
    overhang: list[Any] = []
    for i, (begin, end) in enumerate(padding):
        length, reach = x.shape[2 + i], (kernel[i] - 1) * dilations[i] + 1
        if not ceil_mode or not all(isinstance(n, int) for n in (length, begin, end)):
            overhang.append(0)
            continue
        count = -(-(length + begin + end - reach) // strides[i]) + 1
        if (count - 1) * strides[i] >= length + begin:
            count -= 1
        overhang.append(max((count - 1) * strides[i] + reach - (length + begin + end), 0))
    even = symmetric(padding)
    fits = even is not None and all(2 * p <= k for p, k in zip(even, kernel, strict=True))
    return Windows(list(kernel), strides, dilations, padding, overhang, bool(ceil_mode), fits and not any(overhang))


def _rounds_up(x: Tensor, windows: Windows) -> bool:
    """Whether torch has to be told to round up: where the number of windows depends on dynamic sizes."""
    return windows.ceil and not all(isinstance(n, int) for n in x.shape[2:])


@operator("MaxPool")
def max_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    storage_order: int = 0,
    strides: Sequence[int] | None = None,
    n_used: int,
) -> Any:
    """The second output is the index of each maximum in the flat input; by columns with ``storage_order``."""
    windows = windows_of(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    kind, wide = x.dtype, x
    if x.dtype in (torch.int8, torch.uint8):  # torch pools wider integers only
        wide = x.to(torch.float32)
    if windows.plain:
        source, even = wide, symmetric(windows.padding)
    else:
        lowest = float("-inf") if wide.is_floating_point() else torch.iinfo(wide.dtype).min
        source, even = padded(wide, windows.extents, lowest), [0] * (x.dim() - 2)
    pool = _MAX_POOL[x.dim() - 2]
    result = pool(
        source,
        windows.kernel,
        windows.strides,
        even,
        windows.dilations,
        _rounds_up(x, windows),
        return_indices=n_used > 1,
    )
    if n_used == 1:
        return result.to(kind)
    values, places = result
    return values.to(kind), _flat_places(x, source, windows, places, storage_order)


def _flat_places(x: Tensor, source: Tensor, windows: Windows, places: Tensor, storage_order: int) -> Tensor:
    """Indices within a padded image as indices into the whole, unpadded input."""
    moved = 0 if windows.plain else 1
    coordinates: list[Tensor] = []
    for axis in range(x.dim() - 1, 1, -1):
        size = source.shape[axis]
        coordinates.insert(0, places % size - moved * windows.padding[axis - 2][0])
        places = torch.div(places, size, rounding_mode="floor")
    sizes = list(x.shape[2:])
    pairs = list(zip(coordinates, sizes, strict=True))
    flat: Any = 0
    for coordinate, size in reversed(pairs) if storage_order else pairs:
        flat = flat * size + coordinate
    volume = math.prod(sizes)
    images = torch.arange(x.shape[0] * x.shape[1]).reshape([x.shape[0], x.shape[1], *[1] * len(sizes)])
    return flat + images * volume


def _window_sums(x: Tensor, windows: Windows) -> Tensor:
    """The sum over every window of an input that is padded already."""
    spatial = x.dim() - 2
    ones = torch.ones([1, 1, *windows.kernel], dtype=x.dtype)
    flat = x.reshape([-1, 1, *x.shape[2:]])
    sums = CONV[spatial](flat, ones, None, windows.strides, 0, windows.dilations)
    return sums.reshape([x.shape[0], x.shape[1], *sums.shape[2:]])


@operator("AveragePool")
def average_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """The overhang of ``ceil_mode`` never counts, the padding only if asked to."""
    windows = windows_of(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    if windows.plain and all(d == 1 for d in windows.dilations):
        even = symmetric(windows.padding)
        pool = _AVERAGE_POOL[x.dim() - 2]
        return pool(x, windows.kernel, windows.strides, even, _rounds_up(x, windows), bool(count_include_pad))
    inside = torch.ones([1, 1, *x.shape[2:]], dtype=x.dtype)
    if count_include_pad:
        inside = padded(inside, windows.padding, 1.0)
        inside = padded(inside, [(0, more) for more in windows.overhang])
    else:
        inside = padded(inside, windows.extents)
    return _window_sums(padded(x, windows.extents), windows) / _window_sums(inside, windows)


@operator("LpPool")
def lp_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    p: float = 2,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    windows = windows_of(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    return _window_sums(padded(x.abs() ** p, windows.extents), windows) ** (1 / p)


@operator("GlobalAveragePool")
def global_average_pool(x: Tensor) -> Tensor:
    return x.mean(list(range(2, x.dim())), keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool(x: Tensor) -> Tensor:
    return x.amax(list(range(2, x.dim())), keepdim=True)


@operator("GlobalLpPool")
def global_lp_pool(x: Tensor, *, p: float = 2) -> Tensor:
    return x.abs().pow(p).sum(list(range(2, x.dim())), keepdim=True) ** (1 / p)


@operator("MaxUnpool", host=("output_shape",))
def max_unpool(
    x: Tensor,
    places: Tensor,
    output_shape: Host | None = None,
    *,
    kernel_shape: Sequence[int],
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Each value at its index in the flat result that the kernel, strides and pads imply, zeros elsewhere; a larger
    ``output_shape`` adds zeros at the ends.
    """
    spatial = x.dim() - 2
    strides, pads = list(strides or [1] * spatial), list(pads or [0] * 2 * spatial)
    implied = [
        (x.shape[2 + i] - 1) * strides[i] + kernel_shape[i] - pads[i] - pads[spatial + i] for i in range(spatial)
    ]
    shape = [x.shape[0], x.shape[1], *implied]
    flat = torch.zeros([math.prod(shape)], dtype=x.dtype).scatter(0, places.flatten(), x.flatten())
    result = flat.reshape(shape)
    if output_shape is None:
        return result
    return padded(result, [(0, output_shape.items[2 + i] - implied[i]) for i in range(spatial)])
