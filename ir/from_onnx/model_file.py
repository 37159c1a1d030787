"""Read an ONNX file: the graph, and its initializers as lazy weights.

Weights are mapped, never copied, whether they lie in the file or beside it; and beside it only inside the model's own
folder: a path that leads out of it is an error, not a read of somebody's files.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ImportModelError, suggest
from ..weights import Weight
from .limits import check_calls
from .registry import fill, find
from .wire import read_without_weights

DTYPES: dict[int, torch.dtype] = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    4: torch.uint16,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    12: torch.uint32,
    13: torch.uint64,
    14: torch.complex64,
    15: torch.complex128,
    16: torch.bfloat16,
    17: torch.float8_e4m3fn,
    19: torch.float8_e5m2,
}
"""``TensorProto.DataType`` to torch."""


@dataclass
class OnnxModel:
    """A model file, read.

    Attributes:
        proto: the model, functions inlined.
        opset: version of the standard operators.
        weights: initializers and constants by name.
        source: the file's name.
        folder: where it lies.
    """

    proto: Any
    opset: int
    weights: dict[str, Weight]
    source: str
    folder: Path

    def opset_of(self, domain: str) -> int:
        """The version of a domain's operators (1 for a domain that the file does not declare)."""
        if domain in ("", "ai.onnx"):
            return self.opset
        return next((o.version for o in self.proto.opset_import if o.domain == domain), 1)

    @property
    def graph(self) -> Any:
        """The main graph."""
        return self.proto.graph


def read_model(path: Path) -> OnnxModel:
    """Read a file.

    Raises:
        ImportModelError: it is missing, truncated, no ONNX model, of an unknown opset, or its data lies outside its
            folder.
    """
    import onnx

    if not path.is_file():
        raise ImportModelError(f"no file '{path}'")
    try:
        message, places = read_without_weights(path)
        proto = onnx.load_model_from_string(message)
    except Exception as error:
        raise ImportModelError(
            f"cannot read '{path}': {type(error).__name__}: {error}",
            expected="an ONNX model",
            remedy="the file may be truncated: export, download or copy it again",
        ) from error
    if not proto.graph.output:
        raise ImportModelError(
            f"'{path}' holds no graph", expected="an ONNX model", remedy="the file may be empty or truncated"
        )
    if proto.functions:
        import onnx.inliner

        fill()
        check_calls(proto)
        known = [(f.domain, f.name) for f in proto.functions if find(f.domain, f.name, 1) is not None]
        try:
            proto = onnx.inliner.inline_selected_functions(proto, known, exclude=True)
        except Exception as error:
            detail = " ".join(str(error).split())[:300]
            raise ImportModelError(
                f"the functions of '{path}' cannot be inlined: {detail}",
                expected="functions that do not call themselves, nor each other too deeply",
            ) from error
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
    newest = onnx.defs.onnx_opset_version()
    if not 1 <= opset <= newest:
        raise ImportModelError(
            f"'{path}' uses opset {opset}",
            expected=f"1 to {newest}, the newest that the installed onnx {onnx.__version__} knows",
        )
    if proto.graph.sparse_initializer:
        raise ImportModelError(f"'{path}' holds sparse initializers", expected="dense ones")
    folder = path.absolute().parent
    weights: dict[str, Weight] = {}
    for tensor in proto.graph.initializer:
        if tensor.name in places:
            weights[tensor.name] = _embedded(tensor, path, *places[tensor.name])
        else:
            weights[tensor.name] = tensor_weight(tensor, folder)
    return OnnxModel(proto, opset, weights, path.name, folder)


def fix_inputs(model: OnnxModel, values: Mapping[str, Any]) -> None:
    """Make inputs into stored tensors.

    Raises:
        ImportModelError: there is no such input, or its element type is another.
    """
    ports = {port.name: port.type.tensor_type for port in model.graph.input}
    for name, value in values.items():
        if name not in ports:
            raise ImportModelError(
                f"the model has no input '{name}'{suggest(name, list(ports))}", expected=", ".join(ports) or "none"
            )
        tensor = torch.as_tensor(value)
        wanted = DTYPES.get(ports[name].elem_type)
        if tensor.dtype != wanted:
            raise ImportModelError(f"the value for '{name}' is of type {tensor.dtype}", expected=str(wanted))
        model.weights[name] = Weight.from_tensor(tensor)


def tensor_weight(tensor: Any, folder: Path | None) -> Weight:
    """A stored tensor as a lazy weight.

    Args:
        tensor: the ``TensorProto``.
        folder: where external data may lie (None: nowhere).

    Raises:
        ImportModelError: the element type is unknown, the data is incomplete, or lies elsewhere.
    """
    import onnx

    dtype, shape = _type_of(tensor)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return _external(tensor, dtype, shape, folder)
    if not tensor.HasField("raw_data"):
        array = onnx.numpy_helper.to_array(tensor)
        if dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):  # numpy knows these as extension types
            return Weight.from_tensor(torch.from_numpy(array.view(f"u{dtype.itemsize}").copy()).view(dtype))
        return Weight.from_tensor(torch.from_numpy(array.copy()).reshape(shape))
    raw = tensor.raw_data
    if len(raw) != math.prod(shape) * dtype.itemsize:
        raise _wrong_length(tensor.name, len(raw), dtype, shape)
    if not raw:
        return Weight.from_tensor(torch.empty(shape, dtype=dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the bytes are read-only, and so are weights
        return Weight.from_tensor(torch.frombuffer(raw, dtype=dtype).reshape(shape))


def _type_of(tensor: Any) -> tuple[torch.dtype, tuple[int, ...]]:
    import onnx

    dtype = DTYPES.get(tensor.data_type)
    if dtype is None:
        known = onnx.TensorProto.DataType
        kind = known.Name(tensor.data_type) if tensor.data_type in known.values() else str(tensor.data_type)
        raise ImportModelError(
            f"initializer '{tensor.name}' has the element type {kind}", expected="a type that torch has"
        )
    if any(size < 0 for size in tensor.dims):
        raise ImportModelError(
            f"initializer '{tensor.name}' has the shape {list(tensor.dims)}", expected="sizes from 0 on"
        )
    return dtype, tuple(tensor.dims)


def _wrong_length(name: str, length: int, dtype: torch.dtype, shape: tuple[int, ...]) -> ImportModelError:
    wanted = math.prod(shape) * dtype.itemsize
    return ImportModelError(f"initializer '{name}' has {length} bytes", expected=f"{wanted} for {dtype} {list(shape)}")


def _embedded(tensor: Any, path: Path, offset: int, length: int) -> Weight:
    """A weight inside the model file itself."""
    dtype, shape = _type_of(tensor)
    if length != math.prod(shape) * dtype.itemsize:
        raise _wrong_length(tensor.name, length, dtype, shape)
    return Weight.from_file(path, offset, shape, dtype)


def _external(tensor: Any, dtype: torch.dtype, shape: tuple[int, ...], folder: Path | None) -> Weight:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if folder is None or not location:
        raise ImportModelError(
            f"initializer '{tensor.name}' has no data", expected="the name of a file beside the model"
        )
    try:
        path = (folder / location).resolve()
        exists = path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a byte of zero, links in a circle
        raise ImportModelError(
            f"the data of initializer '{tensor.name}' lies at {location[:80]!a}, which is no path: {error}",
            expected=f"a file inside '{folder}'",
        ) from error
    if Path(location).is_absolute() or not path.is_relative_to(folder.resolve()):
        raise ImportModelError(
            f"the data of initializer '{tensor.name}' lies outside the model's folder: '{location}'",
            expected=f"a file inside '{folder}'",
            remedy="put the data file beside the model; a model may not read files elsewhere",
        )
    if not exists:
        raise ImportModelError(
            f"the data file '{location}' of initializer '{tensor.name}' is missing",
            remedy=f"copy it to '{folder}', beside the model",
        )
    offset = _count(tensor.name, "offset", entries.get("offset", "0"))
    weight = Weight.from_file(path, offset, shape, dtype)
    length = _count(tensor.name, "length", entries.get("length", str(weight.nbytes)))
    if length != weight.nbytes:
        raise _wrong_length(tensor.name, length, dtype, shape)
    end = offset + weight.nbytes
    if path.stat().st_size < end:
        raise ImportModelError(
            f"the data file '{location}' is truncated: {path.stat().st_size} bytes",
            expected=f"at least {end}, for initializer '{tensor.name}'",
            remedy="export, download or copy it again",
        )
    return weight


def _count(name: str, key: str, text: str) -> int:
    """A number of bytes, as external data is described."""
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ImportModelError(f"the data of initializer '{name}' has the {key} '{text}'", expected="a number of bytes")
    return int(text)
