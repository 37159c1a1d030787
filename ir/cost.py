"""What a program costs: parameters, weight bytes, multiply-accumulates, bytes moved, peak activation bytes.

Per operator and in total, as expressions in the dynamic dimensions with the users' names (`Cost.at` puts numbers in).
One sweep: equal operators on equal shapes are costed once, so that a deep model costs little more than one block.

- *params, weight bytes*: of the weights (buffers included) that the graph reads, each once; the first operator that
  reads a weight owns it.
- *MACs*: see `ir.cost_rules`. Operators without a rule are listed in `Cost.unknown`, with how often they occur.
- *bytes moved*: what an operator reads and writes if nothing is fused or cached. Views move nothing, lookups read what
  they return.
- *peak activation bytes*: see `ir.liveness`.

Nested graphs count: of a ``cond`` the dearer branch; of a ``scan`` or ``map`` the body times its number of steps; of a
``while_loop``, whose steps nobody knows beforehand, the body times a symbol of its own. Such symbols, and sizes that
depend on the inputs' contents, are in `Cost.open`; `Cost.at` takes them as 1 unless given.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import fx

from .cost_rules import macs_of, product, sizes, tensors
from .dims import Dims, size_expr
from .errors import InputError, suggest
from .flow import is_view, op_name, shape_key
from .liveness import Polynomial, peaks, shares_storage, undominated
from .program import ORIGIN, Program

_LOOKUPS = {"embedding", "index", "index_select", "gather", "_unsafe_index", "take", "select", "slice"}
_LOOPS = {"scan", "map_impl", "map", "associative_scan"}


@dataclass(frozen=True)
class NodeCost:
    """The cost of one operator.

    Attributes:
        node: its name; operators of nested graphs are counted in the control-flow operator that runs them.
        op: the operator's name.
        origin: the module path or ONNX node that it came from.
        macs, bytes: numbers or expressions.
        params: elements of the weights that it is the first to read.
        known: whether `macs` is known; if not, it is 0.
    """

    node: str
    op: str
    origin: str
    macs: Any
    bytes: Any
    params: int
    known: bool = True


@dataclass(frozen=True)
class OriginCost:
    """The cost of all operators whose origins start alike.

    Attributes:
        origin: the common start; empty for operators without origin.
        operators: how many they are.
        macs, bytes, params: their sums.
    """

    origin: str
    operators: int
    macs: Any
    bytes: Any
    params: int


@dataclass(frozen=True)
class Cost:
    """The cost of a graph; see the module's text.

    Attributes:
        params, weight_bytes: numbers.
        macs, bytes_moved, peak_activation_bytes: numbers, or expressions in the dynamic dimensions.
        nodes: the operators, in graph order.
        unknown: operators whose MACs are unknown, with how many there are.
        open: symbols whose numbers only a run shows: steps of a ``while_loop``, sizes that depend on data.
    """

    params: int
    weight_bytes: int
    macs: Any
    bytes_moved: Any
    peak_activation_bytes: Any
    nodes: tuple[NodeCost, ...]
    unknown: Mapping[str, int] = field(default_factory=dict)
    open: tuple[str, ...] = ()
    defaults: Mapping[str, int] = field(default_factory=dict, repr=False)

    def at(self, **sizes: int) -> Cost:
        """The cost in numbers.

        Args:
            sizes: sizes of dynamic dimensions (and numbers of `open` symbols) by name; dimensions left out take the
                size of the example that was traced, open symbols 1.

        Raises:
            InputError: there is no such dimension.
        """
        known = {**self.defaults, **dict.fromkeys(self.open, 1)}
        for name in sizes:
            if name not in known:
                raise InputError(
                    f"no dynamic dimension '{name}'{suggest(name, list(known))}",
                    expected=f"dimensions: {', '.join(known) or 'none'}",
                )
        numbers = known | sizes
        memo: dict[Any, Any] = {}

        def number(expr: Any) -> Any:
            if isinstance(expr, int):
                return expr
            if expr not in memo:
                memo[expr] = int(expr.xreplace({s: sympy.Integer(numbers[s.name]) for s in expr.free_symbols}).doit())
            return memo[expr]

        return replace(
            self,
            macs=number(self.macs),
            bytes_moved=number(self.bytes_moved),
            peak_activation_bytes=number(self.peak_activation_bytes),
            nodes=tuple(replace(n, macs=number(n.macs), bytes=number(n.bytes)) for n in self.nodes),
        )

    def by_origin(self, depth: int | None = None) -> tuple[OriginCost, ...]:
        """Sums by module path (or ONNX node path), in graph order.

        Args:
            depth: how many components of the path count; None: all.
        """
        groups: dict[str, list[NodeCost]] = {}
        for node in self.nodes:
            parts = [part for part in re.split(r"[./]", node.origin) if part]
            groups.setdefault(".".join(parts[:depth]), []).append(node)
        return tuple(
            OriginCost(origin, len(g), total(n.macs for n in g), total(n.bytes for n in g), sum(n.params for n in g))
            for origin, g in groups.items()
        )


def cost(program: Program, sizes: Mapping[str, int] | None = None, *, entry: str = "main") -> Cost:
    """The cost of one entry of a program.

    Args:
        program: the program; it is not changed.
        sizes: sizes of dynamic dimensions by name, for numbers instead of expressions (see `Cost.at`).
        entry: which entry.

    Raises:
        InputError: ``sizes`` names a dimension that does not exist.
    """
    dims = program.entries[entry].dims
    ledger = _Ledger(program, dims)
    graph = ledger.graph(program.entries[entry].graph)
    # Weights that no operator reads count as well: those that are returned, and those that start a state.
    listed = {str(node.target) for node in program.entries[entry].graph.find_nodes(op="get_attr")}
    listed |= {pair.initial for pair in program.entries[entry].state if pair.initial}
    names = sorted({*ledger.weights, *(listed & program.weights.keys())})
    result = Cost(
        params=sum(program.weights[n].numel for n in names),
        weight_bytes=sum(program.weights[n].nbytes for n in names),
        macs=total(n.macs for n in graph.nodes),
        bytes_moved=total(n.bytes for n in graph.nodes),
        peak_activation_bytes=_largest(graph.peaks),
        nodes=tuple(graph.nodes),
        unknown=dict(sorted(ledger.unknown.items())),
        open=tuple(ledger.open),
        defaults=ledger.defaults,
    )
    return result.at(**sizes) if sizes is not None else result


def total(values: Any) -> Any:
    """The sum of numbers and expressions; equal expressions are multiplied, not added one by one."""
    counts = Counter(values)
    plain = sum(v * times for v, times in counts.items() if isinstance(v, int))
    terms = [v * times for v, times in counts.items() if not isinstance(v, int)]
    return _plain(sympy.Add(sympy.Integer(plain), *terms)) if terms else plain


def _plain(expr: Any) -> Any:
    return int(expr) if isinstance(expr, sympy.Integer) else expr


def _largest(sums: Sequence[Polynomial]) -> Any:
    values = [_plain(sympy.Add(*(m * c for m, c in p.items()))) for p in sums]
    return values[0] if len(values) == 1 else sympy.Max(*values, evaluate=False)


@dataclass
class _GraphCost:
    nodes: list[NodeCost]
    peaks: list[Polynomial]


class _Ledger:
    """Walks the graphs of a program; remembers equal operators, weights that were counted, and what is unknown."""

    def __init__(self, program: Program, dims: Dims) -> None:
        self._program = program
        self._names = dims.names
        self._renamed: dict[Any, Any] = {}
        self._macs: dict[Any, Any] = {}
        self._bytes: dict[Any, Any] = {}
        self._terms: dict[Any, Polynomial] = {}
        self._graphs: dict[str, _GraphCost] = {}
        self.weights: set[str] = set()
        self.unknown: Counter[str] = Counter()
        self.open: list[str] = []
        self.defaults = {name: dim.hint for name, dim in dims.by_name.items()}

    def graph(self, graph: fx.Graph) -> _GraphCost:
        """The cost of a graph's operators, and its possible peaks."""
        nodes: list[NodeCost] = []
        nested: dict[fx.Node, list[Polynomial]] = {}
        for node in graph.nodes:
            if node.op != "call_function":
                continue
            bodies = [
                a for a in node.all_input_nodes if a.op == "get_attr" and str(a.target) in self._program.subgraphs
            ]
            if bodies:
                nodes.append(self._control_flow(node, bodies))
                nested[node] = undominated(p for b in bodies for p in self._inner_peaks(str(b.target)))
            else:
                nodes.append(self._operator(node))
        return _GraphCost(nodes, peaks(graph, self._bytes_of, nested))

    def _operator(self, node: fx.Node) -> NodeCost:
        macs = self._cached_macs(node)
        if macs is None:
            self.unknown[op_name(node)] += 1
        origin = str(node.meta.get(ORIGIN) or "")
        moved = self._cached_bytes(node)
        return NodeCost(node.name, op_name(node), origin, macs or 0, moved, self._params(node), macs is not None)

    def _params(self, node: fx.Node) -> int:
        count = 0
        for operand in node.all_input_nodes:
            name = str(operand.target)
            if operand.op == "get_attr" and name in self._program.weights and name not in self.weights:
                self.weights.add(name)
                count += self._program.weights[name].numel
        return count

    def _key(self, node: fx.Node) -> Any:
        """Operator, shapes and plain arguments: what a cost depends on."""
        shapes = tuple((shape_key(a), _dtype(a)) for a in node.all_input_nodes)
        plain = repr([a for a in node.args if not isinstance(a, (fx.Node, list, tuple))])
        return node.target, shapes, shape_key(node), plain, len(node.args)

    def _cached_macs(self, node: fx.Node) -> Any:
        key = self._key(node)
        if key not in self._macs:
            found = macs_of(node)
            self._macs[key] = None if found is None else self._rename(found)
        return self._macs[key]

    def _cached_bytes(self, node: fx.Node) -> Any:
        if is_view(node) and shares_storage(node):
            return 0
        key = (self._key(node), tuple(_dtype(t) for t in tensors(node.meta.get("val"))))
        if key not in self._bytes:
            written = [t for t in tensors(node.meta.get("val"))]
            read = [t for a in node.all_input_nodes for t in tensors(a.meta.get("val"))]
            if op_name(node) in _LOOKUPS:
                read = [*written, *(t for t in read if not t.is_floating_point())]
            self._bytes[key] = total(self._tensor_bytes(t) for t in (*read, *written))
        return self._bytes[key]

    def _tensor_bytes(self, value: torch.Tensor) -> Any:
        return self._rename(product([size_expr(s) for s in value.shape]) * value.element_size())

    def _bytes_of(self, value: torch.Tensor) -> Polynomial:
        """A tensor's bytes as a polynomial."""
        key = (tuple(size_expr(s) for s in value.shape), value.dtype)
        if key not in self._terms:
            expr = sympy.expand(self._tensor_bytes(value))
            self._terms[key] = {m: int(c) for m, c in expr.as_coefficients_dict().items() if c}
        return self._terms[key]

    def _rename(self, expr: Any) -> Any:
        if isinstance(expr, int):
            return expr
        if expr not in self._renamed:
            self._renamed[expr] = _plain(expr.xreplace(self._names))
            for symbol in expr.free_symbols - self._names.keys():
                self._without_name(symbol)
        return self._renamed[expr]

    def _without_name(self, symbol: Any) -> None:
        """Note a symbol that is no named dimension: a size with a known example, or one that depends on data."""
        env = self._program.fake_mode.shape_env
        hint = env.backed_var_to_val.get(symbol) if env is not None else None
        if hint is not None:
            self.defaults[symbol.name] = int(hint)
        elif symbol.name not in self.open:
            self.open.append(symbol.name)

    def _nested(self, name: str) -> _GraphCost:
        if name not in self._graphs:
            self._graphs[name] = self.graph(self._program.subgraphs[name])
        return self._graphs[name]

    def _inner_peaks(self, name: str) -> list[Polynomial]:
        """What a nested graph needs besides its inputs, which the outer graph holds already."""
        inputs: Polynomial = {}
        for node in self._program.subgraphs[name].find_nodes(op="placeholder"):
            for tensor in tensors(node.meta.get("val")):
                for monomial, count in self._bytes_of(tensor).items():
                    inputs[monomial] = inputs.get(monomial, 0) + count
        return [{m: p.get(m, 0) - inputs.get(m, 0) for m in {**p, **inputs}} for p in self._nested(name).peaks]

    def _control_flow(self, node: fx.Node, bodies: Sequence[fx.Node]) -> NodeCost:
        name = op_name(node)
        parts = [self._nested(str(body.target)) for body in bodies]
        macs = [total(n.macs for n in part.nodes) for part in parts]
        moved = [total(n.bytes for n in part.nodes) for part in parts]
        params = self._params(node) + sum(n.params for part in parts for n in part.nodes)
        if name == "cond":
            work, traffic = _plain(sympy.Max(*macs)), _plain(sympy.Max(*moved))
        else:
            times = self._trip_count(node, name)
            work, traffic = (_plain(sympy.expand(times * total(values))) for values in (macs, moved))
        return NodeCost(node.name, name, str(node.meta.get(ORIGIN) or ""), work, traffic, params)

    def _trip_count(self, node: fx.Node, name: str) -> Any:
        if name in _LOOPS:
            # map and associative_scan give the mapped values second, scan third (after the initial state).
            over = node.args[2 if name == "scan" else 1]
            first = over[0] if isinstance(over, (list, tuple)) else over
            return self._rename(sizes(first)[0])
        if name.startswith("while_loop"):
            symbol = f"trips_{sum(s.startswith('trips') for s in self.open)}"
            self.open.append(symbol)
            return sympy.Symbol(symbol, integer=True)
        return sympy.Integer(1)


def _dtype(value: Any) -> Any:
    if isinstance(value, fx.Node):
        value = value.meta.get("val")
    return getattr(value, "dtype", None)
