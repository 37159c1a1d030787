"""Lazy weights: an immutable expression over a source, materialised only when its numbers are needed.

A weight is ``source + steps``: a tensor in memory, a byte range of a file (read by memory map), or nothing at all
(meta: shape and dtype only), followed by slices, selections, permutations, reshapes, casts and scalings. Weights are
values: a pass that cuts a weight makes a new expression over the same source, so that programs share storage until the
numbers really differ, and a model larger than memory can be cut and exported.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from .errors import GraphlatheError, ImportModelError

# Content hashes of weights above this size are taken from evenly spaced samples: a fingerprint of an
# 8B-parameter model must not read 16 GB.
_SAMPLED_ABOVE_BYTES = 64 << 20
_SAMPLES = 64
_SAMPLE_BYTES = 64 << 10


class Source(Protocol):
    """Where a weight's numbers come from."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The element type."""
        ...

    def load(self) -> torch.Tensor:
        """The numbers; a view where possible."""
        ...


@dataclass(frozen=True, eq=False)
class TensorSource:
    """A tensor in memory, shared with whoever made it (never copied)."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's element type."""
        return self.tensor.dtype

    def load(self) -> torch.Tensor:
        """The tensor itself."""
        return self.tensor


@dataclass(frozen=True, eq=False)
class FileSource:
    """A contiguous little-endian row-major array inside a file (safetensors, GGUF, ONNX external data).

    Args:
        path: the file.
        offset: bytes from the start of the file to the first element.
        shape: the array's shape.
        dtype: the array's element type.
        version: what `file_version` said when the offset was read; a file that changed since is refused.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    version: tuple[int, ...] | None = None

    def load(self) -> torch.Tensor:
        """Map the range; pages are read when touched, and stay clean (the kernel can drop them)."""
        nbytes = math.prod(self.shape) * self.dtype.itemsize
        if nbytes == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        try:
            with open(self.path, "rb") as file:
                self._check_version(file.fileno())
                # Copy-on-write: PyTorch has no read-only tensors, and a stray in-place write must not reach the file.
                raw = np.memmap(file, dtype=np.uint8, mode="c", offset=self.offset, shape=(nbytes,))
        except (OSError, ValueError) as error:
            raise self._unreadable(nbytes, error) from error
        flat = torch.from_numpy(raw)
        if self.offset % self.dtype.itemsize:
            flat = flat.clone()  # `view` needs alignment; safetensors aligns, other writers may not
        return flat.view(self.dtype).reshape(self.shape)

    def read(self, start: int, count: int) -> bytes:
        """``count`` bytes from ``start`` of the array, by an ordinary read."""
        try:
            with open(self.path, "rb") as file:
                self._check_version(file.fileno())
                file.seek(self.offset + start)
                piece = file.read(count)
        except OSError as error:
            raise self._unreadable(count, error) from error
        if len(piece) < count:
            raise ImportModelError(
                f"'{self.path}' ends {count - len(piece)} bytes early", remedy="download or copy the file again"
            )
        return piece

    def _check_version(self, descriptor: int) -> None:
        if self.version is not None and _version(os.fstat(descriptor)) != self.version:
            raise ImportModelError(
                f"'{self.path}' was changed or replaced after the weights were opened",
                remedy="load the program again",
            )

    def _unreadable(self, nbytes: int, error: Exception) -> ImportModelError:
        return ImportModelError(
            f"cannot read {nbytes} bytes at offset {self.offset} of '{self.path}': {error}",
            remedy="check that the file is complete and readable",
        )


def file_version(path: Path) -> tuple[int, ...]:
    """What tells a file from another one that took its place: device, inode, size, time of change."""
    return _version(os.stat(path))


def _version(stat: os.stat_result) -> tuple[int, ...]:
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


@dataclass(frozen=True, eq=False)
class MetaSource:
    """Shape and dtype without numbers: enough for structure, cost and cutting."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def load(self) -> torch.Tensor:
        """There are no numbers.

        Raises:
            GraphlatheError: always.
        """
        raise GraphlatheError(
            f"a weight of shape {list(self.shape)} has no numbers: the model was traced on the meta device",
            remedy="load the checkpoint itself to run, calibrate or export it",
        )


@dataclass(frozen=True, eq=False)
class RandomSource:
    """Random numbers that depend on a name alone: what stands for a weight when only its description is known.

    Matrices are normal with variance 1 / (number of columns), vectors are near 1 (they scale, or are variances),
    integers and booleans are 0 or 1.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def load(self) -> torch.Tensor:
        """The numbers, drawn anew at every call."""
        seed = int.from_bytes(hashlib.blake2b(self.name.encode(), digest_size=7).digest(), "little")
        generator = torch.Generator().manual_seed(seed)
        if not (self.dtype.is_floating_point or self.dtype.is_complex):
            return torch.randint(0, 2, self.shape, generator=generator).to(self.dtype)
        values = torch.randn(self.shape, generator=generator)
        values = 1 + 0.1 * values if len(self.shape) < 2 else values / max(1, self.shape[-1]) ** 0.5
        return values.to(self.dtype)


@dataclass(frozen=True)
class Slice:
    """Elements ``start:stop:step`` of one dimension."""

    dim: int
    start: int
    stop: int
    step: int = 1


@dataclass(frozen=True)
class Select:
    """Chosen elements of one dimension, in the order given."""

    dim: int
    index: tuple[int, ...]


@dataclass(frozen=True)
class Permute:
    """Dimensions in a new order."""

    dims: tuple[int, ...]


@dataclass(frozen=True)
class Reshape:
    """The same elements in another shape."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Cast:
    """Another element type."""

    dtype: torch.dtype


@dataclass(frozen=True)
class Scale:
    """Every element times a number."""

    factor: float


Step = Slice | Select | Permute | Reshape | Cast | Scale


def _apply(step: Step, value: torch.Tensor) -> torch.Tensor:
    match step:
        case Slice(dim, start, stop, stride):
            return value[(slice(None),) * dim + (slice(start, stop, stride),)]
        case Select(dim, index):
            return value.index_select(dim, torch.tensor(index, dtype=torch.int64, device=value.device))
        case Permute(dims):
            return value.permute(dims)
        case Reshape(shape):
            return value.reshape(shape)
        case Cast(dtype):
            return value.to(dtype)
        case Scale(factor):
            return value * factor


def source_key(source: Source) -> Any:
    """What two sources of the same numbers, in the same order, have in common.

    Nothing is loaded: a file that is mapped again may lie where another one did.
    """
    if isinstance(source, TensorSource):
        tensor = source.tensor
        pointer = tensor.untyped_storage().data_ptr()
        return ("tensor", pointer, tensor.storage_offset(), tensor.dtype, tuple(tensor.shape), tensor.stride())
    if isinstance(source, FileSource):
        return ("file", str(source.path), source.offset, source.dtype, source.shape)
    if isinstance(source, RandomSource):
        return ("random", source.name, source.dtype, source.shape)
    return ("other", id(source))


@dataclass(frozen=True, eq=False)
class Weight:
    """One named weight of a program: an immutable expression ``source, then steps``.

    Equality is identity; use `digest` to compare contents. ``shape`` and ``dtype`` are known without reading.
    """

    source: Source
    steps: tuple[Step, ...] = ()

    @classmethod
    def from_tensor(cls, tensor: torch.Tensor) -> Weight:
        """Wrap a tensor, sharing its storage; a meta tensor becomes a weight without numbers."""
        tensor = tensor.detach()
        if tensor.device.type == "meta" or _is_fake(tensor):
            return cls(MetaSource(tuple(tensor.shape), tensor.dtype))
        return cls(TensorSource(tensor))

    @classmethod
    def from_file(cls, path: Path, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Weight:
        """A weight that lies at ``offset`` bytes of a file."""
        return cls(FileSource(path, offset, tuple(shape), dtype))

    @cached_property
    def _signature(self) -> tuple[tuple[int, ...], torch.dtype]:
        if not self.steps:
            return tuple(self.source.shape), self.source.dtype
        value = torch.empty(self.source.shape, dtype=self.source.dtype, device="meta")
        for step in self.steps:
            value = _apply(step, value)
        return tuple(value.shape), value.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape after all steps."""
        return self._signature[0]

    @property
    def dtype(self) -> torch.dtype:
        """The element type after all steps."""
        return self._signature[1]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes when materialised."""
        return self.numel * self.dtype.itemsize

    @property
    def is_meta(self) -> bool:
        """Whether there are no numbers behind this weight."""
        return isinstance(self.source, MetaSource)

    def tensor(self) -> torch.Tensor:
        """Materialise: a view of the source where the steps allow it, else a new tensor. Never cached.

        Raises:
            GraphlatheError: the weight is meta.
            ImportModelError: its file cannot be read.
        """
        value = self.source.load()
        for step in self.steps:
            value = _apply(step, value)
        return value

    def then(self, step: Step) -> Weight:
        """The same source with one more step."""
        return Weight(self.source, (*self.steps, step))

    def slice(self, dim: int, start: int, stop: int, step: int = 1) -> Weight:
        """Elements ``start:stop:step`` of dimension ``dim``."""
        return self.then(Slice(dim, start, stop, step))

    def select(self, dim: int, index: Sequence[int]) -> Weight:
        """The elements ``index`` of dimension ``dim``, in that order."""
        return self.then(Select(dim, tuple(int(i) for i in index)))

    def permute(self, dims: Sequence[int]) -> Weight:
        """Dimensions in a new order; one that undoes the step before leaves the weight as it was."""
        order = tuple(dims)
        steps = self.steps
        if steps and isinstance(last := steps[-1], Permute):
            order, steps = tuple(last.dims[d] for d in order), steps[:-1]
        if order == tuple(range(len(order))):
            return Weight(self.source, steps)
        return Weight(self.source, (*steps, Permute(order)))

    def reshape(self, shape: Sequence[int]) -> Weight:
        """The same elements in another shape."""
        return self.then(Reshape(tuple(shape)))

    def cast(self, dtype: torch.dtype) -> Weight:
        """Another element type (the same weight when it already has it)."""
        return self if dtype == self.dtype else self.then(Cast(dtype))

    def scale(self, factor: float) -> Weight:
        """Every element times ``factor``."""
        return self.then(Scale(factor))

    def shares_storage(self, other: Weight) -> bool:
        """Whether both are expressions over the same numbers, so that both together cost one copy of them."""
        a, b = self.source, other.source
        if isinstance(a, TensorSource) and isinstance(b, TensorSource):
            return a.tensor.untyped_storage().data_ptr() == b.tensor.untyped_storage().data_ptr()
        if isinstance(a, FileSource) and isinstance(b, FileSource):
            return (a.path, a.offset) == (b.path, b.offset)
        return a is b

    def chunks(self, limit: int = 16 << 20) -> Iterator[memoryview]:
        """The row-major bytes in pieces of at most ``limit`` bytes, for writing without a second copy in memory.

        An unmodified file-backed weight is read with ordinary reads, so that its pages do not count as the process's.
        """
        if isinstance(self.source, FileSource) and not self.steps:
            yield from self._file_chunks(self.source, limit)
            return
        data = self._bytes()
        for start in range(0, len(data), limit):
            yield memoryview(data[start : start + limit])  # pyright: ignore[reportArgumentType]

    def _file_chunks(self, source: FileSource, limit: int) -> Iterator[memoryview]:
        for start in range(0, self.nbytes, limit):
            yield memoryview(source.read(start, min(limit, self.nbytes - start)))

    def digest(self) -> str:
        """Eight hex digits of a content hash (of samples above 64 MiB), computed once.

        It depends on shape, dtype and numbers alone: the same weight in memory and in a file has one digest.
        """
        return self._digest

    @cached_property
    def _digest(self) -> str:
        state = hashlib.blake2b(digest_size=4)
        state.update(f"{self.dtype} {list(self.shape)}".encode())
        if self.is_meta:
            return state.hexdigest()
        if self.nbytes <= _SAMPLED_ABOVE_BYTES:
            for piece in self.chunks():
                state.update(piece)
            return state.hexdigest()
        starts = [i * (self.nbytes - _SAMPLE_BYTES) // (_SAMPLES - 1) for i in range(_SAMPLES)]
        if isinstance(self.source, FileSource) and not self.steps:
            for start in starts:
                state.update(self.source.read(start, _SAMPLE_BYTES))
        else:
            data = self._bytes()
            for start in starts:
                state.update(data[start : start + _SAMPLE_BYTES].tobytes())
        return state.hexdigest()

    def _bytes(self) -> np.ndarray:
        """The row-major bytes, materialised."""
        if not self.numel:
            return np.empty(0, dtype=np.uint8)
        flat = self.tensor().reshape(-1)
        if flat.stride(0) != 1:  # `contiguous` would keep the stride of a single element, with which `view` fails
            flat = flat.clone(memory_format=torch.contiguous_format)
        return flat.view(torch.uint8).cpu().numpy()


def _is_fake(tensor: torch.Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)
