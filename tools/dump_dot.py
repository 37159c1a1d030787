"""Graphviz text of a program's main graph: a cluster per block and branch, weights as part of what reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import fx

from ..ir.program import Program
from .describe import describe, op_text, type_text
from .sites import Part, find_parts, is_operator

_COLORS = {"attention": "#d8ecf8", "mlp": "#ddf3dd", "conv": "#f4e1f4", "mixer": "#faf0d0", "block": "#f6f6f6"}


def dot(program: Program, title: str) -> str:
    """The graph for ``dot -Tsvg``."""
    lines = [
        f"digraph {_quote(title)} {{",
        "  rankdir=TB; compound=true; newrank=true;",
        '  node [shape=box, style="rounded,filled", fillcolor=white, fontname="Helvetica", fontsize=10];',
        '  edge [color="#666666", arrowsize=0.6];',
        f'  label={_quote(title)}; labelloc=t; fontname="Helvetica";',
    ]
    dims = program.main.dims
    for name, node in zip(program.main.inputs, program.main.placeholders, strict=True):
        label = f"{name}\n{type_text(node.meta.get('val'), dims)}"
        lines.append(f"  {_quote(node.name)} [label={_quote(label)}, shape=ellipse];")
    lines.extend(_clusters(find_parts(program), program, "  ", []))
    for node in program.graph.nodes:
        if is_operator(node):
            lines.extend(
                f"  {_quote(a.name)} -> {_quote(node.name)};" for a in node.all_input_nodes if a.op != "get_attr"
            )
    for number, (name, value) in enumerate(zip(program.main.outputs, program.main.output_values, strict=True)):
        lines.append(f"  {_quote(f'output:{number}')} [label={_quote(name)}, shape=ellipse];")
        if isinstance(value, fx.Node) and value.op != "get_attr":
            lines.append(f"  {_quote(value.name)} -> {_quote(f'output:{number}')};")
    return "\n".join([*lines, "}", ""])


def _clusters(parts: Sequence[Part], program: Program, indent: str, path: list[int]) -> Iterator[str]:
    blocks = 0
    for position, part in enumerate(parts):
        here = [*path, position]
        if part.kind == "rest":
            yield from _operators(part, program, indent)
            continue
        label = f"{part.label} {blocks}" if part.kind == "block" else part.label
        blocks += part.kind == "block"
        yield f"{indent}subgraph cluster_{'_'.join(map(str, here))} {{"
        fill = _COLORS.get(part.kind, "#ffffff")
        yield f'{indent}  label={_quote(label)}; style="rounded,filled"; color="#bbbbbb"; fillcolor="{fill}";'
        yield from _operators(part, program, indent + "  ")
        yield from _clusters(part.children, program, indent + "  ", here)
        yield f"{indent}}}"


def _operators(part: Part, program: Program, indent: str) -> Iterator[str]:
    for node in part.own:
        text = describe(node) or op_text(node)
        label = f"{text}\n{type_text(node.meta.get('val'), program.main.dims)}"
        yield f"{indent}{_quote(node.name)} [label={_quote(label)}];"


def _quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
