"""What an ONNX value is during the walk: a tensor, a stored tensor, or numbers that the host knows.

Shape arithmetic in ONNX runs on small integer tensors (``Shape``, ``Gather``, ``Concat``, ``Reshape``). Here it stays
on the host, as Python ``int`` and ``SymInt``, so that an exporter's chain of twelve nodes comes out as one symbolic
size. Host numbers become a tensor only when a real tensor operator consumes them.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ..weights import Weight

Number = Any
"""``int``, ``float``, ``bool``, or their symbolic counterparts."""

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
MAX_HOST_ELEMENTS = 64
"""Integer constants up to this size are known to the host from the start; larger ones only where a shape needs them."""


@dataclass(frozen=True)
class Host:
    """A small tensor whose numbers the host knows.

    Attributes:
        items: the numbers in row-major order, ``int`` or ``SymInt`` and the like.
        dtype: the ONNX element type.
        is_scalar: rank 0 (one item) instead of rank 1.
        name: the initializer that holds exactly these numbers, if one does.
        dims: the shape, where the rank is above 1.
    """

    items: tuple[Number, ...]
    dtype: torch.dtype
    is_scalar: bool = False
    name: str | None = None
    dims: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes, all known."""
        if self.dims is not None:
            return self.dims
        return () if self.is_scalar else (len(self.items),)

    @property
    def item(self) -> Number:
        """The only number."""
        (item,) = self.items
        return item

    @property
    def is_concrete(self) -> bool:
        """Whether no number is symbolic."""
        return not any(isinstance(item, SYMBOLIC) for item in self.items)

    def unnamed(self) -> Host:
        """The same numbers, no longer tied to an initializer."""
        return replace(self, name=None)

    def to_tensor(self) -> torch.Tensor:
        """A tensor of these numbers, recorded by the tracer; symbolic sizes stay symbolic."""
        if self.is_scalar:
            return torch.full((), self.item, dtype=self.dtype)
        if not self.items:
            return torch.empty(self.shape, dtype=self.dtype)
        if self.is_concrete:
            flat = torch.tensor(self.items, dtype=self.dtype)
        else:
            flat = torch.stack([torch.full((), item, dtype=self.dtype) for item in self.items])
        return flat if self.dims is None else flat.reshape(self.dims)


@dataclass(frozen=True, eq=False)
class Stored:
    """An initializer: the tensor that stands for it in the trace, and where its numbers are."""

    tensor: torch.Tensor
    weight: Weight
    name: str

    @property
    def shape(self) -> torch.Size:
        """The stored tensor's shape."""
        return self.tensor.shape


@dataclass(frozen=True)
class Items:
    """An ONNX sequence, whose length the host knows."""

    values: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """How many there are, for messages."""
        return (len(self.values),)


Value = torch.Tensor | Host | Stored | Items | None


@contextmanager
def outside_the_trace() -> Generator[None, None, None]:
    """Real tensors for a moment: the walk runs under a tracer that makes every tensor fake and records what it does."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


def host_of(weight: Weight, name: str) -> Host:
    """Read a scalar or vector initializer's numbers (a short one: this is for shapes, axes and scalars)."""
    import numpy as np

    with outside_the_trace():
        raw = b"".join(bytes(piece) for piece in weight.chunks())
    if weight.dtype == torch.bfloat16:
        numbers = (np.frombuffer(raw, dtype="<u2").astype("<u4") << 16).view("<f4")
    else:
        numbers = np.frombuffer(raw, dtype=NUMPY[weight.dtype])
    return Host(tuple(numbers.tolist()), weight.dtype, is_scalar=not weight.shape, name=name)


NUMPY: dict[torch.dtype, str] = {
    torch.float16: "<f2",
    torch.float32: "<f4",
    torch.float64: "<f8",
    torch.int8: "i1",
    torch.int16: "<i2",
    torch.int32: "<i4",
    torch.int64: "<i8",
    torch.uint8: "u1",
    torch.uint16: "<u2",
    torch.uint32: "<u4",
    torch.uint64: "<u8",
    torch.bool: "?",
}
"""Element types whose numbers the host can read, as numpy spells them (bfloat16 is read by its bits)."""


def starts_on_host(weight: Weight) -> bool:
    """Whether an initializer's numbers are worth knowing from the start.

    Short integer vectors are shapes and axes. Floating-point scalars are literals (an epsilon, a scale, an exponent).
    """
    if weight.dtype not in NUMPY and weight.dtype != torch.bfloat16:
        return False
    if weight.dtype.is_floating_point:
        return weight.shape == ()
    return len(weight.shape) <= 1 and weight.numel <= MAX_HOST_ELEMENTS
