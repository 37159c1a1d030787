"""Save a program to a folder and load it again. No pickle.

::

    graph.txt             the text form, with origins
    program.json          what the text does not say: versions, metadata, where each weight lies
    weights.safetensors   the numbers, in the documented safetensors format

Numbers that several weights share are written once; a weight that is cut from a stored one is kept as that expression.
Weights are streamed, so that a model larger than memory can be saved, and loaded weights stay in the file until needed.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .errors import ExportError, ImportModelError
from .program import Program
from .safetensors_index import read_header
from .text import parse_program, print_program
from .types import DTYPES, dtype_name
from .weights import (
    Cast,
    FileSource,
    MetaSource,
    Permute,
    Reshape,
    Scale,
    Select,
    Slice,
    Step,
    Weight,
    file_version,
    source_key,
)

GRAPH, MANIFEST, WEIGHTS = "graph.txt", "program.json", "weights.safetensors"
FORMAT = 1
"""Version of the folder's layout; a reader refuses later ones."""

_STEPS: dict[str, type[Any]] = {cls.__name__.lower(): cls for cls in (Slice, Select, Permute, Reshape, Cast, Scale)}

# The format's names of element types. Those that it lacks are stored as bytes; `program.json` says what they are.
_CODES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}


def save(program: Program, path: Path) -> Path:
    """Write a program to the folder ``path``, replacing what is there once everything is written.

    Args:
        program: the program; only the weights that it uses are written.
        path: a folder that does not exist, is empty, or holds a saved program.

    Returns:
        The folder.

    Raises:
        ExportError: the path holds something else, the program reads its weights from that very folder, a weight has no
            numbers, or the disk is full; nothing is left behind then.
    """
    path = Path(os.path.abspath(path))
    check_target(path)
    _check_weights(program, path)
    text = print_program(program, origins=True)
    stored, manifest = _plan(program)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise ExportError(f"cannot write to '{path.parent}': {error}", remedy="choose another folder") from error
    try:
        (scratch / GRAPH).write_text(text, encoding="ascii")
        (scratch / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="ascii")
        with open(scratch / WEIGHTS, "wb") as file:
            write_safetensors(file, stored)
            file.flush()
            os.fsync(file.fileno())
        _replace(scratch, path)
    except OSError as error:
        raise ExportError(
            f"cannot write '{path}': {error}",
            remedy="free some space, or choose another folder; nothing was left behind",
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return path


def load(path: Path) -> Program:
    """Read what `save` wrote. Weights stay in the file, which must not be changed while the program is used.

    Raises:
        ImportModelError: a file is missing, truncated, of a later version, or does not fit the others.
    """
    path = Path(os.path.abspath(path))
    manifest = _read_manifest(path)
    tensors = read_header(path / WEIGHTS)
    version = file_version(path / WEIGHTS)
    weights: dict[str, Weight] = {}
    try:
        for name, entry in manifest["weights"].items():
            weights[name] = _lazy(tensors[entry["tensor"]], entry, version)
        metadata = {str(k): str(v) for k, v in manifest["metadata"].items()}
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ImportModelError(
            f"'{path / MANIFEST}' does not fit '{WEIGHTS}': {type(error).__name__}: {error}",
            remedy="save the program again",
        ) from error
    program = parse_program(_read_text(path / GRAPH), weights)
    program.metadata.update(metadata)
    return program


def is_saved_program(path: Path) -> bool:
    """Whether a path is a folder that `save` wrote."""
    return (path / GRAPH).is_file() and (path / MANIFEST).is_file()


def check_target(path: Path) -> None:
    """Whether a program may be saved there.

    Raises:
        ExportError: it exists, and is neither empty nor a saved program.
    """
    if path.exists() and not (path.is_dir() and (is_saved_program(path) or not any(path.iterdir()))):
        raise ExportError(f"'{path}' exists and is no saved program", remedy="choose another folder, or remove it")


def _check_weights(program: Program, path: Path) -> None:
    for name in sorted(program.used_weights()):
        weight = program.weights.get(name)
        if weight is None:
            raise ExportError(f"no weight '{name}' in the program", remedy="verify the program first")
        if isinstance(weight.source, MetaSource):
            raise ExportError(
                f"the weight '{name}' has no numbers: the model was traced on the meta device",
                remedy="load the checkpoint itself to save it",
            )
        if isinstance(weight.source, FileSource) and _same_file(weight.source.path, path / WEIGHTS):
            raise ExportError(
                f"the program reads its weights from '{path}'", remedy="save to another folder, then move it"
            )


def _same_file(a: Path, b: Path) -> bool:
    return b.exists() and a.exists() and os.path.samefile(a, b)


def _replace(scratch: Path, path: Path) -> None:
    """Put a complete folder in the place of another one, which is removed only then."""
    os.chmod(scratch, 0o777 & ~_umask())
    if not path.exists():
        os.rename(scratch, path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    try:
        os.rename(path, old / path.name)
        try:
            os.rename(scratch, path)
        except OSError:
            os.rename(old / path.name, path)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise ImportModelError(
            f"cannot read '{path}': {error}", remedy="give the folder that Program.save wrote, with all its files"
        ) from error


def _read_manifest(path: Path) -> dict[str, Any]:
    text = _read_text(path / MANIFEST)
    try:
        manifest = json.loads(text)
        found = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ImportModelError(f"'{path / MANIFEST}' is damaged: {error}", remedy="save the program again") from error
    if found != FORMAT:
        raise ImportModelError(
            f"'{path}' has format {found}", expected=f"format {FORMAT}", remedy="use the version that wrote it"
        )
    return manifest


def _plan(program: Program) -> tuple[dict[str, Weight], dict[str, Any]]:
    """Which tensors to store under which names, and the manifest that makes weights of them.

    Expressions over one source are stored as that source when that takes less than storing each of them.
    """
    groups: dict[Any, dict[str, Weight]] = {}
    for name in sorted(program.used_weights()):
        weight = program.weights[name]
        groups.setdefault(source_key(weight.source), {})[name] = weight
    stored: dict[str, Weight] = {}
    entries: dict[str, Any] = {}
    for group in groups.values():
        distinct: dict[tuple[Step, ...], str] = {}
        for name, weight in group.items():
            distinct.setdefault(weight.steps, name)
        base = Weight(next(iter(group.values())).source)
        as_base = base.nbytes < sum(group[name].nbytes for name in distinct.values())
        for name, weight in group.items():
            tensor = next(iter(group)) if as_base else distinct[weight.steps]
            kept = base if as_base else weight
            stored[tensor] = kept
            entries[name] = {"tensor": tensor, "dtype": dtype_name(kept.dtype), "shape": list(kept.shape)}
            if as_base and weight.steps:
                entries[name]["steps"] = [_step_to_json(step) for step in weight.steps]
    manifest = {
        "format": FORMAT,
        "producer": f"graphlathe (torch {torch.__version__})",
        "metadata": program.metadata,
        "weights": entries,
    }
    return stored, manifest


def _step_to_json(step: Step) -> list[Any]:
    values = {
        key: dtype_name(value) if isinstance(value, torch.dtype) else list(value) if isinstance(value, tuple) else value
        for key, value in asdict(step).items()
    }
    return [type(step).__name__.lower(), values]


def _step_from_json(kind: str, values: Mapping[str, Any]) -> Step:
    cls = _STEPS[kind]
    known = {field.name for field in fields(cls)}
    if set(values) != known:
        raise ValueError(f"a step '{kind}' has {sorted(values)}")
    return cls(
        **{
            key: DTYPES[value] if key == "dtype" else tuple(value) if isinstance(value, list) else value
            for key, value in values.items()
        }
    )


def _lazy(stored: Weight, entry: Mapping[str, Any], version: tuple[int, ...]) -> Weight:
    """The weight of a manifest entry, over the stored tensor."""
    source = stored.source
    assert isinstance(source, FileSource)
    dtype, shape = DTYPES[entry["dtype"]], tuple(int(size) for size in entry["shape"])
    weight = Weight(FileSource(source.path, source.offset, shape, dtype, version))
    if weight.nbytes != stored.nbytes:
        raise ValueError(f"'{entry['tensor']}' has {stored.nbytes} bytes, not {weight.nbytes}")
    for kind, values in entry.get("steps", ()):
        weight = weight.then(_step_from_json(kind, values))
    _ = weight.shape  # the steps must fit one another
    return weight


@dataclass(frozen=True)
class _Slot:
    name: str
    weight: Weight
    begin: int


def write_safetensors(file: BinaryIO, weights: Mapping[str, Weight]) -> None:
    """Stream weights in the safetensors format: header length, JSON header, then the bytes, each tensor aligned.

    Tensors are ordered by falling alignment and then by name, as the reference writer does, so that no gaps are needed.
    """
    slots: list[_Slot] = []
    at = 0
    for name in sorted(weights, key=lambda n: (-weights[n].dtype.itemsize, n)):
        slots.append(_Slot(name, weights[name], at))
        at += weights[name].nbytes
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for slot in slots:
        code, shape = _CODES.get(slot.weight.dtype), list(slot.weight.shape)
        if code is None:
            code, shape = "U8", [slot.weight.nbytes]
        span = [slot.begin, slot.begin + slot.weight.nbytes]
        header[slot.name] = {"dtype": code, "shape": shape, "data_offsets": span}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    file.write(len(raw).to_bytes(8, "little"))
    file.write(raw)
    for slot in slots:
        _write(file, slot.name, slot.weight.chunks(), slot.weight.nbytes)


def _write(file: BinaryIO, name: str, chunks: Iterable[memoryview], nbytes: int) -> None:
    written = sum(file.write(piece) for piece in chunks)
    if written != nbytes:
        raise ExportError(f"the weight '{name}' gave {written} bytes", expected=str(nbytes))
