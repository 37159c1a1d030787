"""From a program to something that runs fast: `compile` and its back ends."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from ..ir.errors import InputError, suggest
from ..ir.program import Program
from .session import ProgramSession, Session

BACKENDS: dict[str, str] = {
    "null": ".null_backend:NullSession",
    "onnxruntime": ".onnxruntime_backend:OnnxRuntimeSession",
    "torch": ".torch_backend:TorchSession",
}
"""Back end -> ``module:Session class``; its keyword arguments are the back end's options."""


def compile(program: Program, backend: str = "onnxruntime", *, entry: str = "main", **options: Any) -> ProgramSession:
    """Make a session of a program.

    Args:
        program: the program.
        backend: ``onnxruntime`` (in memory, see `OnnxRuntimeSession`), ``torch`` (the graph as generated code, see
            `TorchSession`), or ``null`` (checks everything, computes nothing, see `NullSession`).
        entry: which entry.
        options: the back end's own.

    Raises:
        InputError: no such back end or option.
        ExportError: the program cannot be expressed in what the back end runs.
    """
    if backend not in BACKENDS:
        raise InputError(
            f"unknown back end '{backend}'{suggest(backend, list(BACKENDS))}", expected=f"one of: {', '.join(BACKENDS)}"
        )
    if entry not in program.entries:
        raise InputError(f"the program has no entry '{entry}'", expected=f"one of: {', '.join(program.entries)}")
    module, _, name = BACKENDS[backend].partition(":")
    cls: type[ProgramSession] = getattr(importlib.import_module(module, __package__), name)
    known = [p.name for p in inspect.signature(cls).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise InputError(
                f"the back end '{backend}' has no option '{option}'{suggest(option, known)}",
                expected=f"options: {', '.join(known) or 'none'}",
            )
    return cls(program, entry, **options)


__all__ = ["BACKENDS", "ProgramSession", "Session", "compile"]
