"""``graphlathe dump``: a model as text, as a tree of its blocks, as a table of costs, or for Graphviz."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, RenderableType

from ..ir.program import Program
from .console import PIPED_WIDTH, console
from .files import check_writable, write_atomically
from .sizes import parse_sizes


@dataclass(frozen=True)
class DumpOptions:
    """What to print.

    Attributes:
        format: ``text``, ``tree``, ``table`` or ``dot``.
        origins: text: where each node came from, and which pass made it.
        sort: table: ``order``, ``macs``, ``bytes`` or ``params``.
        by: table: ``node``, ``site`` or ``origin``.
        limit: table: at most this many rows; 0 for all.
        sizes: ``NAME=N`` for dynamic dimensions.
    """

    format: str = "tree"
    origins: bool = False
    sort: str = "order"
    by: str = "node"
    limit: int = 0
    sizes: Sequence[str] = ()


def dump_to(path: Path, options: DumpOptions, output: Path | None) -> None:
    """Load a model and print it, or write it to a file."""
    from ..ir.load import load

    if output is not None:
        check_writable(output)
    rendered = render(load(path), options, title=path.name or str(path))
    if output is not None:
        write_atomically(output, to_text(rendered))
    elif sys.stdout.isatty() and not isinstance(rendered, str):
        console().print(rendered)
    else:
        print(to_text(rendered), end="")


def render(program: Program, options: DumpOptions, title: str = "program") -> str | RenderableType:
    """A program in one of the formats; the tree and the table come as Rich objects, with colors."""
    sizes = parse_sizes(options.sizes, program)
    match options.format:
        case "text":
            text = program.to_text(origins=options.origins)
            return text if text.endswith("\n") else text + "\n"
        case "dot":
            from .dump_dot import dot

            return dot(program, title)
        case "table":
            from .dump_table import cost_table

            return cost_table(program, title, by=options.by, sort=options.sort, limit=options.limit, sizes=sizes)
        case _:
            from .dump_tree import tree

            return tree(program, title, sizes)


def to_text(rendered: str | RenderableType) -> str:
    """A rendering as plain text, without colors and trailing blanks."""
    if isinstance(rendered, str):
        return rendered
    buffer = io.StringIO()
    Console(file=buffer, width=PIPED_WIDTH, highlight=False, markup=False, emoji=False).print(rendered)
    return "".join(line.rstrip() + "\n" for line in buffer.getvalue().splitlines())
