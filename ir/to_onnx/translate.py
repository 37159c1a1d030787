"""Translate one graph to ONNX, node by node.

Each operator goes through the first of these that has it: our own translations (`special`), arithmetic on sizes
(`symbolic`), PyTorch's translations, and PyTorch's decompositions (`lower`), whose operators start over.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.onnx._internal.exporter import _dispatching

from ..errors import ExportError, GraphlatheError
from ..program import ORIGIN, Entry, Program
from .attention import attention
from .initializers import WeightTensor, onnx_dtype
from .lower import Lowering, registry_for
from .promote import number_as, promoted, widened
from .recorder import Recorder
from .special import SPECIAL, by_name
from .symbolic import Numbers, scalar_type

_MAX_DEPTH = 8


_SPECIAL = SPECIAL | {torch.ops.aten.scaled_dot_product_attention.default: attention}

# Checks of data at run time, which ONNX cannot express; `torch.export` adds them for sizes that depend on data.
_ASSERTIONS = frozenset(
    {
        torch.ops.aten._assert_async.default,
        torch.ops.aten._assert_async.msg,
        torch.ops.aten._assert_scalar.default,
        torch.ops.aten._assert_tensor_metadata.default,
        torch.ops.aten.sym_constrain_range.default,
        torch.ops.aten.sym_constrain_range_for_size.default,
    }
)


class NoTranslation(Exception):
    """An operator has neither a translation nor a decomposition."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        self.node = node
        self.reason = reason
        super().__init__(reason)


class Translator:
    """Builds the ONNX graph of one entry.

    Attributes:
        opset: the version of the operators in the file.
        graph: the ONNX graph under construction.
        recorder: collects the nodes of the operator under translation.
        shared: values that several operators need, by what they are.
        decomposed: how often each operator had to be decomposed.
        notes: what a reader of the result should know.
    """

    def __init__(self, program: Program, entry: Entry, opset: int) -> None:
        self.program = program
        self.entry = entry
        self.opset = opset
        self.registry = registry_for(opset)
        self.lowering = Lowering(program, opset)
        self.recorder = Recorder(opset)
        self.numbers = Numbers(self.recorder)
        self.graph = ir.Graph([], [], nodes=[], name="main")
        self.values: dict[fx.Node, Any] = {}
        # Where bfloat16 is only an island in a wider model, its elementwise operators are computed in float32.
        self.widen = all(program.weights[name].dtype != torch.bfloat16 for name in program.used_weights())
        self.shared: dict[Any, ir.Value] = {}
        self.decomposed: dict[str, int] = {}
        self.notes: list[str] = []
        self._names: set[str] = {*entry.inputs, *entry.outputs, *program.used_weights()}
        self._dims: dict[str, str] = {}

    def translate(self) -> ir.Graph:
        """Translate all nodes.

        Raises:
            NoTranslation: an operator cannot be expressed.
        """
        for name, node in zip(self.entry.inputs, self.entry.placeholders, strict=True):
            value = self.recorder.value(name)
            self._describe(value, node.meta.get("val"))
            self.graph.inputs.append(value)
            self.values[node] = value
        for node in self.entry.graph.nodes:
            if node.op == "get_attr":
                if str(node.target) not in self.program.subgraphs:
                    self.values[node] = self._initializer(str(node.target))
            elif node.op == "call_function":
                self.values[node] = self._call(node, self.values, node, 0)
        self._outputs()
        return self.graph

    def _initializer(self, weight: str) -> ir.Value:
        ports = {*self.entry.inputs, *self.entry.outputs}
        # A file has one space of names, and a weight called as an input would be a default for it.
        name = self.unique(f"{weight}.weight") if weight in ports else weight
        tensor = WeightTensor(name, self.program.weights[weight])  # pyright: ignore[reportAbstractUsage]
        value = self.recorder.value(name)
        value.type, value.shape, value.const_value = ir.TensorType(tensor.dtype), tensor.shape, tensor
        self.graph.initializers[name] = value
        return value

    def _call(self, node: fx.Node, values: dict[fx.Node, Any], origin: fx.Node, depth: int) -> Any:
        """The ONNX value (or values) of one operator node; ``origin`` is the program's node that it belongs to."""
        target, result = node.target, node.meta.get("val")
        if target in _ASSERTIONS:
            return None
        if target is operator.getitem and isinstance(values[node.args[0]], (list, tuple)):  # type: ignore[index]
            return values[node.args[0]][node.args[1]]  # type: ignore[index]
        if isinstance(target, torch._ops.HigherOrderOperator):
            raise NoTranslation(origin, f"{target} is control flow, which is not translated node by node")
        if self.numbers.supports(target) and scalar_type(result) is not None:
            args = pytree.tree_map(lambda a: values[a] if isinstance(a, fx.Node) else a, node.args)
            return self._finish(self.numbers.translate(target, args, result), node, origin, depth)
        special = _SPECIAL.get(target) or by_name(target)
        if special is not None:
            args, kwargs = self._arguments(node, values)
            outputs = special(self, node, *args, **kwargs)
            if outputs is not NotImplemented:
                return self._finish(outputs, node, origin, depth)
        function, _ = _dispatching.dispatch(node, self.registry)
        if function is None:
            return self._decompose(node, values, origin, depth)
        wide = widened(node) if self.widen else {}
        args, kwargs = self._arguments(node, values, wide)
        try:
            outputs = self.recorder.run(function, args, kwargs)
            if wide:
                outputs = self.recorder.op("Cast", outputs, to=int(ir.DataType.BFLOAT16))
        except Exception as error:
            self.recorder.forget()
            try:
                return self._decompose(node, values, origin, depth)
            except NoTranslation:
                raise NoTranslation(
                    origin, f"the translation of {target} refuses its arguments: {root_cause(error)}"
                ) from error
        return self._finish(outputs, node, origin, depth)

    def _arguments(
        self, node: fx.Node, values: dict[fx.Node, Any], wide: Mapping[int | str, torch.dtype] | None = None
    ) -> tuple[list[Any], dict[str, Any]]:
        wanted = wide or promoted(node)
        args = [self._argument(a, values, wanted.get(i)) for i, a in enumerate(node.args)]
        kwargs = {k: self._argument(v, values, wanted.get(k)) for k, v in node.kwargs.items()}
        if kwargs.get("dtype", 0) is None:
            kwargs["dtype"] = -1
        return args, kwargs

    def _argument(self, argument: Any, values: dict[fx.Node, Any], dtype: torch.dtype | None) -> Any:
        match argument:
            case fx.Node():
                value = values[argument]
                if not isinstance(value, ir.Value):
                    return value
                if dtype is not None:
                    return self.recorder.op("Cast", value, to=int(onnx_dtype(dtype)))
                if isinstance(argument.meta.get("val"), torch.SymFloat):
                    return self.recorder.op("Cast", value, to=int(ir.DataType.FLOAT))
                return value
            case list() | tuple():
                return [self._argument(item, values, dtype) for item in argument]
            case bool() | int() | float() if dtype is not None:
                return number_as(argument, dtype)
            case torch.dtype():
                return onnx_dtype(argument)
            case torch.device() | torch.memory_format() | torch.layout():
                return str(argument)
            case _:
                return argument

    def _decompose(self, node: fx.Node, values: dict[fx.Node, Any], origin: fx.Node, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise NoTranslation(origin, f"decomposing {origin.target} does not end")
        try:
            lowered = self.lowering.lower(node)
        except GraphlatheError:
            raise
        except Exception as error:
            raise NoTranslation(
                origin, f"{node.target} has no translation, and PyTorch cannot decompose it: {root_cause(error)}"
            ) from error
        if lowered is None:
            raise NoTranslation(origin, f"{node.target} has neither an ONNX translation nor a decomposition")
        self.decomposed[str(node.target)] = self.decomposed.get(str(node.target), 0) + 1
        inner = dict(
            zip(lowered.graph.find_nodes(op="placeholder"), (values[o] for o in lowered.operands), strict=True)
        )
        for step in lowered.graph.nodes:
            if step.op == "get_attr":
                inner[step] = self._tensor(lowered.constants[str(step.target)], origin)
            elif step.op == "call_function":
                inner[step] = self._call(step, inner, origin, depth + 1)
            elif step.op == "output":
                outputs = step.args[0]
                answer = pytree.tree_map(lambda x: inner[x] if isinstance(x, fx.Node) else x, outputs)
                return self._adopt(answer, node) if depth == 0 else answer
        raise NoTranslation(origin, f"the decomposition of {node.target} has no output")

    def _tensor(self, tensor: torch.Tensor, origin: fx.Node) -> ir.Value:
        from torch._subclasses.fake_tensor import FakeTensor

        if isinstance(tensor, FakeTensor):
            raise NoTranslation(origin, f"the decomposition of {origin.target} holds a constant without numbers")
        value = self.recorder.op("Constant", value=ir.tensor(tensor.detach().cpu().numpy()))
        return self._finish(value, None, origin, 1)

    def _finish(self, outputs: Any, node: fx.Node | None, origin: fx.Node, depth: int) -> Any:
        """Move the recorded nodes into the graph, and name and describe what they compute."""
        recorded, self.recorder.nodes = self.recorder.nodes, []
        if node is not None and depth == 0:
            self._adopt(outputs, node)
        elif node is not None:
            self._describe_all(outputs, node)
        place = str(origin.meta.get(ORIGIN) or "")
        for item in recorded:
            for output in item.outputs:
                if output.name is None:
                    output.name = self.unique(f"{origin.name}.{item.op_type}")
            item.name = f"{item.op_type}:{item.outputs[0].name}"
            if place:
                item.metadata_props["graphlathe.origin"] = place
        self.graph.extend(recorded)
        return outputs

    def _adopt(self, outputs: Any, node: fx.Node) -> Any:
        """Give the values of a program's node its name."""
        self._describe_all(outputs, node)
        several = isinstance(outputs, (list, tuple))
        for index, value in enumerate(outputs if several else [outputs]):
            if isinstance(value, ir.Value) and value.name is None:
                value.name = self.unique(f"{node.name}.{index}" if several else node.name)
        return outputs

    def vector(self, sizes: Sequence[Any]) -> ir.Value:
        """Numbers and ONNX scalars as one int64 vector."""
        if all(isinstance(size, int) for size in sizes):
            return self.recorder.constant(list(sizes), ir.DataType.INT64)
        return self.recorder.vector(sizes)

    def split(self, x: ir.Value, lengths: ir.Value, axis: int, count: int) -> list[ir.Value]:
        """``x`` cut along an axis into ``count`` pieces of the given lengths."""
        outputs = self.node("Split", [x, lengths], {"axis": axis}, 18, count)
        for output in outputs:
            output.type = x.type
        return outputs

    def node(
        self, name: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any], since: int, count: int = 1
    ) -> list[ir.Value]:
        """The outputs of an operator in the form that it has since an opset (not that of the translations)."""
        outputs = [self.recorder.value(None) for _ in range(count)]
        known = ir.convenience.convert_attributes(attributes)
        self.recorder.nodes.append(ir.Node("", name, inputs, known, outputs=outputs, version=since))
        return outputs

    def unique(self, base: str) -> str:
        """A value name that is not taken: ``base``, or ``base.1``, ``base.2``..."""
        name, count = base, 0
        while name in self._names:
            count += 1
            name = f"{base}.{count}"
        self._names.add(name)
        return name

    def _describe_all(self, outputs: Any, node: fx.Node) -> None:
        """Describe the results that are read; the others (a norm's saved statistics) may have any shape."""
        vals = node.meta.get("val")
        if isinstance(vals, (list, tuple)) and isinstance(outputs, (list, tuple)):
            read = {user.args[1] for user in node.users if user.target is operator.getitem}  # pyright: ignore[reportUnhashable]
            for index, (value, val) in enumerate(zip(outputs, vals, strict=False)):
                if index in read:
                    self._describe(value, val)
        elif isinstance(outputs, (list, tuple)) and len(outputs) == 1:
            self._describe(outputs[0], vals)
        elif not isinstance(vals, (list, tuple)):
            self._describe(outputs, vals)

    def _describe(self, value: Any, val: Any) -> None:
        """Set a value's element type and shape from its fake tensor; complex values are pairs of reals."""
        if not isinstance(value, ir.Value) or isinstance(value.type, ir.SequenceType):
            return
        kind = scalar_type(val)
        if kind is not None:
            value.dtype = value.dtype or kind
            value.shape = ir.Shape([])
        elif isinstance(val, torch.Tensor):
            is_complex = val.dtype.is_complex
            value.dtype = value.dtype or onnx_dtype(val.dtype.to_real() if is_complex else val.dtype)
            sizes = [size if isinstance(size, int) else self.dim(size) for size in val.shape]
            value.shape = ir.Shape([*sizes, 2] if is_complex else sizes)

    def dim(self, size: Any) -> str:
        """A symbolic size as text with the user's names."""
        key = str(size.node.expr)
        if key not in self._dims:
            self._dims[key] = self.entry.dims.format(size)
        return self._dims[key]

    def _outputs(self) -> None:
        """Name the outputs; one that is an input, a weight or another output becomes a copy."""
        taken: set[int] = set()
        for name, source in zip(self.entry.outputs, self.entry.output_values, strict=True):
            if source is None:
                self.notes.append(f"output '{name}' is None and was left out")
                continue
            value = self.values[source] if isinstance(source, fx.Node) else self.numbers.scalar(source)
            if not isinstance(value, ir.Value):
                raise ExportError(f"output '{name}' is a list of tensors", remedy="return the tensors themselves")
            if name in self.entry.inputs:
                self.notes.append(f"output '{name}' has the name of an input and is called '{name}.out'")
                name = self.unique(f"{name}.out")
            producer = value.producer()
            if producer is None or id(value) in taken or producer.op_type == "Constant":
                copy = ir.Value(name=name, type=value.type, shape=value.shape)
                node = ir.Node("", "Identity", [value], outputs=[copy], name=f"Identity:{name}")
                self._flush()
                self.graph.append(node)
                value = copy
            else:
                value.name = name
            taken.add(id(value))
            self.graph.outputs.append(value)

    def _flush(self) -> None:
        for item in self.recorder.nodes:
            for output in item.outputs:
                output.name = output.name or self.unique("constant")
        self.graph.extend(self.recorder.nodes)
        self.recorder.nodes = []


def root_cause(error: BaseException) -> str:
    """The first line of what started a chain of errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


__all__ = ["NoTranslation", "Translator", "root_cause"]
