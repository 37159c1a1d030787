"""Choose a back end: ``compile(program, "onnxruntime", threads=4)``."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from ..ir.errors import GraphlatheError, suggest
from ..ir.program import Program, check_program
from .session import ProgramSession

BACKENDS: dict[str, str] = {
    "null": ".null_backend:NullSession",
    "onnxruntime": ".onnxruntime_backend:OnnxRuntimeSession",
    "torch": ".torch_backend:TorchSession",
}
"""Name -> ``module:class`` in this folder, loaded when used. Its keyword arguments are the back end's options."""


def compile(program: Program, backend: str = "onnxruntime", *, entry: str = "main", **options: Any) -> ProgramSession:
    """Compile an entry of a program.

    Args:
        program: the program.
        backend: ``"onnxruntime"``, ``"torch"``, or ``"null"`` (checks everything and computes nothing).
        entry: which entry.
        options: the back end's own, see its session class.

    Raises:
        GraphlatheError: the back end, the entry or an option is unknown, or the back end's package is missing.
        ExportError: the program cannot be exported to what the back end runs.
    """
    check_program(program)
    if backend not in BACKENDS:
        raise GraphlatheError(
            f"unknown backend '{backend}'{suggest(backend, list(BACKENDS))}", expected=f"one of: {', '.join(BACKENDS)}"
        )
    if entry not in program.entries:
        raise GraphlatheError(
            f"no entry '{entry}'{suggest(entry, list(program.entries))}",
            expected=f"one of: {', '.join(program.entries)}",
        )
    module, _, name = BACKENDS[backend].partition(":")
    session = getattr(importlib.import_module(module, __package__), name)
    check_options(backend, session, options)
    return session(program, entry, **options)


def check_options(backend: str, session: type[Any], options: dict[str, Any]) -> None:
    """Refuse options that the session class does not have.

    Raises:
        GraphlatheError: one is unknown.
    """
    known = [p.name for p in inspect.signature(session).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise GraphlatheError(
                f"backend '{backend}' has no option '{option}'{suggest(option, known)}",
                expected=f"options: {', '.join(known)}",
            )
