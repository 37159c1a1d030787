"""``graphlathe dump``: a model as text, a tree of blocks, sites, a table of costs, for Graphviz, or as HTML."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, RenderableType

from ..ir.errors import InputError
from ..ir.files import check_writable, write_atomically
from ..ir.program import Program
from .console import PIPED_WIDTH, console
from .sizes import parse_sizes, sizes_of_each

NUMBERS_READ = 1 << 28
"""How many numbers of weights a page's statistics are made of, unless told otherwise; beyond, weights are sampled."""


@dataclass(frozen=True)
class DumpOptions:
    """What to print.

    Attributes:
        format: ``text``, ``tree``, ``sites``, ``table``, ``dot`` or ``html``.
        origins: text: where each node came from, and which pass made it.
        sort: table: ``order``, ``macs``, ``bytes`` or ``params``.
        by: table: ``node``, ``site`` or ``origin``.
        limit: table: at most this many rows; 0 for all.
        sizes: ``NAME=N`` for dynamic dimensions.
        against: html: a second model, shown beside the first with what differs.
        statistics: html: how many numbers of weights to read, in all.
        passes: a pipeline that the models go through first, such as ``raise``.
    """

    format: str = "tree"
    origins: bool = False
    sort: str = "order"
    by: str = "node"
    limit: int = 0
    sizes: Sequence[str] = ()
    against: Path | None = None
    statistics: int = NUMBERS_READ
    passes: str = ""


def dump_to(path: Path, options: DumpOptions, output: Path | None) -> None:
    """Load a model and print it, or write it to a file.

    Raises:
        InputError: a page of HTML for a terminal, or a second model where only one is shown.
        PipelineError: the passes are wrong.
        ImportModelError: a model cannot be read.
        ExportError: the output cannot be written.
    """
    from ..ir.load import load

    if output is not None:
        check_writable(output)
    elif options.format == "html" and sys.stdout.isatty():
        raise InputError("a page of HTML is not for a terminal", remedy="name a file: -o page.html")
    if options.against is not None and options.format != "html":
        raise InputError("--against is for --format html", remedy="add --format html")
    run = _runner(options.passes)
    second = run(load(options.against)) if options.against is not None else None
    rendered = render(run(load(path)), options, title=path.name or str(path), second=second)
    if output is not None:
        write_atomically(output, to_text(rendered))
    elif sys.stdout.isatty() and not isinstance(rendered, str):
        console().print(rendered)
    else:
        print(to_text(rendered), end="")


def _runner(passes: str) -> Callable[[Program], Program]:
    """What takes a program through the passes; without any, it stays as it is."""
    if not passes:
        return lambda program: program
    from ..passes.optimize import optimize
    from ..passes.pipeline import parse_pipeline

    pipeline = parse_pipeline(passes)  # a wrong one is refused before a model is read
    return lambda program: optimize(program, passes=pipeline, progress=False, costs=False)


def render(
    program: Program, options: DumpOptions, title: str = "program", second: Program | None = None
) -> str | RenderableType:
    """A program in one of the formats; the tree and the table come as Rich objects, with colors.

    Args:
        program: the program.
        options: the format, and what it shows.
        title: what it is called.
        second: html: a program to show beside it.

    Raises:
        InputError: a size is wrong.
    """
    if options.format == "html":
        return _page(program, options, title, second)
    sizes = parse_sizes(options.sizes, program)
    match options.format:
        case "text":
            text = program.to_text(origins=options.origins)
            return text if text.endswith("\n") else text + "\n"
        case "sites":
            return _sites(program)
        case "dot":
            from .dump_dot import dot

            return dot(program, title)
        case "table":
            from .dump_table import cost_table

            return cost_table(program, title, by=options.by, sort=options.sort, limit=options.limit, sizes=sizes)
        case _:
            from .dump_tree import tree

            return tree(program, title, sizes)


def _sites(program: Program) -> str:
    """Every site: what it is and why it was recognised; then what was not, and why."""
    from ..ir.structure import structure

    texts = {name: str(structure(program, name)) for name in program.entries}
    alone = len(texts) == 1
    return "".join((text if alone else f"@{name}\n{text}") + "\n" for name, text in texts.items())


def _page(program: Program, options: DumpOptions, title: str, second: Program | None) -> str:
    from .html.page import PageOptions, html_page

    programs = [program] if second is None else [program, second]
    sizes = sizes_of_each(options.sizes, programs)
    name = options.against.name if options.against is not None else "after"
    page = PageOptions(title, name, sizes[0], sizes[-1], numbers=options.statistics)
    return html_page(program, page, second)


def to_text(rendered: str | RenderableType) -> str:
    """A rendering as plain text, without colors and trailing blanks."""
    if isinstance(rendered, str):
        return rendered
    buffer = io.StringIO()
    Console(file=buffer, width=PIPED_WIDTH, highlight=False, markup=False, emoji=False).print(rendered)
    return "".join(line.rstrip() + "\n" for line in buffer.getvalue().splitlines())
