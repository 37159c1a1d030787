"""Passes: rewrites of a program with a contract, and what runs them.

Every registered pass is an attribute here by its class name (``passes.DropLayers(ratio=0.25)``), loaded when used.
"""

from __future__ import annotations

from typing import Any

_NAMES = {
    "Case": "base",
    "Context": "base",
    "Effect": "base",
    "Pass": "base",
    "Prop": "base",
    "Stats": "base",
    "option": "base",
    "Pipeline": "pipeline",
    "Repeat": "pipeline",
    "parse_pipeline": "pipeline",
    "PassManager": "manager",
    "bisect": "bisection",
    "Report": "report",
    "Optimized": "optimize",
    "register": "registry",
}


def __getattr__(name: str) -> Any:
    import importlib

    from .registry import BUILTIN

    if name.startswith("_"):
        raise AttributeError(name)
    if name in _NAMES:
        return getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)
    for where in BUILTIN.values():
        module, _, attribute = where.partition(":")
        if attribute == name:
            return getattr(importlib.import_module(module, __name__), name)
    raise AttributeError(f"no pass or name '{name}' in graphlathe.passes")


def __dir__() -> list[str]:
    from .registry import BUILTIN

    return sorted({*_NAMES, *(where.partition(":")[2] for where in BUILTIN.values())})
