"""The one container: graphs, weights, and the signature under which they are valid.

A `Program` holds named entries (``main``; later ``prefill``, ``decode``...), each a `torch.fx.Graph` of functional
operators. In a graph, a ``placeholder`` is an input, a ``get_attr`` is a weight or a nested graph (by name), a
``call_function`` is an operator, and every node carries in its ``meta``:

- ``val``: a fake tensor (shape, dtype) or a symbolic number;
- ``origin``: the module path or ONNX node that it came from;
- ``made_by``: the pass that created it (absent for what a front end produced).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .calling import check_complete, match_call
from .dims import Dims, Size
from .errors import InputError, suggest
from .execute import Observer, as_traced, copy_graph, own_memory, run_graph
from .on_cpu import values_on_cpu
from .weights import Weight

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from .cost import Cost

ORIGIN = "origin"
MADE_BY = "made_by"


class Outputs(dict[str, Any]):
    """Named outputs in order: ``out["logits"]``, ``out.logits``, ``out[0]``."""

    def __getitem__(self, key: str | int) -> Any:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no output '{name}'{suggest(name, list(self))}; outputs: {', '.join(self)}") from None


@dataclass(frozen=True)
class ValueSpec:
    """Name, dtype and (symbolic) shape of an input or output."""

    name: str
    dtype: torch.dtype | None
    shape: tuple[Size, ...]


@dataclass(frozen=True)
class StatePair:
    """An output that feeds an input at the next step.

    Attributes:
        input, output: their names.
        initial: the weight that holds the first value, or None when the caller gives it.
    """

    input: str
    output: str
    initial: str | None = None


@dataclass
class Entry:
    """One callable graph of a program.

    Attributes:
        graph: the operators.
        inputs: the inputs' names, in the order of the graph's placeholders.
        outputs: the outputs' names, in the order of the output node's arguments.
        arguments: the callable's own parameters in order, each with the inputs that its leaves became (one for a
            tensor, several for a nested structure, none for what tracing fixed).
        constants: arguments that tracing fixed (``use_cache=False``); a call may repeat them, not change them.
        dims: named dynamic dimensions, and the size guards.
        state: pairs of output and input that carry state.
        bare_output: whether a call returns the one tensor itself instead of named `Outputs`.
    """

    graph: fx.Graph
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    arguments: dict[str, tuple[str, ...]] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    dims: Dims = field(default_factory=Dims)
    state: tuple[StatePair, ...] = ()
    bare_output: bool = False

    @property
    def placeholders(self) -> list[fx.Node]:
        """The input nodes, in order."""
        return self.graph.find_nodes(op="placeholder")

    @property
    def output_node(self) -> fx.Node:
        """The graph's output node."""
        return next(iter(self.graph.find_nodes(op="output")))

    @property
    def output_values(self) -> tuple[Any, ...]:
        """What the graph returns: nodes, or constants that tracing fixed."""
        return tuple(self.output_node.args[0])  # type: ignore[arg-type]

    def input_node(self, name: str) -> fx.Node:
        """The placeholder of the input ``name``."""
        return self.placeholders[self.inputs.index(name)]

    def copy(self) -> Entry:
        """An entry with a graph of its own (same values, same symbols)."""
        return replace(
            self, graph=copy_graph(self.graph), arguments=dict(self.arguments), constants=dict(self.constants)
        )


def check_program(value: Any) -> None:
    """Refuse what is no program (a module, say) where one is needed.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(value, Program):
        raise InputError(
            f"got a {type(value).__name__}", expected="a Program", remedy="make one with trace(...) or load(...)"
        )


def spec_of(name: str, node: Any) -> ValueSpec:
    """The specification of a graph value."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else node
    if isinstance(value, torch.Tensor):
        return ValueSpec(name, value.dtype, tuple(value.shape))
    return ValueSpec(name, None, ())


class Program:
    """Graphs, weights and signature; see the module's text.

    Args:
        entries: the callable graphs by name; ``main`` is what a plain call runs.
        weights: the weights by name. Programs share `Weight` objects until a pass replaces one.
        subgraphs: nested graphs of control flow, by the name that their ``get_attr`` nodes use.
        fake_mode: the mode under which shapes are inferred (it owns the symbols).
        tied: other names of a weight (``lm_head.weight`` -> ``embed.weight``), kept for reports and round trips.
        history: canonical text of every pass that was applied, in order.
        metadata: free text that travels with the program (source file, producer).
    """

    def __init__(
        self,
        entries: Mapping[str, Entry],
        weights: Mapping[str, Weight],
        *,
        subgraphs: Mapping[str, fx.Graph] | None = None,
        fake_mode: FakeTensorMode,
        tied: Mapping[str, str] | None = None,
        history: Sequence[str] = (),
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.entries: dict[str, Entry] = dict(entries)
        self.weights: dict[str, Weight] = dict(weights)
        self.subgraphs: dict[str, fx.Graph] = dict(subgraphs or {})
        self.fake_mode = fake_mode
        self.tied: dict[str, str] = dict(tied or {})
        self.history: list[str] = list(history)
        self.metadata: dict[str, str] = dict(metadata or {})
        # What operators make of which types, for this program and its clones (see `ir.infer.Inference`): what rewriters
        # inferred, and what verification did, which must not assume anything new of the sizes.
        self.inferred: dict[Any, Any] = {}
        self.checked: dict[Any, Any] = {}
        # Every `Rewriter` of this program counts here and tells the listeners (pass name, kind of change, node).
        self.mutations = 0
        self.listeners: list[Callable[[str, str, fx.Node], None]] = []

    @property
    def main(self) -> Entry:
        """The entry that a plain call runs."""
        return self.entries["main"]

    @property
    def graph(self) -> fx.Graph:
        """The main entry's graph."""
        return self.main.graph

    @property
    def graphs(self) -> dict[str, fx.Graph]:
        """All graphs by name: the entries' and the nested ones."""
        return {**{name: entry.graph for name, entry in self.entries.items()}, **self.subgraphs}

    @property
    def inputs(self) -> tuple[ValueSpec, ...]:
        """The main entry's inputs."""
        return tuple(spec_of(n, p) for n, p in zip(self.main.inputs, self.main.placeholders, strict=True))

    @property
    def outputs(self) -> tuple[ValueSpec, ...]:
        """The main entry's outputs."""
        return tuple(spec_of(n, v) for n, v in zip(self.main.outputs, self.main.output_values, strict=True))

    def used_weights(self) -> set[str]:
        """Names of the weights that some graph reads (or that start a state)."""
        used = {str(n.target) for g in self.graphs.values() for n in g.find_nodes(op="get_attr")} - set(self.subgraphs)
        return used | {s.initial for e in self.entries.values() for s in e.state if s.initial}

    @property
    def parameter_count(self) -> int:
        """Elements of all used weights (tied weights count once)."""
        return sum(self.weights[name].numel for name in self.used_weights())

    @property
    def weight_nbytes(self) -> int:
        """Bytes of all used weights."""
        return sum(self.weights[name].nbytes for name in self.used_weights())

    def feeds(self, /, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Match a call's arguments with the main entry's inputs, without checking shapes.

        Accepts the traced callable's own arguments (nested structures included) or flat input names; a state that has a
        first value may be left out. Tensors on an accelerator are copied to the CPU, where programs run.

        Raises:
            InputError: an argument is missing, unknown, given twice, or a fixed one is changed.
        """
        given = values_on_cpu(match_call(self.main, args, kwargs))
        for pair in self.main.state:
            if pair.input not in given and pair.initial is not None:
                given[pair.input] = self.weights[pair.initial].tensor()
        check_complete(self.main, given)
        return given

    def check_feeds(self, feeds: Mapping[str, Any], entry: str = "main") -> dict[str, int]:
        """Check dtypes, shapes, ranges and size guards of a call.

        Returns:
            The sizes of the named dimensions.

        Raises:
            InputError: something in the call is outside the signature.
        """
        target = self.entries[entry]
        if set(feeds) != set(target.inputs):
            missing = [name for name in target.inputs if name not in feeds]
            unknown = [name for name in feeds if name not in target.inputs]
            what = f"missing input {missing[0]!r}" if missing else f"unknown input {unknown[0]!r}"
            raise InputError(what, expected=f"inputs: {', '.join(target.inputs)}")
        specs = [spec_of(name, node) for name, node in zip(target.inputs, target.placeholders, strict=True)]
        specs = [spec for spec in specs if spec.dtype is not None]
        for spec in specs:
            value = feeds[spec.name]
            if not isinstance(value, torch.Tensor):
                raise InputError(f"input '{spec.name}' is a {type(value).__name__}", expected=f"a {spec.dtype} tensor")
            if value.dtype != spec.dtype:
                raise InputError(
                    f"input '{spec.name}' has dtype {value.dtype}",
                    expected=str(spec.dtype),
                    remedy=f"convert it with .to({spec.dtype})",
                )
        sizes: dict[Any, int] = {}
        for spec in [*specs, *specs]:  # twice: an input may have a size such as A + B of sizes that others have
            target.dims.bind(spec.name, spec.shape, feeds[spec.name].shape, sizes)
        target.dims.check(sizes)
        return {dim.name: sizes[dim.symbol] for dim in target.dims.by_name.values() if dim.symbol in sizes}

    def run(
        self,
        feeds: Mapping[str, Any],
        *,
        entry: str = "main",
        observe: Observer | None = None,
        given: Mapping[fx.Node, Any] | None = None,
        alias: Mapping[fx.Node, fx.Node] | None = None,
    ) -> dict[str, Any]:
        """Run an entry on named inputs and return its named outputs, which own their memory.

        Args:
            feeds: a value for each input.
            entry: which entry.
            observe, given, alias: see `ir.execute.run_graph`.

        Raises:
            InputError: the inputs do not fit the signature.
        """
        target = self.entries[entry]
        self.check_feeds(feeds, entry)
        by_target = {
            str(p.target): as_traced(feeds[n]) for n, p in zip(target.inputs, target.placeholders, strict=True)
        }
        held: set[int] = set()
        values = run_graph(
            target.graph, by_target, self.weights, self.subgraphs, observe=observe, given=given, alias=alias, held=held
        )
        return dict(zip(target.outputs, own_memory(values, held), strict=True))

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Run the main entry; returns the one tensor, or named `Outputs`, as the traced model did."""
        values = self.run(self.feeds(*args, **kwargs))
        return next(iter(values.values())) if self.main.bare_output else Outputs(values)

    def clone(self) -> Program:
        """A program with graphs of its own that shares weights and symbols."""
        copy = Program(
            {name: entry.copy() for name, entry in self.entries.items()},
            self.weights,
            subgraphs={name: copy_graph(graph) for name, graph in self.subgraphs.items()},
            fake_mode=self.fake_mode,
            tied=self.tied,
            history=self.history,
            metadata=self.metadata,
        )
        copy.inferred, copy.checked = self.inferred, self.checked
        return copy

    def fingerprint(self) -> str:
        """A hash of the canonical text, and with it of the weights' contents.

        It does not depend on node names, origins, or on the passes by which the program came about.
        """
        from .text import print_program

        return hashlib.sha256(print_program(self, history=False).encode()).hexdigest()[:16]

    def to_text(self, *, origins: bool = False) -> str:
        """The canonical text form, see `ir.text`."""
        from .text import print_program

        return print_program(self, origins=origins)

    def cost(self, sizes: Mapping[str, int] | None = None) -> Cost:
        """Parameters, MACs, bytes moved, peak activation bytes, see `ir.cost`."""
        from .cost import cost

        return cost(self, sizes)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the program to a folder: ``graph.txt``, ``program.json``, ``weights.safetensors``; no pickle."""
        from .serialize import save

        return save(self, Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Program:
        """Read what `save` wrote; weights stay in the file until needed."""
        from .serialize import load

        return load(Path(path))

    def export_onnx(self, path: str | os.PathLike[str], **options: Any) -> Path:
        """Write an ONNX file, see `ir.to_onnx.export_onnx`."""
        from .to_onnx import export_onnx

        return export_onnx(self, Path(path), **options)

    def __repr__(self) -> str:
        nodes = sum(len(g.nodes) for g in self.graphs.values())
        ports = ", ".join(self.main.inputs)
        return f"Program({ports} -> {', '.join(self.main.outputs)}; {nodes} nodes, {self.parameter_count:,} parameters)"


def no_symbols(value: Any) -> bool:
    """Whether a value is free of symbolic sizes."""
    if isinstance(value, torch.Tensor):
        return all(isinstance(s, int) for s in value.shape)
    return not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


__all__ = ["Entry", "Outputs", "Program", "StatePair", "ValueSpec", "copy_graph", "no_symbols", "spec_of"]
