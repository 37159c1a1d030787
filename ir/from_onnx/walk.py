"""The walk: a module whose forward pass applies one function per ONNX node, in the file's order.

`torch.export` traces the walk. Stored tensors take part as fake ones; shape arithmetic never reaches the tracer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import traceback

from ..errors import GraphlatheError, ImportModelError, UnsupportedOpError
from ..program import ORIGIN
from ..weights import Weight
from .model_file import DTYPES, OnnxModel, tensor_weight
from .registry import Operator, fill, find, find_host
from .values import Host, Stored, Value, host_of, outside_the_trace, starts_on_host

_STANDARD = ("", "ai.onnx")


def node_name(node: Any) -> str:
    """An ONNX node's name, or that of its first output: many files leave nodes unnamed."""
    return node.name or next((name for name in node.output if name), node.op_type)


def all_nodes(graph: Any) -> Iterator[Any]:
    """All nodes of a graph and of the graphs nested in it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from all_nodes(attribute.g)


def names_read(graph: Any) -> set[str]:
    """Names of the values that some node, or a graph's caller, reads."""
    nested = (a.g for node in all_nodes(graph) for a in node.attribute if a.HasField("g"))
    outputs = {output.name for each in (graph, *nested) for output in each.output}
    return outputs | {name for node in all_nodes(graph) for name in node.input}


def check_supported(model: OnnxModel) -> None:
    """Find out before the trace whether an operator is missing.

    Raises:
        UnsupportedOpError: naming the first one and how many others.
    """
    fill()
    missing: dict[str, Any] = {}
    for node in all_nodes(model.graph):
        if node.op_type in ("Constant", "If") and node.domain in _STANDARD:
            continue
        domain = "" if node.domain in _STANDARD else node.domain
        if find(domain, node.op_type, model.opset) is None:
            missing.setdefault(f"{domain}::{node.op_type}" if domain else node.op_type, node)
    if missing:
        name, node = next(iter(missing.items()))
        others = (
            f"; {len(missing) - 1} other operators are missing too: {', '.join(list(missing)[1:])}"
            if len(missing) > 1
            else ""
        )
        raise UnsupportedOpError(
            f"the ONNX operator {name} (opset {model.opset}) cannot be imported{others}",
            node=node_name(node),
            remedy="export the model from its source framework with graphlathe.trace instead, or report the operator",
        )


def rename_constants(graph: Any) -> None:
    """Give every constant inside an ``If`` a name of its own: two branches may use one name for different numbers."""
    seen: set[str] = {name for node in graph.node for name in node.output}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename_inside(attribute.g, seen)


def _rename_inside(graph: Any, seen: set[str]) -> None:
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
        self.read = names_read(model.graph)
        for name, weight in model.weights.items():
            self._store(name, weight)
        for node in all_nodes(model.graph):
            if node.op_type == "Constant" and node.domain in _STANDARD:
                self._constant(node)

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
        (attribute,) = node.attribute
        name = node.output[0]
        match attribute.name:
            case "value":
                self._store(name, tensor_weight(attribute.t, None))
            case "value_int" | "value_ints":
                self.on_host[name] = Host(
                    (attribute.i,) if attribute.name == "value_int" else tuple(attribute.ints),
                    torch.int64,
                    is_scalar=attribute.name == "value_int",
                )
            case "value_float":
                self.on_host[name] = Host((attribute.f,), torch.float32, is_scalar=True)
            case "value_floats":
                self._store(name, Weight.from_tensor(torch.tensor(list(attribute.floats), dtype=torch.float32)))
            case other:
                raise ImportModelError(
                    f"a Constant with the attribute '{other}' cannot be imported", node=node_name(node)
                )

    def forward(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """Apply all nodes."""
        graph = self.model.graph
        constants: dict[str, Value] = dict(self.on_host)
        for parameter, name in self.names.items():
            if name not in self.on_host:
                constants[name] = Stored(getattr(self, parameter), self.stored[name], name)
        self.tensors = {name: getattr(self, parameter) for parameter, name in self.names.items()}
        env: dict[str, Value] = constants | dict(zip(graph_inputs(self.model), inputs, strict=True))
        self._run(graph, env)
        return tuple(self._tensor(self._read(env, output.name, None)) for output in graph.output)

    def _run(self, graph: Any, env: dict[str, Value]) -> None:
        for node in graph.node:
            if node.op_type == "Constant" and node.domain in _STANDARD:
                continue
            with traceback.annotate({ORIGIN: node_name(node)}):
                results = self._step(node, env)
            for name, value in zip(node.output, results, strict=False):
                if name:
                    env[name] = value

    def _step(self, node: Any, env: dict[str, Value]) -> Sequence[Value]:
        values = [self._read(env, name, node) if name else None for name in node.input]
        try:
            if node.op_type == "If" and node.domain in _STANDARD:
                return self._branch(node, values[0], env)
            return _as_tuple(self._call(node, values))
        except GraphlatheError:
            raise
        except Exception as error:
            shapes = ", ".join(str(list(v.shape)) if v is not None else "-" for v in values)
            first = (str(error).splitlines() or [""])[0]
            raise ImportModelError(
                f"{node.op_type} failed on shapes {shapes}: {type(error).__name__}: {first}",
                node=node_name(node),
                remedy="if dimensions depend on each other, pass sizes={name: size} that fit together"
                if any(isinstance(n, torch.SymInt) for v in values if v is not None for n in v.shape)
                else None,
            ) from error

    def _call(self, node: Any, values: list[Value]) -> Any:
        domain = "" if node.domain in _STANDARD else node.domain
        entry = find(domain, node.op_type, self.model.opset)
        assert entry is not None, "check_supported comes first"
        attributes = {a.name: attribute_value(a) for a in node.attribute}
        if "to" in attributes:
            attributes["to"] = DTYPES[attributes["to"]]
        if "dtype" in attributes:
            attributes["dtype"] = DTYPES[attributes["dtype"]]
        unknown = [name for name in attributes if name not in entry.attributes]
        if unknown:
            raise UnsupportedOpError(
                f"{node.op_type}: the attribute '{unknown[0]}' cannot be imported",
                node=node_name(node),
                expected=f"attributes: {', '.join(sorted(entry.attributes)) or 'none'}",
            )
        used = [i for i, name in enumerate(node.output, 1) if name in self.read]
        injected: dict[str, Any] = {
            "n_outputs": len(node.output),
            "n_used": max(used, default=1),
            "opset": self.model.opset,
        }
        keywords = attributes | {name: injected[name] for name in entry.injected}
        shortcut = find_host(domain, node.op_type)
        kinds = {type(v) for v in values if v is not None}
        if shortcut is not None and kinds == {Host}:
            result = shortcut(*values, **keywords)
            if result is not NotImplemented:
                return result
        return entry.function(*self._arguments(node, entry, values), **keywords)

    def _arguments(self, node: Any, entry: Operator, values: Sequence[Value]) -> list[Any]:
        if len(values) > len(entry.inputs) and not entry.variadic:
            raise UnsupportedOpError(
                f"{node.op_type} with {len(values)} inputs cannot be imported",
                node=node_name(node),
                expected=f"at most {len(entry.inputs)}",
            )
        ranks = [len(v.shape) for v in values if v is not None and not isinstance(v, Host)]
        arguments: list[Any] = []
        for position, value in enumerate(values):
            if value is None:
                arguments.append(None)
            elif entry.parameter(position) in entry.host:
                arguments.append(self._known(node, entry.parameter(position), value))
            elif (
                entry.parameter(position) in entry.known
                and isinstance(value, Host)
                and (len(value.items) == 1 or value.name not in self.tensors)
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
                arguments.append(self._tensor(value))
        return arguments

    def _known(self, node: Any, parameter: str, value: Value) -> Host:
        if isinstance(value, Stored) and len(value.shape) <= 1:
            return host_of(value.weight, value.name)
        if isinstance(value, Host):
            return value
        raise ImportModelError(
            f"the input '{parameter}' of {node.op_type} is computed from data",
            node=node_name(node),
            expected="a constant, or a function of the inputs' sizes",
            remedy="shapes that depend on data cannot be imported: trace the original model instead",
        )

    def _tensor(self, value: Value) -> Tensor:
        match value:
            case Stored(tensor=tensor):
                return tensor
            case Host(name=str() as name) if name in self.tensors:
                return self.tensors[name]
            case Host():
                return value.to_tensor()
            case Tensor():
                return value
            case None:
                raise ImportModelError("an output that was left out is used")

    def _branch(self, node: Any, condition: Value, env: dict[str, Value]) -> list[Value]:
        """An ``If`` whose condition the host knows is the branch it takes."""
        known = self._known(node, "cond", condition)
        wanted = "then_branch" if bool(known.item) else "else_branch"
        body = next(a.g for a in node.attribute if a.name == wanted)
        inner = dict(env)
        for tensor in body.initializer:
            if tensor.name not in self.stored:
                raise ImportModelError(
                    "an If branch with stored tensors of its own cannot be imported", node=node_name(node)
                )
        self._run(body, inner)
        return [self._read(inner, output.name, node) for output in body.output]

    def _read(self, env: dict[str, Value], name: str, node: Any) -> Value:
        if name not in env:
            raise ImportModelError(
                f"nothing computes the value '{name}'",
                node=node_name(node) if node is not None else None,
                remedy="the file is not a valid ONNX graph: onnx.checker.check_model says where",
            )
        return env[name]


def graph_inputs(model: OnnxModel) -> list[str]:
    """Names of the graph's inputs that are no initializers."""
    return [port.name for port in model.graph.input if port.name not in model.weights]


def attribute_value(attribute: Any) -> Any:
    """An attribute as a Python value; a tensor as host numbers."""
    import onnx

    if attribute.type == onnx.AttributeProto.TENSOR:
        with outside_the_trace():
            return host_of(tensor_weight(attribute.t, None), "").unnamed()
    value = onnx.helper.get_attribute_value(attribute)
    return value.decode() if isinstance(value, bytes) else value


def _as_tuple(result: Any) -> tuple[Value, ...]:
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)
