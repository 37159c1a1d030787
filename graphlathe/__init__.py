"""graphlathe: a compiler for neural-network graphs, made of composable passes with contracts.

    import graphlathe as gl

    opt = gl.optimize(model, example_inputs, passes="canonicalize,drop-layers{ratio=0.2}", calibration=batches)
    print(opt.report)
    opt.export("model.onnx")

Everything here loads when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import kernels as kernels
    from . import passes as passes
    from .ir.errors import ExportError as ExportError
    from .ir.errors import GraphlatheError as GraphlatheError
    from .ir.errors import ImportModelError as ImportModelError
    from .ir.errors import InputError as InputError
    from .ir.errors import PipelineError as PipelineError
    from .ir.errors import PostconditionError as PostconditionError
    from .ir.errors import PreconditionError as PreconditionError
    from .ir.errors import UnsupportedOpError as UnsupportedOpError
    from .ir.errors import VerifyError as VerifyError
    from .ir.from_torch import trace as trace
    from .ir.load import load as load
    from .ir.program import Program as Program
    from .ir.rules import Rule as Rule
    from .ir.structure import structure as structure
    from .passes.base import Effect as Effect
    from .passes.base import Pass as Pass
    from .passes.base import option as option
    from .passes.optimize import optimize as optimize
    from .passes.registry import register as register
    from .runtime.compile import compile as compile

__version__ = "0.1.0"

_WHERE = {
    "trace": "ir.from_torch",
    "load": "ir.load",
    "optimize": "passes.optimize",
    "compile": "runtime.compile",
    "structure": "ir.structure",
    "Program": "ir.program",
    "Pass": "passes.base",
    "option": "passes.base",
    "Effect": "passes.base",
    "Rule": "ir.rules",
    "register": "passes.registry",
    "GraphlatheError": "ir.errors",
    "PipelineError": "ir.errors",
    "PreconditionError": "ir.errors",
    "PostconditionError": "ir.errors",
    "VerifyError": "ir.errors",
    "UnsupportedOpError": "ir.errors",
    "ExportError": "ir.errors",
    "ImportModelError": "ir.errors",
    "InputError": "ir.errors",
}
_MODULES = ("passes", "kernels")

__all__ = [
    "Effect",
    "ExportError",
    "GraphlatheError",
    "ImportModelError",
    "InputError",
    "Pass",
    "PipelineError",
    "PostconditionError",
    "PreconditionError",
    "Program",
    "Rule",
    "UnsupportedOpError",
    "VerifyError",
    "__version__",
    "compile",
    "kernels",
    "load",
    "optimize",
    "option",
    "passes",
    "register",
    "structure",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'graphlathe' has no attribute '{name}'; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
