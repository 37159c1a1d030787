"""Random ONNX models with their inputs.

Every node is computed with ONNX's reference evaluator while the model is built: that gives shapes and element types,
and tells which values are *exact* (small multiples of 1/256), so that comparisons, roundings and sorting are only
applied where no rounding error can turn them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

OPSETS = (13, 17, 18, 20)
EXAMPLE = 3
_LARGEST = 1e3
_NUMEL = 3000
_GRID = 256
_SMOOTH = ("Sigmoid", "Tanh", "Erf", "Softplus", "Softsign", "Elu", "Selu", "HardSwish", "Mish", "Gelu", "Cos", "Sin")
_EXACT = ("Relu", "Neg", "Abs", "Identity", "Sign", "Floor", "Ceil", "Round", "HardSigmoid", "LeakyRelu")
_SINCE = {"Mish": 18, "Gelu": 20, "HardSwish": 14}
_REDUCE = ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare")
_STEPS = (
    "unary", "unary", "binary", "binary", "clip", "compare", "logic", "where", "cast", "reduce", "argmax", "topk",
    "cumsum", "softmax", "layer_norm", "batch_norm", "matmul", "gemm", "conv", "pool", "global_pool", "einsum",
    "transpose", "reshape", "reshape_by_shape", "flatten", "squeeze", "unsqueeze", "concat", "split", "slice", "gather",
    "gather_elements", "expand", "tile", "pad", "trilu", "one_hot", "integer", "quantize", "constant",
)  # fmt: skip


@dataclass(frozen=True)
class Value:
    """A value of the model with its numbers at the example's size.

    Attributes:
        name: in the graph.
        array: its numbers.
        exact: whether they are free of rounding errors.
    """

    name: str
    array: np.ndarray
    exact: bool

    @property
    def rank(self) -> int:
        return self.array.ndim

    @property
    def is_float(self) -> bool:
        return self.array.dtype.kind == "f"


@dataclass
class Case:
    """A model, what to feed it, and how large its values get.

    Attributes:
        model: the model.
        feeds: the example's inputs.
        magnitude: the largest finite number on the way, which bounds rounding errors.
        symbolic: the inputs with a symbolic first axis.
    """

    model: onnx.ModelProto
    feeds: dict[str, np.ndarray]
    magnitude: float
    symbolic: tuple[str, ...] = ()
    operators: list[str] = field(default_factory=list)

    def resized(self, size: int, seed: int) -> dict[str, np.ndarray]:
        """Other inputs, with another size of the symbolic axis."""
        generator = np.random.default_rng(seed)
        made: dict[str, np.ndarray] = {}
        for name, array in self.feeds.items():
            shape = (size, *array.shape[1:]) if name in self.symbolic else array.shape
            made[name] = _numbers(generator, shape, array.dtype)
        return made

    def __repr__(self) -> str:
        inputs = {name: f"{a.dtype}{list(a.shape)}" for name, a in self.feeds.items()}
        return f"Case({inputs}, symbolic={self.symbolic}):\n{onnx.printer.to_text(self.model)}"


def _numbers(generator: np.random.Generator, shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
    if dtype == np.bool_:
        return np.asarray(generator.integers(0, 2, shape)).astype(np.bool_)
    if dtype.kind == "i":
        return np.asarray(generator.integers(-3, 4, shape)).astype(dtype)
    return np.asarray(generator.integers(-8, 9, shape) / 4).astype(dtype)


@st.composite
def onnx_cases(draw: st.DrawFn, *, most: int = 12) -> Case:
    """A random valid model of up to ``most`` steps (a step may take several nodes)."""
    builder = _Builder(draw)
    for _ in range(draw(st.integers(2, most))):
        builder.step(draw(st.sampled_from(_STEPS)))
    return builder.finish()


class _Builder:
    def __init__(self, draw: Callable[[Any], Any]) -> None:
        self.draw = draw
        self.opset = draw(st.sampled_from(OPSETS))
        self.generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, np.ndarray] = {}
        self.values: list[Value] = []
        self.feeds: dict[str, np.ndarray] = {}
        self.symbolic: list[str] = []
        self.magnitude = 2.0
        self.float_type = np.dtype(draw(st.sampled_from([np.float32, np.float32, np.float64])))
        for _ in range(draw(st.integers(1, 3))):
            self._input()

    def chance(self, one_in: int) -> bool:
        return self.draw(st.integers(0, one_in - 1)) == one_in - 1

    def size(self) -> int:
        return self.draw(st.sampled_from([2, 3, 4, 3, 2, 1, 0] if self.chance(4) else [2, 3, 4, 1]))

    def _input(self) -> None:
        name = f"x{len(self.feeds)}"
        kinds = [self.float_type, self.float_type, self.float_type, np.dtype(np.int64), np.dtype(np.bool_)]
        shape = [self.size() for _ in range(self.draw(st.integers(0, 4)))]
        if shape and self.draw(st.booleans()):
            shape[0] = EXAMPLE
            self.symbolic.append(name)
        self.feeds[name] = _numbers(self.generator, shape, self.draw(st.sampled_from(kinds)))
        self.values.append(Value(name, self.feeds[name], True))

    def add(self, op: str, inputs: Sequence[Value | None], outputs: int = 1, **attributes: Any) -> list[Value]:
        """A node; nothing if the evaluator cannot compute it."""
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        read = [value.name if value is not None else "" for value in inputs]
        node = helper.make_node(op, read, names, name=f"n{len(self.nodes)}", **attributes)
        known = {value.name: value.array for value in inputs if value is not None}
        try:
            with np.errstate(all="ignore"):
                results = ReferenceEvaluator(node, opsets={"": self.opset}).run(None, known)
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):
            return []  # also for faults of the evaluator: it reshapes nothing of size 0, for example
        arrays = [np.asarray(result) for result in results]
        if any(a.size > _NUMEL for a in arrays):
            return []
        self.nodes.append(node)
        from_exact = all(value.exact for value in inputs if value is not None)
        return [Value(name, a, from_exact and self._on_grid(a)) for name, a in zip(names, arrays, strict=True)]

    def _on_grid(self, array: np.ndarray) -> bool:
        if array.dtype.kind != "f":
            return True
        if not np.isfinite(array).all() or (array.size and np.abs(array).max() > _LARGEST):
            return False
        return bool((array * _GRID == np.round(array * _GRID)).all())

    def keep(self, made: Sequence[Value]) -> None:
        """Take results as values for further steps, bounded where they have become large."""
        for value in made:
            if value.is_float and value.array.size:
                finite = np.abs(value.array[np.isfinite(value.array)])
                if finite.size < value.array.size or finite.max() > _LARGEST:
                    self.values.extend(self.add("Tanh", [value]))
                    continue
                self.magnitude = max(self.magnitude, float(finite.max()))
            self.values.append(value)

    def constant(self, array: np.ndarray) -> Value:
        """An initializer; often one that is there already."""
        same = [n for n, a in self.initializers.items() if a.dtype == array.dtype and a.shape == array.shape]
        if same and array.dtype.kind == "f" and self.draw(st.booleans()):
            return Value(same[-1], self.initializers[same[-1]], True)
        return self.initializer(array)

    def initializer(self, array: np.ndarray) -> Value:
        """An initializer of exactly these numbers."""
        name = f"w{len(self.initializers)}"
        self.initializers[name] = array
        return Value(name, array, True)

    def weight(self, *shape: int, dtype: np.dtype[Any] | None = None) -> Value:
        return self.constant(_numbers(self.generator, shape, dtype or self.float_type))

    def integers(self, *numbers: int) -> Value:
        return self.constant(np.array(numbers, dtype=np.int64))

    def pick(self, fits: Callable[[Value], bool] = lambda value: True) -> Value | None:
        known = [value for value in self.values if fits(value)]
        return known[self.draw(st.integers(0, len(known) - 1))] if known else None

    def floating(self, least: int = 0, most: int = 6) -> Value | None:
        return self.pick(lambda v: v.array.dtype == self.float_type and least <= v.rank <= most)

    def axis(self, value: Value) -> int:
        return self.draw(st.integers(-value.rank, value.rank - 1))

    def step(self, name: str) -> None:
        """One step of a kind, if there is a value that it fits."""
        self.keep(getattr(self, f"_{name}")() or [])

    def _unary(self) -> list[Value]:
        x = self.floating()
        names = [n for n in _SMOOTH + _EXACT if _SINCE.get(n, 0) <= self.opset]
        if x is None:
            return []
        op = self.draw(st.sampled_from(names))
        if op in ("Sign", "Floor", "Ceil", "Round") and not x.exact:
            return []
        if op in ("Erf", "HardSwish") and x.array.dtype == np.float64:
            return []  # the evaluator computes them in single precision, or with such constants
        # Attributes are in single precision; their usual values are rounded.
        exact = {"HardSigmoid": {"alpha": 0.25, "beta": 0.5}, "LeakyRelu": {"alpha": 0.125}}
        return self.add(op, [x], **exact.get(op, {}))

    def _integer(self) -> list[Value]:
        x = self.pick(lambda v: v.array.dtype == np.int64)
        if x is None:
            return []
        op = self.draw(st.sampled_from(["Neg", "Abs", "Add", "Sub", "Mul", "Mod", "Div", "Max", "Min"]))
        if op in ("Neg", "Abs"):
            return self.add(op, [x])
        other = self.integers(self.draw(st.sampled_from([1, 2, 3, 5])))
        if np.abs(x.array).max(initial=0) > 1e4 or (op == "Div" and (x.array < 0).any()):
            return []  # ONNX does not say how negative integers are divided
        return self.add(op, [x, other])

    def _partner(self, x: Value) -> Value:
        """A value that broadcasts with another one, of its type: a computed one, the same one, or a new constant."""

        def fits(v: Value) -> bool:
            try:
                return v.array.dtype == x.array.dtype and np.broadcast_shapes(v.array.shape, x.array.shape) is not None
            except ValueError:
                return False

        if self.chance(4):
            shape = [n if self.draw(st.booleans()) else 1 for n in x.array.shape]
            return self.weight(*shape[self.draw(st.integers(0, len(shape))) :], dtype=x.array.dtype)
        found = self.pick(fits)
        assert found is not None
        return found

    def _binary(self) -> list[Value]:
        x = self.floating()
        if x is None:
            return []
        y = self._partner(x)
        op = self.draw(st.sampled_from(["Add", "Sub", "Mul", "Div", "Max", "Min", "Pow"]))
        if op == "Div":
            absolute = self.add("Abs", [y])
            return [v for a in absolute for one in self.add("Add", [a, self._one(y)]) for v in self.add(op, [x, one])]
        if op == "Pow":
            return self.add(op, [x, self.constant(np.array(2, dtype=x.array.dtype))])
        return self.add(op, [x, y] if self.draw(st.booleans()) else [y, x])

    def _one(self, like: Value) -> Value:
        return self.constant(np.array([1], dtype=like.array.dtype) * 1)

    def _clip(self) -> list[Value]:
        x = self.floating()
        low, high = (self.constant(np.array(n, dtype=self.float_type)) for n in (-1, 1.5))
        return [] if x is None else self.add("Clip", [x, low if self.draw(st.booleans()) else None, high])

    def _compare(self) -> list[Value]:
        x = self.pick(lambda v: v.exact and v.array.dtype != np.bool_)
        if x is None:
            return []
        y = self._partner(x)
        op = self.draw(st.sampled_from(["Less", "Greater", "Equal", "LessOrEqual", "GreaterOrEqual"]))
        return self.add(op, [x, y]) if y.exact else []

    def _logic(self) -> list[Value]:
        x = self.pick(lambda v: v.array.dtype == np.bool_)
        if x is None:
            return []
        if self.draw(st.booleans()):
            return self.add("Not", [x])
        return self.add(self.draw(st.sampled_from(["And", "Or", "Xor"])), [x, self._partner(x)])

    def _where(self) -> list[Value]:
        chosen = self.pick(lambda v: v.array.dtype == np.bool_)
        x = self.floating()
        if chosen is None or x is None:
            return []
        try:
            np.broadcast_shapes(chosen.array.shape, x.array.shape)
        except ValueError:
            return []
        return self.add("Where", [chosen, x, self.constant(np.array([-1], dtype=self.float_type))])

    def _cast(self) -> list[Value]:
        x = self.pick(lambda v: v.exact)
        if x is None:
            return []
        to = self.draw(
            st.sampled_from([TensorProto.INT64, TensorProto.BOOL, helper.np_dtype_to_tensor_dtype(self.float_type)])
        )
        return self.add("Cast", [x], to=to)

    def _reduce(self) -> list[Value]:
        x = self.floating()
        if x is None:
            return []
        op = self.draw(st.sampled_from(_REDUCE))
        axes = sorted({self.axis(x) % x.rank for _ in range(self.draw(st.integers(0, 2)))}) if x.rank else []
        empty = any(n == 0 for n in x.array.shape)
        if empty and op in ("ReduceMax", "ReduceMin", "ReduceMean"):
            return []
        keep = {"keepdims": int(self.draw(st.booleans()))}
        if self.opset >= 18 or op == "ReduceSum":
            return self.add(op, [x, self.integers(*axes)] if axes else [x], **keep)
        return self.add(op, [x], **keep, **({"axes": axes} if axes else {}))

    def _argmax(self) -> list[Value]:
        x = self.pick(lambda v: v.is_float and v.exact and v.rank > 0 and v.array.size > 0)
        if x is None:
            return []
        op = self.draw(st.sampled_from(["ArgMax", "ArgMin"]))
        return self.add(op, [x], axis=self.axis(x), keepdims=int(self.draw(st.booleans())))

    def _topk(self) -> list[Value]:
        x = self.pick(lambda v: v.is_float and v.exact and v.rank > 0 and v.array.shape[-1] > 0)
        if x is None:
            return []
        # Indices of equal values are no matter of the specification: values only.
        return self.add("TopK", [x, self.integers(1)], 2, axis=-1)[:1]

    def _cumsum(self) -> list[Value]:
        x = self.floating(1)
        if x is None:
            return []
        flags = {"exclusive": int(self.chance(3)), "reverse": int(self.chance(3))}
        return self.add("CumSum", [x, self.constant(np.array(self.axis(x), dtype=np.int64))], **flags)

    def _softmax(self) -> list[Value]:
        x = self.floating(1)
        op = self.draw(st.sampled_from(["Softmax", "LogSoftmax"]))
        return [] if x is None or 0 in x.array.shape else self.add(op, [x], axis=self.axis(x))

    def _layer_norm(self) -> list[Value]:
        x = self.floating(1)
        if x is None or self.opset < 17 or x.array.shape[-1] < 2 or 0 in x.array.shape:
            return []
        width = x.array.shape[-1]
        bias = self.weight(width) if self.draw(st.booleans()) else None
        return self.add("LayerNormalization", [x, self.weight(width), bias], axis=-1, epsilon=0.1)

    def _batch_norm(self) -> list[Value]:
        x = self.floating(2)
        if x is None or 0 in x.array.shape or self.opset < 14:
            return []  # the evaluator takes the older form for training
        width = x.array.shape[1]
        scale, bias, mean = (self.weight(width) for _ in range(3))
        variance = self.constant(np.ones(width, dtype=self.float_type))
        if (variance.array <= 0).any():
            return []
        return self.add("BatchNormalization", [x, scale, bias, mean, variance], epsilon=0.1)

    def _matmul(self) -> list[Value]:
        x = self.floating(1)
        if x is None:
            return []
        if self.draw(st.booleans()):
            return self.add("MatMul", [x, self.weight(x.array.shape[-1], self.size())])
        y = self.pick(
            lambda v: (
                v.array.dtype == self.float_type and v.rank == x.rank == 2 and v.array.shape[0] == x.array.shape[1]
            )
        )
        return self.add("MatMul", [x, y]) if y is not None else []

    def _gemm(self) -> list[Value]:
        x = self.floating(2, 2)
        if x is None:
            return []
        turned = {"transA": int(self.draw(st.booleans())), "transB": int(self.draw(st.booleans()))}
        inner, out = x.array.shape[0 if turned["transA"] else 1], self.draw(st.integers(1, 4))
        weight = self.weight(out, inner) if turned["transB"] else self.weight(inner, out)
        bias = self.weight(out) if self.draw(st.booleans()) else None
        return self.add("Gemm", [x, weight, bias], alpha=self.draw(st.sampled_from([1.0, 0.5])), beta=2.0, **turned)

    def _conv(self) -> list[Value]:
        x = self.floating(3, 4)
        if x is None or 0 in x.array.shape or min(x.array.shape[2:]) < 2:
            return []
        spatial, channels = x.rank - 2, x.array.shape[1]
        groups = channels if self.chance(4) else 1
        kernel = self.draw(st.sampled_from([1, 2]))
        weight = self.weight(2 * groups, channels // groups, *[kernel] * spatial)
        bias = self.weight(2 * groups) if self.draw(st.booleans()) else None
        pads = [self.draw(st.integers(0, 1)) for _ in range(2 * spatial)]
        strides = [self.draw(st.integers(1, 2))] * spatial
        return self.add(
            "Conv", [x, weight, bias], group=groups, pads=pads, strides=strides, kernel_shape=[kernel] * spatial
        )

    def _pool(self) -> list[Value]:
        x = self.floating(3, 4)
        if x is None or 0 in x.array.shape or min(x.array.shape[2:]) < 2:
            return []
        spatial = x.rank - 2
        op = self.draw(st.sampled_from(["MaxPool", "AveragePool"]))
        attributes: dict[str, Any] = {"strides": [self.draw(st.integers(1, 2))] * spatial}
        if op == "AveragePool":
            attributes["count_include_pad"] = int(self.draw(st.booleans()))
        return self.add(op, [x], kernel_shape=[2] * spatial, **attributes)

    def _global_pool(self) -> list[Value]:
        x = self.floating(4, 4)  # the evaluator loses axes of others
        if x is None or 0 in x.array.shape:
            return []
        return self.add(self.draw(st.sampled_from(["GlobalAveragePool", "GlobalMaxPool"])), [x])

    def _einsum(self) -> list[Value]:
        x = self.floating(2, 2)
        if x is None or 0 in x.array.shape:
            return []
        equation = self.draw(st.sampled_from(["ij->ji", "ij,ij->i", "ij,kj->ik", "ij->", "ij,ij->ij"]))
        return self.add("Einsum", [x] * (1 + equation.count(",")), equation=equation)

    def _transpose(self) -> list[Value]:
        x = self.pick()
        assert x is not None
        if x.rank == 0 or self.chance(3):
            return self.add("Transpose", [x])
        return self.add("Transpose", [x], perm=self.draw(st.permutations(range(x.rank))))

    def _reshape(self) -> list[Value]:
        x = self.pick(lambda v: v.array.size > 0)
        if x is None:
            return []
        shape = list(x.array.shape)
        match self.draw(st.sampled_from(["flat", "one", "zero", "merge"])):
            case "flat":
                shape = [-1]
            case "one":
                shape = [1, *[0] * 0, -1, *shape[1:]] if shape else [1, 1]
            case "zero" if shape:
                shape = [0, -1]
            case _ if len(shape) > 1:
                shape = [-1, *shape[2:]]
            case _:
                shape = [-1]
        return self.add("Reshape", [x, self.integers(*shape)])

    def _reshape_by_shape(self) -> list[Value]:
        """What exporters write: the shape, parts of it, put together again."""
        x = self.pick(lambda v: v.rank >= 2 and v.array.size > 0)
        if x is None:
            return []
        shape = self.add("Shape", [x])[0]
        first = self.add("Gather", [shape, self.constant(np.array(0, dtype=np.int64))], axis=0)[0]
        lifted = self.add("Unsqueeze", [first, self.integers(0)])[0]
        joined = self.add("Concat", [lifted, self.integers(-1)], axis=0)[0]
        return [*self.add("Reshape", [x, joined]), shape]

    def _flatten(self) -> list[Value]:
        x = self.pick()
        assert x is not None
        return self.add("Flatten", [x], axis=self.draw(st.integers(-x.rank, x.rank)))

    def _squeeze(self) -> list[Value]:
        x = self.pick(lambda v: any(n == 1 for n in v.array.shape[1:]))
        if x is None:
            return []
        axes = [i for i, n in enumerate(x.array.shape) if n == 1 and i > 0]
        return self.add("Squeeze", [x, self.integers(self.draw(st.sampled_from(axes)))])

    def _unsqueeze(self) -> list[Value]:
        x = self.pick(lambda v: v.rank < 5)
        if x is None:
            return []
        return self.add("Unsqueeze", [x, self.integers(self.draw(st.integers(-x.rank - 1, x.rank)))])

    def _concat(self) -> list[Value]:
        x = self.pick(lambda v: v.rank > 0)
        if x is None:
            return []
        axis = self.axis(x)

        def shape_without(value: Value) -> list[int]:
            return [n for i, n in enumerate(value.array.shape) if i != axis % value.rank]

        same = self.pick(
            lambda v: v.array.dtype == x.array.dtype and v.rank == x.rank and shape_without(v) == shape_without(x)
        )
        assert same is not None
        return self.add("Concat", [x, same] if self.draw(st.booleans()) else [x, same, x], axis=axis)

    def _split(self) -> list[Value]:
        # The evaluator does not mind sizes that do not add up, as they would not for another N.
        x = self.pick(lambda v: v.rank > 0 and v.array.shape[-1] in (2, 4))
        if x is None:
            return []
        first = self.draw(st.integers(0, x.array.shape[-1]))
        return self.add("Split", [x, self.integers(first, x.array.shape[-1] - first)], 2, axis=-1)

    def _slice(self) -> list[Value]:
        x = self.pick(lambda v: v.rank > 0)
        if x is None:
            return []
        first, last = -(2**63) + 1, 2**63 - 1
        step = self.draw(st.sampled_from([1, 1, 2, -1]))
        if step < 0:  # not from before the first one on: the evaluator finds nothing there, ONNX says the first one
            start, stop = self.draw(st.sampled_from([(last, first), (-1, first), (last, 0), (-1, -3), (2, 0)]))
        else:  # not from the end to the start: how many that are depends on the size in two ways
            start = self.draw(st.sampled_from([first, -3, -1, 0, 1, 2, 5, last]))
            stop = self.draw(st.sampled_from([last, -1] if start in (-3, -1) else [first, -3, -1, 0, 1, 2, 5, last]))
        parts = [self.integers(n) for n in (start, stop, self.axis(x), step)]
        return self.add("Slice", [x, *parts])

    def _gather(self) -> list[Value]:
        x = self.pick(lambda v: v.rank > 0)
        if x is None:
            return []
        axis = self.axis(x)
        extent = x.array.shape[axis]
        if not extent:
            return []
        index = self.draw(st.sampled_from([0, -1, [0, -1, 0], [[0], [extent - 1]]]))
        return self.add("Gather", [x, self.constant(np.array(index, dtype=np.int64))], axis=axis)

    def _gather_elements(self) -> list[Value]:
        x = self.pick(lambda v: v.rank > 0 and v.array.size > 0)
        if x is None:
            return []
        return self.add(
            "GatherElements", [x, self.constant(np.zeros(x.array.shape, dtype=np.int64))], axis=self.axis(x)
        )

    def _expand(self) -> list[Value]:
        x = self.pick(lambda v: v.rank < 4)
        if x is None:
            return []
        return self.add("Expand", [x, self.integers(2, *[1] * x.rank)])

    def _tile(self) -> list[Value]:
        x = self.pick(lambda v: 0 < v.rank < 4)
        if x is None:
            return []
        return self.add("Tile", [x, self.integers(*[self.draw(st.integers(1, 2)) for _ in range(x.rank)])])

    def _pad(self) -> list[Value]:
        x = self.floating(1)
        if x is None:
            return []
        pads = [self.draw(st.integers(0, 2)) for _ in range(2 * x.rank)]
        value = self.constant(np.array(0.5, dtype=self.float_type)) if self.draw(st.booleans()) else None
        return self.add("Pad", [x, self.integers(*pads), *([value] if value is not None else [])])

    def _trilu(self) -> list[Value]:
        x = self.floating(2)
        if x is None or self.opset < 14:
            return []
        return self.add(
            "Trilu",
            [x, self.constant(np.array(self.draw(st.integers(-1, 1)), dtype=np.int64))],
            upper=int(self.draw(st.booleans())),
        )

    def _one_hot(self) -> list[Value]:
        x = self.pick(lambda v: v.array.dtype == np.int64 and v.rank < 4)
        if x is None:
            return []
        depth, values = (
            self.constant(np.array(4, dtype=np.int64)),
            self.constant(np.array([0.25, 2], dtype=self.float_type)),
        )
        return self.add("OneHot", [x, depth, values], axis=-1)

    def _quantize(self) -> list[Value]:
        """There and back: as a model that is quantised holds it, with one scale, or one for each channel."""
        x = self.pick(lambda v: v.array.dtype == np.float32 and v.exact and v.rank > 0 and v.array.size > 0)
        if x is None or self.opset < 19:  # older ones the evaluator lacks
            return []
        axis = self.axis(x)
        width = [x.array.shape[axis]] if self.draw(st.booleans()) and axis % x.rank else []
        # Powers of two: a value is never between two steps by a rounding error.
        scale = self.initializer(np.full(width, self.draw(st.sampled_from([0.125, 0.25])), dtype=np.float32))
        kind = self.draw(st.sampled_from([np.uint8, np.int8]))
        point = self.initializer(np.full(width, self.draw(st.integers(0, 100)), dtype=kind))
        stored = self.add("QuantizeLinear", [x, scale, point], axis=axis)
        return self.add("DequantizeLinear", [*stored, scale, point], axis=axis) if stored else []

    def _constant(self) -> list[Value]:
        if self.draw(st.booleans()):
            return [self.weight(*[self.size() for _ in range(self.draw(st.integers(0, 3)))])]
        tensor = numpy_helper.from_array(np.array([0.5], dtype=self.float_type))
        return self.add("ConstantOfShape", [self.integers(self.size(), self.size())], value=tensor)

    def finish(self) -> Case:
        """Outputs: some results, perhaps an input and an initializer among them."""
        computed = [v for v in self.values if v.name not in self.feeds and v.name not in self.initializers]
        outputs = computed[-2:] or self.values[:1]
        if self.chance(4):
            outputs = [*outputs, self.draw(st.sampled_from(self.values))]
        outputs = list({value.name: value for value in outputs}.values())
        inputs = [
            helper.make_tensor_value_info(
                name,
                helper.np_dtype_to_tensor_dtype(array.dtype),
                ["N" if name in self.symbolic and i == 0 else n for i, n in enumerate(array.shape)],
            )
            for name, array in self.feeds.items()
        ]
        results = [
            helper.make_tensor_value_info(v.name, helper.np_dtype_to_tensor_dtype(v.array.dtype), [None] * v.rank)
            for v in outputs
        ]
        weights = [numpy_helper.from_array(a, name) for name, a in self.initializers.items()]
        graph = helper.make_graph(self.nodes, "fuzz", inputs, results, weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        return Case(model, self.feeds, self.magnitude, tuple(self.symbolic), [n.op_type for n in self.nodes])
