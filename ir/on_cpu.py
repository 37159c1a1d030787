"""What lies on an accelerator, on the CPU: programs are held, changed and explained there, and the runtime moves them.

A module is copied, so that the given one stays where it is. Its weights are copied once each: parameters that are tied,
or that share memory, are so in the copy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.utils._pytree as pytree

from .errors import ImportModelError

T = TypeVar("T")
_HERE = frozenset({"cpu", "meta"})


def values_on_cpu(values: T) -> T:
    """A structure with its tensors on the CPU (those without numbers stay on the meta device)."""

    def here(leaf: Any) -> Any:
        return leaf.cpu() if isinstance(leaf, torch.Tensor) and leaf.device.type not in _HERE else leaf

    found: T = pytree.tree_map(here, values)
    return found


def module_on_cpu(module: torch.nn.Module) -> torch.nn.Module:
    """The module, or a copy of it on the CPU where any of its weights lies elsewhere.

    Raises:
        ImportModelError: it cannot be copied.
    """
    tensors = list(chain(module.parameters(), module.buffers()))
    if not away(tensors):
        return module
    storages: dict[tuple[str, int], torch.UntypedStorage] = {}
    memo: dict[int, Any] = {}
    for tensor in tensors:
        if tensor.device.type in _HERE:
            continue
        storage = tensor.untyped_storage()
        place = (str(tensor.device), storage.data_ptr())
        if place not in storages:
            storages[place] = storage.cpu()
        whole = torch.empty(0, dtype=tensor.dtype)
        value = whole.set_(storages[place], tensor.storage_offset(), tensor.size(), tensor.stride())
        wrapped = isinstance(tensor, torch.nn.Parameter)
        memo[id(tensor)] = torch.nn.Parameter(value, tensor.requires_grad) if wrapped else value
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise ImportModelError(
            f"{type(module).__name__} lies on {', '.join(away(tensors))} and cannot be copied: {error}",
            remedy="move it with .cpu() before tracing",
        ) from error


def away(tensors: Iterable[torch.Tensor]) -> list[str]:
    """The devices among those of the tensors that programs are not held on."""
    return sorted({str(tensor.device) for tensor in tensors if tensor.device.type not in _HERE})
