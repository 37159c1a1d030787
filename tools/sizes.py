"""Sizes of dynamic dimensions on the command line: ``B=2``, ``S=512``, or both as ``B=2,S=512``."""

from __future__ import annotations

from collections.abc import Sequence

from ..ir.errors import InputError, suggest
from ..ir.program import Program


def parse_sizes(texts: Sequence[str], program: Program) -> dict[str, int]:
    """Read sizes and check their names and ranges.

    Raises:
        InputError: not ``NAME=N``, no such dimension, or a size outside its range.
    """
    dims = program.main.dims.by_name
    sizes: dict[str, int] = {}
    for item in (part.strip() for text in texts for part in text.split(",") if part.strip()):
        name, equals, number = item.partition("=")
        name, number = name.strip(), number.strip()
        if not equals or not number.isdecimal():
            raise InputError(f"'{item}' is not a size", expected="NAME=N, such as S=512")
        if name not in dims:
            known = ", ".join(dims) or "none: all sizes of this model are fixed"
            raise InputError(
                f"no dynamic dimension '{name}'{suggest(name, list(dims))}", expected=f"dimensions: {known}"
            )
        size, dim = int(number), dims[name]
        if size < dim.min or (dim.max is not None and size > dim.max):
            raise InputError(f"dimension {name} is {size}", expected=f"from {dim.min} to {dim.max or 'any'}")
        sizes[name] = size
    return sizes


def sizes_of_each(texts: Sequence[str], programs: Sequence[Program]) -> list[dict[str, int]]:
    """The sizes for several programs, each of which need not have all the dimensions.

    Raises:
        InputError: as `parse_sizes` does, and for a name that none of them has.
    """
    items = [part.strip() for text in texts for part in text.split(",") if part.strip()]
    known = {name for program in programs for name in program.main.dims.by_name}
    if unknown := [item for item in items if item.partition("=")[0].strip() not in known]:
        parse_sizes(unknown, programs[0])
    return [
        parse_sizes([i for i in items if i.partition("=")[0].strip() in program.main.dims.by_name], program)
        for program in programs
    ]


def with_defaults(sizes: dict[str, int], program: Program) -> dict[str, int]:
    """The sizes, completed by those of the example that was traced."""
    return {name: sizes.get(name, dim.hint) for name, dim in program.main.dims.by_name.items()}


def sizes_text(sizes: dict[str, int]) -> str:
    """``B=2, S=512``."""
    return ", ".join(f"{name}={size}" for name, size in sizes.items())
