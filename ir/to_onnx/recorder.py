"""Record ONNX nodes while PyTorch's operator translations run, and simplify size arithmetic on the way.

A translation is a Python function over ONNX Script operators. It emits a constant for every number, a cast for every
size that is an int64 already, and a reshape for every size that becomes one element of a shape. The stock exporter
removes these afterwards with a pattern-matching optimizer; here an operator whose result is known, or was recorded
before, is not recorded at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import evaluator, values
from torch.onnx._internal.exporter import _building, _tensors

# Results of more elements than this are left to the run time.
_FOLD_LIMIT = 256

# Types between which a constant is converted here as it would be at run time.
_PLAIN = frozenset({ir.DataType.BOOL, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.FLOAT, ir.DataType.DOUBLE})

# Operators on sizes, shapes and constants: recorded once for the same operands.
_SHARED = frozenset(
    {
        "Shape",
        "Size",
        "Squeeze",
        "Unsqueeze",
        "Concat",
        "Reshape",
        "Gather",
        "Cast",
        "Slice",
        "Range",
        "ConstantOfShape",
    }
    | {"Add", "Sub", "Mul", "Div", "Mod", "Neg", "Max", "Min"}
)


def _squeeze(x: np.ndarray, axes: np.ndarray | None = None) -> np.ndarray:
    return np.squeeze(x) if axes is None else np.squeeze(x, tuple(int(a) for a in axes))


def _unsqueeze(x: np.ndarray, axes: np.ndarray) -> np.ndarray:
    return np.expand_dims(x, tuple(int(a) for a in axes.reshape(-1)))


_FOLDED: dict[str, Callable[..., np.ndarray]] = {
    "Reshape": lambda x, shape, allowzero=0: x.reshape([int(s) for s in shape]),
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Concat": lambda *xs, axis: np.concatenate(xs, axis=axis),
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Neg": np.negative,
}


@cache
def signature_of(name: str, domain: str, since: int) -> ir.schemas.OpSignature:
    """The signature of an ONNX operator; the exporter derives it anew for every node."""
    import onnx.defs

    return ir.schemas.OpSignature.from_op_schema(onnx.defs.get_schema(name, since, domain))


class Recorder(_building.OpRecorder):
    """Collects the ONNX nodes of one graph; one recorder serves all of its operators.

    Attributes:
        nodes: what was recorded since the caller last emptied it.
        known: recorded size operators by their operands, so that each is recorded once.
        called: which functions of ours (`local_functions`) the graph calls.
    """

    def __init__(self, opset_version: int) -> None:
        super().__init__(values.Opset("", opset_version), {})
        self.known: dict[Any, _tensors.SymbolicTensor] = {}
        self.called: set[str] = set()
        self._kept: list[Any] = []  # operands in `known`, which is keyed by identity, must stay alive

    def run(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run a translation under this recorder and return the ONNX value (or values) of its result."""
        with evaluator.default_as(self):
            return function(*args, **kwargs)

    def value(self, name: str | None) -> ir.Value:
        """A value that no node computes (an input or a weight), of the kind that translations expect."""
        return _tensors.SymbolicTensor(self.opset, name=name)

    def forget(self) -> None:
        """Drop what an abandoned translation recorded, and everything that might refer to it."""
        self.nodes.clear()
        self.known.clear()
        self.constant_farm.clear()

    def op(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Record one ONNX operator (numbers and lists become constants)."""
        with evaluator.default_as(self):
            return getattr(self.opset, name)(*args, **kwargs)

    def constant(self, value: Any, dtype: ir.DataType) -> ir.Value:
        """A constant of the given type, shared with equal ones."""
        with evaluator.default_as(self):
            return _building._get_or_create_constant(self.constant_farm, value, dtype, self.opset)

    def eval(self, schema: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Record one operator, or return the value that it would compute."""
        signature = signature_of(schema.name, schema.domain, schema.since_version)
        inputs, attributes = _building._construct_named_inputs_and_attrs(signature, args, kwargs)
        for parameter in signature.inputs:
            given = inputs.get(parameter.name)
            if (
                isinstance(given, (list, tuple))
                and not parameter.variadic
                and not _is_sequence(parameter.type_constraint)
            ):
                inputs[parameter.name] = self.vector(given)
        if schema.domain == "":
            simpler = self._simplify(schema.name, inputs, attributes)
            if simpler is not None:
                return simpler
        key = self._key(schema.name, inputs, attributes) if schema.domain == "" and schema.name in _SHARED else None
        if key is not None and key in self.known:
            return self.known[key]
        count = _building._determine_output_number(signature, attributes)
        outputs = self._call_op(signature, inputs, attributes, count)
        self._annotate(signature, schema.name, outputs)
        if len(outputs) > 1:
            return outputs
        if key is not None:
            self.known[key] = outputs[0]
            self._kept.append(args)
        return outputs[0]

    def vector(self, items: Sequence[Any]) -> Any:
        """A list of sizes, some of them computed, as one vector."""
        if not any(isinstance(item, ir.Value) for item in items):
            return items
        minus_one = self.constant([-1], ir.DataType.INT64)
        parts = [
            self.opset.Reshape(item, minus_one)
            if isinstance(item, ir.Value)
            else self.constant([item], ir.DataType.INT64)
            for item in items
        ]
        return self.op("Concat", *parts, axis=0)

    def _annotate(self, signature: ir.schemas.OpSignature, name: str, outputs: Sequence[ir.Value]) -> None:
        """Set the outputs' element types, from which constants of later operators take theirs."""
        node = outputs[0].producer()
        assert node is not None
        if name == "Constant":
            tensor = _attribute_tensor(node)
            if tensor is not None:
                outputs[0].const_value = tensor
                outputs[0].dtype = tensor.dtype
                outputs[0].shape = ir.Shape(tensor.numpy().shape)
            return
        if name == "Cast":
            source = node.inputs[0]
            outputs[0].dtype = ir.DataType(node.attributes["to"].as_int())
            outputs[0].shape = source.shape if source is not None else None
            return
        types: dict[str, ir.DataType] = {}
        parameters = signature.inputs
        for position, value in enumerate(node.inputs):
            parameter = parameters[min(position, len(parameters) - 1)]
            if value is not None and value.dtype is not None and not isinstance(value.type, ir.SequenceType):
                types.setdefault(parameter.type_constraint.name, value.dtype)
        for value, parameter in zip(outputs, signature.outputs, strict=False):
            constraint = parameter.type_constraint
            dtype = types.get(constraint.name)
            if dtype is None and len(constraint.allowed_types) == 1:
                only = next(iter(constraint.allowed_types))
                dtype = only.dtype if isinstance(only, ir.TensorType) else None
            if dtype is not None and value.type is None and not _is_sequence(constraint):
                value.dtype = dtype

    def _simplify(self, name: str, inputs: dict[str, Any], attributes: dict[str, Any]) -> Any:
        operands = _operands(inputs)
        first = operands[0] if operands else None
        if name == "Constant":
            return self._shared_constant(attributes)
        if name == "Identity":
            return first
        if name == "Cast":
            return self._simpler_cast(first, ir.DataType(int(getattr(attributes["to"], "value", attributes["to"]))))
        if name == "CastLike" and isinstance(operands[1], ir.Value) and operands[1].dtype is not None:
            return self.op("Cast", first, to=int(operands[1].dtype))
        if name == "Concat" and len(operands) == 1 and isinstance(first, ir.Value):
            return first
        if name in ("Reshape", "Unsqueeze") and isinstance(first, ir.Value):
            source = self._one_element_vector(name, first, operands[1])
            if source is not None:
                return source
        if name == "Shape" and isinstance(first, ir.Value) and first.shape is not None:
            return self._static_shape(first.shape, attributes)
        return self._fold(name, operands, attributes)

    def _simpler_cast(self, value: Any, wanted: ir.DataType) -> ir.Value | None:
        """A value that has the wanted type already, or a number in that type."""
        if isinstance(value, (bool, int, float)):
            return self.constant(value, wanted)
        if not isinstance(value, ir.Value) or isinstance(value.type, ir.SequenceType):
            return None
        if value.dtype == wanted:
            return value
        number = _numbers(value)
        if number is None or number.size != 1 or number.ndim or {value.dtype, wanted} - _PLAIN:
            return None
        return self.constant(number.astype(wanted.numpy()).item(), wanted)

    def _shared_constant(self, attributes: dict[str, Any]) -> ir.Value | None:
        """The one constant of this number (or few numbers), when it is written as a list of integers or a float."""
        for name, dtype in (
            ("value_int", ir.DataType.INT64),
            ("value_ints", ir.DataType.INT64),
            ("value_float", ir.DataType.FLOAT),
        ):
            value = getattr(attributes.get(name), "value", attributes.get(name))
            if value is not None:
                return self.constant(list(value) if name == "value_ints" else value, dtype)
        return None

    def _one_element_vector(self, name: str, scalar: ir.Value, argument: Any) -> ir.Value | None:
        """Undo ``vector -> scalar -> vector`` around a size."""
        producer = scalar.producer()
        if producer is None or producer.op_type != "Squeeze" or producer.inputs[0] is None:
            return None
        wanted = _numbers(argument)
        if wanted is None or wanted.tolist() not in (
            [-1] if name == "Reshape" else [0],
            [1] if name == "Reshape" else 0,
        ):
            return None
        source = producer.inputs[0]
        origin = source.producer()
        if origin is None or origin.op_type != "Shape" or not {"start", "end"} <= origin.attributes.keys():
            return None
        length = origin.attributes["end"].as_int() - origin.attributes["start"].as_int()
        return source if length == 1 else None

    def _static_shape(self, shape: ir.Shape, attributes: dict[str, Any]) -> ir.Value | None:
        start, end = (getattr(attributes.get(k), "value", attributes.get(k)) for k in ("start", "end"))
        sizes = list(shape)[start or 0 : end]
        return self.constant(sizes, ir.DataType.INT64) if sizes and all(isinstance(s, int) for s in sizes) else None

    def _fold(self, name: str, operands: list[Any], attributes: dict[str, Any]) -> ir.Value | None:
        function = _FOLDED.get(name)
        if function is None or not operands:
            return None
        if not any(isinstance(o, ir.Value) for o in operands):
            return None
        arrays = [_numbers(o) for o in operands]
        first = next(o for o in operands if isinstance(o, ir.Value))
        if any(a is None or a.size > _FOLD_LIMIT for a in arrays) or first.dtype != ir.DataType.INT64:
            return None
        plain = {k: getattr(v, "value", v) for k, v in attributes.items()}
        result = np.asarray(function(*arrays, **plain), dtype=np.int64)
        return self.constant(result.tolist(), ir.DataType.INT64) if result.ndim <= 1 and result.size else None

    def _key(self, name: str, inputs: dict[str, Any], attributes: dict[str, Any]) -> Any:
        operands = tuple(id(o) if isinstance(o, ir.Value) else _hashable(o) for o in _operands(inputs))
        plain = tuple(sorted((k, _hashable(getattr(v, "value", v))) for k, v in attributes.items()))
        return None if any(o is NotImplemented for o in operands) else (name, operands, plain)


def _operands(inputs: dict[str, Any]) -> list[Any]:
    """The operands in order, variadic ones spread out."""
    flat: list[Any] = []
    for value in inputs.values():
        if isinstance(value, (list, tuple)) and any(isinstance(v, ir.Value) for v in value):
            flat.extend(value)
        else:
            flat.append(value)
    while flat and flat[-1] is None:
        flat.pop()
    return flat


def _hashable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(id(v) if isinstance(v, ir.Value) else _hashable(v) for v in value)
    if isinstance(value, (bool, int, float, str, type(None))):
        return (type(value).__name__, value)
    return NotImplemented


def _numbers(value: Any) -> np.ndarray | None:
    """The numbers of a constant operand."""
    if isinstance(value, ir.Value):
        return None if value.const_value is None else value.const_value.numpy()
    if isinstance(value, (int, list, tuple)) and not isinstance(value, bool):
        return (
            np.asarray(value, dtype=np.int64)
            if not isinstance(value, (list, tuple)) or all(type(v) is int for v in value)
            else None
        )
    return None


def _attribute_tensor(node: ir.Node) -> ir.TensorProtocol | None:
    for name, dtype in (
        ("value_int", ir.DataType.INT64),
        ("value_ints", ir.DataType.INT64),
        ("value_float", ir.DataType.FLOAT),
    ):
        if name in node.attributes:
            return ir.tensor(node.attributes[name].value, dtype=dtype)
    if "value_floats" in node.attributes:
        return ir.tensor(node.attributes["value_floats"].value, dtype=ir.DataType.FLOAT)
    return node.attributes["value"].as_tensor() if "value" in node.attributes else None


def _is_sequence(constraint: Any) -> bool:
    return any(isinstance(t, ir.SequenceType) for t in constraint.allowed_types)
