"""Where the weights lie inside an ``.onnx`` file, and the file without them.

An ONNX file is a Protocol Buffers message. Parsing it whole copies every embedded weight twice; here the message is
walked by its wire format (a tag, a length, the bytes), large ``raw_data`` fields are noted by their offset and left
out, and only the small rest is parsed. Weights are then mapped from the file like external data.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

# Field numbers of onnx.proto, which never change.
_MODEL_GRAPH = 7
_GRAPH_INITIALIZER = 5
_TENSOR_RAW_DATA = 9
_TENSOR_NAME = 8

_BYTES = 2

SMALLEST = 4096
"""Raw data below this many bytes is parsed with the rest: constants are wanted at once."""


class WireError(ValueError):
    """The bytes are no Protocol Buffers message, or end too early."""


def read_without_weights(path: Path) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The model's bytes without its large initializers' data, and where that data is.

    Returns:
        The message, in which these initializers have neither raw nor external data; and for each, by name, the offset
        and length of its data in the file.

    Raises:
        WireError: the file is truncated, or something else.
    """
    if path.stat().st_size == 0:
        return b"", {}
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found: dict[str, tuple[int, int]] = {}
        parts: list[bytes] = []
        for number, start, body, end in _fields(data, 0, len(data)):
            if number == _MODEL_GRAPH:
                graph = b"".join(_graph(data, body, end, found))
                parts += [_tag(number, _BYTES), _varint(len(graph)), graph]
            else:
                parts.append(data[start:end])
        return b"".join(parts), found


def _graph(data: mmap.mmap, start: int, stop: int, found: dict[str, tuple[int, int]]) -> Iterator[bytes]:
    for number, begin, body, end in _fields(data, start, stop):
        if number == _GRAPH_INITIALIZER and end - body >= SMALLEST:
            tensor = _tensor(data, body, end, found)
            yield _tag(number, _BYTES) + _varint(len(tensor)) + tensor
        else:
            yield data[begin:end]


def _tensor(data: mmap.mmap, start: int, stop: int, found: dict[str, tuple[int, int]]) -> bytes:
    kept: list[bytes] = []
    name, place = "", None
    for number, begin, body, end in _fields(data, start, stop):
        if number == _TENSOR_RAW_DATA and end - body >= SMALLEST:
            place = (body, end - body)
            continue
        if number == _TENSOR_NAME:
            name = data[body:end].decode()
        kept.append(data[begin:end])
    if place is not None:
        found[name] = place
    return b"".join(kept)


def _fields(data: mmap.mmap, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """The fields of a message: number, where its tag starts, where its content starts, where it ends."""
    at = start
    while at < stop:
        begin = at
        tag, at = _read_varint(data, at, stop)
        number, kind = tag >> 3, tag & 7
        body = at
        match kind:
            case 0:
                _, at = _read_varint(data, at, stop)
            case 1:
                at += 8
            case 2:
                length, body = _read_varint(data, at, stop)
                at = body + length
            case 5:
                at += 4
            case _:
                raise WireError(f"unknown wire type {kind} at byte {begin}")
        if at > stop or number == 0:
            raise WireError(f"the field at byte {begin} ends {at - stop} bytes behind its message")
        yield number, begin, body, at


def _read_varint(data: mmap.mmap, at: int, stop: int) -> tuple[int, int]:
    value = shift = 0
    while at < stop and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise WireError(f"a number at byte {at} does not end")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _tag(number: int, kind: int) -> bytes:
    return _varint(number << 3 | kind)
