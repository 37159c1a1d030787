"""Our own translations: operators that PyTorch's translations get wrong, lack, or write in a roundabout way.

A translation takes the translator, the node, and the node's arguments (ONNX values, or plain numbers), and returns
the ONNX value of the result, or NotImplemented to leave the node to PyTorch's translation.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import fx

from ...kernels import OPERATORS
from . import local_functions

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


@special(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
def convolution(t: Translator, node: fx.Node, x: ir.Value, weight: ir.Value, *rest: Any, **options: Any) -> Any:
    """Without a bias, none: PyTorch's translation adds zeros, in three dimensions in a shape that is not legal."""
    names = ("bias", "stride", "padding", "dilation", "groups")
    given = dict(zip(names, rest, strict=False)) | options
    value = node.meta["val"]
    if given.get("bias") is not None or value.is_complex():
        return NotImplemented
    rank = value.dim() - 2
    stride, padding, dilation = (
        list(v) * (rank if len(v) == 1 else 1)
        for v in (given.get("stride") or [1], given.get("padding") or [0], given.get("dilation") or [1])
    )
    return t.recorder.op(
        "Conv",
        x,
        weight,
        strides=stride,
        pads=padding * 2,
        dilations=dilation,
        group=given.get("groups", 1),
    )


@special(aten.einsum.default)
def einsum(t: Translator, node: fx.Node, equation: str, operands: Any, **options: Any) -> Any:
    """ONNX has none in bfloat16 (nor has most that runs it): computed in float32, rounded once."""
    value = node.meta["val"]
    if value.dtype != torch.bfloat16:
        return NotImplemented
    op = t.recorder.op
    wide = [op("Cast", each, to=int(ir.DataType.FLOAT)) for each in operands]
    return op("Cast", op("Einsum", *wide, equation=equation), to=int(ir.DataType.BFLOAT16))


@special(aten.view.default, aten.reshape.default)
def reshape(t: Translator, node: fx.Node, x: ir.Value, shape: Any) -> Any:
    """A size of zero is meant: without ``allowzero`` it would copy the input's."""
    if not any(isinstance(size, int) and size == 0 for size in shape):
        return NotImplemented
    return t.recorder.op("Reshape", x, t.vector(shape), allowzero=1)


@special(aten.repeat_interleave.self_int)
def repeat_nothing(t: Translator, node: fx.Node, x: ir.Value, *rest: Any, **options: Any) -> Any:
    """Of a tensor without elements; in PyTorch's translation its zeros would copy sizes."""
    shape = list(node.meta["val"].shape)
    if 0 not in shape or not all(isinstance(size, int) for size in shape):
        return NotImplemented
    return t.recorder.op("Reshape", x, t.vector(shape), allowzero=1)


@special(aten.remainder.Tensor)
def remainder(t: Translator, node: fx.Node, a: Any, b: Any) -> Any:
    """Of floating-point numbers: what C leaves, moved to the divisor's side; infinite divisors come out right."""
    if not node.meta["val"].is_floating_point():
        return NotImplemented
    op = t.recorder.op
    zero = t.recorder.constant(0.0, ir.DataType(_element(node)))
    rest = op("Mod", a, b, fmod=1)
    across = op("Less", op("Mul", op("Sign", rest), op("Sign", b)), zero)
    return op("Where", across, op("Add", rest, b), rest)


@special(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
def average_pool(t: Translator, node: fx.Node, x: ir.Value, kernel: Any, *rest: Any, **options: Any) -> Any:
    """With a divisor of its own: the mean over the window, times the window's size over the divisor."""
    names = ("stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    given = dict(zip(names, rest, strict=False)) | options
    divisor = given.get("divisor_override")
    if divisor is None:
        return NotImplemented
    from .translate import NoTranslation

    if given.get("ceil_mode"):
        raise NoTranslation(node, "a pool with divisor_override and ceil_mode counts windows as ONNX does not")
    rank = node.meta["val"].dim() - 2
    window = list(kernel) * (rank if len(kernel) == 1 else 1)
    strides, pads = (list(given.get(n) or d) for n, d in (("stride", window), ("padding", [0])))
    strides, pads = (v * (rank if len(v) == 1 else 1) for v in (strides, pads))
    mean = t.recorder.op("AveragePool", x, kernel_shape=window, strides=strides, pads=pads * 2, count_include_pad=1)
    dtype = ir.DataType(int(_element(node)))
    return t.recorder.op("Mul", mean, t.recorder.constant(math.prod(window) / divisor, dtype))


@special(aten.amax.default, aten.amin.default)
def extreme(t: Translator, node: fx.Node, x: ir.Value, dim: Any = (), keepdim: bool = False) -> Any:
    """Over all dimensions (of a scalar, too), where PyTorch's translation demands a list of some."""
    if dim or node.meta["val"].dtype == torch.bool:
        return NotImplemented
    return t.recorder.op("ReduceMax" if node.target is aten.amax.default else "ReduceMin", x, keepdims=int(keepdim))


@special(aten.cat.default)
def concatenate_nothing(t: Translator, node: fx.Node, parts: Any, dim: int = 0) -> Any:
    """Parts that are all empty; PyTorch's translation drops such ones until none is left."""
    values = [part.meta["val"] for part in node.all_input_nodes]
    rank = node.meta["val"].dim()
    if any(value.dim() != rank or not any(isinstance(n, int) and n == 0 for n in value.shape) for value in values):
        return NotImplemented
    return t.recorder.op("Concat", *parts, axis=dim % rank)


@special(aten.mean.dim)
def global_average(t: Translator, node: fx.Node, x: ir.Value, dims: Any, *rest: Any, **options: Any) -> Any:
    """The mean of whole images is a pool: ONNX Runtime then keeps its own layout of channels."""
    value, source = node.meta["val"], node.args[0].meta["val"]  # type: ignore[union-attr]
    rank = source.dim()
    whole = rank in (4, 5) and sorted(d % rank for d in dims or ()) == list(range(2, rank))
    if not whole or value.dim() != rank or value.dtype != source.dtype or not value.is_floating_point():
        return NotImplemented
    return t.recorder.op("GlobalAveragePool", x)


@special(aten.cumprod.default)
def running_product(t: Translator, node: fx.Node, x: ir.Value, dim: int, dtype: Any = None) -> Any:
    """The products of all beginnings, side by side: ONNX has a running product from opset 26 on only."""
    op, value = t.recorder.op, node.meta["val"]
    axis, rank = dim % max(value.dim(), 1), value.dim()
    if rank == 0 or node.args[0].meta["val"].dtype != value.dtype:  # type: ignore[union-attr]
        return NotImplemented
    zero, one = (t.recorder.constant(n, ir.DataType.INT64) for n in (0, 1))
    length = op("Squeeze", op("Shape", x, start=axis, end=axis + 1), t.vector([0]))
    places = op("Range", zero, length, one)
    shape = [-1 if i == axis else 1 for i in range(rank)]
    columns = op("Reshape", places, t.vector([*shape[: axis + 1], 1, *shape[axis + 1 :]]))
    rows = op("Reshape", places, t.vector([*shape[:axis], 1, *shape[axis:]]))
    factors = op(
        "Where",
        op("LessOrEqual", rows, columns),
        op("Unsqueeze", x, t.vector([axis])),
        t.recorder.constant(1, ir.DataType(int(_element(node)))),
    )
    return op("ReduceProd", factors, t.vector([axis + 1]), keepdims=0)


@special(aten.squeeze.dim, aten.squeeze.dims)
def squeeze(t: Translator, node: fx.Node, x: ir.Value, dims: Any) -> Any:
    """Dimensions of another size than 1 stay, which ONNX calls an error."""
    source: Any = node.args[0]
    shape = source.meta["val"].shape
    listed = [dims] if isinstance(dims, int) else list(dims)
    gone = sorted({d % len(shape) for d in listed if isinstance(shape[d], int) and shape[d] == 1} if shape else set())
    if len(shape) - len(gone) != node.meta["val"].dim():
        return NotImplemented
    return t.recorder.op("Squeeze", x, t.recorder.constant(gone, ir.DataType.INT64)) if gone else x


@special(aten.add.Tensor, aten.mul.Tensor)
def arithmetic_of_truth_values(t: Translator, node: fx.Node, a: Any, b: Any, alpha: float = 1) -> Any:
    """The sum of truth values is ``or``, their product ``and``."""
    kinds = [n.meta["val"] if isinstance(n, fx.Node) else None for n in node.args[:2]]
    if not all(isinstance(v, torch.Tensor) and v.dtype is torch.bool for v in kinds) or alpha != 1:
        return NotImplemented
    return t.recorder.op("Or" if node.target is aten.add.Tensor else "And", a, b)


@special(aten.sub.Tensor)
def subtract_scaled(t: Translator, node: fx.Node, a: Any, b: Any, alpha: float = 1) -> Any:
    """``a - alpha * b`` with a number for ``b`` or a factor."""
    if alpha == 1 or isinstance(b, ir.Value):
        return NotImplemented
    return t.recorder.op("Sub", a, t.recorder.constant(alpha * b, ir.DataType(int(_element(node)))))


@special(aten.sort.stable)
def stable_sort(t: Translator, node: fx.Node, x: ir.Value, *rest: Any, **options: Any) -> Any:
    """All of them as the top ones: ONNX puts equal elements in the order of their indices."""
    op = t.recorder.op
    named = dict(zip(("stable", "dim", "descending"), rest, strict=False)) | options
    axis = named.get("dim", -1)
    size = op("Gather", op("Shape", x), t.recorder.constant([axis], ir.DataType.INT64), axis=0)
    return op("TopK", x, size, axis=axis, largest=int(named.get("descending", False)), sorted=1)


@special(aten.embedding_bag.padding_idx, aten._embedding_bag.default, aten._embedding_bag_forward_only.default)
def embedding_bag(t: Translator, node: fx.Node, *_: Any, **__: Any) -> Any:
    """PyTorch's translation node by node makes a file that ONNX Runtime does not survive."""
    from .translate import NoTranslation

    raise NoTranslation(node, "embedding bags are left to PyTorch's own exporter")


def _element(node: fx.Node) -> int:
    from .initializers import onnx_dtype

    return int(onnx_dtype(node.meta["val"].dtype))


@special(aten._is_all_true.default, aten._is_any_true.default)
def all_or_any(t: Translator, node: fx.Node, x: ir.Value) -> Any:
    """Whether all (or any) elements of a boolean tensor are true."""
    op = t.recorder.op
    name = "ReduceMin" if node.target is aten._is_all_true.default else "ReduceMax"
    found = op(name, op("Cast", x, to=int(ir.DataType.INT32)), keepdims=0)
    return op("Cast", found, to=int(ir.DataType.BOOL))


def grouped_mm(t: Translator, node: fx.Node, x: ir.Value, weight: ir.Value, ends: ir.Value) -> Any:
    """Rows of ``x`` (sorted by expert) times their expert's matrix: as `kernels.expert_linear`.

    ``x`` is [rows, K], ``weight`` [experts, K, N], ``ends`` [experts]: where each expert's rows end. A row's expert is
    the number of experts whose rows end before it.
    """
    op, integer = t.recorder.op, ir.DataType.INT64
    zero, one = t.recorder.constant(0, integer), t.recorder.constant(1, integer)
    last = t.recorder.constant([-1], integer)
    rows = op("Unsqueeze", op("Range", zero, op("Squeeze", op("Shape", x, start=0, end=1)), one), last)
    passed = op("Cast", op("GreaterOrEqual", rows, op("Cast", ends, to=int(integer))), to=int(integer))
    experts = op("ReduceSum", passed, last, keepdims=1)
    middle = t.recorder.constant([1], integer)
    assert x.dtype is not None
    found = local_functions.call(t.recorder, "ExpertLinear", op("Unsqueeze", x, middle), weight, experts, dtype=x.dtype)
    return op("Squeeze", found, middle)


def by_name(target: Any) -> Special | None:
    """Translations of our own operators, and of those that other packages define and that may not be loaded."""
    own = OPERATORS.get(target)
    if own is not None:
        return own.to_onnx
    return _BY_NAME.get(str(target)) if isinstance(target, torch._ops.OpOverload) else None


_BY_NAME: dict[str, Special] = {"transformers.grouped_mm_fallback.default": grouped_mm}
