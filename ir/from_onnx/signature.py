"""What our own ONNX export records beside the graph, read back: size guards and ranges, tied names, state, history.

ONNX has no place for size guards; without them an imported model would accept sizes that its graph gets wrong.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch

from ..dims import Dims, Guard, size_expr
from ..errors import ImportModelError
from ..program import Program, StatePair
from ..types import parse_expr
from ..weights import Weight

PREFIX = "graphlathe."
_RANGE = re.compile(r"(\d+) <= (\w+)(?: <= (\d+))?")
_CANDIDATES = (*range(3, 40), 40, 48, 64, 80, 96, 128, 160, 192, 224, 256, 320, 384, 512, 1024, 2, 1)
_MOST_TRIES = 20_000


@dataclass
class Recorded:
    """What the file says about its dimensions.

    Attributes:
        guards: conditions on dimension names.
        ranges: smallest and largest size by name.
        data: the other records, by key without the prefix.
    """

    guards: list[str] = field(default_factory=list)
    ranges: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)


def read_recorded(metadata: Mapping[str, str]) -> Recorded:
    """Read the records of a file that we wrote (nothing of any other file)."""
    recorded = Recorded(data={k.removeprefix(PREFIX): v for k, v in metadata.items() if k.startswith(PREFIX)})
    for line in recorded.data.pop("guards", "").splitlines():
        found = _RANGE.fullmatch(line)
        if found:
            recorded.ranges[found[2]] = (int(found[1]), int(found[3]) if found[3] else None)
        else:
            recorded.guards.append(line)
    return recorded


def _parsed(recorded: Recorded, symbols: Mapping[str, Any]) -> list[sympy.Basic]:
    try:
        return [parse_expr(text, symbols) for text in recorded.guards]
    except ValueError as error:
        raise ImportModelError(
            f"the file's size guards cannot be read: {error}",
            remedy=f"remove the metadata entry {PREFIX}guards from the file",
        ) from error


def fitting(recorded: Recorded, tries: Sequence[dict[str, int]], fixed: Mapping[str, int]) -> list[dict[str, int]]:
    """The example sizes that the guards allow; where none is, others are searched for.

    Raises:
        ImportModelError: no sizes were found.
    """
    if not tries or not tries[0] or not (recorded.guards or recorded.ranges):
        return list(tries)
    names = list(tries[0])
    symbols = {name: sympy.Symbol(name, integer=True, positive=True) for name in names}
    guards = [Guard(expr) for expr in _parsed(recorded, symbols) if expr != sympy.true]

    def allowed(sizes: Mapping[str, int]) -> bool:
        for name, (low, high) in recorded.ranges.items():
            if name in sizes and (sizes[name] < low or (high is not None and sizes[name] > high)):
                return False
        return all(guard.holds({symbols[name]: size for name, size in sizes.items()}) for guard in guards)

    kept = [sizes for sizes in tries if allowed(sizes)]
    if kept:
        return kept
    found = next((sizes for sizes in _combinations(names, fixed) if allowed(sizes)), None)
    if found is None:
        raise ImportModelError(
            "no sizes were found that satisfy the model's size guards",
            expected="; ".join(recorded.guards),
            remedy=f"pass sizes={{...}} for {', '.join(names)}",
        )
    return [found]


def _combinations(names: Sequence[str], fixed: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Sizes to try, small changes first."""
    choices = [(fixed[name],) if name in fixed else _CANDIDATES for name in names]
    for row in itertools.islice(itertools.product(*reversed(choices)), _MOST_TRIES):
        yield dict(zip(names, reversed(row), strict=True))


def restore(program: Program, recorded: Recorded) -> None:
    """Put what was recorded back into an imported program."""
    entry = program.main
    dims = dict(entry.dims.by_name)
    for name, (low, high) in recorded.ranges.items():
        if name in dims:
            old = dims[name]
            highs = [bound for bound in (high, old.max) if bound is not None]
            dims[name] = replace(old, min=max(low, old.min), max=min(highs) if highs else None)
    symbols = {name: dim.symbol for name, dim in dims.items()}
    known = {str(guard.expr) for guard in entry.dims.guards}
    guards = [Guard(e) for e in _parsed(recorded, symbols) if e != sympy.true and str(e) not in known]
    entry.dims = Dims(dims, (*entry.dims.guards, *guards))
    if recorded.data.get("pipeline"):
        program.history = [recorded.data["pipeline"]]
    names = set(program.weights)
    program.tied |= {a: b for a, b in json.loads(recorded.data.get("tied", "{}")).items() if b in names}
    entry.state = tuple(_state(program, pair) for pair in json.loads(recorded.data.get("state", "[]")))


def _state(program: Program, pair: Mapping[str, Any]) -> StatePair:
    """A state pair; a first value that is one number becomes a weight, where the shape is known."""
    value = program.main.input_node(pair["input"]).meta["val"]
    if pair.get("initial") is None or any(size_expr(size).free_symbols for size in value.shape):
        return StatePair(pair["input"], pair["output"])
    name = pair["input"]
    program.weights[name] = Weight.from_tensor(
        torch.full([int(s) for s in value.shape], pair["initial"], dtype=value.dtype)
    )
    return StatePair(pair["input"], pair["output"], name)
