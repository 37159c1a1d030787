"""How a call's arguments meet an entry's inputs.

A traced callable is called with its own arguments: tensors, nested structures of them, and values that tracing fixed.
Each tensor among their leaves is an input, named by its path (``x``, or ``x.0.key``).
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.utils._pytree as pytree

from .dims import RESERVED
from .errors import InputError, suggest

if TYPE_CHECKING:
    from .program import Entry


def key_text(key: Any) -> str:
    """One step of a path into a nested structure as text: a key, a field's name, or an index."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def identifier(name: str, taken: Collection[str] = ()) -> str:
    """A name as an ASCII identifier that is not taken: ``a.b`` as ``a_b``, the next such one as ``a_b_1``."""
    text = re.sub(r"\W+", "_", name, flags=re.ASCII)
    unusable = not text or text[0].isdigit() or keyword.iskeyword(text) or text in RESERVED
    base = f"_{text}" if unusable else text
    found, count = base, 0
    while found in taken:
        count += 1
        found = f"{base}_{count}"
    return found


def leaf_paths(argument: str, value: Any) -> list[tuple[str, Any]]:
    """The leaves of a (nested) argument with their names: ``x``, or ``x.0.key``."""
    paths, _ = pytree.tree_flatten_with_path(value)
    return [(".".join([argument, *(key_text(k) for k in path)]), leaf) for path, leaf in paths]


def leaf_names(argument: str, value: Any) -> list[str]:
    """Stable names of a (nested) argument's tensors."""
    return [name for name, leaf in leaf_paths(argument, value) if isinstance(leaf, torch.Tensor)]


def call_order(entry: Entry) -> list[str]:
    """The names that positional arguments go to."""
    return list(entry.arguments) or list(entry.inputs)


def match_call(entry: Entry, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Match a call's arguments with the entry's inputs, without checking shapes, or that none is missing.

    Accepts the traced callable's own arguments (nested structures included) or flat input names; values that tracing
    fixed may be repeated.

    Raises:
        InputError: an argument is unknown, given twice, or a fixed one is changed.
    """
    names = call_order(entry)
    if len(args) > len(names):
        raise InputError(f"{len(args)} positional inputs given", expected=f"at most {len(names)}: {', '.join(names)}")
    given: dict[str, Any] = {}
    for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
        if name in entry.constants:
            _check_fixed(entry, name, value)
            continue
        ports = entry.arguments.get(name, (name,) if name in entry.inputs else None)
        if ports is None:
            known = [*names, *(i for i in entry.inputs if i not in names)]
            raise InputError(f"unknown input '{name}'{suggest(name, known)}", expected=f"inputs: {', '.join(known)}")
        for port, leaf in _placed(entry, name, value, ports).items():
            if port in given:
                raise InputError(f"input '{port}' is given twice", expected="one value for each input")
            given[port] = leaf
    return given


def _placed(entry: Entry, name: str, value: Any, ports: Sequence[str]) -> dict[str, Any]:
    """The leaves of one argument by input: by their paths where these are the traced ones, else in order."""
    leaves: dict[str, Any] = {}
    for path, leaf in leaf_paths(name, value):
        if path in entry.constants:
            _check_fixed(entry, path, leaf)
        elif leaf is not None:
            leaves[path] = leaf
    if set(leaves) == set(ports):
        return leaves
    if len(leaves) != len(ports):
        raise InputError(f"'{name}' holds {len(leaves)} tensors", expected=f"{len(ports)}: {', '.join(ports)}")
    if isinstance(value, Mapping) or not set(leaves).isdisjoint(ports):
        raise InputError(f"'{name}' holds {', '.join(leaves)}", expected=", ".join(ports))
    return dict(zip(ports, leaves.values(), strict=True))


def check_complete(entry: Entry, given: Mapping[str, Any]) -> None:
    """Every input must be there.

    Raises:
        InputError: one is missing.
    """
    missing = [name for name in entry.inputs if name not in given]
    if missing:
        raise InputError(
            f"missing input {', '.join(repr(m) for m in missing)}", expected=f"inputs: {', '.join(entry.inputs)}"
        )


def _check_fixed(entry: Entry, name: str, value: Any) -> None:
    fixed = entry.constants[name]
    if isinstance(value, (torch.Tensor, np.ndarray)) or (value is not fixed and repr(value) != repr(fixed)):
        shown = f"a {type(value).__name__}" if isinstance(value, (torch.Tensor, np.ndarray)) else repr(value)
        raise InputError(
            f"'{name}' was fixed to {fixed!r} by tracing",
            expected=f"{fixed!r} or nothing, not {shown}",
            remedy="trace the model again with that value",
        )
