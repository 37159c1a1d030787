"""Our own translations: operators that PyTorch's translations get wrong, lack, or write in a roundabout way.

A translation takes the translator, the node, and the node's arguments (ONNX values, or plain numbers), and returns
the ONNX value of the result, or NotImplemented to leave the node to PyTorch's translation.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import fx

if TYPE_CHECKING:
    from .translate import Translator

aten = torch.ops.aten
Special = Callable[..., Any]

SPECIAL: dict[Any, Special] = {}


def special(*targets: Any) -> Callable[[Special], Special]:
    """Register a translation of some operators."""

    def register(function: Special) -> Special:
        SPECIAL.update(dict.fromkeys(targets, function))
        return function

    return register


@special(aten.item.default, aten._local_scalar_dense.default)
def item(t: Translator, node: fx.Node, x: ir.Value) -> Any:
    """``tensor.item()``: the one element as a number, in the type that Python would give it."""
    from .symbolic import scalar_type

    kind = scalar_type(node.meta["val"])
    scalar = t.recorder.op("Reshape", x, t.recorder.constant([1], ir.DataType.INT64))
    scalar = t.recorder.op("Squeeze", scalar, t.recorder.constant([0], ir.DataType.INT64))
    return scalar if kind is None else t.recorder.op("Cast", scalar, to=int(kind))


@special(operator.getitem)
def getitem(t: Translator, node: fx.Node, x: ir.Value, index: int) -> Any:
    """One element of a sequence."""
    return t.recorder.op("SequenceAt", x, t.recorder.constant(index, ir.DataType.INT64))


@special(
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unsafe_split.Tensor,
    aten.unsafe_chunk.default,
)
def split(t: Translator, node: fx.Node, x: ir.Value, how: Any, dim: int = 0) -> Any:
    """Pieces of a tensor, as one ``Split``; PyTorch's translations make a sequence of them."""
    pieces = node.meta["val"]
    axis = dim % len(pieces[0].shape)
    sizes = list(how) if isinstance(how, (list, tuple)) else [piece.shape[axis] for piece in pieces]
    if any(isinstance(size, torch.SymInt) for size in sizes):
        return NotImplemented
    lengths = t.vector(sizes)
    return t.split(x, lengths, axis, len(pieces))


@special(aten.unbind.int)
def unbind(t: Translator, node: fx.Node, x: ir.Value, dim: int = 0) -> Any:
    """The slices of a tensor along one dimension."""
    slices = node.meta["val"]
    axis = dim % (slices[0].dim() + 1)
    index = [t.recorder.constant(i, ir.DataType.INT64) for i in range(len(slices))]
    return [t.recorder.op("Gather", x, i, axis=axis) for i in index]


@special(aten.square.default)
def square(t: Translator, node: fx.Node, x: ir.Value) -> Any:
    """``x * x``."""
    return t.recorder.op("Mul", x, x)


@special(aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
def dropout(t: Translator, node: fx.Node, x: ir.Value, p: float, train: bool) -> Any:
    """Nothing, when the model is not in training."""
    return NotImplemented if train else x


@special(aten._is_all_true.default, aten._is_any_true.default)
def all_or_any(t: Translator, node: fx.Node, x: ir.Value) -> Any:
    """Whether all (or any) elements of a boolean tensor are true."""
    op = t.recorder.op
    name = "ReduceMin" if node.target is aten._is_all_true.default else "ReduceMax"
    found = op(name, op("Cast", x, to=int(ir.DataType.INT32)), keepdims=0)
    return op("Cast", found, to=int(ir.DataType.BOOL))


def grouped_mm(t: Translator, node: fx.Node, x: ir.Value, weight: ir.Value, ends: ir.Value) -> Any:
    """Rows of ``x`` (sorted by expert) times their expert's matrix: a slice and a product for each expert.

    ``x`` is [rows, K], ``weight`` [experts, K, N], ``ends`` [experts]: where each expert's rows end.
    """
    op = t.recorder.op
    count = int(node.args[1].meta["val"].shape[0])  # type: ignore[union-attr]
    ends = op("Cast", ends, to=int(ir.DataType.INT64))
    zero = t.recorder.constant([0], ir.DataType.INT64)
    ones = t.vector([1] * count)
    stops = t.split(ends, ones, 0, count) if count > 1 else [ends]
    parts = []
    for expert, (start, stop) in enumerate(zip([zero, *stops], stops, strict=False)):
        rows = op("Slice", x, start, stop, zero)
        parts.append(op("MatMul", rows, op("Gather", weight, t.recorder.constant(expert, ir.DataType.INT64), axis=0)))
    return op("Concat", *parts, axis=0) if count > 1 else parts[0]


def by_name(target: Any) -> Special | None:
    """Translations of operators that other packages define, and that may not be loaded."""
    return _BY_NAME.get(str(target)) if isinstance(target, torch._ops.OpOverload) else None


_BY_NAME: dict[str, Special] = {"transformers.grouped_mm_fallback.default": grouped_mm}
