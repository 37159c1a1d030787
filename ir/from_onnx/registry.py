"""The table of operators: one decorated function per ONNX operator, looked up by name and opset version.

A function's positional parameters are the operator's inputs (``None`` where one is left out), its keyword-only
parameters the attributes, by their ONNX names. Inputs arrive as tensors, unless the decorator says otherwise:

- ``host=("shape",)``: this input is needed on the host, and arrives as a `Host`;
- ``known=("indices",)``: this input arrives as a `Host` where the host knows it, else as a tensor;
- ``raw=("state",)``: this input arrives as it is, whatever it is;
- ``scalars=True``: an input of one known number may arrive as that Python number (element-wise operators).

``@host_operator`` registers the same operator on host numbers; it runs when all inputs are known to the host, and
returns ``NotImplemented`` where it cannot answer, so that the tensor function takes over.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Function = Callable[..., Any]

MODULES = (
    "attention",
    "control",
    "detection",
    "elementwise",
    "host",
    "indexing",
    "layers",
    "microsoft_attention",
    "microsoft_elementwise",
    "microsoft_layers",
    "microsoft_norms",
    "microsoft_quantized",
    "normalization",
    "own",
    "pooling",
    "quantized",
    "recurrent",
    "reduce",
    "resize",
    "shape",
    "signal",
)
"""The files that hold operators, one group each."""

INJECTED = ("n_outputs", "n_used", "opset_version", "walk")
"""Keyword-only parameters that are no attributes: how many outputs the node has, how many up to the last one that
something reads, the opset version, and the walk itself (for operators that hold graphs)."""


@dataclass(frozen=True)
class Operator:
    """One operator from one opset version on."""

    name: str
    since: int
    function: Function
    inputs: tuple[str, ...]
    variadic: bool
    attributes: frozenset[str]
    injected: tuple[str, ...]
    host: frozenset[str]
    known: frozenset[str]
    raw: frozenset[str]
    scalars: bool

    def parameter(self, position: int) -> str:
        """The name of the parameter that takes the input at a position."""
        return self.inputs[min(position, len(self.inputs) - 1)]


@dataclass(frozen=True)
class HostOperator:
    """An operator on host numbers, and the attributes that it knows."""

    function: Function
    attributes: frozenset[str]


_operators: dict[tuple[str, str], list[Operator]] = {}
_host: dict[tuple[str, str], HostOperator] = {}


def operator(
    *names: str,
    since: int = 1,
    domain: str = "",
    host: Iterable[str] = (),
    known: Iterable[str] = (),
    raw: Iterable[str] = (),
    scalars: bool = False,
) -> Callable[[Function], Function]:
    """Register the decorated function for one or more operator names."""

    def register(function: Function) -> Function:
        parameters = inspect.signature(function).parameters.values()
        inputs = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL))
        keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        for name in names:
            entry = Operator(
                name,
                since,
                function,
                inputs,
                variadic,
                frozenset(k for k in keywords if k not in INJECTED),
                tuple(k for k in keywords if k in INJECTED),
                frozenset(host),
                frozenset(known),
                frozenset(raw),
                scalars,
            )
            versions = _operators.setdefault((domain, name), [])
            versions.append(entry)
            versions.sort(key=lambda o: o.since)
        return function

    return register


def host_operator(*names: str, domain: str = "") -> Callable[[Function], Function]:
    """Register the decorated function as the operator on host numbers; inputs arrive as `Host`."""

    def register(function: Function) -> Function:
        parameters = inspect.signature(function).parameters.values()
        known = frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
        for name in names:
            _host[domain, name] = HostOperator(function, known)
        return function

    return register


def fill() -> None:
    """Import the files that hold the operators."""
    for module in MODULES:
        importlib.import_module(f".{module}", __package__)


def find(domain: str, name: str, opset: int) -> Operator | None:
    """The operator's newest version that the opset has."""
    known = [entry for entry in _operators.get((domain, name), ()) if entry.since <= opset]
    return known[-1] if known else None


def find_host(domain: str, name: str) -> HostOperator | None:
    """The operator's function on host numbers."""
    return _host.get((domain, name))


def supported() -> list[str]:
    """Names of all operators of the standard domain, sorted."""
    fill()
    return sorted({name for domain, name in _operators if not domain})
