"""The walk: a module whose forward pass applies one function per ONNX node, in the file's order.

`torch.export` traces the walk. Stored tensors take part as fake ones; shape arithmetic never reaches the tracer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import traceback

from ..errors import DataDependentError, GraphlatheError, ImportModelError, MissingOperatorError
from ..program import ORIGIN
from ..weights import Weight
from .functions import Described, body_of, has_body
from .limits import MOST_UNROLLED, ImportLimitError
from .model_file import DTYPES, OnnxModel, tensor_weight
from .registry import Operator, fill, find, find_host
from .values import Host, Items, Stored, Value, host_of, outside_the_trace, starts_on_host

_STANDARD = ("", "ai.onnx")


def node_name(node: Any) -> str:
    """An ONNX node's name, or that of its first output: many files leave nodes unnamed."""
    return node.name or next((name for name in node.output if name), node.op_type)


def domain_of(node: Any) -> str:
    """The node's domain; the standard one is the empty string."""
    return "" if node.domain in _STANDARD else node.domain


def full_name(node: Any) -> str:
    """The operator's name, with its domain unless that is the standard one."""
    return f"{node.domain}::{node.op_type}" if domain_of(node) else node.op_type


def all_nodes(graph: Any) -> Iterator[Any]:
    """All nodes of a graph or a function and of the graphs nested in it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from all_nodes(attribute.g)


def names_read(graph: Any) -> set[str]:
    """Names of the values that some node, or a graph's caller, reads."""
    nested = (a.g for node in all_nodes(graph) for a in node.attribute if a.HasField("g"))
    # A graph's outputs are described, a function's are names.
    outputs = {getattr(output, "name", output) for each in (graph, *nested) for output in each.output}
    return outputs | {name for node in all_nodes(graph) for name in node.input}


def check_supported(model: OnnxModel) -> None:
    """Find out before the trace whether an operator is missing.

    Raises:
        MissingOperatorError: naming the first one and how many others.
    """
    fill()
    missing: dict[str, Any] = {}
    for node in all_nodes(model.graph):
        if node.op_type == "Constant" and node.domain in _STANDARD:
            continue
        opset = model.opset_of(node.domain)
        if find(domain_of(node), node.op_type, opset) is None and not has_body(node, opset):
            missing.setdefault(full_name(node), node)
    if missing:
        name, node = next(iter(missing.items()))
        others = (
            f"; {len(missing) - 1} other operators are missing too: {', '.join(list(missing)[1:])}"
            if len(missing) > 1
            else ""
        )
        raise MissingOperatorError(
            f"the ONNX operator {name} (opset {model.opset_of(node.domain)}) cannot be imported{others}",
            node=node_name(node),
            remedy="export the model from its source framework with graphlathe.trace instead, or report the operator",
        )


def rename_constants(graph: Any) -> None:
    """Give every stored tensor of a nested graph a name of its own: two branches may use one name for two tensors."""
    seen: set[str] = {name for node in graph.node for name in node.output}
    seen |= {port.name for port in graph.input} | {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename_inside(attribute.g, seen)


def _rename_inside(graph: Any, seen: set[str]) -> None:
    for tensor in graph.initializer:
        if tensor.name in seen:
            old, new = tensor.name, f"{tensor.name}.{len(seen)}"
            tensor.name = new
            _rename_uses(graph, old, new)
        seen.add(tensor.name)
    for node in graph.node:
        if node.op_type == "Constant" and node.domain in _STANDARD and node.output[0] in seen:
            old, new = node.output[0], f"{node.output[0]}.{len(seen)}"
            node.output[0] = new
            _rename_uses(graph, old, new)
        seen.update(node.output)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename_inside(attribute.g, seen)


def _rename_uses(graph: Any, old: str, new: str) -> None:
    for node in all_nodes(graph):
        for index, name in enumerate(node.input):
            if name == old:
                node.input[index] = new
    nested = [a.g for node in all_nodes(graph) for a in node.attribute if a.HasField("g")]
    for each in (graph, *nested):
        for output in each.output:
            if output.name == old:
                output.name = new


class Walk(nn.Module):
    """The ONNX graph as a module: ``forward(inputs)`` takes the graph's inputs in order, and returns its outputs.

    Attributes:
        names: for each of the module's parameters, the initializer that it stands for.
    """

    def __init__(self, model: OnnxModel) -> None:
        super().__init__()
        self.model = model
        rename_constants(model.graph)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.names: dict[str, str] = {}
        self.stored: dict[str, Weight] = {}
        self.on_host: dict[str, Host] = {}
        for name, weight in model.weights.items():
            self._store(name, weight)
        for node in all_nodes(model.graph):
            if node.op_type == "Constant" and node.domain in _STANDARD:
                self._constant(node)
            for attribute in node.attribute:
                for tensor in attribute.g.initializer:
                    self._store(tensor.name, tensor_weight(tensor, model.folder))

    def _store(self, name: str, weight: Weight) -> None:
        parameter = f"w{len(self.names)}"
        with self.mode:
            fake = torch.empty(weight.shape, dtype=weight.dtype)
        self.register_buffer(parameter, fake)
        self.names[parameter] = name
        self.stored[name] = weight
        if starts_on_host(weight):
            self.on_host[name] = host_of(weight, name)

    def _constant(self, node: Any) -> None:
        value = constant_value(node)
        if isinstance(value, Host):
            self.on_host[node.output[0]] = value
        else:
            self._store(node.output[0], value)

    def forward(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """Apply all nodes."""
        graph = self.model.graph
        self.unrolled = 0
        constants: dict[str, Value] = dict(self.on_host)
        for parameter, name in self.names.items():
            if name not in self.on_host:
                constants[name] = Stored(getattr(self, parameter), self.stored[name], name)
        self.tensors = {name: getattr(self, parameter) for parameter, name in self.names.items()}
        env: dict[str, Value] = constants | dict(zip(graph_inputs(self.model), inputs, strict=True))
        scope = Scope(env, self.model.opset_of, names_read(graph), list(all_nodes(graph)))
        self._run(graph.node, scope)
        return tuple(self.tensor(self._read(scope, output.name, None)) for output in graph.output)

    def _run(self, nodes: Iterable[Any], scope: Scope) -> None:
        for node in nodes:
            if node.op_type == "Constant" and node.domain in _STANDARD:
                if scope.call is not None:
                    scope.env[node.output[0]] = _immediate(node)
                continue
            with traceback.annotate({ORIGIN: scope.name_of(node)}):
                results = self._step(node, scope)
            for name, value in zip(node.output, results, strict=False):
                if name:
                    scope.env[name] = value

    def _step(self, node: Any, scope: Scope) -> Sequence[Value]:
        values = [self._read(scope, name, node) if name else None for name in node.input]
        try:
            return _as_tuple(self._call(node, values, scope))
        except GraphlatheError as error:
            if error.node is None:
                error.node = scope.name_of(node)
                error.message = error.message if node.op_type in error.message else f"{node.op_type}: {error.message}"
            raise
        except Exception as error:
            shapes = ", ".join(str(list(v.shape)) if v is not None else "-" for v in values)
            first = (str(error).splitlines() or [""])[0]
            raise ImportModelError(
                f"{node.op_type} failed on shapes {shapes}: {type(error).__name__}: {first}",
                node=scope.name_of(node),
                remedy="if dimensions depend on each other, pass sizes={name: size} that fit together"
                if any(isinstance(n, torch.SymInt) for v in values if v is not None for n in v.shape)
                else None,
            ) from error

    def _call(self, node: Any, values: list[Value], scope: Scope) -> Any:
        opset = scope.opset_of(node.domain)
        entry = find(domain_of(node), node.op_type, opset)
        if entry is None:
            return self._function(node, values, scope, opset)
        attributes = {a.name: attribute_value(a) for a in node.attribute}
        for name, attribute in attributes.items():
            if isinstance(attribute, Graph):
                attributes[name] = Body(self, attribute.proto, scope)
        for name in ("to", "dtype", "output_dtype"):
            if attributes.get(name):
                attributes[name] = _element_type(node, attributes[name])
            else:
                attributes.pop(name, None)
        unknown = [name for name in attributes if name not in entry.attributes]
        if unknown:
            raise MissingOperatorError(
                f"{node.op_type}: the attribute '{unknown[0]}' cannot be imported",
                node=scope.name_of(node),
                expected=f"attributes: {', '.join(sorted(entry.attributes)) or 'none'}",
            )
        used = [i for i, name in enumerate(node.output, 1) if name in scope.read]
        injected: dict[str, Any] = {
            "n_outputs": len(node.output),
            "n_used": max(used, default=1),
            "opset_version": opset,
            "walk": self,
        }
        keywords = attributes | {name: injected[name] for name in entry.injected}
        shortcut = find_host(domain_of(node), node.op_type)
        kinds = {type(v) for v in values if v is not None}
        if shortcut is not None and kinds == {Host} and set(attributes) <= shortcut.attributes:
            chosen = {name: keywords[name] for name in keywords if name in shortcut.attributes}
            result = shortcut.function(*values, **chosen)
            if result is not NotImplemented:
                return result
        return entry.function(*self._arguments(node, entry, values, scope), **keywords)

    def _function(self, node: Any, values: list[Value], scope: Scope, opset: int) -> list[Value]:
        """Apply the operator's own definition in terms of others, from ONNX's schema."""
        body = body_of(node, opset, [_described(value) for value in values])
        if body is None:
            raise MissingOperatorError(
                f"the ONNX operator {full_name(node)} (opset {opset}) cannot be imported",
                node=scope.name_of(node),
            )
        opsets = {"" if e.domain in _STANDARD else e.domain: e.version for e in body.opset_import}

        def opset_of(domain: str) -> int:
            return opsets.get("" if domain in _STANDARD else domain) or scope.opset_of(domain)

        env: dict[str, Value] = dict.fromkeys(body.input)
        env |= dict(zip(body.input, values, strict=False))
        inner = Scope(env, opset_of, names_read(body), list(all_nodes(body)), Call(node, body, scope))
        self._run(body.node, inner)
        return [self._read(inner, name, node) for name in body.output[: len(node.output)]]

    def _arguments(self, node: Any, entry: Operator, values: Sequence[Value], scope: Scope) -> list[Any]:
        if len(values) > len(entry.inputs) and not entry.variadic:
            raise MissingOperatorError(
                f"{node.op_type} with {len(values)} inputs cannot be imported",
                node=scope.name_of(node),
                expected=f"at most {len(entry.inputs)}",
            )
        ranks = [len(v.shape) for v in values if isinstance(v, (Tensor, Stored))]
        arguments: list[Any] = []
        for position, value in enumerate(values):
            if value is None or isinstance(value, Items) or entry.parameter(position) in entry.raw:
                arguments.append(value)
            elif entry.parameter(position) in entry.host:
                arguments.append(self._known(node, position, entry.parameter(position), value, scope))
            elif (
                entry.parameter(position) in entry.known
                and isinstance(value, Host)
                and (len(value.items) == 1 or value.name not in self.tensors or _has_negative(value))
            ):
                arguments.append(value)
            elif (
                entry.scalars
                and ranks
                and isinstance(value, Host)
                and len(value.items) == 1
                and len(value.shape) <= max(ranks)
            ):
                arguments.append(value.item)
            else:
                arguments.append(self.tensor(value))
        return arguments

    def _known(self, node: Any, position: int, parameter: str, value: Value, scope: Scope) -> Host:
        if isinstance(value, Stored) and len(value.shape) <= 1:
            return host_of(value.weight, value.name)
        if isinstance(value, Host):
            return value
        sources = list(dict.fromkeys(sources_of(scope, node.input[position], graph_inputs(self.model))))
        raise DataDependentError(
            f"the input '{parameter}' of {node.op_type} is computed from data",
            inputs=sources,
            node=scope.name_of(node),
            expected="a constant, or a function of the inputs' sizes",
            remedy=f"fix the inputs that it comes from: from_onnx(..., values={{{_examples(sources)}}})"
            if sources
            else "shapes that depend on data cannot be imported: trace the original model instead",
        )

    def tensor(self, value: Value) -> Tensor:
        """A value as a tensor of the trace."""
        match value:
            case Stored(tensor=tensor):
                return tensor
            case Host(name=str() as name) if name in self.tensors:
                return self.tensors[name]
            case Host():
                return value.to_tensor()
            case Tensor():
                return value
            case Items():
                raise ImportModelError("a sequence is used as a tensor")
            case None:
                raise ImportModelError("an output that was left out is used")

    def _read(self, scope: Scope, name: str, node: Any) -> Value:
        if name not in scope.env:
            raise ImportModelError(
                f"nothing computes the value '{name}'",
                node=node_name(node) if node is not None else None,
                remedy="the file is not a valid ONNX graph: onnx.checker.check_model says where",
            )
        return scope.env[name]


def _has_negative(value: Host) -> bool:
    """Whether an index counts from the end; a lookup in a table of embeddings takes no such one."""
    return any(isinstance(item, int) and item < 0 for item in value.items)


@dataclass(frozen=True)
class Scope:
    """What a list of nodes sees.

    Attributes:
        env: values by name.
        opset_of: the opset version of a domain.
        read: names of the values that something reads.
        call: the operator whose own definition is being applied, if one is.
        nodes: the nodes, and those around them.
    """

    env: dict[str, Value]
    opset_of: Callable[[str], int]
    read: set[str]
    nodes: Sequence[Any]
    call: Call | None = None

    def name_of(self, node: Any) -> str:
        """The name of the node in the file that a node stands for."""
        return node_name(node) if self.call is None else self.call.outer.name_of(self.call.node)


@dataclass(frozen=True)
class Call:
    """A node whose operator's own definition is being applied, the definition, and the scope of the node."""

    node: Any
    body: Any
    outer: Scope


class Body:
    """A nested graph as a function of its inputs; it sees the values around it."""

    def __init__(self, walk: Walk, graph: Any, scope: Scope) -> None:
        self.walk = walk
        self.graph = graph
        self.scope = scope

    def repeated(self, *values: Value) -> list[Value]:
        """One turn of a loop."""
        self.walk.unrolled += len(self.graph.node)
        if self.walk.unrolled > MOST_UNROLLED:
            raise ImportLimitError(
                "the model's loops are too long to be unrolled", expected=f"at most {MOST_UNROLLED} nodes"
            )
        return self(*values)

    def __call__(self, *values: Value) -> list[Value]:
        """Apply its nodes, and return its outputs."""
        env = self.scope.env | dict(zip((port.name for port in self.graph.input), values, strict=True))
        inner = replace(self.scope, env=env, read=names_read(self.graph))
        self.walk._run(self.graph.node, inner)
        return [self.walk._read(inner, output.name, None) for output in self.graph.output]


@dataclass(frozen=True)
class Graph:
    """An attribute that is a graph."""

    proto: Any


def sources_of(scope: Scope, name: str, inputs: Sequence[str]) -> list[str]:
    """The graph inputs that a value is computed from."""
    producers = {output: node for node in scope.nodes for output in node.output}
    found: list[str] = []
    waiting, seen = [name], set[str]()
    while waiting:
        each = waiting.pop()
        if not each or each in seen:
            continue
        seen.add(each)
        if each in producers:
            waiting.extend(producers[each].input)
        elif scope.call is None:
            found += [each] if each in inputs else []
        elif each in scope.call.body.input:
            outside = scope.call.node.input[list(scope.call.body.input).index(each)]
            found += sources_of(scope.call.outer, outside, inputs)
    return found


def _examples(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}': ..." for name in names)


def graph_inputs(model: OnnxModel) -> list[str]:
    """Names of the graph's inputs that are no initializers."""
    return [port.name for port in model.graph.input if port.name not in model.weights]


def attribute_value(attribute: Any) -> Any:
    """An attribute as a Python value; a tensor as host numbers, a graph as a `Graph`."""
    import onnx

    if attribute.type == onnx.AttributeProto.TENSOR:
        with outside_the_trace():
            return host_of(tensor_weight(attribute.t, None), "").unnamed()
    if attribute.type == onnx.AttributeProto.GRAPH:
        return Graph(attribute.g)
    value = onnx.helper.get_attribute_value(attribute)
    return value.decode() if isinstance(value, bytes) else value


def constant_value(node: Any) -> Host | Weight:
    """The numbers of a ``Constant``."""
    (attribute,) = node.attribute
    match attribute.name:
        case "value":
            return tensor_weight(attribute.t, None)
        case "value_int" | "value_ints":
            numbers = (attribute.i,) if attribute.name == "value_int" else tuple(attribute.ints)
            return Host(numbers, torch.int64, is_scalar=attribute.name == "value_int")
        case "value_float":
            return Host((attribute.f,), torch.float32, is_scalar=True)
        case "value_floats":
            return Weight.from_tensor(torch.tensor(list(attribute.floats), dtype=torch.float32))
        case other:
            raise MissingOperatorError(
                f"a Constant with the attribute '{other}' cannot be imported", node=node_name(node)
            )


def _immediate(node: Any) -> Value:
    """A ``Constant`` in an operator's definition, which no file stores."""
    with outside_the_trace():
        value = constant_value(node)
        if isinstance(value, Host):
            return value
        if starts_on_host(value):
            return host_of(value, "").unnamed()
        numbers = value.tensor()
    return torch.tensor(numbers.tolist(), dtype=numbers.dtype)


def _element_type(node: Any, number: int) -> torch.dtype:
    if number not in DTYPES:
        raise MissingOperatorError(
            f"{node.op_type} to the element type {number} cannot be imported",
            node=node_name(node),
            expected="a type that torch has",
        )
    return DTYPES[number]


def _described(value: Value) -> Described:
    if isinstance(value, Stored):
        return value.tensor.dtype, tuple(value.shape)
    return (value.dtype, tuple(value.shape)) if isinstance(value, (Tensor, Host)) else None


def _as_tuple(result: Any) -> tuple[Value, ...]:
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)
