"""Operators that pick or place elements by index. ONNX allows negative indices almost everywhere."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .registry import operator
from .values import Host


@operator("Gather", known=("indices",))
def gather(data: Tensor, indices: Tensor | Host, *, axis: int = 0) -> Tensor:
    """Rows of a floating-point table are an embedding, one known index is a selection; the rest is plain indexing."""
    if isinstance(indices, Host):
        if indices.is_scalar:
            return torch.select(data, axis, indices.item)
        indices = indices.to_tensor()
    elif data.dim() == 2 and axis in (0, -2) and data.is_floating_point() and indices.dim() >= 1:
        return torch.embedding(data, indices)
    return data[(slice(None),) * (axis % data.dim()) + (indices,)]


@operator("GatherElements")
def gather_elements(data: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    return torch.gather(data, axis, _wrapped(indices, data.shape[axis]))


def _wrapped(indices: Tensor, length: Any) -> Tensor:
    """Negative indices count from the end."""
    return torch.where(indices < 0, indices + length, indices)


@operator("GatherND")
def gather_nd(data: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    """The last dimension of ``indices`` holds coordinates into ``data`` after its batch dimensions."""
    coordinates = tuple(indices[..., i] for i in range(int(indices.shape[-1])))
    return data[_batches(data, indices.dim() - 1, batch_dims) + coordinates]


def _batches(data: Tensor, rank: int, batch_dims: int) -> tuple[Tensor, ...]:
    """One index per batch dimension, shaped to broadcast against indices of that rank."""
    return tuple(
        torch.arange(data.shape[d]).reshape([-1 if i == d else 1 for i in range(rank)]) for d in range(batch_dims)
    )


_SCATTER = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@operator("ScatterND")
def scatter_nd(data: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    """The last dimension of ``indices`` holds coordinates of elements or slices of ``data``."""
    depth = int(indices.shape[-1])
    if reduction in ("none", "add"):
        coordinates = tuple(indices[..., i] for i in range(depth))
        return torch.index_put(data, coordinates, updates, accumulate=reduction == "add")
    # One row for each element or slice that can be addressed.
    flat: Any = 0
    for i in range(depth):
        flat = flat * data.shape[i] + _wrapped(indices[..., i], data.shape[i])
    outer = math.prod(data.shape[:depth])
    rows = data.reshape(outer, -1)
    added = updates.reshape(-1, rows.shape[1])
    where = flat.reshape(-1, 1).expand(added.shape)
    return torch.scatter_reduce(rows, 0, where, added, _SCATTER[reduction], include_self=True).reshape(data.shape)


@operator("Scatter")
def scatter(data: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0) -> Tensor:
    """The old name of ``ScatterElements``."""
    return scatter_elements(data, indices, updates, axis=axis)


@operator("ScatterElements")
def scatter_elements(
    data: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none"
) -> Tensor:
    where = _wrapped(indices, data.shape[axis])
    if reduction == "none":
        return torch.scatter(data, axis, where, updates)
    return torch.scatter_reduce(data, axis, where, updates, _SCATTER[reduction], include_self=True)


@operator("OneHot", host=("depth",))
def one_hot(indices: Tensor, depth: Host, values: Tensor, *, axis: int = -1) -> Tensor:
    length = depth.items[0]
    axis = axis % (indices.dim() + 1)
    classes = torch.arange(length).reshape([-1 if i == axis else 1 for i in range(indices.dim() + 1)])
    hit = _wrapped(indices, length).unsqueeze(axis) == classes
    return torch.where(hit, values[1], values[0])


@operator("TopK")
def top_k_by_attribute(x: Tensor, *, k: int, axis: int = -1) -> Any:
    """Before opset 10."""
    return top_k(x, Host((k,), torch.int64), axis=axis)


@operator("TopK", since=10, host=("k",))
def top_k(x: Tensor, k: Host, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> Any:
    """Of equal elements the one with the lower index comes first, which torch.topk does not promise."""
    values, indices = torch.sort(x, stable=True, dim=axis, descending=bool(largest))
    return tuple(torch.ops.aten.slice.Tensor(each, axis, 0, k.items[0]) for each in (values, indices))


@operator("NonZero")
def non_zero(x: Tensor) -> Tensor:
    return torch.nonzero(x).t()


@operator("Compress")
def compress(x: Tensor, condition: Tensor, *, axis: int | None = None) -> Tensor:
    """The condition may be shorter than the axis: what it does not reach is left out."""
    places = torch.nonzero(condition).squeeze(1)
    return x.flatten()[places] if axis is None else torch.index_select(x, axis, places)


@operator("Unique")
def unique(x: Tensor, *, axis: int | None = None, sorted: int = 1, n_used: int) -> Any:
    """Distinct elements (or slices), where each first appears, which one each input is, and how often it is there."""
    flat = x.flatten() if axis is None else x
    along = 0 if axis is None else axis
    values, inverse, counts = torch.unique(flat, sorted=True, return_inverse=True, return_counts=True, dim=along)
    if n_used == 1 and sorted:
        return values
    length = inverse.shape[0]
    places = torch.arange(length)
    first = torch.full_like(counts, length).scatter_reduce(0, inverse, places, "amin", include_self=True)
    if not sorted:
        order = torch.argsort(first)
        rank = torch.empty_like(order).scatter(0, order, torch.arange(order.shape[0]))
        values, first, counts, inverse = values.index_select(along, order), first[order], counts[order], rank[inverse]
    return (values, first, inverse, counts)[:n_used]


@operator("ReverseSequence")
def reverse_sequence(x: Tensor, lengths: Tensor, *, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    """Each batch element's first ``lengths`` steps backward, the rest as it is."""
    steps = torch.arange(x.shape[time_axis])
    ends = lengths.unsqueeze(-1)
    places = torch.where(steps < ends, ends - 1 - steps, steps)
    places = places if batch_axis < time_axis else places.t()
    shape = [n if i in (batch_axis, time_axis) else 1 for i, n in enumerate(x.shape)]
    return torch.gather(x, time_axis, places.reshape(shape).expand(x.shape))


@operator("TensorScatter")
def tensor_scatter(
    cache: Tensor, update: Tensor, start: Tensor | None = None, *, axis: int = -2, mode: str = "linear"
) -> Tensor:
    """Write an update into a cache, in each batch element from its own place on; in a circle with ``circular``."""
    axis = axis % cache.dim()
    places = torch.arange(update.shape[axis])
    rows = places.unsqueeze(0) if start is None else start.unsqueeze(-1) + places
    rows = rows % cache.shape[axis] if mode == "circular" else rows
    shape = [-1 if i in (0, axis) else 1 for i in range(cache.dim())]
    shape[0] = rows.shape[0]
    return torch.scatter(cache, axis, rows.reshape(shape).expand(update.shape), update)


@operator("Det")
def determinant(x: Tensor) -> Tensor:
    return torch.linalg.det(x)
