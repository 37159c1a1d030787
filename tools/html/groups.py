"""The tree of the page: a program's sites, or those of two programs laid over each other.

A site of the first program and one of the second are one site of the page if most of their operators correspond. Runs
of equal sites become one that opens into them; what is left with too many members opens in steps, so that no site shows
more than about a hundred things at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import fx

from ...ir.program import Program
from ...ir.structure import Structure
from ..describe import describe_all
from ..sites import Part, collapse, common_origin, is_operator, join_origins
from .matching import Matching
from .site_parts import site_parts

LARGEST = 100
T = TypeVar("T")


@dataclass
class Site(Part):
    """A part with its counterpart in a second program.

    Attributes:
        others: the second program's operators that are in none of the children.
        sides: which of the two programs have it.
    """

    others: list[fx.Node] = field(default_factory=list)
    sides: tuple[bool, bool] = (True, False)


def sites(
    first: Program,
    second: Program | None,
    matchings: Mapping[str, Matching],
    structures: Sequence[Mapping[str, Structure]],
) -> list[Site]:
    """The top of the tree: a site for each part of ``main``, then one for each other entry and nested graph.

    Args:
        first, second: the programs, before and after; or one.
        matchings: for each entry of both, what corresponds.
        structures: each program's structures, by entry.
    """
    top: list[Site] = []
    for name in _names(first, second, lambda p: p.entries):
        a = _entry_parts(first, name, structures[0])
        b = _entry_parts(second, name, structures[1]) if second is not None else []
        merged = _merge(a, b, matchings.get(name, Matching()))
        if name == "main":
            top += merged
        else:
            top.append(_whole(f"entry {name}", merged, bool(a), bool(b)))
    for name in _names(first, second, lambda p: p.subgraphs):
        a, b = (_graph_nodes(p, name) for p in (first, second))
        site = Site(f"nested graph {name}", "nested", own=a, sides=(bool(a), bool(b)), others=b)
        top.append(site)
    return top


def _names(first: Program, second: Program | None, of: Callable[[Program], Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys([*of(first), *(of(second) if second is not None else ())]))


def _entry_parts(program: Program, name: str, structures: Mapping[str, Structure]) -> list[Part]:
    """An entry's parts, its inputs and outputs among them."""
    if name not in program.entries:
        return []
    entry = program.entries[name]
    inputs, outputs = Part("inputs", "port", own=entry.placeholders), Part("output", "port", own=[entry.output_node])
    parts = site_parts(program, name, structures[name])
    return [part for part in (inputs, *parts, outputs) if part.own or part.children]


def _graph_nodes(program: Program | None, name: str) -> list[fx.Node]:
    graph = program.subgraphs.get(name) if program is not None else None
    return [node for node in graph.nodes if node.op != "get_attr"] if graph is not None else []


def _whole(label: str, children: Sequence[Part], first: bool, second: bool) -> Site:
    return Site(label, "entry", children=list(children), sides=(first, second))


def _merge(a: Sequence[Part], b: Sequence[Part], matching: Matching) -> list[Site]:
    """Lay two lists of parts over each other."""
    merged: list[Site] = []
    for x, y in interleave(a, b, _pairs(a, b, matching)):
        part = x if x is not None else y
        assert part is not None
        children = _merge(x.children if x else [], y.children if y else [], matching)
        own, others = (list(p.own) if p is not None else [] for p in (x, y))
        signature = _signature(x, y, matching)
        sides = (x is not None, y is not None)
        merged.append(Site(part.label, part.kind, own, [*children], signature, [], part.note, others, sides))
    return merged


def _signature(x: Part | None, y: Part | None, matching: Matching) -> str:
    """Equal for sites that look alike on the page: the same on both sides, changed in the same way."""
    signatures = [part.signature for part in (x, y) if part is not None]
    if not all(signatures):
        return ""
    changes = [str(int(matching.changes.get(node, 0))) for node in (x.nodes() if x is not None else ())]
    return "|".join((str(x is not None), str(y is not None), *signatures, *(changes if any(map(int, changes)) else ())))


def _pairs(a: Sequence[Part], b: Sequence[Part], matching: Matching) -> dict[int, int]:
    """Which part is which: the two that share most; and between such, those of one kind in order."""
    inside = {node: j for j, part in enumerate(b) for node in part.all_nodes()}
    shared: Counter[tuple[int, int]] = Counter()
    for i, part in enumerate(a):
        places = (inside.get(matching.forward[n]) for n in part.all_nodes() if n in matching.forward)
        shared.update((i, j) for j in places if j is not None)
    pairs: dict[int, int] = {}
    for i, j in sorted(shared, key=lambda pair: (-shared[pair], pair)):
        if i not in pairs and j not in pairs.values():
            pairs[i] = j
    left = [j for j in range(len(b)) if j not in pairs.values()]
    for i in (i for i in range(len(a)) if i not in pairs):
        # Not past a neighbour: an added block must not be taken for one that was removed elsewhere.
        low = max((j for k, j in pairs.items() if k < i), default=-1)
        high = min((j for k, j in pairs.items() if k > i), default=len(b))
        alike = (j for j in left if low < j < high and (a[i].label, a[i].kind) == (b[j].label, b[j].kind))
        if a[i].kind != "block" and (found := next(alike, None)) is not None:
            pairs[i] = found
            left.remove(found)
    return pairs


def interleave(a: Sequence[T], b: Sequence[T], pairs: Mapping[int, int]) -> Iterator[tuple[T | None, T | None]]:
    """Two lists as one: pairs, what only ``a`` has, and what only ``b`` has after its neighbour there."""
    of_b = {j: i for i, j in pairs.items()}
    after: dict[int, list[int]] = {}
    last = -1
    for j in range(len(b)):
        if j in of_b:
            last = of_b[j]
        else:
            after.setdefault(last, []).append(j)
    yield from ((None, b[j]) for j in after.get(-1, ()))
    for i, item in enumerate(a):
        yield item, b[pairs[i]] if i in pairs else None
        yield from ((None, b[j]) for j in after.get(i, ()))


class Tree:
    """Sites as plain data.

    Args:
        numbers: each side's numbers of nodes.
        matchings: what corresponds, of all entries.
    """

    def __init__(self, numbers: Sequence[Mapping[fx.Node, int]], matchings: Sequence[Matching]) -> None:
        self._numbers = numbers
        self._forward = {a: b for matching in matchings for a, b in matching.forward.items()}

    def data(self, parts: Sequence[Part]) -> list[dict[str, Any]]:
        """A list of sites, runs of equal ones as one."""
        counts: Counter[str] = Counter()
        found: list[dict[str, Any]] = []
        for part in collapse(parts):
            if not part.copies:
                found.append(self._site(part, counts))
                continue
            label = f"{part.times} x {_label(part)}"
            members = [self._site(one, counts) for one in (part, *part.copies)]
            origins = [common_origin(one.nodes()) for one in (part, *part.copies)]
            origin = join_origins(origins) if all(origins) else ""
            what = "blocks" if part.kind == "block" else "sites"
            found.append({"label": label, "kind": "run", "origin": origin, "children": _steps(members, what)})
        return found

    def _site(self, part: Part, counts: Counter[str]) -> dict[str, Any]:
        label = _label(part)
        if part.kind in ("block", "group"):
            label = f"{part.label} {counts[part.label]}"
            counts[part.label] += 1
        others = part.others if isinstance(part, Site) else []
        nodes = list(part.nodes())
        data: dict[str, Any] = {"label": label, "kind": part.kind, "children": self.data(part.children)}
        data |= {"origin": common_origin(nodes)} if common_origin(nodes) else {}
        data |= {"note": part.note} if part.note else {}
        if not part.children and (detail := describe_all(filter(is_operator, part.own or others))):
            data["detail"] = detail
        members = self._members(part.own, others)
        if len(members) > LARGEST or (members and len(members) + len(part.children) > LARGEST):
            data["children"] += _steps([{"nodes": member} for member in members], "operators")
        elif members:
            data["nodes"] = members
        return data

    def _members(self, own: Sequence[fx.Node], others: Sequence[fx.Node]) -> list[list[int]]:
        """Rows of operators: one number, or one of each side with -1 for none."""
        if len(self._numbers) == 1:
            return [[self._numbers[0][node]] for node in own]
        place = {node: j for j, node in enumerate(others)}
        pairs = {i: place[self._forward[n]] for i, n in enumerate(own) if self._forward.get(n) in place}
        return [
            [-1 if x is None else self._numbers[0][x], -1 if y is None else self._numbers[1][y]]
            for x, y in interleave(own, others, pairs)
        ]


def _label(part: Part) -> str:
    if part.kind == "block":
        return f"block [{', '.join(child.label for child in part.children)}]" if part.children else "block"
    return "group of " + ", ".join(map(_label, part.children)) if part.kind == "group" else part.label


def _steps(members: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    """Members in steps of at most `LARGEST`, in as many levels as it takes; operators become a site's nodes."""
    if what != "operators" and len(members) <= LARGEST:
        return members
    steps: list[dict[str, Any]] = []
    for start in range(0, len(members), LARGEST):
        chunk = members[start : start + LARGEST]
        label = f"{what} {start} to {start + len(chunk) - 1}"
        inside = {"nodes": [m["nodes"] for m in chunk]} if what == "operators" else {"children": chunk}
        steps.append({"label": label, "kind": "step", "children": [], **inside})
    return steps if len(steps) <= LARGEST else _steps(steps, "steps")
