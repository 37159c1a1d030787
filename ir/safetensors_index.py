"""Where each tensor of a checkpoint lies: safetensors headers and shard indices, without reading a single weight.

A safetensors file is an 8-byte little-endian length, that many bytes of JSON (name -> dtype, shape, byte range), then
the bytes. The header alone is enough to make lazy weights, so a checkpoint larger than memory opens in milliseconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .errors import ImportModelError
from .weights import Weight

_HEADER_LIMIT_BYTES = 100_000_000
"""The format's own limit; a longer header means that this is some other file."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


def read_header(path: Path) -> dict[str, Weight]:
    """Lazy weights of one safetensors file, by name, in the file's order.

    Raises:
        ImportModelError: the file is missing, truncated, or no safetensors file; a tensor has an unknown type, or a
            range that does not fit its shape.
    """
    if not path.is_file():
        raise ImportModelError(
            f"no file '{path}'",
            remedy="copy the whole checkpoint folder, every shard included",
        )
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > _HEADER_LIMIT_BYTES:
            raise ImportModelError(f"'{path}' is no safetensors file", expected="an 8-byte header length")
        raw = file.read(length)
    if len(raw) < length:
        raise _truncated(path, size, 8 + length)
    try:
        header: dict[str, Any] = json.loads(raw)
    except ValueError as error:
        raise ImportModelError(f"'{path}' is no safetensors file: its header is not JSON ({error})") from error
    header.pop("__metadata__", None)
    base = 8 + length
    weights: dict[str, Weight] = {}
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = (
                _DTYPES[entry["dtype"]],
                [int(d) for d in entry["shape"]],
                entry["data_offsets"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ImportModelError(
                f"'{path}': the header entry of '{name}' cannot be read: {entry}",
                expected=f"dtype (one of {', '.join(_DTYPES)}), shape, data_offsets",
            ) from error
        weight = Weight.from_file(path, base + begin, shape, dtype)
        if end - begin != weight.nbytes or begin < 0:
            raise ImportModelError(
                f"'{path}': '{name}' has {end - begin} bytes",
                expected=f"{weight.nbytes} for {dtype} {shape}",
            )
        if base + end > size:
            raise _truncated(path, size, base + end)
        weights[name] = weight
    return weights


def _truncated(path: Path, size: int, wanted: int) -> ImportModelError:
    return ImportModelError(
        f"'{path}' is truncated: {size} bytes",
        expected=f"at least {wanted}",
        remedy="download or copy the file again, and compare its size or checksum",
    )


def read_checkpoint(folder: Path) -> dict[str, Weight]:
    """Lazy weights of a checkpoint folder, sharded or not, by their names in the checkpoint.

    Returns:
        An empty dict when the folder holds no safetensors checkpoint.

    Raises:
        ImportModelError: a shard is missing, truncated, outside the folder, or lacks a tensor that the index promises.
    """
    index = folder / INDEX_NAME
    if not index.is_file():
        single = folder / SINGLE_NAME
        return read_header(single) if single.is_file() else {}
    try:
        names: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ImportModelError(f"'{index}' cannot be read: {error!r}", expected='JSON with a "weight_map"') from error
    shards: dict[str, dict[str, Weight]] = {}
    for name, shard in names.items():
        if shard in shards:
            continue
        path = folder / shard
        if Path(shard).name != shard:
            raise ImportModelError(
                f"'{index}' places '{name}' in '{shard}'",
                expected="a file name inside the folder",
            )
        if not path.is_file():
            raise ImportModelError(
                f"'{index.name}' names the shard '{shard}', which '{folder}' does not hold",
                remedy="copy the whole checkpoint folder, every shard included",
            )
        shards[shard] = read_header(path)
    weights: dict[str, Weight] = {}
    for name, shard in names.items():
        if name not in shards[shard]:
            raise ImportModelError(f"'{index.name}' places '{name}' in '{shard}', which does not hold it")
        weights[name] = shards[shard][name]
    return weights


def main_dtype(weights: Mapping[str, Weight]) -> torch.dtype:
    """The floating-point type that most elements have (float32 when there is none)."""
    elements: dict[torch.dtype, int] = {}
    for weight in weights.values():
        if weight.dtype.is_floating_point:
            elements[weight.dtype] = elements.get(weight.dtype, 0) + weight.numel
    return max(elements, key=elements.__getitem__) if elements else torch.float32
