"""How far a file may take the importer: a hundred bytes can ask for any number of nodes, numbers or bytes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any

from ..errors import ImportModelError

MOST_TURNS = 1024
"""A loop is unrolled; one of more turns makes a graph that nobody wants."""
MOST_UNROLLED = 10_000
"""Nodes that the loops of a model may become, those inside of others included."""
MOST_INLINED = 1_000_000
"""Nodes that calls of a model's functions may become."""
MOST_EXAMPLE_BYTES = 1 << 30
"""An input of a fixed shape is traced at it."""


class ImportLimitError(ImportModelError):
    """A model asks for more than the importer does, whatever its dynamic sizes."""


def check_turns(count: Any, what: str) -> int:
    """The number of times that something is repeated, which must be known and not too large."""
    if not isinstance(count, int):
        raise ImportModelError(
            f"{what} depends on a dynamic size", expected="a constant", remedy="fix that dimension: static=True"
        )
    if count > MOST_TURNS:
        raise ImportLimitError(f"{what} is {count}: it would be unrolled", expected=f"at most {MOST_TURNS}")
    return count


def check_example(name: str, sizes: Sequence[int], itemsize: int) -> None:
    """Refuse an input of an absurd declared shape."""
    nbytes = math.prod(sizes) * itemsize
    if nbytes > MOST_EXAMPLE_BYTES:
        raise ImportLimitError(
            f"the input '{name}' has the shape {list(sizes)}: {nbytes} bytes",
            expected=f"at most {MOST_EXAMPLE_BYTES}",
            remedy="give it dynamic dimensions in the file",
        )


def check_calls(proto: Any) -> None:
    """Refuse functions that call each other so often that they cannot be inlined."""
    calls = {(f.domain, f.name): Counter(_called(f)) for f in proto.functions}
    try:
        order = list(
            TopologicalSorter({name: set(inner) & calls.keys() for name, inner in calls.items()}).static_order()
        )
    except CycleError:
        return  # the inliner says which

    sizes: dict[tuple[str, str], int] = {}

    def size(inner: Counter[tuple[str, str]]) -> int:
        return sum(times * sizes.get(name, 1) for name, times in inner.items())

    for name in order:
        sizes[name] = size(calls[name])
    total = size(Counter(_called(proto.graph)))
    if total > MOST_INLINED:
        raise ImportLimitError(
            f"the model's functions call each other so often that they come to {total} nodes",
            expected=f"at most {MOST_INLINED}",
        )


def _called(graph: Any) -> Iterator[tuple[str, str]]:
    for node in graph.node:
        yield node.domain, node.op_type
        for attribute in node.attribute:
            yield from _called(attribute.g)
            for inner in attribute.graphs:
                yield from _called(inner)
