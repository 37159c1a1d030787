"""Writing results: a file appears complete or not at all, and a failure says what to do."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

from .errors import ExportError


def check_writable(path: Path, *, folder: bool = False) -> None:
    """Fail before the work, not after it, when an output cannot be written.

    Args:
        path: the output.
        folder: whether it is to be a folder rather than a file.

    Raises:
        ExportError: the folder around it does not exist or is read-only, or there is a folder where a file is to go.
    """
    if path.is_dir() and not folder:
        raise ExportError(f"cannot write '{path}': it is a folder", remedy="name a file")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise ExportError(
            f"cannot write '{path}': there is no folder '{parent}'",
            remedy="create it, or choose another path",
        )
    if not os.access(parent, os.W_OK):
        raise ExportError(
            f"cannot write '{path}': the folder '{parent}' is read-only",
            remedy="choose another path",
        )


def write_atomically(path: Path, content: str | bytes | Callable[[Path], None]) -> None:
    """Write a file under another name, then move it into place.

    Args:
        path: where it goes; an existing file is replaced, a pipe or device is written to.
        content: the content, or a function that writes it to the path it is given.

    Raises:
        ExportError: it cannot be written (full disk, no permission); nothing is left behind.
    """
    path = path.resolve() if path.is_symlink() else path  # the link stays a link
    check_writable(path)
    # A pipe or a device cannot be replaced: it is written to.
    special = path.exists() and not path.is_file()
    # The suffix stays: writers such as numpy's look at it.
    partial = path if special else path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        if callable(content):
            content(partial)
        elif isinstance(content, bytes):
            partial.write_bytes(content)
        else:
            partial.write_text(content, encoding="utf-8")
        if not special:
            os.replace(partial, path)
    except OSError as error:
        raise ExportError(
            f"cannot write '{path}': {error.strerror or error}",
            remedy="check free space and permissions",
        ) from error
    finally:
        if not special:
            partial.unlink(missing_ok=True)
