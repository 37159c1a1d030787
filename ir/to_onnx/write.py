"""Write an ONNX model as a stream: the graph first, then each weight piece by piece, never two copies in memory.

A protobuf message is a sequence of tagged, length-prefixed fields, and all lengths are known before any weight is
read. So the graph is serialized without its weights, and the weights are appended to it as they are read.
Files are written beside their place and renamed when complete.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import onnx
import onnx_ir as ir
import torch

from ..errors import ExportError
from ..weights import FileSource
from .initializers import WeightTensor

# Protobuf refuses messages of 2 GiB and more.
INLINE_LIMIT = (2 << 30) - (1 << 20)
# Offsets in the data file are multiples of a page, so that readers can map each weight.
ALIGNMENT = 4096
# Smaller weights stay in the file: shape inference may need their numbers.
SMALL_BYTES = 1024

# Element types that a runtime can take from a tensor in place.
SHARABLE = frozenset(
    {torch.float32, torch.float64, torch.float16, torch.bfloat16}
    | {torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool}
)

# Field number and wire type 2 (length-delimited), as in onnx.proto.
_MODEL_GRAPH = bytes([7 << 3 | 2])
_GRAPH_INITIALIZER = bytes([5 << 3 | 2])
_TENSOR_RAW_DATA = bytes([9 << 3 | 2])


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


@dataclass
class _Piece:
    """One initializer: its header, and the tensor whose bytes follow it (None when they lie elsewhere)."""

    header: bytes
    tensor: Any
    nbytes: int

    @property
    def size(self) -> int:
        extra = len(_TENSOR_RAW_DATA) + len(_varint(self.nbytes)) + self.nbytes if self.tensor is not None else 0
        return len(self.header) + extra


class Layout:
    """The bytes of a model: what precedes the weights, the weights, and the data file's contents.

    Args:
        model: the model; its initializers' numbers are not read before they are written.
        data_name: the name of the data file beside the model that large weights go to; None keeps all inside.
        goes_out: which of the large weights go there; default all.
    """

    def __init__(
        self, model: ir.Model, data_name: str | None, goes_out: Callable[[Any], bool] = lambda tensor: True
    ) -> None:
        self.goes_out = goes_out
        self.external: list[tuple[int, Any]] = []
        self.external_size = 0
        pieces = [self._piece(name, value.const_value, data_name) for name, value in model.graph.initializers.items()]
        graph, rest = _without_weights(model)
        self.pieces = pieces
        self.graph = graph
        length = len(graph) + sum(1 + len(_varint(p.size)) + p.size for p in pieces)
        self.head = rest + _MODEL_GRAPH + _varint(length) + graph
        self.size = len(rest) + 1 + len(_varint(length)) + length

    def _piece(self, name: str, tensor: Any, data_name: str | None) -> _Piece:
        proto = onnx.TensorProto(name=name, data_type=int(tensor.dtype), dims=[int(d) for d in tensor.shape])
        nbytes = int(tensor.nbytes)
        if data_name is None or nbytes < SMALL_BYTES or not self.goes_out(tensor):
            return _Piece(proto.SerializeToString(), tensor, nbytes)
        offset = -(-self.external_size // ALIGNMENT) * ALIGNMENT
        proto.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", data_name), ("offset", str(offset)), ("length", str(nbytes))):
            proto.external_data.add(key=key, value=value)
        self.external.append((offset, tensor))
        self.external_size = offset + nbytes
        return _Piece(proto.SerializeToString(), None, nbytes)

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The model file's bytes."""
        yield self.head
        for piece in self.pieces:
            yield _GRAPH_INITIALIZER + _varint(piece.size) + piece.header
            if piece.tensor is not None:
                yield _TENSOR_RAW_DATA + _varint(piece.nbytes)
                yield from _bytes_of(piece.tensor)

    def data_chunks(self) -> Iterator[bytes | memoryview]:
        """The data file's bytes."""
        position = 0
        for offset, tensor in self.external:
            yield bytes(offset - position)
            yield from _bytes_of(tensor)
            position = offset + int(tensor.nbytes)


def _bytes_of(tensor: Any) -> Iterator[bytes | memoryview]:
    if isinstance(tensor, WeightTensor):
        yield from tensor.chunks()
    else:
        yield tensor.tobytes()


def _without_weights(model: ir.Model) -> tuple[bytes, bytes]:
    """The serialized graph without initializers, and the rest of the model."""
    weights = dict(model.graph.initializers)
    model.graph.initializers.clear()
    try:
        proto = ir.serde.serialize_model(model)
    finally:
        model.graph.initializers.update(weights)
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    return graph, proto.SerializeToString()


def to_bytes(model: ir.Model) -> bytes:
    """The whole model as bytes.

    Raises:
        ExportError: it is larger than a protobuf message may be.
    """
    layout = Layout(model, None)
    if layout.size > INLINE_LIMIT:
        raise ExportError(
            f"the model takes {layout.size:,} bytes",
            expected="less than 2 GiB in one piece",
            remedy="write it to a file",
        )
    return b"".join(layout.chunks())


def in_memory(model: ir.Model) -> tuple[bytes, dict[str, torch.Tensor]]:
    """The graph as bytes, and its large weights as tensors that a runtime may share; no weight is copied to bytes."""
    layout = Layout(
        model, "weights", lambda tensor: isinstance(tensor, WeightTensor) and tensor.weight.dtype in SHARABLE
    )
    for _, tensor in layout.external:
        tensor.require_numbers()
    tensors = {str(tensor.name): tensor.weight.tensor() for _, tensor in layout.external}
    return b"".join(layout.chunks()), tensors


def write_model(model: ir.Model, path: Path, external_data: bool | None = None) -> Path:
    """Write a model, and its data file if it has one, completely or not at all.

    Args:
        model: the model.
        path: where; the data file is called ``<name>.data`` and lies beside it.
        external_data: whether weights go to a data file; None: only if the model would exceed 2 GiB.

    Raises:
        ExportError: a file cannot be written, or holds the weights that are being written.
    """
    data_path = path.with_name(path.name + ".data")
    layout = Layout(model, None) if not external_data else Layout(model, data_path.name)
    if layout.size > INLINE_LIMIT and external_data is None:
        layout = Layout(model, data_path.name)
    if layout.size > INLINE_LIMIT:
        raise ExportError(
            f"the model file would take {layout.size:,} bytes",
            expected="less than 2 GiB",
            remedy="use external_data=True",
        )
    targets = [(path, layout.chunks())]
    if layout.external:
        targets.insert(0, (data_path, layout.data_chunks()))
    _check_targets(model, [target for target, _ in targets])
    suffix = f".{uuid.uuid4().hex[:8]}.tmp"
    temporary = [target.with_name(target.name + suffix) for target, _ in targets]
    try:
        for place, (_, chunks) in zip(temporary, targets, strict=True):
            with open(place, "xb") as file:
                _write_all(file, chunks)
        for place, (target, _) in zip(temporary, targets, strict=True):
            os.replace(place, target)
    except OSError as error:
        raise ExportError(
            f"cannot write '{path}': {error.strerror or error}",
            remedy="check the folder's permissions and the free space on its disk",
        ) from error
    finally:
        for place in temporary:
            with contextlib.suppress(OSError):
                place.unlink(missing_ok=True)
    return path


def _write_all(file: IO[bytes], chunks: Iterator[bytes | memoryview]) -> None:
    for chunk in chunks:
        file.write(chunk)


def _check_targets(model: ir.Model, targets: list[Path]) -> None:
    """Refuse what could only fail later, or destroy what it reads."""
    folder = targets[0].parent
    if not folder.is_dir():
        raise ExportError(f"no folder '{folder}'", remedy="create it first")
    for target in targets:
        if target.is_dir():
            raise ExportError(f"'{target}' is a folder", expected="a file name")
    existing = [target for target in targets if target.exists()]
    sources = {
        value.const_value.weight.source.path
        for value in model.graph.initializers.values()
        if isinstance(value.const_value, WeightTensor) and isinstance(value.const_value.weight.source, FileSource)
    }
    for target in existing:
        for source in sources:
            if source.exists() and os.path.samefile(source, target):
                raise ExportError(
                    f"'{target}' holds the weights that are being exported", remedy="write to another name"
                )
