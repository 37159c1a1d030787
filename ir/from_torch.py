"""PyTorch front end: ``nn.Module``, ``ExportedProgram`` or ``.pt2`` file to `Program`.

`torch.export` captures; this file makes the result ours: weights become lazy and shared, inputs and outputs get stable
names, dynamic dimensions the user's names, size guards go into the signature, and `ir.clean` removes what capture
leaves behind. The decomposition that usually follows an export takes twice the export's own time, so it is run only
where it changes something: on graphs with in-place operators.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind

from .clean import clean_capture, needs_functionalization
from .dims import Dim, Dims, Guard
from .errors import GraphlatheError, ImportModelError, suggest
from .program import ORIGIN, Entry, Program, StatePair
from .rewrite import fake_weight
from .weights import Weight

Dynamic = Mapping[str, Mapping[int, Any]] | str | None


def trace(
    model: torch.nn.Module | ExportedProgram | str | Path,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    dynamic: Dynamic = None,
) -> Program:
    """Trace a PyTorch model to a `Program`.

    Args:
        model: a module (traced in eval mode; its mode is restored), an ``ExportedProgram``, or a ``.pt2`` file.
        example_inputs: a tuple (positional) or a dict (keyword). Only shapes and dtypes matter; nested structures of
            tensors are allowed; other values are fixed.
        dynamic: names of dynamic dimensions by input and axis, ``{"input_ids": {0: "B", 1: "S"}}`` (inputs that share
            a name share the size; a `torch.export.Dim` gives a range), or ``"auto"``: every dimension that the model
            lets be dynamic, or None: all sizes fixed.

    Returns:
        The program; its entry is called ``main``.

    Raises:
        ImportModelError: the model cannot be traced, or a named dimension cannot be dynamic.
    """
    if isinstance(model, (str, Path)):
        return from_exported(load_pt2(Path(model)))
    if isinstance(model, ExportedProgram):
        return from_exported(model)
    if not isinstance(model, torch.nn.Module):
        raise ImportModelError(
            f"cannot trace a {type(model).__name__}", expected="an nn.Module, an ExportedProgram, or the path of a .pt2 file"
        )
    if example_inputs is None:
        raise ImportModelError("tracing a module needs example_inputs", remedy="pass a tuple (positional) or a dict (keyword)")
    by_keyword = isinstance(example_inputs, Mapping)
    args: tuple[Any, ...] = () if by_keyword else tuple(example_inputs)
    kwargs: dict[str, Any] = dict(example_inputs) if by_keyword else {}
    arguments = argument_names(model, args, kwargs)
    exported, names = _export(model, args, kwargs, arguments, dynamic)
    return from_exported(exported, names=names)


def argument_names(model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    """The callable's own names of the arguments given, positional ones first."""
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise ImportModelError(
            f"the example inputs do not fit {type(model).__name__}.forward: {error}",
            expected=f"forward{inspect.signature(model.forward)}",
        ) from error
    names: list[str] = []
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            names.extend(f"{name}_{i}" for i in range(len(value)))
        elif kind is inspect.Parameter.VAR_KEYWORD:
            names.extend(value)
        else:
            names.append(name)
    positional = names[: len(args)]
    return positional + [n for n in kwargs if n not in positional]


@contextmanager
def _eval_mode(model: torch.nn.Module) -> Any:
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _export(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], arguments: list[str], dynamic: Dynamic
) -> tuple[ExportedProgram, dict[tuple[str, int], str]]:
    """Export with the requested dynamic dimensions; also returns their names by (leaf name, axis)."""
    values = [*args, *kwargs.values()]
    named = _named_dims(arguments, values, dynamic)
    values = [_widen(value, name, named) for name, value in zip(arguments, values, strict=True)]
    shapes = [_dynamic_shapes(name, value, named, dynamic == "auto") for name, value in zip(arguments, values, strict=True)]
    args, kwargs = tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :], strict=True))
    spec: Any = (*shapes[: len(args)], *shapes[len(args) :])
    by_name = dict(zip(arguments, spec, strict=True))
    hook = model.register_forward_pre_hook(_SameSizes(arguments, named), with_kwargs=True, prepend=True)
    try:
        with _eval_mode(model), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.export(
                model,
                args,
                kwargs,
                dynamic_shapes=_match_signature(model, args, kwargs, by_name) if dynamic else None,
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=False,
            )
    except GraphlatheError:
        raise
    except Exception as error:
        raise _trace_error(model, error) from error
    finally:
        hook.remove()
    return exported, {key: name for key, (name, _) in named.items()}


def _match_signature(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], by_name: dict[str, Any]) -> Any:
    """torch.export wants dynamic shapes keyed by parameter, with variadic ones grouped."""
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    result: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            result[name] = tuple(by_name[f"{name}_{i}"] for i in range(len(value)))
        elif kind is inspect.Parameter.VAR_KEYWORD:
            result[name] = {key: by_name[key] for key in value}
        else:
            result[name] = by_name[name]
    return result


def leaf_names(argument: str, value: Any) -> list[str]:
    """Stable names of a (nested) argument's tensors: ``x``, or ``x.0.key``."""
    paths, _ = pytree.tree_flatten_with_path(value)
    return [".".join([argument, *(_key_text(k) for k in path)]) for path, leaf in paths if isinstance(leaf, torch.Tensor)]


def _key_text(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _named_dims(arguments: list[str], values: list[Any], dynamic: Dynamic) -> dict[tuple[str, int], tuple[str, Any]]:
    """The requested dimensions: (leaf name, axis) -> (name, range)."""
    if dynamic is None or dynamic == "auto":
        return {}
    if isinstance(dynamic, str):
        raise ImportModelError(f"dynamic={dynamic!r} is unknown", expected="a dict of names by input and axis, 'auto', or None")
    leaves: dict[str, torch.Tensor] = {}
    for argument, value in zip(arguments, values, strict=True):
        tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
        leaves.update(zip(leaf_names(argument, value), tensors, strict=True))
    named: dict[tuple[str, int], tuple[str, Any]] = {}
    for port, axes in dynamic.items():
        if port not in leaves:
            raise ImportModelError(f"dynamic names no input '{port}'{suggest(port, list(leaves))}", expected=", ".join(leaves))
        for axis, dim in axes.items():
            if not -leaves[port].dim() <= axis < leaves[port].dim():
                raise ImportModelError(f"dynamic[{port!r}] names axis {axis}", expected=f"an axis of shape {list(leaves[port].shape)}")
            low, high = (getattr(dim, "min", 1), getattr(dim, "max", None)) if not isinstance(dim, str) else (1, None)
            name = dim if isinstance(dim, str) else getattr(dim, "__name__", str(dim))
            named[port, axis % leaves[port].dim()] = (name, (max(int(low), 1), None if high is None or high > 2**31 else int(high)))
    return named


def _widen(value: Any, argument: str, named: Mapping[tuple[str, int], Any]) -> Any:
    """Repeat the example along dynamic axes of size 1: tracing takes 0 and 1 for constants, and numbers do not matter."""
    names = iter(leaf_names(argument, value))

    def widen(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        name = next(names)
        for axis in range(leaf.dim()):
            if (name, axis) in named and leaf.shape[axis] == 1:
                leaf = leaf.repeat_interleave(2, dim=axis)
        return leaf

    return pytree.tree_map(widen, value)


def _dynamic_shapes(argument: str, value: Any, named: Mapping[tuple[str, int], Any], auto: bool) -> Any:
    names = iter(leaf_names(argument, value))

    def shape(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return None
        name = next(names)
        if auto:
            return {axis: torch.export.Dim.AUTO for axis in range(leaf.dim())}
        result: dict[int, Any] = {}
        for axis in range(leaf.dim()):
            if (name, axis) in named:
                low, high = named[name, axis][1]
                result[axis] = torch.export.Dim.DYNAMIC(min=low, max=high) if high else torch.export.Dim.DYNAMIC
        return result or None

    return pytree.tree_map(shape, value)


class _SameSizes:
    """A forward pre-hook that tells the tracer which dimensions carry one name, before the model sees them."""

    def __init__(self, arguments: list[str], named: Mapping[tuple[str, int], tuple[str, Any]]) -> None:
        self.arguments = arguments
        self.named = named

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves: dict[str, torch.Tensor] = {}
        positional = dict(zip(self.arguments, args, strict=False))
        for argument, value in {**positional, **kwargs}.items():
            tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
            leaves.update(zip(leaf_names(argument, value), tensors, strict=True))
        first: dict[str, Any] = {}
        for (port, axis), (name, _) in self.named.items():
            size = leaves[port].shape[axis]
            torch._check(first.setdefault(name, size) == size)


def _trace_error(model: torch.nn.Module, error: Exception) -> ImportModelError:
    text = str(error).strip().splitlines()
    first = text[0] if text else type(error).__name__
    specialised = next((line.strip() for line in text if "specialized" in line), None)
    if specialised:
        return ImportModelError(
            f"a named dimension cannot be dynamic: {specialised}",
            remedy="leave that dimension out of dynamic=, or use dynamic='auto'",
        )
    return ImportModelError(
        f"cannot trace {type(model).__name__}: {type(error).__name__}: {first}",
        remedy="torch.export must be able to capture the model: remove data-dependent Python control flow, or trace a part of it",
    )


def load_pt2(path: Path) -> ExportedProgram:
    """Read a ``.pt2`` file.

    Raises:
        ImportModelError: it is missing, truncated, or something else.
    """
    if not path.is_file():
        raise ImportModelError(f"no file '{path}'")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(str(path))
    except Exception as error:
        raise ImportModelError(
            f"cannot read '{path}': {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            expected="a file that torch.export.save wrote",
            remedy="the file may be truncated, or written by another version of torch: export it again",
        ) from error


def from_exported(exported: ExportedProgram, *, names: Mapping[tuple[str, int], str] | None = None) -> Program:
    """Turn an ``ExportedProgram`` into a `Program`, sharing its weights.

    Args:
        exported: what `torch.export` returned (training or inference dialect).
        names: names for dynamic dimensions, by (input name, axis); others are called after their input and axis.

    Raises:
        ImportModelError: it holds something that a program cannot.
    """
    if needs_functionalization(exported.graph_module):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = exported.run_decompositions({})
    return _Importer(exported, names or {}).program()


class _Importer:
    """Builds a program from an exported one: inputs, weights, operators, outputs, then the clean-up."""

    def __init__(self, exported: ExportedProgram, names: Mapping[tuple[str, int], str]) -> None:
        self.exported = exported
        self.names = names
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.weights: dict[str, Weight] = {}
        self.tied: dict[str, str] = {}
        self.subgraphs: dict[str, fx.Graph] = {}
        self.initial: dict[str, str] = {}  # buffer that the model mutates -> name of the input that carries it
        self.fake_mode = _fake_mode_of(exported.graph)

    def program(self) -> Program:
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
                self.weights[str(spec.target)] = Weight.from_tensor(self._constant(str(spec.target)))
        by_storage: dict[tuple[int, int, tuple[int, ...], tuple[int, ...]], str] = {}
        for spec in signature.input_specs:
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR) and spec.target not in mutated:
                self._weight(placeholders[spec.arg.name], str(spec.target), by_storage)
        _copy_operators(self.exported.graph_module, self.graph, self.env, self.subgraphs)
        outputs = self._outputs(mutated)
        entry = Entry(
            self.graph,
            tuple(inputs),
            tuple(outputs),
            arguments={name: tuple(port for _, port in leaves) for name, leaves in arguments.items() if leaves},
            constants=constants,
            bare_output=outputs == ["output"],
        )
        program = Program(
            {"main": entry}, self.weights, subgraphs=self.subgraphs, fake_mode=self.fake_mode, tied=self.tied, metadata={"producer": "torch"}
        )
        entry.state = tuple(StatePair(name, f"{name}.next", weight) for name, weight in self.initial.items())
        for node in self.graph.find_nodes(op="get_attr"):
            if str(node.target) in self.weights:
                node.meta["val"] = fake_weight(program, self.weights[str(node.target)])
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
        node = self.graph.placeholder(_identifier(name))
        node.meta["val"] = old.meta["val"]
        node.meta[ORIGIN] = name
        self.env[old] = node

    def _weight(self, old: fx.Node, name: str, by_storage: dict[Any, str]) -> None:
        if not old.users:
            return
        tensor = self._constant(name)
        key = _storage_key(tensor)
        known = by_storage.setdefault(key, name) if key is not None else name
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
            paths, _ = pytree.tree_flatten_with_path(value)
            arguments[name] = []
            for path, leaf in paths:
                port = ".".join([name, *(_key_text(k) for k in path)])
                if isinstance(leaf.spec.arg, ConstantArgument):
                    constants[port] = leaf.spec.arg.value
                else:
                    arguments[name].append((leaf.spec.arg.name, port))
        return arguments, constants

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
                    f"the model changes its input '{spec.target}' in place", remedy="return the new value instead of writing into the input"
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
        text = ".".join(_key_text(k) for k in path)
        names.append("output" if not text else text if not text[0].isdigit() else f"output_{text}")
    return names


def _identifier(name: str) -> str:
    return name.replace(".", "_")


def _storage_key(tensor: torch.Tensor) -> Any:
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return None
    try:
        pointer = tensor.untyped_storage().data_ptr()
    except RuntimeError:  # fake tensors have no data; identity tells tied ones apart
        return id(tensor)
    return (pointer, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype) if pointer else id(tensor)


def _fake_mode_of(graph: fx.Graph) -> FakeTensorMode:
    for node in graph.nodes:
        value = node.meta.get("val")
        for leaf in pytree.tree_leaves(value):
            mode = getattr(leaf, "fake_mode", None)
            if mode is not None:
                return mode
    return FakeTensorMode()


def _copy_operators(
    module: fx.GraphModule, graph: fx.Graph, env: dict[fx.Node, fx.Node], subgraphs: dict[str, fx.Graph]
) -> None:
    """Copy operator nodes; nested graphs of control flow move into ``subgraphs``; captured modes are inlined."""
    for old in module.graph.nodes:
        if old.op == "call_function":
            inner = _mode_region(old, module)
            if inner is not None:
                body, operands = inner
                env[old] = _inline(body, operands, graph, env, subgraphs)  # type: ignore[assignment]
                continue
            if _is_projection(old, env):
                env[old] = env[old.args[0]][old.args[1]]  # type: ignore[index]
                continue
            new = graph.create_node(
                "call_function", old.target, fx.node.map_arg(old.args, env.__getitem__), fx.node.map_arg(old.kwargs, env.__getitem__), old.name
            )
            new.meta["val"] = old.meta.get("val")
            new.meta[ORIGIN] = origin_of(old)
            env[old] = new
        elif old.op == "get_attr" and isinstance(getattr(module, str(old.target), None), fx.GraphModule):
            if any(not _is_mode(user) for user in old.users):
                name = str(old.target)
                while name in subgraphs:
                    name += "_"
                subgraphs[name] = _nested(getattr(module, str(old.target)), subgraphs)
                env[old] = graph.create_node("get_attr", name)
        elif old.op == "get_attr":
            raise ImportModelError(f"the graph reads an attribute '{old.target}' that is no weight", node=old.name)


def _nested(module: fx.GraphModule, subgraphs: dict[str, fx.Graph]) -> fx.Graph:
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for old in module.graph.find_nodes(op="placeholder"):
        env[old] = graph.placeholder(str(old.target))
        env[old].meta["val"] = old.meta.get("val")
    _copy_operators(module, graph, env, subgraphs)
    output = next(iter(module.graph.find_nodes(op="output")))
    graph.output(fx.node.map_arg(output.args[0], env.__getitem__))
    return graph


_MODES = ("wrap_with_set_grad_enabled", "wrap_with_autocast")


def _is_mode(node: fx.Node) -> bool:
    return node.op == "call_function" and str(node.target) in _MODES


def _mode_region(node: fx.Node, module: fx.GraphModule) -> tuple[fx.GraphModule, Sequence[Any]] | None:
    """The body and operands of a region that only sets a mode; an enabled autocast was functionalised away before."""
    if not _is_mode(node):
        return None
    position = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr")
    body = getattr(module, str(node.args[position].target))  # type: ignore[union-attr]
    return body, node.args[position + 1 :]


def _inline(
    body: fx.GraphModule, operands: Sequence[Any], graph: fx.Graph, env: dict[fx.Node, fx.Node], subgraphs: dict[str, fx.Graph]
) -> tuple[Any, ...]:
    inner: dict[fx.Node, fx.Node] = {}
    for placeholder, operand in zip(body.graph.find_nodes(op="placeholder"), operands, strict=True):
        inner[placeholder] = env[operand] if isinstance(operand, fx.Node) else operand
    _copy_operators(body, graph, inner, subgraphs)
    output = next(iter(body.graph.find_nodes(op="output")))
    return tuple(fx.node.map_arg(output.args[0], inner.__getitem__))  # type: ignore[arg-type]


def _is_projection(node: fx.Node, env: Mapping[fx.Node, Any]) -> bool:
    """Whether a node picks one result of an inlined region."""
    import operator

    return node.target is operator.getitem and isinstance(node.args[0], fx.Node) and isinstance(env.get(node.args[0]), tuple)


def origin_of(node: fx.Node) -> str:
    """The module path that a captured node came from."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(next(reversed(stack.values()))[0])
    return path.removeprefix("L['self'].").removeprefix("L__self__").removeprefix(".")


def read_dims(program: Program, entry: Entry, names: Mapping[tuple[str, int], str]) -> Dims:
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
                wanted = names.get((port, axis)) or f"{_identifier(port)}_{axis}"
                if symbol in symbols or wanted in dims:
                    continue
                symbols[symbol] = wanted
                bounds = env.var_to_range.get(symbol)
                upper = None if bounds is None or not bounds.upper.is_finite or bounds.upper > 2**31 else int(bounds.upper)
                lower = 1 if bounds is None or bounds.lower <= 2 else int(bounds.lower)
                dims[wanted] = Dim(wanted, symbol, int(env.backed_var_to_val[symbol]), lower, upper)
    return Dims(dims, _guards(env, set(symbols)))


def _guards(env: Any, symbols: set[sympy.Symbol]) -> tuple[Guard, ...]:
    guards: dict[str, Guard] = {}
    for recorded in env.guards:
        expr = env.replace(recorded.expr)
        if expr.free_symbols and expr.free_symbols <= symbols:
            guards.setdefault(str(expr), Guard(expr))
    return tuple(guards.values())
