"""Open whatever a path holds: a saved program, ``.pt2``, ``.onnx``, GGUF, or a checkpoint folder."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import GraphlatheError, ImportModelError, suggest
from .program import Program

SAVED_NAME = "program.json"
_KINDS = (
    "a folder that Program.save wrote, an .onnx, .pt2 or .gguf file, or a checkpoint folder "
    "(config.json and safetensors, or one .gguf file)"
)
_DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,  # of which RecursionError is one
    TypeError,
    ValueError,
)
_ADVICE = {
    ".safetensors": "pass the checkpoint folder, with its config.json",
    ".bin": "pass the checkpoint folder, with its config.json",
    ".json": "pass the folder that holds it",
    ".pt": "a pickle is not opened: rebuild the module in Python, load its state dict, and use graphlathe.trace",
    ".pth": "a pickle is not opened: rebuild the module in Python, load its state dict, and use graphlathe.trace",
    ".ckpt": "a pickle is not opened: rebuild the module in Python, load its state dict, and use graphlathe.trace",
    ".tflite": "convert it to ONNX first",
    ".pb": "convert it to ONNX first",
    ".h5": "convert it to ONNX first",
}


def load(path: str | os.PathLike[str], **options: Any) -> Program:
    """Open a model.

    Args:
        path: see above; what it is is told from its name and content.
        options: options of the reader: `ir.from_hub.from_hub` for checkpoints and GGUF, `ir.from_onnx.from_onnx` for
            ONNX files; the others take none.

    Raises:
        ImportModelError: nothing is there, its kind is unknown, it cannot be read, or an option does not apply.
    """
    source = Path(path)
    if not source.exists():
        raise ImportModelError(f"'{source}' does not exist", expected=_KINDS, remedy="check the path")
    kind, reader = _reader(source)
    _check_options(kind, reader, options)
    try:
        return reader(source, **options)
    except GraphlatheError:
        raise
    except _DAMAGE as error:
        # Readers check what they rely on; what a damaged file can hold beyond that has no end.
        detail = " ".join(str(error).split())[:200]
        raise ImportModelError(
            f"'{source}' cannot be read as {kind}: {type(error).__name__}: {detail}",
            remedy="the file may be damaged: write it again; if it is sound, report it",
        ) from error


def _reader(source: Path) -> tuple[str, Callable[..., Program]]:
    """What a path holds, in words, and the function that reads it."""
    if source.is_dir():
        return _folder_reader(source)
    suffix = source.suffix.lower()
    if suffix == ".onnx":
        from .from_onnx import from_onnx

        return "an ONNX file", from_onnx
    if suffix == ".pt2":
        from .from_torch import trace

        return "an exported program", lambda path: trace(path)
    if suffix == ".gguf":
        from .from_hub import from_hub

        return "a GGUF file", from_hub
    if source.name == SAVED_NAME:
        return _folder_reader(source.parent)
    raise ImportModelError(f"'{source}' is of an unknown kind", expected=_KINDS, remedy=_ADVICE.get(suffix))


def _folder_reader(folder: Path) -> tuple[str, Callable[..., Program]]:
    if (folder / SAVED_NAME).is_file():
        return "a saved program", lambda path: Program.load(path if path.is_dir() else path.parent)
    if (folder / "config.json").is_file() or any(folder.glob("*.gguf")):
        from .from_hub import from_hub

        return "a checkpoint", from_hub
    models = sorted(folder.glob("*.onnx"))
    if len(models) == 1:
        from .from_onnx import from_onnx

        return "a folder with an ONNX file", lambda path, **options: from_onnx(models[0], **options)
    if models:
        raise ImportModelError(
            f"'{folder}' holds {len(models)} ONNX files", remedy=f"pass one of them, such as '{models[0]}'"
        )
    content = "nothing" if not any(folder.iterdir()) else "no model"
    raise ImportModelError(f"the folder '{folder}' holds {content}", expected=_KINDS)


def _check_options(kind: str, reader: Callable[..., Program], options: Mapping[str, Any]) -> None:
    if not options:
        return
    if kind == "a folder with an ONNX file":
        from .from_onnx import from_onnx as reader  # type: ignore[assignment]
    known = [p.name for p in inspect.signature(reader).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            raise ImportModelError(
                f"{kind} has no reading option '{name}'{suggest(name, known)}",
                expected=", ".join(known) or "no options",
            )
