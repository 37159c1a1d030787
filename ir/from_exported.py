"""``ExportedProgram`` to `Program`: inputs, lazy shared weights, operators, named outputs, named dimensions, guards."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind

from .calling import identifier, key_text, leaf_paths
from .clean import clean_capture
from .copy_capture import copy_operators, enables_autocast
from .dims import Dim, Dims, Guard
from .errors import ImportModelError
from .functionalize import functionalize
from .on_cpu import away
from .program import ORIGIN, Entry, Program, StatePair
from .rewrite import fake_weight
from .weights import Weight


def from_exported(
    exported: ExportedProgram, *, names: Mapping[tuple[str, int], tuple[str, int]] | None = None
) -> Program:
    """Turn an ``ExportedProgram`` into a `Program`, sharing its weights.

    Args:
        exported: what `torch.export` returned (training or inference dialect).
        names: name and minimum of dynamic dimensions, by (input name, axis); others are called after
            their input and axis.

    Raises:
        ImportModelError: it holds something that a program cannot, or weights on an accelerator.
    """
    tensors = (*exported.state_dict.values(), *exported.constants.values())
    if elsewhere := away(value for value in tensors if isinstance(value, torch.Tensor)):
        raise ImportModelError(
            f"the model was exported on {', '.join(elsewhere)}",
            expected="a model on the CPU; a program is compiled for a device later",
            remedy="export it on the CPU, or move it with torch.export.passes.move_to_device_pass(exported, 'cpu')",
        )
    program = None if enables_autocast(exported.graph_module) else _Importer(exported, names or {}).program()
    if program is None:
        # PyTorch's own functionalization: a second trace, at twice the cost of the first.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = exported.run_decompositions({})
        program = _Importer(exported, names or {}).program()
    if program is None:
        raise ImportModelError("the model writes in place in a way that cannot be made functional")
    return program


class _Importer:
    """Builds a program from an exported one: inputs, weights, operators, outputs, then the clean-up."""

    def __init__(self, exported: ExportedProgram, names: Mapping[tuple[str, int], tuple[str, int]]) -> None:
        self.exported = exported
        self.names = names
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.weights: dict[str, Weight] = {}
        self.tied: dict[str, str] = {}
        self.subgraphs: dict[str, fx.Graph] = {}
        self.initial: dict[str, str] = {}  # buffer that the model mutates -> name of the input that carries it
        self.fake_mode = _fake_mode_of(exported.graph)

    def program(self) -> Program | None:
        """The program, or None if it writes in place where only a new trace can tell what it means."""
        signature = self.exported.graph_signature
        placeholders = {n.name: n for n in self.exported.graph.find_nodes(op="placeholder")}
        mutated = {s.target for s in signature.output_specs if s.kind is OutputKind.BUFFER_MUTATION}
        arguments, constants = self._arguments()
        inputs: list[str] = []
        leaf_name = {leaf: port for _, leaves in arguments.items() for leaf, port in leaves}
        for spec in signature.input_specs:
            old = placeholders[spec.arg.name]
            if spec.kind is InputKind.USER_INPUT:
                if isinstance(spec.arg, ConstantArgument):
                    continue
                self._input(old, leaf_name[old.name])
                inputs.append(leaf_name[old.name])
            elif spec.target in mutated:
                self._input(old, str(spec.target))
                inputs.append(str(spec.target))
                self.initial[str(spec.target)] = str(spec.target)
                # A copy: the module itself goes on writing into its own.
                self.weights[str(spec.target)] = Weight.from_tensor(self._constant(str(spec.target)).clone())
        by_storage: dict[tuple[int, int, tuple[int, ...], tuple[int, ...]], str] = {}
        stored = [
            (placeholders[spec.arg.name], str(spec.target))
            for spec in signature.input_specs
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
            and spec.target not in mutated
        ]
        # Export reads a tied parameter under one of its names; the others, which nothing reads, come last.
        for old, target in sorted(stored, key=lambda pair: not pair[0].users):
            self._weight(old, target, by_storage)
        copy_operators(self.exported.graph_module, self.graph, self.env, self.subgraphs)
        outputs = self._outputs(mutated)
        entry = Entry(
            self.graph,
            tuple(inputs),
            tuple(outputs),
            arguments={name: tuple(port for _, port in leaves) for name, leaves in arguments.items()},
            constants=constants,
            bare_output=outputs == ["output"] and self._returns_one_tensor(),
        )
        program = Program(
            {"main": entry},
            self.weights,
            subgraphs=self.subgraphs,
            fake_mode=self.fake_mode,
            tied=self.tied,
            metadata={"producer": "torch"},
        )
        entry.state = tuple(StatePair(name, f"{name}.next", weight) for name, weight in self.initial.items())
        for node in self.graph.find_nodes(op="get_attr"):
            if str(node.target) in self.weights:
                node.meta["val"] = fake_weight(program, self.weights[str(node.target)])
        if not functionalize(program):
            return None
        clean_capture(program)
        entry.dims = read_dims(program, entry, self.names)
        used = program.used_weights()
        program.weights = {name: w for name, w in program.weights.items() if name in used}
        return program

    def _constant(self, name: str) -> torch.Tensor:
        for store in (self.exported.state_dict, self.exported.constants):
            value = store.get(name)
            if isinstance(value, torch.Tensor):
                return value
        raise ImportModelError(f"the exported program has no tensor '{name}'")

    def _input(self, old: fx.Node, name: str) -> None:
        taken = {str(node.target) for node in self.graph.find_nodes(op="placeholder")}
        node = self.graph.placeholder(identifier(name, taken))
        node.meta["val"] = old.meta["val"]
        node.meta[ORIGIN] = name
        self.env[old] = node

    def _weight(self, old: fx.Node, name: str, by_storage: dict[Any, str]) -> None:
        tensor = self._constant(name)
        key = _storage_key(tensor)
        known = by_storage.get(key, name)
        if not old.users:
            if known != name:
                self.tied[name] = known
            return
        if key is not None:
            by_storage[key] = known
        if known != name:
            self.tied[name] = known
            self.env[old] = next(n for n in self.graph.find_nodes(op="get_attr") if n.target == known)
            return
        node = self.graph.create_node("get_attr", name)
        node.meta[ORIGIN] = name.rpartition(".")[0]
        self.weights[name] = Weight.from_tensor(tensor)
        self.env[old] = node

    def _arguments(self) -> tuple[dict[str, list[tuple[str, str]]], dict[str, Any]]:
        """The call's arguments: name -> [(placeholder, input name)], and the fixed ones by name."""
        specs = [s for s in self.exported.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
        call = self.exported.module_call_graph[0].signature
        args, kwargs = pytree.tree_unflatten([_Leaf(s) for s in specs], call.in_spec) if call else ((), {})
        order = list(call.forward_arg_names or []) if call else []
        positional = [order[i] if i < len(order) else f"arg{i}" for i in range(len(args))]
        arguments: dict[str, list[tuple[str, str]]] = {}
        constants: dict[str, Any] = {}
        for name, value in [*zip(positional, args, strict=True), *kwargs.items()]:
            arguments[name] = []
            for port, leaf in leaf_paths(name, value):
                if isinstance(leaf.spec.arg, ConstantArgument):
                    constants[port] = leaf.spec.arg.value
                else:
                    arguments[name].append((leaf.spec.arg.name, port))
        return arguments, constants

    def _returns_one_tensor(self) -> bool:
        call = self.exported.module_call_graph[0].signature
        return call is None or call.out_spec.is_leaf()

    def _outputs(self, mutated: set[Any]) -> list[str]:
        old = next(iter(self.exported.graph.find_nodes(op="output")))
        specs = self.exported.graph_signature.output_specs
        user = [i for i, s in enumerate(specs) if s.kind is OutputKind.USER_OUTPUT]
        call = self.exported.module_call_graph[0].signature
        names = output_names(call.out_spec, len(user)) if call else [f"output_{i}" for i in range(len(user))]
        values: list[Any] = []
        kept: list[str] = []
        for name, index in zip(names, user, strict=True):
            value = old.args[0][index]  # type: ignore[index]
            if value is None:
                continue
            values.append(self.env[value] if isinstance(value, fx.Node) else value)
            kept.append(name)
        for index, spec in enumerate(specs):
            if spec.kind is OutputKind.BUFFER_MUTATION:
                values.append(self.env[old.args[0][index]])  # type: ignore[index]
                kept.append(f"{spec.target}.next")
            elif spec.kind is OutputKind.USER_INPUT_MUTATION:
                raise ImportModelError(
                    f"the model changes its input '{spec.target}' in place",
                    remedy="return the new value instead of writing into the input",
                )
        self.graph.output(tuple(values))
        return kept


class _Leaf:
    """Carries an input's specification through a pytree."""

    def __init__(self, spec: Any) -> None:
        self.spec = spec


def output_names(out_spec: Any, count: int) -> list[str]:
    """Stable names from the output's structure: fields and keys joined by dots; ``output`` for a bare tensor."""
    paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(count)), out_spec))
    names: list[str] = []
    for path, _ in paths:
        text = ".".join(key_text(k) for k in path)
        names.append("output" if not text else text if not text[0].isdigit() else f"output_{text}")
    return names


def _storage_key(tensor: torch.Tensor) -> Any:
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return None
    storage = tensor.untyped_storage()
    # A fake tensor has no data, but a storage object of its own.
    pointer = storage._cdata if isinstance(tensor, FakeTensor) else storage.data_ptr()
    return (
        (pointer, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)
        if pointer
        else id(tensor)
    )


def _fake_mode_of(graph: fx.Graph) -> FakeTensorMode:
    for node in graph.nodes:
        value = node.meta.get("val")
        for leaf in pytree.tree_leaves(value):
            mode = getattr(leaf, "fake_mode", None)
            if mode is not None:
                return mode
    return FakeTensorMode()


def read_dims(program: Program, entry: Entry, names: Mapping[tuple[str, int], tuple[str, int]]) -> Dims:
    """Name the symbols in the inputs' shapes, and take over the ranges and guards that tracing recorded."""
    env = program.fake_mode.shape_env
    if env is None:
        return Dims()
    dims: dict[str, Dim] = {}
    symbols: dict[sympy.Symbol, str] = {}
    for port, node in zip(entry.inputs, entry.placeholders, strict=True):
        value = node.meta.get("val")
        for axis, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if not isinstance(size, torch.SymInt):
                continue
            for symbol in sorted(size.node.expr.free_symbols, key=str):
                if symbol in symbols:
                    continue
                wanted, least = names.get((port, axis), (f"{identifier(port)}_{axis}", 1))
                wanted = identifier(wanted, dims)
                symbols[symbol] = wanted
                bounds = env.var_to_range.get(symbol)
                upper = (
                    None if bounds is None or not bounds.upper.is_finite or bounds.upper > 2**31 else int(bounds.upper)
                )
                # Tracing takes 0 and 1 for constants and so reports 2 as the least size; size 1 is checked by tests.
                lower = least if bounds is None or bounds.lower <= 2 else int(bounds.lower)
                dims[wanted] = Dim(wanted, symbol, int(env.backed_var_to_val[symbol]), lower, upper)
    return Dims(dims, _guards(env, set(symbols)))


def _guards(env: Any, symbols: set[sympy.Symbol]) -> tuple[Guard, ...]:
    guards: dict[str, Guard] = {}
    for recorded in env.guards:
        expr = env.replace(recorded.expr)
        if expr.free_symbols and expr.free_symbols <= symbols:
            guards.setdefault(str(expr), Guard(expr))
    return tuple(guards.values())
