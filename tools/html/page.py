"""``--format html``: one file that shows a model, or two side by side; it works offline and loads nothing.

The file is a skeleton with our styles and scripts, the libraries from ``vendor/``, and the data as JSON. A policy in
its head forbids it any connection.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from string import Template
from typing import Any

from ...ir.program import Program
from ...ir.weights import Weight
from .groups import Tree, sites
from .matching import Matching, match
from .side import Side, Texts
from .weights import Statistics, all_statistics

STYLES = ("style.css", "tree.css", "graph.css", "pictures.css")
SCRIPTS = (
    "format.js",
    "model.js",
    "state.js",
    "search.js",
    "tree.js",
    "layout.js",
    "graph.js",
    "histogram.js",
    "details.js",
    "pictures.js",
    "app.js",
)
LIBRARIES = ("d3.min.js", "elk-api.js")
WORKER = "elk-worker.min.js"
LICENCES = ("LICENSE-d3.txt", "LICENSE-elkjs.md")


@dataclass(frozen=True)
class PageOptions:
    """What the page shows.

    Attributes:
        title: the model's name, or the first one's of two.
        second_title: the other one's name.
        sizes: sizes of dynamic dimensions; others take those of the traced example.
        second_sizes: the same for the other program, whose dimensions may be named differently.
        numbers: how many numbers of weights to read for statistics, in all; 0 for none. Beyond, weights are sampled.
        notes: lines about both, such as what a pipeline did.
        compression: the plans of what was compressed, see `pictures.compression`.
    """

    title: str = "program"
    second_title: str = "after"
    sizes: Mapping[str, int] = field(default_factory=dict)
    second_sizes: Mapping[str, int] = field(default_factory=dict)
    numbers: int = 1 << 28
    notes: tuple[str, ...] = ()
    compression: tuple[Mapping[str, Any], ...] = ()


def html_page(program: Program, options: PageOptions | None = None, second: Program | None = None) -> str:
    """The page of a program, or of two with what differs.

    Args:
        program: the program, or the one before.
        options: what to show.
        second: the program after.

    Returns:
        The HTML text; equal programs and options give equal text.

    Raises:
        ImportModelError: a weight's file cannot be read.
    """
    options = options or PageOptions()
    return assemble(page_data(program, options, second), options.title)


def page_data(program: Program, options: PageOptions, second: Program | None = None) -> dict[str, Any]:
    """Everything that the page shows, as plain data; see the modules for its parts."""
    texts = Texts()
    programs = [program] if second is None else [program, second]
    known = _statistics(programs, options.numbers)
    sides = [Side(program, options.title, options.sizes, texts, known)]
    if second is not None:
        # What is not given is taken as on the first side, since costs at different sizes cannot be compared.
        same = {name: n for name, n in sides[0].sizes.items() if name in second.main.dims.by_name}
        sides.append(Side(second, options.second_title, {**same, **options.second_sizes}, texts, known))
    matchings: dict[str, Matching] = {}
    if second is not None:
        matchings = {name: match(program, second, name, known) for name in program.entries if name in second.entries}
    tree = Tree([side.numbers for side in sides], list(matchings.values()))
    data: dict[str, Any] = {
        "sides": [side.data() for side in sides],
        "tree": tree.data(sites(program, second, matchings, [side.structures for side in sides])),
        "notes": list(options.notes),
        "compression": list(options.compression),
    }
    if second is not None:
        a, b = sides[0].numbers, sides[1].numbers
        pairs = [(a[x], b[y]) for m in matchings.values() for x, y in m.forward.items() if x in a and y in b]
        data["pairs"] = sorted(pairs)
        data["changes"] = sorted((a[x], int(c)) for m in matchings.values() for x, c in m.changes.items() if x in a)
    data["texts"] = texts.all()
    return data


def _statistics(programs: list[Program], numbers: int) -> dict[Weight, Statistics | None]:
    if not numbers:
        return {}
    return all_statistics(
        (p.weights[n] for p in programs for n in sorted(p.used_weights() & p.weights.keys())), numbers
    )


def assemble(data: Mapping[str, Any], title: str) -> str:
    """The page around its data."""
    page = Template(_asset("page.html"))
    return page.substitute(
        title=_escaped(title),
        style="\n".join(map(_asset, STYLES)),
        data=_json(data),
        libraries="\n".join(f"<script>{_script(_asset(f'vendor/{name}'))}</script>" for name in LIBRARIES),
        worker=_script(_asset(f"vendor/{WORKER}")),
        licences=_script("\n\n".join(_asset(f"vendor/{name}") for name in LICENCES)),
        script=_script("\n".join(map(_asset, SCRIPTS))),
    )


def _asset(name: str) -> str:
    return resources.files(__name__.rpartition(".")[0]).joinpath(name).read_text(encoding="utf-8")


def _json(data: Mapping[str, Any]) -> str:
    """JSON that cannot end the element it stands in, whatever a name contains; ASCII."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _script(text: str) -> str:
    """A script's text, which must not end its element or open a comment in it."""
    lowered = text.lower()
    if "</script" in lowered or "<!--" in lowered:
        raise AssertionError("a script of the page contains what would end it")
    return text


def _escaped(text: str) -> str:
    for plain, escape in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;")):
        text = text.replace(plain, escape)
    return text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate can be in a text, and in no file
