"""Writing results: a file appears complete or not at all, and a failure says what to do."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

from ..ir.errors import ExportError


def check_writable(path: Path) -> None:
    """Fail before the work, not after it, when an output cannot be written.

    Raises:
        ExportError: the folder does not exist or is read-only.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ExportError(
            f"cannot write '{path}': there is no folder '{folder}'",
            remedy="create it, or choose another path",
        )
    if not os.access(folder, os.W_OK):
        raise ExportError(
            f"cannot write '{path}': the folder '{folder}' is read-only",
            remedy="choose another path",
        )


def write_atomically(path: Path, content: str | bytes | Callable[[Path], None]) -> None:
    """Write a file under another name, then move it into place.

    Args:
        path: where it goes; an existing file is replaced.
        content: the content, or a function that writes it to the path it is given.

    Raises:
        ExportError: it cannot be written (full disk, no permission); nothing is left behind.
    """
    check_writable(path)
    if path.is_dir():
        raise ExportError(f"cannot write '{path}': it is a folder", remedy="name a file")
    # The suffix stays: writers such as numpy's look at it.
    partial = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        if callable(content):
            content(partial)
        elif isinstance(content, bytes):
            partial.write_bytes(content)
        else:
            partial.write_text(content, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise ExportError(
            f"cannot write '{path}': {error.strerror or error}",
            remedy="check free space and permissions",
        ) from error
    finally:
        partial.unlink(missing_ok=True)
