"""One program as plain data for the page: its operators in columns, its weights, and what stands at the top.

A node is a number: its place in the lists of columns. Texts that repeat (operators, types, origins) stand once in a
table that both sides share, and columns hold their places in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from ...ir.cost import Cost, NodeCost, cost
from ...ir.cost_rules import tensors
from ...ir.dims import Dims, SizePrinter, size_expr
from ...ir.liveness import shares_storage
from ...ir.program import MADE_BY, ORIGIN, Entry, Program
from ...ir.structure import structure
from ...ir.weights import Weight
from ..console import count, size
from ..describe import describe, dtype_text, op_text, type_text
from ..sizes import sizes_text, with_defaults
from .calls import call_template
from .site_parts import roles
from .weights import Statistics

_DIGITS = 6
_SHOWN = 3


class Texts:
    """Texts by number, each once."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {"": 0}

    def __call__(self, text: str) -> int:
        """The text's number; the empty text's is 0."""
        return self._places.setdefault(text, len(self._places))

    def all(self) -> list[str]:
        """The texts in the order of their numbers."""
        return list(self._places)


class Side:
    """One program's data.

    Args:
        program: the program.
        title: what it is called.
        sizes: sizes of dynamic dimensions; others take those of the traced example.
        texts: the page's texts.
        statistics: of its weights.

    Attributes:
        numbers: each node's number: of every graph, all nodes but weights and nested graphs.
        structures: what was found in each entry.
    """

    def __init__(
        self,
        program: Program,
        title: str,
        sizes: Mapping[str, int],
        texts: Texts,
        statistics: Mapping[Weight, Statistics | None],
    ) -> None:
        self.program = program
        self.title = title
        self.sizes = with_defaults(dict(sizes), program)
        self._texts = texts
        self._statistics = statistics
        self._names = sorted(program.used_weights() & program.weights.keys())
        self._weight_numbers = {name: number for number, name in enumerate(self._names)}
        self.numbers: dict[fx.Node, int] = {}
        for graph in program.graphs.values():
            for node in graph.nodes:
                if node.op != "get_attr":
                    self.numbers[node] = len(self.numbers)
        self.cost = cost(program).at(**self.sizes)
        self.structures = {name: structure(program, name) for name in program.entries}
        self._roles = {node: role for found in self.structures.values() for node, role in roles(found).items()}

    def data(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        columns: dict[str, list[Any]] = {
            key: [] for key in ("name", "op", "what", "role", "type", "at", "origin", "by", "call", "formula")
        }
        columns |= {key: [] for key in ("macs", "moved", "out", "params", "reads")}
        for name, graph in self.program.graphs.items():
            entry = self.program.entries.get(name)
            rows = _Rows(self, entry)
            for node in graph.nodes:
                if node.op != "get_attr":
                    for key, value in rows.row(node).items():
                        columns[key].append(value)
        main = self.program.main
        return {
            "title": self.title,
            "facts": self._facts(),
            "history": self.program.history,
            "notes": self._notes(),
            "inputs": [self.numbers[node] for node in main.placeholders],
            "totals": {
                "params": self.cost.params,
                "macs": self.cost.macs,
                "moved": self.cost.bytes_moved,
                "peak": self.cost.peak_activation_bytes,
            },
            "nodes": columns,
            "weights": [self._weight(name) for name in self._names],
        }

    def _facts(self) -> list[tuple[str, str]]:
        main, dims = self.program.main, self.program.main.dims
        results = zip(main.outputs, main.output_values, strict=True)
        facts = [("input", f"{n} {_type(p, dims)}") for n, p in zip(main.inputs, main.placeholders, strict=True)]
        facts += [("output", f"{name} {_type(value, dims)}") for name, value in results]
        facts += [("sizes", sizes_text(self.sizes))] if self.sizes else []
        facts += [
            ("parameters", count(self.cost.params)),
            ("weights", size(self.cost.weight_bytes)),
            ("MACs", count(self.cost.macs)),
            ("peak activations", size(self.cost.peak_activation_bytes)),
            ("operators", count(len(self.cost.nodes))),
        ]
        return facts + [(key, value) for key, value in sorted(self.program.metadata.items()) if len(value) < 200]

    def _notes(self) -> list[str]:
        unknown = ", ".join(f"{times} x {op}" for op, times in self.cost.unknown.items())
        notes = [f"MACs unknown, counted as 0: {unknown}"] if unknown else []
        for name, found in self.structures.items():
            where = "" if name == "main" else f" in {name}"
            lost = [str(missing) for missing in found.missing]
            notes += lost[:_SHOWN] + ([f"and {len(lost) - _SHOWN} more{where}"] if len(lost) > _SHOWN else [])
        if self.program.subgraphs:
            notes.append("operators of nested graphs (control flow) are counted where these are run")
        return notes

    def _weight(self, name: str) -> dict[str, Any]:
        weight = self.program.weights[name]
        found: dict[str, Any] = {
            "name": name,
            "type": self._texts(f"{dtype_text(weight.dtype)}[{', '.join(map(str, weight.shape))}]"),
            "numel": weight.numel,
            "bytes": weight.nbytes,
        }
        if also := sorted(other for other, owner in self.program.tied.items() if owner == name):
            found["also"] = also
        known = self._statistics.get(weight)
        if known is not None:
            found["stats"] = {
                "read": known.read,
                "finite": known.finite,
                "zeros": known.zeros,
                "range": [_rounded(x) for x in (known.min, known.max, known.mean, known.std)],
                "counts": known.counts,
            }
        elif weight.is_meta:
            found["none"] = "traced without numbers (on the meta device)"
        return found

    def text(self, text: str) -> int:
        """The number of a text."""
        return self._texts(text)

    def role(self, node: fx.Node) -> str:
        """What a node is in its site; may be empty."""
        return self._roles.get(node, "")

    def weight_number(self, node: fx.Node) -> int | None:
        """The number of the weight that a node is; None for a nested graph."""
        return self._weight_numbers.get(str(node.target))


class _Rows:
    """The columns of one graph's nodes; ``entry`` is None for a nested graph, which has no costs of its own."""

    def __init__(self, side: Side, entry: Entry | None) -> None:
        self.side = side
        self.dims = entry.dims if entry is not None else side.program.main.dims
        names = [] if entry is None else list(zip(entry.placeholders, entry.inputs, strict=True))
        self.inputs: dict[fx.Node, str] = dict(names)
        self.numeric: dict[str, NodeCost] = {}
        self.symbolic: dict[str, NodeCost] = {}
        if entry is not None:
            name = next(n for n, e in side.program.entries.items() if e is entry)
            whole: Cost = cost(side.program, entry=name)
            known = {n: s for n, s in side.sizes.items() if n in whole.defaults}
            self.symbolic = {item.node: item for item in whole.nodes}
            self.numeric = {item.node: item for item in whole.at(**known).nodes}
        self._bytes: dict[Any, int] = {}
        self._extents: dict[Any, int] = {}

    def row(self, node: fx.Node) -> dict[str, Any]:
        """One node's values, by column."""
        texts = self.side.text
        kind = {"placeholder": "input", "output": "output"}.get(node.op)
        template, operands = call_template(node)
        spent, formula = self.numeric.get(node.name), self.symbolic.get(node.name)
        written, numbers = _type(node, self.dims), self._numbers(node.meta.get("val"))
        macs = formula.macs if formula is not None else 0
        return {
            "name": self.inputs.get(node, node.name),
            "op": texts(kind or op_text(node)),
            "what": texts((describe(node) if not kind else "") or ""),
            "role": texts(self.side.role(node)),
            "type": texts(written if node.op != "output" else ""),
            "at": texts(numbers if numbers != written else ""),
            "origin": texts(str(node.meta.get(ORIGIN) or "")),
            "by": texts(str(node.meta.get(MADE_BY) or "")),
            "call": texts(template if not kind else ""),
            "macs": spent.macs if spent is not None else 0,
            "formula": texts(SizePrinter().doprint(macs) if isinstance(macs, sympy.Basic) else ""),
            "moved": spent.bytes if spent is not None else 0,
            "out": self._out(node),
            "params": spent.params if spent is not None else 0,
            # For each gap of the call: a node's number, -1 less a weight's, or a nested graph's name.
            "reads": [self._reference(n) for n in operands],
        }

    def _reference(self, node: fx.Node) -> int | str:
        if node in self.side.numbers:
            return self.side.numbers[node]
        weight = self.side.weight_number(node)
        return str(node.target) if weight is None else -1 - weight

    def _out(self, node: fx.Node) -> int:
        """Bytes of what an operator produces; a view produces nothing."""
        if node.op != "call_function" or not self.numeric or shares_storage(node):
            return 0
        return sum(self._tensor_bytes(value) for value in tensors(node.meta.get("val")))

    def _numbers(self, value: Any) -> str:
        """A type with sizes in numbers."""
        found = [
            f"{dtype_text(t.dtype)}[{', '.join(str(self._number(size_expr(s))) for s in t.shape)}]"
            for t in tensors(value)
        ]
        return f"({', '.join(found)})" if isinstance(value, (tuple, list)) else "".join(found)

    def _tensor_bytes(self, value: torch.Tensor) -> int:
        key = (tuple(size_expr(s) for s in value.shape), value.dtype)
        if key not in self._bytes:
            total = value.element_size()
            for extent in key[0]:
                total *= self._number(extent)
            self._bytes[key] = total
        return self._bytes[key]

    def _number(self, extent: sympy.Expr) -> int:
        """A size in numbers; one that depends on the inputs' contents counts as 1, as in `ir.cost`."""
        if extent not in self._extents:
            self._extents[extent] = self._evaluate(extent)
        return self._extents[extent]

    def _evaluate(self, extent: sympy.Expr) -> int:
        values: dict[Any, Any] = {d.symbol: self.side.sizes.get(n, d.hint) for n, d in self.dims.by_name.items()}
        env = self.side.program.fake_mode.shape_env
        hints: Mapping[Any, Any] = env.backed_var_to_val if env is not None else {}
        symbols: Sequence[Any] = sorted(extent.free_symbols, key=str)
        numbers = {s: sympy.Integer(int(values.get(s, hints.get(s, 1)))) for s in symbols}
        value: Any = extent.xreplace(numbers)
        return int(value)


def _type(value: Any, dims: Dims) -> str:
    return type_text(value.meta.get("val") if isinstance(value, fx.Node) else value, dims)


def _rounded(value: float) -> float | None:
    """Six digits are plenty to look at; a sum beyond the range of floats is None."""
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
