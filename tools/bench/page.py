"""Suite ``page``: time and size of ``dump --format html``, of one program and of two side by side.

Llama models of tiny width, so that the graph is what is measured; the second program is the first without a tenth of
its layers, which is what the page is mostly used to look at.
"""

from __future__ import annotations

import json

from ...ir.errors import GraphlatheError
from ...ir.from_torch import trace
from ...ir.program import Program
from ...passes.base import Context
from ...passes.layers.drop_layers import DropLayers
from ..html.page import PageOptions, html_page
from .base import Goal, Result, Row, Run, Suite
from .compiler_steps import DYNAMIC, build
from .measure import fit_exponent, interleave

EXPONENT = 1.15
"""Growth of time over operators that still counts as linear."""


def run(context: Run) -> Result:
    """Measure all sizes, smallest first."""
    result = Result()
    for layers in (8, 32) if context.quick else (30, 96, 290):
        result.rows.append(_row(layers, context))
    sizes = [row["operators"] for row in result.rows]
    for column in ("one_seconds", "two_seconds"):
        growth = fit_exponent(sizes, [row[column] for row in result.rows])
        result.goals.append(Goal(f"growth exponent of {column} over operators", growth, EXPONENT))
    result.notes.append("the best of two; statistics of weights included; tracing not")
    return result


def _row(layers: int, context: Run) -> Row:
    context.say(f"{layers} layers: tracing")
    import torch

    example = {"input_ids": torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(0))}
    program = trace(build(f"llama-{layers}"), example, dynamic=DYNAMIC)
    smaller = program.clone()
    DropLayers(indices=tuple(range(1, layers, 10))).run(smaller, Context())
    _check(program, html_page(program))
    context.say(f"{layers} layers: pages")
    times = interleave(
        {
            "one": lambda: html_page(program),
            "two": lambda: html_page(program, PageOptions(), smaller),
        },
        2,
        warmup=0,
    )
    return {
        "case": f"llama-{layers}",
        "operators": _operators(program),
        "one_seconds": times["one"].best,
        "one_bytes": len(html_page(program).encode()),
        "two_seconds": times["two"].best,
        "two_bytes": len(html_page(program, PageOptions(), smaller).encode()),
    }


def _operators(program: Program) -> int:
    return sum(node.op == "call_function" for node in program.graph.nodes)


def _check(program: Program, page: str) -> None:
    """The page holds every input, operator and output."""
    data = json.loads(page.partition('<script type="application/json" id="data">')[2].partition("</script>")[0])
    shown = len(data["sides"][0]["nodes"]["macs"])
    nodes = sum(node.op != "get_attr" for graph in program.graphs.values() for node in graph.nodes)
    if shown != nodes:
        raise GraphlatheError(f"the page shows {shown} of {nodes} nodes")


SUITE = Suite(
    "page",
    "time and size of the HTML page, of one program and of two, as the graph grows",
    ("time grows linearly with the graph (exponent at most 1.15)",),
    run,
)
