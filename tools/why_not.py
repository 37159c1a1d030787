"""``optimize --why-not``: why a pass left places as they were; all of them, or those that somebody asks about."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from ..ir.errors import InputError, PipelineError, suggest
from ..ir.program import MADE_BY, ORIGIN, Program
from ..passes.pipeline import Pipeline
from ..passes.report import Report, Row

PLACES = 8
"""How many places are listed for each reason."""


@dataclass(frozen=True)
class Question:
    """A question about a pass.

    Attributes:
        name: of a pass in the pipeline, or of a part of one (``raise-attention`` is a part of ``raise``), or ``all``.
        place: a node's name, its number in the text of the given model (``%35``), or an origin; None: every place.
        inside: the passes of the pipeline that it is a part of.
    """

    name: str
    place: str | None = None
    inside: frozenset[str] = frozenset()


def parse_question(text: str, pipeline: Pipeline) -> Question:
    """Read ``PASS`` or ``PASS:PLACE``.

    Raises:
        PipelineError: the pass is neither in the pipeline nor a part of one that is.
    """
    name, _, place = text.partition(":")
    used = list(pipeline.passes())
    known = ["all", *(p.name for p in used), *(part for p in used for part in p.parts)]
    if name not in known:
        raise PipelineError(
            f"--why-not names '{name}', which is not in the pipeline{suggest(name, known)}",
            expected=", ".join(dict.fromkeys(known)),
        )
    return Question(name, place.removeprefix("%") or None, frozenset(p.name for p in used if name in p.parts))


def answer(question: Question, report: Report, before: Program, after: Program) -> list[str]:
    """Lines that answer a question.

    Args:
        question: what is asked.
        report: of the run.
        before: the program that was given.
        after: the program that came out.

    Raises:
        InputError: no node is meant by the place.
    """
    lines: list[str] = []
    for row in report.rows:
        prefix = _prefix(question, row)
        if prefix is None:
            continue
        misses = {r.removeprefix(prefix): n for r, n in row.misses.items() if r.startswith(prefix)}
        missed = {n: r.removeprefix(prefix) for n, r in row.missed.items() if r.startswith(prefix)}
        if question.place is None:
            head = "" if prefix else f": {row.hits} of {row.attempts} places rewritten"
            lines.append(f"{prefix.removesuffix(': ') or row.text}{head}")
            for reason, count in sorted(misses.items(), key=lambda item: -item[1]):
                lines.append(f"  {count} x {reason}")
                lines += _places([name for name, why in missed.items() if why == reason], before, after)
            lines += [] if misses else ["  nothing that it considered was left"]
        else:
            lines += _about(question, missed, before, after)
    return lines or [f"'{question.name}' did not run"]


def _places(names: list[str], before: Program, after: Program) -> list[str]:
    """The first places that were left for one reason, as they were called in the given model or are called now."""
    nodes = _nodes(before) | _nodes(after)
    shown = [f"      {_described(name, nodes)}" for name in names[:PLACES]]
    return [*shown, f"      and {len(names) - PLACES} more"] if len(names) > PLACES else shown


def _prefix(question: Question, row: Row) -> str | None:
    """What starts the reasons of the pass that is asked about; None for another row."""
    if question.name in ("all", row.name):
        return ""
    return f"{question.name}: " if row.name in question.inside else None


def _about(question: Question, missed: dict[str, str], before: Program, after: Program) -> Iterator[str]:
    assert question.place is not None
    meant = _meant(question.place, missed, before, after)
    if not meant:
        names = [*missed, *_nodes(after), *(str(n.meta.get(ORIGIN)) for n in _nodes(before).values())]
        raise InputError(
            f"--why-not: no node '{question.place}'{suggest(question.place, names)}",
            expected="a node's name, its number in `graphlathe dump --format text` of the given model, or an origin",
        )
    left = [name for name in meant if name in missed]
    now = _nodes(after)
    for name in left:
        yield f"{question.name} left {_described(name, now)}: {missed[name]}"
    if left:
        return
    gone = [name for name in meant if name not in now]
    made = [n.name for n in now.values() if n.meta.get(MADE_BY) == question.name and _shares_origin(n, meant, before)]
    if gone:
        took = f"; {question.name} wrote {', '.join(_described(m, now) for m in made)}" if made else ""
        yield f"{', '.join(_described(g, _nodes(before)) for g in gone[:8])}: rewritten or removed{took}"
    else:
        yield f"{', '.join(_described(n, now) for n in meant[:8])}: nothing that {question.name} considers"


def _nodes(program: Program) -> dict[str, fx.Node]:
    return {n.name: n for graph in program.graphs.values() for n in graph.nodes if n.op == "call_function"}


def _meant(place: str, missed: dict[str, str], before: Program, after: Program) -> list[str]:
    """The names of the nodes that a place means."""
    given = _nodes(before)
    if place in missed or place in given or place in _nodes(after):
        return [place]
    if place.isdecimal():
        numbered = [n.name for n in before.graph.nodes if n.op == "call_function"]
        return numbered[int(place) : int(place) + 1]
    found = {name: node for name, node in (given | _nodes(after)).items() if _within(node, place)}
    return list(found)


def _within(node: fx.Node, place: str) -> bool:
    origin = str(node.meta.get(ORIGIN) or "")
    return origin == place or origin.startswith((f"{place}.", f"{place}/"))


def _shares_origin(node: fx.Node, names: list[str], before: Program) -> bool:
    given = _nodes(before)
    origins = {given[name].meta.get(ORIGIN) for name in names if name in given}
    return node.meta.get(ORIGIN) in origins - {None, ""}


def _described(name: str, nodes: dict[str, fx.Node]) -> str:
    node = nodes.get(name)
    if node is None:
        return f"%{name}"
    origin = node.meta.get(ORIGIN)
    return f"%{name} ({node.target}{f', from {origin}' if origin else ''})"
