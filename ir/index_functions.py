"""Tensors that are functions of their own coordinates: positions, causal masks, windows, ALiBi slopes.

Models build masks from ``arange`` and comparisons, in many ways. Here such a tensor is read back as an expression over
its coordinates: ``le(arange(S)[None, :], arange(S)[:, None])`` is ``x1 <= x0``. What is no function of coordinates (an
input, a computed value) stays as an unknown function of its own coordinates, so that a mask of padding and causality
reads ``(x3 <= x2) & (mask(x0, x3) != 0)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx

from .dims import size_expr
from .flow import op_name
from .program import Program

_LARGEST_BAND = 8192
_LIMIT = 400  # operators in one expression; a mask needs a few dozen


def coordinate(axis: int) -> sympy.Symbol:
    """The symbol of the coordinate along an axis."""
    return sympy.Symbol(f"x{axis}", integer=True, nonnegative=True)


def is_condition(value: Any) -> bool:
    """Whether an expression is a condition, and no number (a sympy symbol may be both)."""
    return isinstance(value, Boolean) and not isinstance(value, sympy.Symbol)


class IndexFunctions:
    """Reads values of one graph as functions of coordinates; each node once.

    Args:
        program: where weights are looked up, so that a stored triangle or band is read as well; None: they are unknown.

    Attributes:
        leaves: the node behind each unknown function.
    """

    def __init__(self, program: Program | None = None) -> None:
        self.program = program
        self.leaves: dict[Any, fx.Node] = {}
        self._known: dict[fx.Node, Any] = {}

    def read(self, node: fx.Node) -> Any:
        """The value of ``node`` at coordinates ``x0, x1...``: a number's expression, or a condition for booleans."""
        stack = [node]
        while stack:
            current = stack[-1]
            if current in self._known:
                stack.pop()
                continue
            rule = _RULES.get(op_name(current))
            operands = [] if rule is None else [a for a in current.all_input_nodes if _is_tensor(a)]
            waiting = [a for a in operands if a not in self._known]
            if waiting:
                stack.extend(waiting)
                continue
            stack.pop()
            found = None
            if rule is not None and _is_tensor(current):
                try:
                    found = rule(self, current)
                except (TypeError, ValueError, IndexError, AttributeError):
                    found = None  # arguments in a form that the rule does not know: an unknown function, then
            if found is None or found.count_ops() > _LIMIT:
                found = self._leaf(current)
            self._known[current] = found
        return self._known[node]

    def at(self, node: Any, coordinates: Sequence[Any]) -> Any:
        """A tensor's value at other coordinates, or a plain number as it is."""
        if not isinstance(node, fx.Node):
            return _literal(node)
        if not _is_tensor(node):
            return size_expr(node.meta["val"])
        return self.read(node).xreplace({coordinate(i): c for i, c in enumerate(coordinates)})

    def broadcast(self, node: fx.Node, operand: Any) -> Any:
        """An operand's value at the coordinates of ``node``, to whose shape it is broadcast."""
        if not isinstance(operand, fx.Node) or not _is_tensor(operand):
            return self.at(operand, ())
        rank, shape = node.meta["val"].dim(), operand.meta["val"].shape
        lead = rank - len(shape)
        return self.at(operand, [_zero_if_one(s, coordinate(lead + i)) for i, s in enumerate(shape)])

    def within(self, value: Any, shape: Sequence[Any]) -> Any:
        """An expression, knowing that each coordinate is below the size of its axis."""
        sizes = {coordinate(i): size_expr(s) for i, s in enumerate(shape)}

        def whole(fraction: Any) -> Any:
            terms = sympy.Add.make_args(sympy.expand(fraction))
            small = [t for t in terms if any(t == x / size for x, size in sizes.items())]
            rest = sympy.Add(*(t for t in terms if t not in small))
            return rest if len(small) == 1 and rest.is_integer else sympy.floor(fraction)

        def remainder(number: Any, size: Any) -> Any:
            terms: Any = sympy.Add.make_args(sympy.expand(number))
            small = [t for t in terms if sizes.get(t) == size]
            others = all((t / size).is_integer for t in terms if t not in small)
            return small[0] if len(small) == 1 and others else sympy.Mod(number, size)

        return value.replace(sympy.floor, whole).replace(sympy.Mod, remainder)

    def _leaf(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return sympy.Symbol(f"n_{node.name}")
        if node.op == "get_attr" and (constant := self._constant(node)) is not None:
            return constant
        if node.op == "get_attr" and (band := self._band(node)) is not None:
            return band if value.dtype is torch.bool else number(band)
        if node.op == "get_attr" and (ramp := self._ramp(node)) is not None:
            return ramp
        function: Any = sympy.Function(f"v_{node.name}", real=True)
        self.leaves[function] = node
        applied = function(*(_zero_if_one(s, coordinate(i)) for i, s in enumerate(value.shape)))
        return sympy.Ne(applied, 0) if value.dtype is torch.bool else applied

    def _constant(self, node: fx.Node) -> Any | None:
        """A stored table of one number."""
        weight = None if self.program is None else self.program.weights.get(str(node.target))
        size = 0 if weight is None else math.prod(weight.shape)
        if weight is None or weight.is_meta or not 0 < size <= _LARGEST_BAND**2 or weight.dtype.is_complex:
            return None
        values = weight.tensor().flatten()
        return _literal(values[0].item()) if size == 1 or bool((values == values[0]).all()) else None

    def _band(self, node: fx.Node) -> Any | None:
        """A stored mask [..., N, N] of zeros and ones: ones below the diagonal, perhaps only so far below it."""
        weight = None if self.program is None else self.program.weights.get(str(node.target))
        if weight is None or weight.is_meta or len(weight.shape) < 2 or weight.shape[-1] != weight.shape[-2]:
            return None
        size, rank = weight.shape[-1], len(weight.shape)
        if size < 2 or math.prod(weight.shape) != size * size or size > _LARGEST_BAND:
            return None
        values = weight.tensor().reshape(size, size)
        seen = values != 0
        if not bool((values == seen.to(values.dtype)).all()):
            return None
        width = int(seen[-1].sum())
        ones = torch.ones(size, size, dtype=torch.bool).tril()
        if not torch.equal(seen, ones & ~ones.tril(-width)):
            return None
        row, column = coordinate(rank - 2), coordinate(rank - 1)
        return column <= row if width == size else sympy.And(column <= row, column > row - width)

    def _ramp(self, node: fx.Node) -> Any | None:
        """A stored table whose rows rise evenly along the last axis (ALiBi slopes times positions)."""
        weight = None if self.program is None else self.program.weights.get(str(node.target))
        if weight is None or weight.is_meta or not weight.dtype.is_floating_point or not weight.shape:
            return None
        size = weight.shape[-1]
        if size < 3 or math.prod(weight.shape) > _LARGEST_BAND * 64:
            return None
        steps = weight.tensor().double().diff(dim=-1)
        if not bool(steps.any()) or float((steps - steps[..., :1]).abs().max()) > 1e-6 * float(steps.abs().max()):
            return None
        rows = [_zero_if_one(s, coordinate(i)) for i, s in enumerate(weight.shape[:-1])]
        slope, base = (sympy.Function(f"{kind}_{node.name}", real=True)(*rows) for kind in ("slope", "base"))
        return slope * coordinate(len(weight.shape) - 1) + base


def _literal(value: Any) -> Any:
    """A number or truth value; whole floats as integers, which sympy would not call equal."""
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    return sympy.Integer(int(value)) if isinstance(value, float) and value.is_integer() else sympy.sympify(value)


def _is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def _zero_if_one(size: Any, symbol: Any) -> Any:
    return sympy.Integer(0) if isinstance(size, int) and size == 1 else symbol


_RULES: dict[str, Callable[[IndexFunctions, fx.Node], Any]] = {}


def _rule(*names: str) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        for name in names:
            _RULES[name] = function
        return function

    return register


def _arg(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def number(value: Any) -> Any:
    """A condition as the number 0 or 1; a number as it is."""
    return sympy.Piecewise((1, value), (0, True)) if is_condition(value) else value


def _condition(value: Any) -> Any:
    return value if is_condition(value) else compare(sympy.Ne, value, sympy.Integer(0))


def choice_of(value: Any) -> tuple[Any, Any, Any] | None:
    """A choice between two values: the first, its condition, and the other one; None for anything else."""
    if not isinstance(value, sympy.Piecewise) or len(value.args) != 2:
        return None
    branches: Any = value.args
    (yes, condition), (no, _) = branches
    return yes, condition, no


def compare(relation: Any, a: Any, b: Any) -> Any:
    """A comparison; of a choice between numbers, it is the condition of the choice or its opposite."""
    a, b = number(a), number(b)
    for side, other, swapped in ((a, b, False), (b, a, True)):
        if (choice := choice_of(side)) is not None:
            yes, condition, no = choice
            first, second = (relation(other, v) if swapped else relation(v, other) for v in (yes, no))
            if all(v in (sympy.true, sympy.false) for v in (first, second)):
                if first == second:
                    return first
                return condition if first == sympy.true else sympy.Not(condition)
    return relation(a, b)


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
    return _condition(value) if node.meta["val"].dtype is torch.bool else number(value)


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
        return _condition(value)
    if source.is_floating_point and not target.is_floating_point:
        return None  # truncates
    return number(value)


@_rule("transpose", "permute", "t", "mT", "numpy_T")
def _permute(f: IndexFunctions, node: fx.Node) -> Any:
    from .views import permutation

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
        places.append(f.at(index, [_zero_if_one(s, coordinate(offset + i)) for i, s in enumerate(shape)]))
    if any(place.is_negative for place in places):
        return None
    return f.at(source, [*places, *(coordinate(lead + i) for i in range(trailing))])


@_rule("add", "sub", "rsub", "mul", "neg", "abs", "div")
def _arithmetic(f: IndexFunctions, node: fx.Node) -> Any:
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
    values = [_condition(f.broadcast(node, x)) for x in node.args[:2]]
    name = op_name(node)
    return sympy.And(*values) if "and" in name else sympy.Or(*values) if "or" in name else sympy.Not(values[0])


@_rule("where")
def _where(f: IndexFunctions, node: fx.Node) -> Any:
    condition, yes, no = (f.broadcast(node, x) for x in node.args[:3])
    return _choice(node, _condition(condition), yes, no)


@_rule("masked_fill")
def _masked_fill(f: IndexFunctions, node: fx.Node) -> Any:
    value, mask, fill = (f.broadcast(node, x) for x in node.args[:3])
    return _choice(node, _condition(mask), fill, value)


def _choice(node: fx.Node, condition: Any, yes: Any, no: Any) -> Any:
    if node.meta["val"].dtype is torch.bool:
        yes, no = _condition(yes), _condition(no)
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
        return sympy.And(kept, _condition(value))
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
    axis = node.args[1] % source.meta["val"].dim()  # type: ignore[operator]
    value, x = number(f.read(source)), coordinate(axis)
    return None if x in value.free_symbols else sympy.expand(value * (x + 1))
