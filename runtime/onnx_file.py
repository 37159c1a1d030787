"""Run an ``.onnx`` file as it is, whoever wrote it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..ir.errors import ImportModelError, InputError, suggest
from ..ir.program import Outputs
from .onnxruntime_backend import Binding, open_session
from .session import Session, as_tensor


class OnnxFileSession(Session):
    """A file opened in ONNX Runtime; ONNX Runtime itself checks the inputs.

    Args:
        path: the file.
        options: see `onnxruntime_backend.open_session`.
    """

    def __init__(self, path: Path, **options: Any) -> None:
        self._binding: Binding | None = Binding(open_session(path, **options))
        super().__init__(tuple(self._binding.inputs), tuple(self._binding.outputs))

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """See `Session.run`.

        Raises:
            InputError: an input is missing or unknown, or ONNX Runtime refuses its type or shape.
        """
        if self._binding is None:
            raise InputError("the session is closed")
        for name in feeds:
            if name not in self.inputs:
                raise InputError(f"unknown input '{name}'{suggest(name, self.inputs)}", expected=", ".join(self.inputs))
        missing = [name for name in self.inputs if name not in feeds]
        if missing:
            raise InputError(f"missing input '{missing[0]}'", expected=f"inputs: {', '.join(self.inputs)}")
        try:
            return dict(self._binding.run({name: as_tensor(value) for name, value in feeds.items()}, {}))
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"ONNX Runtime refuses the run: {str(error).splitlines()[0]}") from error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on the file's inputs, positional or by name; returns named `Outputs`."""
        return Outputs(self.run({**dict(zip(self.inputs, args, strict=False)), **kwargs}))

    def close(self) -> None:
        """Free the model."""
        self._binding = None


def open_onnx(path: str | os.PathLike[str], **options: Any) -> OnnxFileSession:
    """Open an ``.onnx`` file in ONNX Runtime.

    Args:
        path: the file.
        options: see `onnxruntime_backend.open_session`.

    Raises:
        ImportModelError: there is no such file.
        ExportError: ONNX Runtime refuses it.
    """
    file = Path(path)
    if not file.is_file():
        raise ImportModelError(f"no file '{file}'")
    return OnnxFileSession(file, **options)
