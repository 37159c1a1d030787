"""What the numbers of a weight look like, with a bound on how many of them are read.

A weight is lazy, and may be a cut of a file larger than memory. Nothing here materialises one: positions in the weight
are traced back through its steps to positions in its source, and only those are read.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ...ir.weights import Cast, MetaSource, Permute, Reshape, Scale, Select, Slice, Weight

BINS = 40
_RUN = 1024
_CHUNK = 1 << 20
_NOT_NUMPY = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


@dataclass(frozen=True)
class Statistics:
    """The distribution of a weight's numbers.

    Attributes:
        read: how many numbers were read; fewer than there are when sampled.
        finite: how many of them are neither infinite nor NaN; the other figures are about these.
        zeros: how many are zero.
        min, max, mean, std: of the finite ones, ``std`` of the whole population; 0 when there is none. Sums beyond the
            range of floats are infinite or NaN.
        counts: how many fall into each of `BINS` equal intervals from ``min`` to ``max``; empty if these are so far
            apart that their difference is no float.
        digest: a hash of the numbers that were read.
    """

    read: int
    finite: int
    zeros: int
    min: float
    max: float
    mean: float
    std: float
    counts: tuple[int, ...]
    digest: str


def quotas(sizes: Sequence[int], budget: int) -> list[int]:
    """How many numbers to read of each weight: all of the small ones, equally many of the others, ``budget`` in all."""
    quota = dict.fromkeys(range(len(sizes)), 0)
    left = budget
    for done, index in enumerate(sorted(quota, key=lambda i: (sizes[i], i))):
        quota[index] = min(sizes[index], left // (len(sizes) - done))
        left -= quota[index]
    return list(quota.values())


def statistics(weight: Weight, limit: int) -> Statistics | None:
    """The distribution of a weight's numbers, of at most ``limit`` of them.

    A sample is runs of neighbors at even distances, the first and the last number included. It is read twice.

    Args:
        weight: the weight.
        limit: the bound.

    Returns:
        The statistics; None for a weight without numbers (meta, complex, empty), or with a limit of 0.

    Raises:
        ImportModelError: its file cannot be read.
    """
    count = min(weight.numel, limit)
    if count <= 0 or isinstance(weight.source, MetaSource) or weight.dtype.is_complex:
        return None
    low, high, total = math.inf, -math.inf, 0.0
    read, finite, zeros = 0, 0, 0
    state = hashlib.blake2b(digest_size=8)
    for numbers in _numbers(weight, count):
        state.update(numbers.tobytes())
        read += numbers.size
        good = numbers[np.isfinite(numbers)]
        finite += good.size
        zeros += int(good.size - np.count_nonzero(good))
        if good.size:
            low, high = min(low, float(good.min())), max(high, float(good.max()))
            with np.errstate(over="ignore", invalid="ignore"):
                total += float(good.sum(dtype=np.float64))
    if not finite:
        return Statistics(read, 0, 0, 0.0, 0.0, 0.0, 0.0, (), state.hexdigest())
    mean, squares, counts = total / finite, 0.0, np.zeros(BINS, dtype=np.int64)
    edges = _edges(low, high)
    for numbers in _numbers(weight, count):
        good = numbers[np.isfinite(numbers)].astype(np.float64)
        if math.isfinite(edges[1] - edges[0]):
            counts += np.histogram(good, BINS, edges)[0]
        with np.errstate(over="ignore", invalid="ignore"):
            squares += float(np.square(good - mean).sum())
    std = math.sqrt(squares / finite)
    shown = tuple(map(int, counts)) if counts.any() else ()
    return Statistics(read, finite, zeros, low, high, mean, std, shown, state.hexdigest())


def _edges(low: float, high: float) -> tuple[float, float]:
    """The histogram's range; around numbers that are all but equal, one that has room for them in the middle."""
    scale = max(abs(low), abs(high))
    room = 0.0 if high - low > 1e-9 * scale else max(0.5, scale / 4)
    return low - room, high + room


def _numbers(weight: Weight, count: int) -> Iterator[np.ndarray]:
    """``count`` of a weight's numbers, in pieces."""
    source = weight.source.load()
    for positions in _positions(weight.numel, count):
        indices = _to_source(weight, positions)
        values = _take(source, indices)
        for step in weight.steps:
            if isinstance(step, Cast):
                values = values.to(step.dtype)
            elif isinstance(step, Scale):
                values = values * step.factor
        if values.dtype in _NOT_NUMPY:
            values = values.to(torch.float32)
        yield values.cpu().numpy()


def _take(source: torch.Tensor, indices: np.ndarray) -> torch.Tensor:
    """The numbers at flat indices: a view if they are neighbors, else gathered; the whole is never copied."""
    if not source.is_contiguous():
        index = np.unravel_index(indices, tuple(source.shape))
        return source[tuple(torch.from_numpy(axis) for axis in index)]
    flat = source.view(-1)
    first, last = int(indices[0]), int(indices[-1])
    straight = last - first == len(indices) - 1 and bool(np.all(np.diff(indices) == 1))
    return flat[first : last + 1] if straight else flat[torch.from_numpy(indices)]


def _positions(numel: int, count: int) -> Iterator[np.ndarray]:
    """Positions of the numbers to read: all of them, or runs at even distances."""
    if count >= numel:
        for start in range(0, numel, _CHUNK):
            yield np.arange(start, min(start + _CHUNK, numel))
        return
    run = min(_RUN, count)
    starts = np.linspace(0, numel - run, max(count // run, 1)).astype(np.int64)
    # Runs do not overlap, since all together they are shorter than the weight.
    for first in range(0, len(starts), _CHUNK // _RUN):
        yield (starts[first : first + _CHUNK // _RUN, None] + np.arange(run)).reshape(-1)


def _to_source(weight: Weight, positions: np.ndarray) -> np.ndarray:
    """Where the numbers at these (flat) positions of a weight lie in its source."""
    shapes = _shapes(weight)
    for step, before, after in reversed(list(zip(weight.steps, shapes[:-1], shapes[1:], strict=True))):
        if isinstance(step, (Cast, Scale, Reshape)) or not before:
            continue
        index = list(np.unravel_index(positions, after))
        match step:
            case Slice(dim, start, stop, stride):
                index[dim] = range(before[dim])[start:stop:stride].start + index[dim] * stride
            case Select(dim, chosen):
                index[dim] = np.asarray(chosen, dtype=np.int64)[index[dim]] % before[dim]
            case Permute(dims):
                moved = dict(zip((d % len(before) for d in dims), index, strict=True))
                index = [moved[d] for d in range(len(before))]
        positions = np.ravel_multi_index(tuple(index), before)
    return positions


def _shapes(weight: Weight) -> list[tuple[int, ...]]:
    """The shape of the source, and after every step."""
    return [Weight(weight.source, weight.steps[:done]).shape for done in range(len(weight.steps) + 1)]


def all_statistics(weights: Iterable[Weight], budget: int) -> dict[Weight, Statistics | None]:
    """The statistics of many weights, ``budget`` numbers in all; equal objects are read once."""
    distinct = list(dict.fromkeys(weights))
    limits = quotas([0 if w.is_meta else w.numel for w in distinct], budget)
    return {weight: statistics(weight, limit) for weight, limit in zip(distinct, limits, strict=True)}
