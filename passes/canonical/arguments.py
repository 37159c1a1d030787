"""An operator's arguments by name, however they were written."""

from __future__ import annotations

import struct
from collections.abc import Hashable
from functools import cache
from typing import Any

import torch
from torch import fx

_NO_DEFAULT = object()


@cache
def schema(target: torch._ops.OpOverload) -> dict[str, Any]:
    """An operator's arguments in order, with their defaults (a lone object where there is none)."""
    return {a.name: a.default_value if a.has_default_value() else _NO_DEFAULT for a in target._schema.arguments}


@cache
def _frozen_defaults(target: torch._ops.OpOverload) -> dict[str, Hashable]:
    return {name: freeze(value) for name, value in schema(target).items()}


def given(node: fx.Node) -> dict[str, Any]:
    """What a node of an ATen operator was given, by name, without what equals the default."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    defaults = _frozen_defaults(target)
    values = dict(zip(defaults, node.args, strict=False)) | dict(node.kwargs)
    return {n: v for n, v in values.items() if isinstance(v, fx.Node) or freeze(v) != defaults[n]}


def argument(node: fx.Node, name: str) -> Any:
    """One argument of a node of an ATen operator, by name; its default where it was not given."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    if name in node.kwargs:
        return node.kwargs[name]
    defaults = schema(target)
    position = list(defaults).index(name)
    return node.args[position] if position < len(node.args) else defaults[name]


def freeze(value: Any) -> Hashable:
    """A hashable stand-in that tells apart what Python's equality does not: 1, 1.0 and True; 0.0 and -0.0."""
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, (list, tuple)):
        return ("list", *(freeze(v) for v in value))
    if isinstance(value, dict):
        return ("dict", *((k, freeze(v)) for k, v in sorted(value.items())))
    if isinstance(value, slice):
        return ("slice", freeze(value.start), freeze(value.stop), freeze(value.step))
    if isinstance(value, float):
        return ("float", struct.pack("d", value))
    return (type(value).__name__, value)
