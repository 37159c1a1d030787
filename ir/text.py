"""The text form of programs: canonical, ASCII, one node per line; `parse_program` reads it back.

::

    program @main(%ids: i64[B, S]) -> (%logits) {
      dim B = 2 in [1, inf]
      dim S = 12 in [1, 512]
      %w0 = weight "embed.weight" : f32[49152, 576] #a1b2c3d4
      %0 = aten.embedding(%w0, %ids) : f32[B, S, 576]
      return (%0,)
    }

Operators are numbered in order, weights in order of first use, so that the text does not depend on node names or on the
order of dicts. Weights that nothing reads do not appear. The bodies of control flow follow as ``graph @name`` sections,
where inputs are called ``%a0``, ``%a1``... With origins, each line ends in ``; from <module path> by <pass>``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch import fx

from .errors import GraphlatheError
from .from_text import FUNCTIONS, parse_program
from .program import MADE_BY, ORIGIN, Entry, Program
from .types import TypePrinter, dtype_name
from .weights import Weight

_PLAIN_NAME = re.compile(r"(?!(?:[wa]?\d+)$)[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z0-9_]+)*")


def print_program(program: Program, *, origins: bool = False, history: bool = True) -> str:
    """The canonical text of a program; linear in the number of nodes.

    Args:
        program: the program; its weights are hashed once (see `Weight.digest`).
        origins: add where each node came from and which pass made it.
        history: include the passes that were applied.

    Raises:
        GraphlatheError: a graph holds something that has no text form.
    """
    return _Printer(program, origins).text(history)


def quoted(name: str) -> str:
    """A name as it stands after ``%`` or ``@``: plain where that is unambiguous, else in quotes."""
    return name if _PLAIN_NAME.fullmatch(name) else json.dumps(name)


def target_name(target: Any) -> str:
    """The name of an operator: ``aten.add.Tensor``, ``aten.relu`` (default overload), ``operator.mul``.

    Raises:
        GraphlatheError: it cannot be found again by a name.
    """
    if isinstance(target, torch._ops.OpOverload):
        overload = "" if target._overloadname == "default" else f".{target._overloadname}"
        return f"{target.namespace}.{target._opname}{overload}"
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher_order.{target.name()}"
    for name, function in FUNCTIONS.items():
        if function is target:
            return name
    raise GraphlatheError(
        f"the function {target!r} has no text form",
        expected="an operator of torch.ops, or an arithmetic function of operator, math or torch",
        remedy="register it as an operator (torch.library.custom_op)",
    )


class _Printer:
    """Prints one program: its entries, then the nested graphs in the order in which they are met."""

    def __init__(self, program: Program, origins: bool) -> None:
        self.program = program
        self.origins = origins
        self.unbacked: dict[sympy.Symbol, str] = {}
        self.nested: dict[str, TypePrinter] = {}  # in order of the first reference
        self.targets: dict[Any, str] = {}

    def text(self, history: bool) -> str:
        program = self.program
        sections: list[str] = []
        head = [f"history {json.dumps(line)}\n" for line in program.history] if history else []
        used = program.used_weights()
        head += [f"tied {json.dumps(a)} -> {json.dumps(b)}\n" for a, b in sorted(program.tied.items()) if b in used]
        if head:
            sections.append("".join(head))
        for name, entry in program.entries.items():
            sections.append(self._entry(name, entry))
        done = 0
        while done < len(self.nested):  # nested graphs may nest in turn
            name, types = list(self.nested.items())[done]
            sections.append(self._nested(name, types))
            done += 1
        return "\n".join(sections)

    def _entry(self, name: str, entry: Entry) -> str:
        dims = entry.dims
        types = TypePrinter({dim.symbol: dim.name for dim in dims.by_name.values()}, self.unbacked)
        known = len(self.unbacked)
        names = {p: f"%{quoted(i)}" for i, p in zip(entry.inputs, entry.placeholders, strict=True)}
        body = _Body(self, types, names)
        lines = body.lines(entry.graph)
        ports = ", ".join(f"{names[p]}: {types.type(p.meta['val'])}" for p in entry.placeholders)
        results = ", ".join(f"%{quoted(o)}" for o in entry.outputs)
        result = results if entry.bare_output and len(entry.outputs) == 1 else f"({results})"
        header = [
            f"dim {d.name} = {d.hint} in [{d.min}, {'inf' if d.max is None else d.max}]" for d in dims.by_name.values()
        ]
        header += self._unbacked_dims(known)
        header += [f"guard {types.expr(guard.expr)}" for guard in dims.guards]
        trivial = {i: (i,) for i in entry.inputs}
        if entry.arguments and list(entry.arguments.items()) != list(trivial.items()):
            header += [
                f"argument {quoted(a)}({', '.join(f'%{quoted(p)}' for p in ports_)})"
                for a, ports_ in entry.arguments.items()
            ]
        header += [f"constant {quoted(key)} = {body.value(value)}" for key, value in entry.constants.items()]
        for pair in entry.state:
            initial = f" = {self._weight(pair.initial, types)}" if pair.initial is not None else ""
            header.append(f"state %{quoted(pair.input)} -> %{quoted(pair.output)}{initial}")
        return _section(f"program @{quoted(name)}({ports}) -> {result}", header, lines)

    def _nested(self, name: str, types: TypePrinter) -> str:
        graph = self.program.subgraphs[name]
        known = len(self.unbacked)
        placeholders = graph.find_nodes(op="placeholder")
        names = {p: f"%a{i}" for i, p in enumerate(placeholders)}
        lines = _Body(self, types, names).lines(graph)
        ports = ", ".join(f"{names[p]}: {types.type(p.meta['val'])}" for p in placeholders)
        return _section(f"graph @{quoted(name)}({ports})", self._unbacked_dims(known), lines)

    def _unbacked_dims(self, known: int) -> list[str]:
        """The data-dependent sizes that a section met first; what is known of them, its operators say."""
        return [f"dim {name}" for name in list(self.unbacked.values())[known:]]

    def _weight(self, name: str, types: TypePrinter) -> str:
        weight: Weight | None = self.program.weights.get(name)
        if weight is None:
            raise GraphlatheError(f"no weight '{name}' in the program")
        shape = ", ".join(map(str, weight.shape))
        return f"weight {json.dumps(name)} : {dtype_name(weight.dtype)}[{shape}] #{weight.digest()}"


def _section(head: str, *groups: Iterable[str]) -> str:
    return f"{head} {{\n" + "".join(f"  {line}\n" for group in groups for line in group) + "}\n"


class _Body:
    """Prints the nodes of one graph; weights get their numbers when they are first used."""

    def __init__(self, printer: _Printer, types: TypePrinter, names: dict[fx.Node, str]) -> None:
        self.printer = printer
        self.types = types
        self.names = names
        self.weights: list[fx.Node] = []

    def lines(self, graph: fx.Graph) -> list[str]:
        operators: list[str] = []
        count = 0
        for node in graph.nodes:
            if node.op == "output":
                operators.append(f"return {self.value(node.args[0])}")
            elif node.op == "call_function":
                call = f"{self._target(node.target)}({self._arguments(node)})"
                operators.append(f"%{count} = {call} : {self.types.type(node.meta.get('val'))}{self._comment(node)}")
                self.names[node] = f"%{count}"
                count += 1
            elif node.op not in ("placeholder", "get_attr"):
                raise GraphlatheError(f"a node of kind {node.op} has no text form", node=node.name)
        weights = [
            f"{self.names[node]} = {self.printer._weight(str(node.target), self.types)}{self._comment(node)}"
            for node in self.weights
        ]
        return weights + operators

    def _target(self, target: Any) -> str:
        known = self.printer.targets
        if target not in known:
            known[target] = target_name(target)
        return known[target]

    def _comment(self, node: fx.Node) -> str:
        if not self.printer.origins:
            return ""
        origin, maker = node.meta.get(ORIGIN), node.meta.get(MADE_BY)
        parts = [f"from {_word(origin)}"] if origin else []
        parts += [f"by {_word(maker)}"] if maker else []
        return f"  ; {' '.join(parts)}" if parts else ""

    def _arguments(self, node: fx.Node) -> str:
        parts = [self.value(a) for a in node.args]
        parts += [f"{key}={self.value(node.kwargs[key])}" for key in sorted(node.kwargs)]
        return ", ".join(parts)

    def _reference(self, node: fx.Node) -> str:
        if node.op == "get_attr" and str(node.target) in self.printer.program.subgraphs:
            self.printer.nested.setdefault(str(node.target), self.types)
            return f"@{quoted(str(node.target))}"
        name = self.names.get(node)
        if name is None:
            if node.op != "get_attr":
                raise GraphlatheError("a value is used before it is computed, or in another graph", node=node.name)
            name = self.names[node] = f"%w{len(self.weights)}"
            self.weights.append(node)
        return name

    def value(self, value: Any) -> str:
        """An argument as text."""
        match value:
            case fx.Node():
                return self._reference(value)
            case None | bool() | int():
                return str(value)
            case float():
                return repr(value)
            case str():
                return json.dumps(value)
            case tuple():
                return f"({', '.join(map(self.value, value))}{',' if len(value) == 1 else ''})"
            case list():
                return f"[{', '.join(map(self.value, value))}]"
            case slice():
                return f"slice({', '.join(map(self.value, (value.start, value.stop, value.step)))})"
            case complex():
                return f"complex({value.real!r}, {value.imag!r})"
            case dict():
                return f"{{{', '.join(f'{json.dumps(k)}: {self.value(v)}' for k, v in sorted(value.items()))}}}"
            case torch.dtype():
                return dtype_name(value)
            case torch.layout() | torch.memory_format():
                return str(value).removeprefix("torch.")
            case torch.device():
                return str(value)
            case _:
                raise GraphlatheError(f"an argument of type {type(value).__name__} has no text form: {value!r}")


def _word(text: str) -> str:
    """An origin or a pass's name in a comment."""
    return text if text.isascii() and text.isprintable() and not set(' "') & set(text) else json.dumps(text)


__all__ = ["parse_program", "print_program", "quoted", "target_name"]
