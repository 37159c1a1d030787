"""Which operator of one program is which of another one, and how the two differ.

Of a pipeline's result, operators that survived keep their names. Two files may name everything differently, so there:

1. inputs and outputs, by name or else by place;
2. operators that read weights, or what is computed from weights only: by the operator and the weights' names, or else
   by the weights' numbers;
3. from these on along the edges, forward and backward: the same operator on values that correspond;
4. between two that correspond, what is left in order (a longest common subsequence of operators and types).

What has no counterpart was removed or added. All steps but the last are linear in the graph; the last is bounded.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntFlag
from typing import Any

import sympy
from torch import fx

from ...ir.dims import Dims, size_expr
from ...ir.program import ORIGIN, Entry, Program
from ...ir.weights import Weight
from ..describe import type_text
from .calls import call_template
from .weights import Statistics

_LARGEST_TABLE = 250_000
_ROUNDS = 4


class Change(IntFlag):
    """How an operator differs from its counterpart."""

    OPERATOR = 1
    ARGUMENTS = 2
    TYPE = 4
    INPUTS = 8
    WEIGHTS = 16
    NUMBERS = 32


@dataclass
class Matching:
    """Counterparts of one entry's nodes.

    Attributes:
        forward: from the nodes of the first graph to those of the second.
        changes: how a node of the first graph and its counterpart differ; only those that do.
    """

    forward: dict[fx.Node, fx.Node] = field(default_factory=dict)
    changes: dict[fx.Node, Change] = field(default_factory=dict)


def match(
    first: Program,
    second: Program,
    entry: str = "main",
    statistics: Mapping[Weight, Statistics | None] | None = None,
) -> Matching:
    """Find the counterparts of an entry's nodes.

    Args:
        first, second: the programs, before and after.
        entry: an entry that both have.
        statistics: of both programs' weights, for comparing numbers; without, only names and types are compared.
    """
    matcher = _Matcher(first, second, first.entries[entry], second.entries[entry], statistics or {})
    matcher.ports()
    # A program that came of the other one shares its symbols; then a name means the same node.
    if first.fake_mode is second.fake_mode:
        matcher.by_name()
    matcher.by_weights()
    matcher.spread()
    matcher.by_order()
    matcher.spread()
    return Matching(matcher.forward, matcher.changes())


class _Matcher:
    """Collects pairs of nodes."""

    def __init__(
        self,
        first: Program,
        second: Program,
        a: Entry,
        b: Entry,
        statistics: Mapping[Weight, Statistics | None],
    ) -> None:
        self.programs = (first, second)
        self.entries = (a, b)
        self.statistics = statistics
        self.forward: dict[fx.Node, fx.Node] = {}
        self.taken: dict[fx.Node, fx.Node] = {}
        self.weights = _weight_names(first, second, statistics)
        self.dims = (a.dims, b.dims)

    def pair(self, a: fx.Node, b: fx.Node) -> None:
        self.forward[a] = b
        self.taken[b] = a

    def free(self, side: int) -> list[fx.Node]:
        """Operators that have no counterpart yet, in order."""
        done: Iterable[fx.Node] = self.taken if side else self.forward
        known = set(done)
        return [n for n in self.entries[side].graph.nodes if n.op == "call_function" and n not in known]

    def ports(self) -> None:
        """Pair inputs by name, the others by place; and the output nodes."""
        a, b = self.entries
        left = dict(zip(a.inputs, a.placeholders, strict=True))
        right = dict(zip(b.inputs, b.placeholders, strict=True))
        for name in [name for name in left if name in right]:
            self.pair(left.pop(name), right.pop(name))
        for x, y in zip(left.values(), right.values(), strict=False):
            self.pair(x, y)
        self.pair(a.output_node, b.output_node)
        self.dims = (_renamed(a.dims, b.dims, self.forward), b.dims)

    def by_name(self) -> None:
        """Pair operators of the same name, kind and origin."""
        names = {node.name: node for node in self.free(1)}
        for a in self.free(0):
            b = names.get(a.name)
            if b is not None and b.target == a.target and a.meta.get(ORIGIN) == b.meta.get(ORIGIN):
                self.pair(a, b)

    def by_weights(self) -> None:
        """Pair operators that alone read certain weights, also through what is computed from weights only."""
        numbers: dict[Hashable, int] = {}
        keys = [self._unique(side, self._constants(side, numbers)) for side in (0, 1)]
        for key, a in keys[0].items():
            if key in keys[1]:
                self.pair(a, keys[1][key])

    def _constants(self, side: int, numbers: dict[Hashable, int]) -> dict[fx.Node, Hashable]:
        """For each operator that reads weights, which ones and how; equal on both sides where these are the same.

        Args:
            side: of which graph.
            numbers: a number for each value that is computed from weights only; shared by both sides.
        """
        known: dict[fx.Node, int] = {}
        keys: dict[fx.Node, Hashable] = {}
        for node in self.entries[side].graph.nodes:
            if node.op == "get_attr":
                known[node] = numbers.setdefault(self._weight(node, side), len(numbers))
            constant = [known[n] for n in node.all_input_nodes if n in known]
            if node.op != "call_function" or not constant:
                continue
            keys[node] = (node.target, *constant)
            if len(constant) == len(node.all_input_nodes):
                value = (node.target, call_template(node)[0], *constant)
                known[node] = numbers.setdefault(value, len(numbers))
        return keys

    def _weight(self, node: fx.Node, side: int) -> str:
        name = str(node.target)
        return name if side else self.weights.get(name, f"{name} (only before)")

    def _unique(self, side: int, keys: Mapping[fx.Node, Hashable]) -> dict[Hashable, fx.Node]:
        found: dict[Hashable, list[fx.Node]] = defaultdict(list)
        for node in self.free(side):
            if node in keys:
                found[keys[node]].append(node)
        return {key: nodes[0] for key, nodes in found.items() if len(nodes) == 1}

    def spread(self) -> None:
        """Pair along the edges until nothing new is found."""
        for _ in range(_ROUNDS):
            before = len(self.forward)
            # First what belongs to one reader only: where a block is gone, the next one's first operators read what
            # its own did, and must not be taken for them.
            self._upstream(alone=True)
            self._downstream(certain=True)
            self._upstream(alone=False)
            if len(self.forward) == before:
                break
        self._downstream(certain=False)

    def _downstream(self, *, certain: bool) -> None:
        """Pair operators of one kind and with equal arguments whose operands correspond.

        Args:
            certain: leave out those that are computed several times from the same values (as ``unsqueeze(cos)`` is in
                every block), unless both graphs do it equally often.
        """
        free = self.free(0)
        waiting: dict[Hashable, list[fx.Node]] = defaultdict(list)
        for b in reversed(self.free(1)):
            waiting[self._call_key(b, 1)].append(b)
        times = {key: len(nodes) for key, nodes in waiting.items()}
        alike = Counter(_call(a) for a in free)
        for a in free:
            key = self._call_key(a, 0)
            if key is None or not waiting.get(key) or (certain and alike[_call(a)] != times[key]):
                continue
            self.pair(a, waiting[key].pop())

    def _call_key(self, node: fx.Node, side: int) -> Hashable | None:
        operands: list[Any] = []
        for operand in node.all_input_nodes:
            if operand.op == "get_attr":
                operands.append(self._weight(operand, side))
            elif side:
                operands.append(operand)
            elif operand in self.forward:
                operands.append(self.forward[operand])
            else:
                return None
        return (node.target, call_template(node)[0], *operands) if operands else None

    def _upstream(self, *, alone: bool) -> None:
        """Pair the operands of pairs, where they are of one kind; ``alone``: only those with one reader."""
        for a in reversed(list(self.entries[0].graph.nodes)):
            b = self.forward.get(a)
            if b is None or len(a.all_input_nodes) != len(b.all_input_nodes):
                continue
            for x, y in zip(a.all_input_nodes, b.all_input_nodes, strict=True):
                fresh = x.op == "call_function" and x not in self.forward and y not in self.taken
                if not fresh or x.target != y.target:
                    continue
                if (len(x.users) == len(y.users) == 1) if alone else self._agree(x, y):
                    self.pair(x, y)

    def _agree(self, x: fx.Node, y: fx.Node) -> bool:
        """Whether no operand of either is known to correspond to something else.

        What follows a removed block reads what that one read; its operand is not the removed block's result.
        """
        for u, v in zip(x.all_input_nodes, y.all_input_nodes, strict=False):
            if self.forward.get(u, v) is not v or self.taken.get(v, u) is not u:
                return False
        return True

    def by_order(self) -> None:
        """Between pairs that are in the same order in both graphs, pair what is left in order."""
        place = {node: i for i, node in enumerate(self.entries[1].graph.nodes)}
        nodes = list(self.entries[0].graph.nodes)
        anchors = _increasing([(i, place[self.forward[n]]) for i, n in enumerate(nodes) if n in self.forward])
        others = list(self.entries[1].graph.nodes)
        for (i, j), (k, m) in zip([(-1, -1), *anchors], [*anchors, (len(nodes), len(others))], strict=True):
            left = [n for n in nodes[i + 1 : k] if n.op == "call_function" and n not in self.forward]
            right = [n for n in others[j + 1 : m] if n.op == "call_function" and n not in self.taken]
            if 0 < len(left) * len(right) <= _LARGEST_TABLE:
                for x, y in _common([self._kind(n, 0) for n in left], [self._kind(n, 1) for n in right]):
                    self.pair(left[x], right[y])

    def _kind(self, node: fx.Node, side: int) -> Hashable:
        return node.target, type_text(node.meta.get("val"), self.dims[side])

    def changes(self) -> dict[fx.Node, Change]:
        """How each pair differs."""
        found: dict[fx.Node, Change] = {}
        for a, b in self.forward.items():
            if change := self._change(a, b):
                found[a] = change
        return found

    def _change(self, a: fx.Node, b: fx.Node) -> Change:
        change = Change(0)
        if a.op == "call_function" and a.target != b.target:
            change |= Change.OPERATOR
        elif a.op == "call_function" and call_template(a)[0] != call_template(b)[0]:
            change |= Change.ARGUMENTS
        types = [type_text(n.meta.get("val"), dims) for n, dims in zip((a, b), self.dims, strict=True)]
        if types[0] != types[1]:
            change |= Change.TYPE
        inputs = [[n for n in node.all_input_nodes if n.op != "get_attr"] for node in (a, b)]
        if [self.forward.get(n) for n in inputs[0]] != inputs[1]:
            change |= Change.INPUTS
        names = [[str(n.target) for n in node.all_input_nodes if n.op == "get_attr"] for node in (a, b)]
        if len(names[0]) != len(names[1]):
            return change | Change.WEIGHTS
        for x, y in zip(*names, strict=True):
            change |= self._weight_change(x, y)
        return change

    def _weight_change(self, x: str, y: str) -> Change:
        a, b = self.programs[0].weights.get(x), self.programs[1].weights.get(y)
        if a is b:  # also when both are nested graphs
            return Change(0)
        if a is None or b is None or (a.shape, a.dtype) != (b.shape, b.dtype):
            return Change.WEIGHTS
        s, t = self.statistics.get(a), self.statistics.get(b)
        return Change.NUMBERS if s and t and s.read == t.read and s.digest != t.digest else Change(0)


def _call(node: fx.Node) -> Hashable:
    """What an operator computes from what."""
    return node.target, call_template(node)[0], *node.all_input_nodes


def _renamed(dims: Dims, others: Dims, ports: Mapping[fx.Node, fx.Node]) -> Dims:
    """The dimensions with the names that they have in the other program, as its inputs show."""
    by_symbol = {dim.symbol: dim.name for dim in dims.by_name.values()}
    names: dict[str, str] = {}
    for a, b in ports.items():
        shapes = [getattr(node.meta.get("val"), "shape", ()) for node in (a, b)]
        for x, y in zip(*shapes, strict=False):
            symbol = size_expr(x)
            if isinstance(symbol, sympy.Symbol) and symbol in by_symbol and isinstance(size_expr(y), sympy.Symbol):
                names.setdefault(by_symbol[symbol], others.format(y))
    return Dims({n: replace(dim, name=names.get(n, n)) for n, dim in dims.by_name.items()}, dims.guards)


def _weight_names(first: Program, second: Program, statistics: Mapping[Weight, Statistics | None]) -> dict[str, str]:
    """From names of weights of the first program to those of the second: the same one, or that of equal numbers."""
    used = [sorted(p.used_weights() & p.weights.keys()) for p in (first, second)]
    same = set(used[0]) & set(used[1])
    names = {name: name for name in same}
    contents: list[dict[Hashable, list[str]]] = []
    for program, candidates in zip((first, second), used, strict=True):
        found: dict[Hashable, list[str]] = defaultdict(list)
        for name in candidates:
            known = statistics.get(program.weights[name])
            if name not in same and known is not None:
                found[(program.weights[name].shape, known.read, known.digest)].append(name)
        contents.append(found)
    for key, owners in contents[0].items():
        # Equal numbers under several names (ones, zeros) say nothing, unless they correspond one to one.
        if len(owners) == len(contents[1].get(key, ())):
            names.update(zip(owners, contents[1][key], strict=True))
    return names


def _increasing(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """A longest subsequence whose second numbers increase, too."""
    tails: list[int] = []
    ends: list[int] = []
    previous: list[int] = []
    for index, (_, value) in enumerate(pairs):
        at = bisect_left(tails, value)
        previous.append(ends[at - 1] if at else -1)
        if at == len(tails):
            tails.append(value)
            ends.append(index)
        else:
            tails[at], ends[at] = value, index
    chain: list[tuple[int, int]] = []
    at = ends[-1] if ends else -1
    while at >= 0:
        chain.append(pairs[at])
        at = previous[at]
    return chain[::-1]


def _common(left: Sequence[Hashable], right: Sequence[Hashable]) -> list[tuple[int, int]]:
    """A longest common subsequence, as pairs of places."""
    table = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i in range(len(left) - 1, -1, -1):
        for j in range(len(right) - 1, -1, -1):
            same = table[i + 1][j + 1] + 1 if left[i] == right[j] else 0
            table[i][j] = max(same, table[i + 1][j], table[i][j + 1])
    pairs: list[tuple[int, int]] = []
    i = j = 0
    while i < len(left) and j < len(right):
        if left[i] == right[j]:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif table[i + 1][j] >= table[i][j + 1]:
            i += 1
        else:
            j += 1
    return pairs
