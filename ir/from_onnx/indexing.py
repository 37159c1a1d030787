"""Operators that pick or place elements by index. ONNX allows negative indices almost everywhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ImportModelError
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
    coordinates = tuple(indices[..., i] for i in range(int(indices.shape[-1])))
    if reduction in ("none", "add"):
        return torch.index_put(data, coordinates, updates, accumulate=reduction == "add")
    raise ImportModelError(f"ScatterND with reduction '{reduction}' is not supported", expected="none or add")


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


@operator("TopK", host=("k",))
def top_k(x: Tensor, k: Host, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> Any:
    """Of equal elements the one with the lower index comes first, which torch.topk does not promise."""
    values, indices = torch.sort(x, stable=True, dim=axis, descending=bool(largest))
    return tuple(torch.ops.aten.slice.Tensor(each, axis, 0, k.items[0]) for each in (values, indices))
