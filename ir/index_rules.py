"""How each operator's result is a function of coordinates, given its operands': the rules of `ir.index_functions`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx

from .coordinates import as_condition, compare, coordinate, number, zero_if_one
from .dims import size_expr
from .flow import op_name
from .views import permutation

if TYPE_CHECKING:
    from .index_functions import IndexFunctions

RULES: dict[str, Callable[[IndexFunctions, fx.Node], Any]] = {}
"""By the operator's name. A rule returns None for a form that it does not know."""


def _rule(*names: str) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        for name in names:
            RULES[name] = function
        return function

    return register


def _arg(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


@_rule("arange")
def _arange(f: IndexFunctions, node: fx.Node) -> Any:
    overload = str(getattr(node.target, "_overloadname", "default"))
    start = f.at(node.args[0], ()) if overload in ("start", "start_step") else sympy.Integer(0)
    step = f.at(_arg(node, 2, "step", 1), ()) if overload == "start_step" else sympy.Integer(1)
    return start + step * coordinate(0)


@_rule("full", "full_like", "new_full", "zeros", "ones", "zeros_like", "ones_like", "new_zeros", "new_ones",
       "scalar_tensor")  # fmt: skip
def _full(f: IndexFunctions, node: fx.Node) -> Any:
    name = op_name(node)
    if "full" in name:
        value = f.at(_arg(node, 2 if name == "new_full" else 1, "fill_value"), ())
    elif name == "scalar_tensor":
        value = f.at(node.args[0], ())
    else:
        value = sympy.Integer("ones" in name)
    return as_condition(value) if node.meta["val"].dtype is torch.bool else number(value)


@_rule("unsqueeze", "squeeze", "reshape", "view", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as")
def _regroup(f: IndexFunctions, node: fx.Node) -> Any:
    """Axes are merged and divided: each run of axes of the source has as many elements as a run of the result."""
    source: Any = node.args[0]
    before = [size_expr(s) for s in source.meta["val"].shape]
    after = [size_expr(s) for s in node.meta["val"].shape]
    places: list[Any] = []
    one, axis = sympy.Integer(1), 0
    while len(places) < len(before):
        run = [before[len(places)]]
        if run[0] == 1:
            places.append(sympy.Integer(0))
            continue
        count, place, wanted = one, sympy.Integer(0), run[0]
        while count != wanted:
            if axis < len(after):
                place = place * after[axis] + (coordinate(axis) if after[axis] != 1 else 0)
                count = sympy.expand(count * after[axis])
                axis += 1
                # Neither side may be ahead for ever: take more of the source when the result has all of this run.
                while count != wanted and len(places) + len(run) < len(before) and _divides(wanted, count):
                    run.append(before[len(places) + len(run)])
                    wanted = sympy.expand(wanted * run[-1])
            else:
                return None
        places += _divided(sympy.expand(place), run)
    return f.at(source, places) if all(size == 1 for size in after[axis:]) else None


def _divides(small: Any, large: Any) -> bool:
    return bool(sympy.simplify(large / small).is_integer) and large != small


def _divided(place: Any, sizes: Sequence[Any]) -> list[Any]:
    """The coordinates along several axes of one place in all of them, in row-major order."""
    if len(sizes) == 1:
        return [place]
    below = sympy.prod(sizes[1:])
    return [sympy.floor(place / below), *_divided(sympy.Mod(place, below), sizes[1:])]


@_rule("cat", "concat")
def _concatenate(f: IndexFunctions, node: fx.Node) -> Any:
    """A choice by the coordinate along the axis; one function where a single first element only continues the rest."""
    parts: Any = node.args[0]
    rank = node.meta["val"].dim()
    axis = _arg(node, 1, "dim", 0) % rank
    x = coordinate(axis)
    if len(parts) > 8 or node.meta["val"].dtype is torch.bool:
        return None
    values, offset = [], sympy.Integer(0)
    for part in parts:
        size = size_expr(part.meta["val"].shape[axis])
        # Read with a free coordinate even along an axis of size 1.
        values.append((number(f.read(part)).xreplace({x: x - offset}), offset + size))
        offset = offset + size
    if len(values) == 2 and values[0][1] == 1 and values[0][0] == values[1][0].xreplace({x: sympy.Integer(0)}):
        return values[1][0]
    return sympy.Piecewise(*((value, x < end) for value, end in values[:-1]), (values[-1][0], True))


@_rule("repeat", "tile")
def _repeat(f: IndexFunctions, node: fx.Node) -> Any:
    source: Any = node.args[0]
    before, after = source.meta["val"].shape, node.meta["val"].shape
    lead = len(after) - len(before)
    places = [
        coordinate(lead + i)
        if size_expr(s) == size_expr(after[lead + i])
        else sympy.Mod(coordinate(lead + i), size_expr(s))
        for i, s in enumerate(before)
    ]
    return f.at(source, places)


@_rule("expand", "expand_as", "broadcast_to", "clone", "contiguous", "alias", "detach", "lift_fresh_copy")
def _expand(f: IndexFunctions, node: fx.Node) -> Any:
    return f.broadcast(node, node.args[0])


@_rule("_to_copy", "to", "type_as")
def _cast(f: IndexFunctions, node: fx.Node) -> Any:
    value = f.broadcast(node, node.args[0])
    target, source = node.meta["val"].dtype, node.args[0].meta["val"].dtype  # type: ignore[union-attr]
    if target is torch.bool:
        return as_condition(value)
    if source.is_floating_point and not target.is_floating_point:
        return None  # truncates
    return number(value)


@_rule("transpose", "permute", "t", "mT", "numpy_T")
def _permute(f: IndexFunctions, node: fx.Node) -> Any:
    order = permutation(node)
    if order is None:
        return None
    places = [coordinate(order.index(axis)) for axis in range(len(order))]
    return f.at(node.args[0], places)


@_rule("slice")
def _slice(f: IndexFunctions, node: fx.Node) -> Any:
    source: Any = node.args[0]
    rank = source.meta["val"].dim()
    axis = _arg(node, 1, "dim", 0) % rank
    start, step = _arg(node, 2, "start") or 0, _arg(node, 4, "step", 1)
    first = f.at(start, ())
    if first.is_negative:
        first = first + size_expr(source.meta["val"].shape[axis])
    places: list[Any] = [coordinate(i) for i in range(rank)]
    places[axis] = first + step * places[axis]
    return f.at(source, places)


@_rule("select")
def _select(f: IndexFunctions, node: fx.Node) -> Any:
    source: Any = node.args[0]
    rank = source.meta["val"].dim()
    axis, index = node.args[1] % rank, f.at(node.args[2], ())  # type: ignore[operator]
    if index.is_negative:
        index = index + size_expr(source.meta["val"].shape[axis])
    return f.at(source, [index if i == axis else coordinate(i - (i > axis)) for i in range(rank)])


@_rule("index")
def _index(f: IndexFunctions, node: fx.Node) -> Any:
    """A lookup whose index tensors stand for the leading axes; they broadcast to the result's leading axes."""
    source: Any = node.args[0]
    indices: Any = node.args[1]
    if any(i is None or i.meta["val"].dtype is torch.bool for i in indices):
        return None
    rank = node.meta["val"].dim()
    trailing = source.meta["val"].dim() - len(indices)
    lead = rank - trailing
    places = []
    for index in indices:
        shape = index.meta["val"].shape
        offset = lead - len(shape)
        places.append(f.at(index, [zero_if_one(s, coordinate(offset + i)) for i, s in enumerate(shape)]))
    if any(place.is_negative for place in places):
        return None
    return f.at(source, [*places, *(coordinate(lead + i) for i in range(trailing))])


@_rule("add", "sub", "rsub", "mul", "neg", "abs", "div")
def _arithmetic(f: IndexFunctions, node: fx.Node) -> Any:
    if node.meta["val"].dtype is torch.bool:  # sums and products of truth values are such
        join: Any = {"add": sympy.Or, "mul": sympy.And}.get(op_name(node))
        return join and join(*(as_condition(f.broadcast(node, a)) for a in node.args[:2]))
    values = [number(f.broadcast(node, a)) for a in node.args[:2]]
    alpha = sympy.sympify(node.kwargs.get("alpha", 1))
    match op_name(node):
        case "add":
            result = values[0] + alpha * values[1]
        case "sub":
            result = values[0] - alpha * values[1]
        case "rsub":
            result = values[1] - alpha * values[0]
        case "mul":
            result = values[0] * values[1]
        case "div":
            mode = node.kwargs.get("rounding_mode")
            quotient = values[0] / values[1]
            result = sympy.floor(quotient) if mode == "floor" else quotient if mode is None else None
        case "neg":
            result = -values[0]
        case _:
            result = sympy.Abs(values[0])
    return None if result is None else sympy.piecewise_fold(sympy.expand(result))


@_rule("floor_divide")
def _floor_divide(f: IndexFunctions, node: fx.Node) -> Any:
    a, b = (number(f.broadcast(node, x)) for x in node.args[:2])
    return sympy.floor(a / b)


_RELATIONS = {"le": sympy.Le, "lt": sympy.Lt, "ge": sympy.Ge, "gt": sympy.Gt, "eq": sympy.Eq, "ne": sympy.Ne}


@_rule(*_RELATIONS)
def _compare(f: IndexFunctions, node: fx.Node) -> Any:
    a, b = (f.broadcast(node, x) for x in node.args[:2])
    return compare(_RELATIONS[op_name(node)], a, b)


@_rule("logical_and", "bitwise_and", "logical_or", "bitwise_or", "logical_not", "bitwise_not", "__and__", "__or__")
def _logic(f: IndexFunctions, node: fx.Node) -> Any:
    if node.meta["val"].dtype is not torch.bool:
        return None
    values = [as_condition(f.broadcast(node, x)) for x in node.args[:2]]
    name = op_name(node)
    return sympy.And(*values) if "and" in name else sympy.Or(*values) if "or" in name else sympy.Not(values[0])


@_rule("where")
def _where(f: IndexFunctions, node: fx.Node) -> Any:
    condition, yes, no = (f.broadcast(node, x) for x in node.args[:3])
    return _choice(node, as_condition(condition), yes, no)


@_rule("masked_fill")
def _masked_fill(f: IndexFunctions, node: fx.Node) -> Any:
    value, mask, fill = (f.broadcast(node, x) for x in node.args[:3])
    return _choice(node, as_condition(mask), fill, value)


def _choice(node: fx.Node, condition: Any, yes: Any, no: Any) -> Any:
    if node.meta["val"].dtype is torch.bool:
        yes, no = as_condition(yes), as_condition(no)
        return sympy.Or(sympy.And(condition, yes), sympy.And(sympy.Not(condition), no))
    return sympy.piecewise_fold(sympy.Piecewise((number(yes), condition), (number(no), True)))


@_rule("tril", "triu")
def _triangle(f: IndexFunctions, node: fx.Node) -> Any:
    value = f.broadcast(node, node.args[0])
    rank = node.meta["val"].dim()
    row, column = coordinate(rank - 2), coordinate(rank - 1)
    shift = sympy.Integer(_arg(node, 1, "diagonal", 0))
    kept = column - row <= shift if op_name(node) == "tril" else column - row >= shift
    if node.meta["val"].dtype is torch.bool:
        return sympy.And(kept, as_condition(value))
    return sympy.piecewise_fold(sympy.Piecewise((value, kept), (0, True)))


@_rule("diff")
def _diff(f: IndexFunctions, node: fx.Node) -> Any:
    """First differences of an affine function; what is put before it must continue it."""
    source: Any = node.args[0]
    rank = source.meta["val"].dim()
    axis = _arg(node, 2, "dim", -1) % rank
    prepend, append = _arg(node, 3, "prepend"), _arg(node, 4, "append")
    if _arg(node, 1, "n", 1) != 1 or append is not None:
        return None
    x = coordinate(axis)
    value = f.read(source)
    step = sympy.expand(value.xreplace({x: x + 1}) - value)
    if x in step.free_symbols or step.has(sympy.Function):
        return None
    if prepend is None:
        return step
    places = [sympy.Integer(0) if i == axis else coordinate(i) for i in range(rank)]
    if prepend.meta["val"].shape[axis] != 1 or f.at(prepend, places) != sympy.expand(value.xreplace({x: 0}) - step):
        return None
    return step


@_rule("cumsum")
def _cumulative_sum(f: IndexFunctions, node: fx.Node) -> Any:
    """Of a value that is the same everywhere along the axis."""
    source: Any = node.args[0]
    rank = source.meta["val"].dim()
    if rank == 0:
        return number(f.read(source))
    value, x = number(f.read(source)), coordinate(node.args[1] % rank)  # type: ignore[operator]
    return None if x in value.free_symbols else sympy.expand(value * (x + 1))
