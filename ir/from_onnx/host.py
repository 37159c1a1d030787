"""Shape arithmetic on the host: the operators that exporters build shapes with, on Python and symbolic numbers."""

from __future__ import annotations

import math
import operator as py
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._sympy.functions import Mod, PythonMod
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from .registry import host_operator
from .values import MAX_HOST_ELEMENTS, NUMPY, SYMBOLIC, Host, Number, outside_the_trace

MOST_AXES = 8
"""A computed range of up to this many numbers may be a list of axes."""


def _rounded(items: Sequence[Number], dtype: torch.dtype) -> tuple[Number, ...]:
    """Round concrete floating-point results to the element type, as the operator itself would."""
    if not dtype.is_floating_point:
        return tuple(items)
    if dtype not in NUMPY:  # bfloat16, which numpy does not have
        with outside_the_trace():
            return tuple(torch.tensor(items, dtype=dtype).tolist())
    kind = np.dtype(NUMPY[dtype]).type
    return tuple(item if isinstance(item, SYMBOLIC) else float(kind(item)) for item in items)


def _array(host: Host) -> Any:
    """The numbers in an array of Python objects, symbolic ones included."""
    flat = np.empty(len(host.items), dtype=object)
    for index, item in enumerate(host.items):
        flat[index] = item
    return flat.reshape(host.shape)


def _host(array: Any, dtype: torch.dtype) -> Any:
    """An array of Python objects as host numbers, unless there are too many of them."""
    array = np.asarray(array, dtype=object)
    if array.size > MAX_HOST_ELEMENTS:
        return NotImplemented
    dims = array.shape if array.ndim > 1 else None
    return Host(tuple(array.ravel().tolist()), dtype, is_scalar=array.ndim == 0, dims=dims)


def _elementwise(function: Callable[..., Number], *hosts: Host, dtype: torch.dtype | None = None) -> Any:
    dtype = dtype or hosts[0].dtype
    if dtype.is_floating_point and not all(h.is_concrete for h in hosts):
        return NotImplemented
    if math.prod(np.broadcast_shapes(*(h.shape for h in hosts))) > max(
        MAX_HOST_ELEMENTS, *(len(h.items) for h in hosts)
    ):
        return NotImplemented
    arrays = np.broadcast_arrays(*(_array(h) for h in hosts))
    items = [function(*row) for row in zip(*(a.ravel().tolist() for a in arrays), strict=True)]
    shape = arrays[0].shape
    dims = shape if len(shape) > 1 else None
    if not _fit(items, dtype):
        return NotImplemented
    return Host(_rounded(items, dtype), dtype, is_scalar=not shape, dims=dims)


def _fit(items: Sequence[Number], dtype: torch.dtype) -> bool:
    """Whether whole numbers are within the element type's range; beyond it, they are left to the tensor operator."""
    if dtype.is_floating_point or dtype == torch.bool:
        return True
    limits = torch.iinfo(dtype)
    return all(isinstance(item, SYMBOLIC) or limits.min <= item <= limits.max for item in items)


def _with_remainder(a: Number, b: Number) -> Number:
    """``x`` where ``a`` is ``x - x % b``: exporters spell a floor division so, and sizes must compare equal to it."""
    if not isinstance(a, torch.SymInt):
        return a
    node = a.node
    for remainder in node.expr.atoms(Mod, PythonMod):
        whole, by = remainder.args
        if by == (b.node.expr if isinstance(b, SYMBOLIC) else b) and node.expr + remainder == whole:
            return _from_symbols(whole, node.shape_env)
    return a


def _from_symbols(expression: Any, shape_env: Any) -> Any:
    """A size computed anew from the graph's own sizes, so that the trace knows where it comes from."""
    sizes: dict[Any, Any] = {}
    for symbol in expression.free_symbols:
        hint = shape_env.backed_var_to_val.get(symbol)
        sizes[symbol] = shape_env.create_symintnode(symbol, hint=None if hint is None else int(hint))
    return sympy_interp(PythonReferenceAnalysis, sizes, expression)


def _truncated_division(a: Number, b: Number) -> Number:
    """ONNX divides integers toward zero; symbolic sizes are never negative, where floor and truncation agree."""
    if isinstance(a, SYMBOLIC) or isinstance(b, SYMBOLIC):
        return _with_remainder(a, b) // b  # type: ignore[operator]
    if isinstance(a, float):
        return a / b
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


@host_operator("Add")
def add(a: Host, b: Host) -> Any:
    return _elementwise(py.add, a, b)


@host_operator("Sub")
def sub(a: Host, b: Host) -> Any:
    return _elementwise(py.sub, a, b)


@host_operator("Mul")
def mul(a: Host, b: Host) -> Any:
    return _elementwise(py.mul, a, b)


@host_operator("Div")
def div(a: Host, b: Host) -> Any:
    if any(not isinstance(item, SYMBOLIC) and item == 0 for item in b.items):
        return NotImplemented
    return _elementwise(_truncated_division, a, b)


@host_operator("Mod")
def mod(a: Host, b: Host, *, fmod: int = 0) -> Any:
    if fmod or any(not isinstance(item, SYMBOLIC) and item == 0 for item in b.items):
        return NotImplemented
    return _elementwise(py.mod, a, b)


@host_operator("Neg")
def neg(a: Host) -> Any:
    return _elementwise(py.neg, a)


@host_operator("Sqrt")
def sqrt(a: Host) -> Any:
    if not a.is_concrete or any(item < 0 for item in a.items):
        return NotImplemented
    return _elementwise(math.sqrt, a)


@host_operator("Pow")
def power(a: Host, b: Host) -> Any:
    if not (a.is_concrete and b.is_concrete) or any(x <= 0 for x in a.items) or any(x < 0 for x in b.items):
        return NotImplemented
    whole = not a.dtype.is_floating_point
    if whole and any(y * math.log2(x) > 64 for x in a.items for y in b.items):
        return NotImplemented  # too large for any type, and possibly for the memory
    return _elementwise(lambda x, y: int(x**y) if whole else x**y, a, b)


@host_operator("Reciprocal")
def reciprocal(a: Host) -> Any:
    if any(not isinstance(item, SYMBOLIC) and item == 0 for item in a.items):
        return NotImplemented
    return _elementwise(lambda x: 1.0 / x, a)


@host_operator("Abs")
def abs_(a: Host) -> Any:
    return _elementwise(abs, a) if a.is_concrete else NotImplemented


@host_operator("Ceil")
def ceil(a: Host) -> Any:
    return _whole(math.ceil, a)


@host_operator("Floor")
def floor(a: Host) -> Any:
    return _whole(math.floor, a)


def _whole(function: Callable[[float], int], a: Host) -> Any:
    if not a.is_concrete or not all(math.isfinite(item) for item in a.items):
        return NotImplemented
    return _elementwise(function, a)


@host_operator("Relu")
def relu(a: Host) -> Any:
    return _elementwise(lambda x: torch.sym_max(x, 0), a)


@host_operator("Min")
def minimum(*hosts: Host) -> Any:
    return _folded(torch.sym_min, hosts)


@host_operator("Max")
def maximum(*hosts: Host) -> Any:
    return _folded(torch.sym_max, hosts)


def _folded(function: Callable[[Number, Number], Number], hosts: Sequence[Host]) -> Any:
    result: Any = hosts[0].unnamed()
    for each in hosts[1:]:
        result = _elementwise(function, result, each)
        if result is NotImplemented:
            return result
    return result


def _compared(function: Callable[[Number, Number], Number]) -> Callable[[Host, Host], Any]:
    # Comparing sizes decides which way a shape is built; the decision becomes a guard of the program.
    def compare(a: Host, b: Host) -> Any:
        return _elementwise(lambda x, y: bool(function(x, y)), a, b, dtype=torch.bool)

    return compare


for _name, _function in {
    "Equal": py.eq,
    "Less": py.lt,
    "LessOrEqual": py.le,
    "Greater": py.gt,
    "GreaterOrEqual": py.ge,
    "And": lambda x, y: x and y,
    "Or": lambda x, y: x or y,
}.items():
    host_operator(_name)(_compared(_function))


@host_operator("Not")
def not_(a: Host) -> Any:
    return _elementwise(lambda x: not x, a)


@host_operator("Where")
def where(condition: Host, a: Host, b: Host) -> Any:
    return _elementwise(lambda c, x, y: x if c else y, condition, a, b, dtype=a.dtype)


@host_operator("Identity")
def identity(a: Host) -> Any:
    return a


@host_operator("Shape")
def shape(a: Host, *, start: int = 0, end: int | None = None) -> Any:
    return Host(a.shape[start:end], torch.int64)


@host_operator("Size")
def size(a: Host) -> Any:
    return Host((len(a.items),), torch.int64, is_scalar=True)


@host_operator("Gather")
def gather(data: Host, indices: Host, *, axis: int = 0) -> Any:
    if data.is_scalar or not indices.is_concrete:
        return NotImplemented
    return _host(np.take(_array(data), _array(indices).astype(np.int64), axis), data.dtype)


@host_operator("Concat")
def concat(*hosts: Host, axis: int) -> Any:
    if any(h.is_scalar for h in hosts):
        return NotImplemented
    return _host(np.concatenate([_array(h) for h in hosts], axis), hosts[0].dtype)


@host_operator("Split")
def split_(
    data: Host,
    sizes: Host | None = None,
    *,
    axis: int = 0,
    num_outputs: int | None = None,
    split: Sequence[int] | None = None,
    n_outputs: int,
) -> Any:
    if data.is_scalar or len(data.shape) > 1 or (sizes is not None and not sizes.is_concrete):
        return NotImplemented
    count = num_outputs or n_outputs
    width = -(-len(data.items) // count)
    given = split if sizes is None else sizes.items
    lengths = given or [width] * (count - 1) + [len(data.items) - width * (count - 1)]
    parts, start = [], 0
    for length in lengths:
        parts.append(Host(data.items[start : start + length], data.dtype))
        start += length
    return tuple(parts)


def _axes(given: Host | None, attribute: Sequence[int] | None) -> tuple[int, ...] | None:
    """Axes as an input, or (before opset 13, of reductions 18) as an attribute."""
    chosen = attribute if given is None else given.items
    return None if chosen is None else tuple(chosen)


@host_operator("Unsqueeze")
def unsqueeze(a: Host, given: Host | None = None, *, axes: Sequence[int] | None = None) -> Any:
    if given is not None and not given.is_concrete:
        return NotImplemented
    return _host(np.expand_dims(_array(a), _axes(given, axes) or ()), a.dtype)


@host_operator("Squeeze")
def squeeze(a: Host, given: Host | None = None, *, axes: Sequence[int] | None = None) -> Any:
    if given is not None and not given.is_concrete:
        return NotImplemented
    return _host(np.squeeze(_array(a), _axes(given, axes)), a.dtype)


@host_operator("Reshape")
def reshape(a: Host, target: Host, *, allowzero: int = 0) -> Any:
    if not target.is_concrete:
        return NotImplemented
    sizes = [a.shape[i] if n == 0 and not allowzero else n for i, n in enumerate(target.items)]
    return _host(_array(a).reshape(sizes), a.dtype)


@host_operator("Transpose")
def transpose(a: Host, *, perm: Sequence[int] | None = None) -> Any:
    return _host(np.transpose(_array(a), perm), a.dtype)


@host_operator("Cast")
def cast(a: Host, *, to: torch.dtype, saturate: int = 1) -> Any:
    if a.dtype == to:
        return a
    if to == torch.bool:
        return Host(tuple(bool(item) for item in a.items), to, a.is_scalar, dims=a.dims)
    if not to.is_floating_point and to not in NUMPY:
        return NotImplemented
    if to.is_floating_point:
        if (to not in NUMPY and to != torch.bfloat16) or not a.is_concrete:
            return NotImplemented
        return Host(_rounded([float(item) for item in a.items], to), to, a.is_scalar, dims=a.dims)
    if not a.is_concrete:
        return (
            Host(a.items, to, a.is_scalar, dims=a.dims)
            if to in (torch.int32, torch.int64) and not a.dtype.is_floating_point
            else NotImplemented
        )
    limits = torch.iinfo(to)
    items = [int(item) for item in a.items if math.isfinite(item)]
    fits = len(items) == len(a.items) and all(limits.min <= item <= limits.max for item in items)
    return Host(tuple(items), to, a.is_scalar, dims=a.dims) if fits else NotImplemented


@host_operator("CastLike")
def cast_like(a: Host, like: Host, *, saturate: int = 1) -> Any:
    return cast(a, to=like.dtype)


@host_operator("Expand")
def expand(a: Host, target: Host) -> Any:
    if not target.is_concrete or math.prod(target.items) > MAX_HOST_ELEMENTS:
        return NotImplemented
    shape = np.broadcast_shapes(a.shape, tuple(target.items))
    return _host(np.broadcast_to(_array(a), shape), a.dtype)


@host_operator("ConstantOfShape")
def constant_of_shape(target: Host, *, value: Host | None = None) -> Any:
    fill = value or Host((0.0,), torch.float32)
    if not target.is_concrete or math.prod(target.items) > MAX_HOST_ELEMENTS:
        return NotImplemented
    if fill.dtype.is_floating_point and target.items:
        return NotImplemented
    return _host(np.full(target.items, fill.items[0], dtype=object), fill.dtype)


@host_operator("OneHot")
def one_hot(indices: Host, depth: Host, values: Host, *, axis: int = -1) -> Any:
    """A list of sizes is made this way: one for every dimension but one."""
    if not (indices.is_concrete and depth.is_concrete) or depth.item * len(indices.items) > MAX_HOST_ELEMENTS:
        return NotImplemented
    off, on = values.items
    table = np.full((*indices.shape, depth.item), off, dtype=object)
    for place, index in np.ndenumerate(_array(indices)):
        if -depth.item <= index < depth.item:
            table[(*place, index)] = on
    return _host(np.moveaxis(table, -1, axis), values.dtype)


@host_operator("Range")
def range_(start: Host, limit: Host, delta: Host) -> Any:
    """Only a list of axes is worth knowing: anything longer is data."""
    if start.dtype.is_floating_point or not (start.is_concrete and limit.is_concrete and delta.is_concrete):
        return NotImplemented
    items = range(start.item, limit.item, delta.item) if delta.item else range(MOST_AXES + 1)
    return Host(tuple(items), start.dtype) if len(items) <= MOST_AXES else NotImplemented


def _reduction(function: Callable[[Number, Number], Number], start: int) -> Callable[..., Any]:
    def reduce(
        a: Host,
        given: Host | None = None,
        *,
        axes: Sequence[int] | None = None,
        keepdims: int = 1,
        noop_with_empty_axes: int = 0,
    ) -> Any:
        none_named = not _axes(given, axes)
        if a.dtype.is_floating_point or len(a.shape) != 1 or (noop_with_empty_axes and none_named):
            return NotImplemented
        total: Number = start
        for item in a.items:
            total = function(total, item)
        if not _fit((total,), a.dtype):
            return NotImplemented
        return Host((total,), a.dtype, is_scalar=not keepdims)

    return reduce


host_operator("ReduceProd")(_reduction(py.mul, 1))
host_operator("ReduceSum")(_reduction(py.add, 0))


@host_operator("Slice")
def slice_(
    data: Host,
    start_input: Host | None = None,
    end_input: Host | None = None,
    axes_input: Host | None = None,
    steps: Host | None = None,
    *,
    starts: Sequence[int] | None = None,
    ends: Sequence[int] | None = None,
    axes: Sequence[int] | None = None,
) -> Any:
    """Bounds are inputs, or (before opset 10) attributes."""
    bounds = [b for b in (start_input, end_input, axes_input, steps) if b is not None]
    if data.is_scalar or not all(b.is_concrete for b in bounds):
        return NotImplemented
    array = _array(data)
    first, last = _axes(start_input, starts) or (), _axes(end_input, ends) or ()
    which = _axes(axes_input, axes) or range(len(first))
    strides = steps.items if steps else [1] * len(first)
    for axis, start, end, step in zip(which, first, last, strides, strict=True):
        stop = None if step < 0 and end < -array.shape[axis] else end
        array = array[(slice(None),) * (axis % array.ndim) + (slice(start, stop, step),)]
    return _host(array, data.dtype)
