"""Read attention that is spelled out: from a softmax down to the product of queries and keys, and up to the values.

Between the product and the softmax stand, in any order: a scale, a soft cap, masks and biases that are added, masks
that fill or choose, casts, and reshapes of the leading axes (heads folded into the batch, windows unfolded from it).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from ...ir.coordinates import choice_of, coordinate, number
from ...ir.index_functions import IndexFunctions
from ...ir.masks import HIDES
from ...ir.program import Program
from ...ir.rewrite import is_op
from .arguments import argument
from .constants import scalar_of

aten = torch.ops.aten

SOFTMAX = (aten.softmax, aten._softmax, aten._safe_softmax)
_DEPTH = 16  # operators between a softmax and its product
_NEVER = -1e30  # a bound below every score


class NoAttention(Exception):
    """Why a softmax is no attention that can be raised; the text is the reason."""


@dataclass(frozen=True)
class Added:
    """A tensor added to the scores, times a factor; ``inner`` if it has the leading axes of queries and keys."""

    tensor: fx.Node
    factor: float
    inner: bool


@dataclass(frozen=True)
class Hidden:
    """A condition on keys: ``visible`` if it is true where a key is seen; ``fill`` is the score where it is not."""

    condition: fx.Node
    visible: bool
    fill: float
    inner: bool


@dataclass
class Scores:
    """Attention that was read.

    Attributes:
        query: [..., queries, head_dim].
        key_t: the keys as the product reads them, [..., head_dim, keys].
        value: [..., keys, value_dim].
        scale: factor of the product.
        softcap: bound of the scores, or None.
        added: tensors added to the scores.
        hidden: conditions that choose between the scores and a very negative number.
        lead: the sizes (arguments of a reshape) of the scores when queries and keys have other leading axes.
        back: the sizes to which the weights were reshaped before they met the values, or None.
        sinks: the tensor of attention sinks, or None.
        by: a factor of the product that differs between heads, [heads, 1, 1], or None.
        output: the product of weights and values.
    """

    query: fx.Node
    key_t: fx.Node
    value: fx.Node
    output: fx.Node
    scale: float = 1.0
    softcap: float | None = None
    added: list[Added] = field(default_factory=list)
    hidden: list[Hidden] = field(default_factory=list)
    lead: list[Any] | None = None
    back: list[Any] | None = None
    sinks: fx.Node | None = None
    by: fx.Node | None = None


def read_scores(program: Program, softmax: fx.Node, functions: IndexFunctions) -> Scores:
    """Read the attention around a softmax.

    Raises:
        NoAttention: it is none, or none that one operator can say.
    """
    rank = softmax.meta["val"].dim()
    if int(softmax.args[1]) % rank != rank - 1:  # type: ignore[call-overload]
        raise NoAttention("the softmax is not over the last axis")
    reader = _Reader(program, functions)
    start: Any = softmax.args[0]
    found = reader.down(start)
    output, value, back = _up(softmax, found.sinks is not None, reader.number)
    found.output, found.value, found.back = output, value, back or found.back
    if found.lead is not None and found.back is None and value.meta["val"].dim() != rank:
        raise NoAttention("the weights and the values have other leading axes")
    if found.back is not None and found.lead is None:
        raise NoAttention("the weights are reshaped, but not the scores")
    return found


class _Reader:
    def __init__(self, program: Program, functions: IndexFunctions) -> None:
        self.program = program
        self.functions = functions

    def number(self, value: Any) -> float | None:
        return scalar_of(self.program, value)

    def down(self, node: fx.Node) -> Scores:
        """From the softmax's operand to the product."""
        node, sinks = self._without_sinks(node)
        found = Scores(node, node, node, node, sinks=sinks)
        factor = 1.0
        for _ in range(_DEPTH):
            args: Any = node.args
            if is_op(node, aten.matmul):
                return self._product(found, node, factor)
            if is_op(node, aten.mul, aten.div) and (scaled := self._scaled(node)) is not None:
                node, by = scaled
                factor *= by
            elif is_op(node, aten.mul) and found.by is None and found.softcap is None and _is_per_head(args[1]):
                if found.lead is None and (found.back is not None or self._folds(args[0])):
                    raise NoAttention("its scores are scaled head by head after they are reshaped")
                found.by, node = args[1], args[0]
            elif is_op(node, aten.add, aten.sub):
                node = self._added(found, node, factor)
            elif is_op(node, aten.masked_fill):
                node = self._filled(found, args[0], args[1], self.number(args[2]), False, factor)
            elif is_op(node, aten.where):
                if (fill := self.number(args[2])) is not None:
                    node = self._filled(found, args[1], args[0], fill, True, factor)
                else:
                    node = self._filled(found, args[2], args[0], self.number(args[1]), False, factor)
            elif is_op(node, aten.maximum) and (bound := self.number(args[1])) is not None and bound <= _NEVER:
                node = args[0]  # a floor below every score
            elif is_op(node, aten.tanh):
                if found.softcap is not None:
                    raise NoAttention("two soft caps")
                found.softcap, factor, node = factor, 1.0, args[0]
            elif is_op(node, aten.reshape):
                node = self._regrouped(found, node)
            elif is_op(node, aten._to_copy) and args[0].meta["val"].dtype.is_floating_point:
                node = args[0]
            else:
                raise NoAttention(f"its scores come from {_name(node)}, not from a product of queries and keys")
        raise NoAttention("its scores do not come from a product of queries and keys")

    def _folds(self, node: fx.Node) -> bool:
        """Whether a reshape stands between here and the product."""
        while not is_op(node, aten.matmul):
            if is_op(node, aten.reshape) or not isinstance(node.args[0], fx.Node):
                return True
            node = node.args[0]
        return False

    def _product(self, found: Scores, node: fx.Node, factor: float) -> Scores:
        query, key_t = node.args[:2]
        for operand in (query, key_t):
            if not isinstance(operand, fx.Node) or operand.op == "get_attr" or operand.meta["val"].dim() < 3:
                raise NoAttention("its scores are a product by a weight")
        if factor <= 0:
            raise NoAttention("its scores have a negative scale")
        if len(node.users) != 1:
            raise NoAttention("its scores are used elsewhere too")
        found.query, found.key_t = query, key_t  # type: ignore[assignment]
        # cap * tanh(g * product) is cap * tanh(g * cap * product / cap).
        found.scale = factor if found.softcap is None else factor * found.softcap
        return found

    def _scaled(self, node: fx.Node) -> tuple[fx.Node, float] | None:
        a, b = node.args[:2]
        by = self.number(b)
        if by is not None and isinstance(a, fx.Node):
            return (a, by) if is_op(node, aten.mul) else (a, 1 / by) if by else None
        by = self.number(a)
        return (b, by) if by is not None and isinstance(b, fx.Node) and is_op(node, aten.mul) else None

    def _added(self, found: Scores, node: fx.Node, factor: float) -> fx.Node:
        a, b = node.args[:2]
        alpha: Any = node.kwargs.get("alpha", 1)
        sign = -1.0 if is_op(node, aten.sub) else 1.0
        if self.number(b) is not None and isinstance(a, fx.Node) and found.softcap is None:
            return a  # a softmax does not see what all scores have in common
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
            raise NoAttention("a number is added under the soft cap")
        if found.softcap is not None or found.by is not None:
            raise NoAttention("a bias is added under the soft cap, or before the scores are scaled head by head")
        kept = self._multiplied(a, b, factor * sign * float(alpha))
        if kept is not None:
            found.added.append(Added(b, factor * sign * float(alpha), found.lead is not None))
            return kept
        if self._leads(a, _DEPTH):
            found.added.append(Added(b, factor * sign * float(alpha), found.lead is not None))
            return a
        if self._leads(b, _DEPTH) and sign == 1.0 and alpha == 1:
            found.added.append(Added(a, factor, found.lead is not None))
            return b
        raise NoAttention("its scores are a sum without a product of queries and keys")

    def _multiplied(self, a: fx.Node, b: fx.Node, factor: float) -> fx.Node | None:
        """``scores * mask + lowest * (1 - mask)``, where the mask is 0 or 1: the scores; None if it is not that."""
        if not is_op(a, aten.mul) or not all(isinstance(x, fx.Node) for x in a.args):
            return None
        scores, mask = a.args
        if not isinstance(scores, fx.Node) or not isinstance(mask, fx.Node) or not self._leads(scores, _DEPTH):
            return None
        rank = a.meta["val"].dim()
        keep, add = (self.functions.at(x, _aligned(x, rank)) for x in (mask, b))
        keep, add = (sympy.piecewise_fold(number(x)) for x in (keep, add))
        seen, hidden = (_where(keep, add, value) for value in (1, 0))
        hides = hidden is not None and hidden.is_number and hidden * factor <= HIDES
        return scores if seen == 0 and hides else None

    def _leads(self, node: fx.Node, depth: int) -> bool:
        """Whether a chain of what stands between product and softmax leads from here to a product."""
        if depth == 0 or not isinstance(node, fx.Node):
            return False
        if is_op(node, aten.matmul):
            return all(a.op != "get_attr" for a in node.all_input_nodes)
        args: Any = node.args
        if is_op(node, aten.mul, aten.div):
            scaled = self._scaled(node)
            if scaled is not None:
                return self._leads(scaled[0], depth - 1)
            return is_op(node, aten.mul) and any(self._leads(a, depth - 1) for a in args[:2])
        if is_op(node, aten.add, aten.sub):
            return any(self._leads(a, depth - 1) for a in args[:2])
        if is_op(node, aten.where):
            return any(self._leads(a, depth - 1) for a in args[1:3])
        if is_op(node, aten.masked_fill, aten.tanh, aten.maximum, aten._to_copy, aten.reshape):
            return self._leads(args[0], depth - 1)
        return False

    def _filled(
        self, found: Scores, scores: Any, condition: Any, fill: float | None, visible: bool, factor: float
    ) -> fx.Node:
        if fill is None or not isinstance(scores, fx.Node):
            raise NoAttention("its scores are chosen from two tensors")
        if fill > HIDES or factor <= 0:
            raise NoAttention(f"masked scores become {fill:g}, which does not hide them")
        if found.softcap is not None:
            raise NoAttention("a mask stands under the soft cap")
        found.hidden.append(Hidden(condition, visible, fill, found.lead is not None))
        return scores

    def _regrouped(self, found: Scores, node: fx.Node) -> fx.Node:
        source: Any = node.args[0]
        before, after = source.meta["val"].shape, node.meta["val"].shape
        if tuple(map(str, before[-2:])) != tuple(map(str, after[-2:])):
            raise NoAttention("its scores are reshaped across queries and keys")
        if any(mask.inner for mask in (*found.added, *found.hidden)):
            raise NoAttention("its scores are reshaped twice, with masks between")
        if not found.added and not found.hidden and found.lead is None and found.back is None:
            found.back = list(node.args[1])  # type: ignore[arg-type]
            return source  # a softmax does not see the leading axes: as if reshaped after it
        if found.lead is None:
            found.lead = list(node.args[1])  # type: ignore[arg-type]
        return source

    def _without_sinks(self, node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
        """Scores with one more column for each head; the greatest score may have been subtracted from all."""
        if is_op(node, aten.sub) and _greatest_of(node.args[1]) is node.args[0]:
            node = node.args[0]  # type: ignore[assignment]
        if not is_op(node, aten.cat):
            return node, None
        parts: Any = node.args[0]
        rank = node.meta["val"].dim()
        last = rank > 2 and argument(node, "dim") % rank == rank - 1
        if len(parts) != 2 or not last or parts[1].meta["val"].shape[-1] != 1:
            raise NoAttention("its scores are a concatenation")
        source, heads = parts[1], parts[0].meta["val"].shape[-3]
        while is_op(source, aten.expand, aten._to_copy):
            source = source.args[0]
        shape = source.meta["val"].shape
        if len(shape) < 3 or shape[-3] != heads or any(s != 1 for i, s in enumerate(shape) if i != len(shape) - 3):
            raise NoAttention("its scores have a further column that is no sink of the heads")
        return parts[0], source


def _is_per_head(factor: Any) -> bool:
    """Whether a tensor is one number for each head: [..., heads, 1, 1]."""
    if not isinstance(factor, fx.Node):
        return False
    shape = factor.meta["val"].shape
    return len(shape) >= 3 and shape[-1] == 1 and shape[-2] == 1


def _aligned(node: fx.Node, rank: int) -> list[Any]:
    """The coordinates at which a tensor is read when it is broadcast to a rank."""
    shape = node.meta["val"].shape
    return [0 if s == 1 else coordinate(rank - len(shape) + i) for i, s in enumerate(shape)]


def _where(keep: Any, add: Any, value: int) -> Any:
    """What is added where the mask ``keep`` has a value, if it can have no others than 0 and 1."""
    kept, added = choice_of(keep), choice_of(add)
    if kept is None or added is None or (kept[0], kept[2]) != (1, 0) or added[1] not in (kept[1], ~kept[1]):
        return None
    return added[0] if (added[1] == kept[1]) == bool(value) else added[2]


def _greatest_of(node: Any) -> Any:
    """The scores of which a value is the greatest one, or None."""
    if isinstance(node, fx.Node) and node.target is operator.getitem and node.args[1] == 0:
        node = node.args[0]
    return node.args[0] if is_op(node, aten.amax, aten.max) else None


def _up(
    softmax: fx.Node, sinks: bool, number: Callable[[Any], float | None]
) -> tuple[fx.Node, fx.Node, list[Any] | None]:
    """From the softmax to the product with the values."""
    node, back = softmax, None
    for _ in range(_DEPTH):
        users = _without_guard(node)
        if len(users) != 1:
            raise NoAttention(f"its weights have {len(users)} users: " + ", ".join(sorted({_name(u) for u in users})))
        user = users[0]
        args: Any = user.args
        if is_op(user, aten.matmul):
            if args[0] is not node or not isinstance(args[1], fx.Node):
                raise NoAttention("its weights are the second factor of a product")
            if args[1].meta["val"].dim() < 3:
                raise NoAttention("its weights are multiplied by a weight")
            return user, args[1], back
        if is_op(user, aten._to_copy) and user.meta["val"].dtype.is_floating_point:
            node = user
        elif is_op(user, aten.where) and args[2] is node and number(args[1]) == 0:
            node = user  # rows without any key become zero: so does the operator
        elif is_op(user, aten.reshape) and back is None:
            before, after = node.meta["val"].shape, user.meta["val"].shape
            if tuple(map(str, before[-2:])) != tuple(map(str, after[-2:])):
                raise NoAttention("its weights are reshaped across queries and keys")
            node, back = user, list(args[1])
        elif is_op(user, aten.slice) and sinks and _drops_last(user):
            node, sinks = user, False
        else:
            raise NoAttention(f"its weights go to {_name(user)}, not to a product with values")
    raise NoAttention("its weights do not go to a product with values")


def _without_guard(node: fx.Node) -> list[fx.Node]:
    """The users of weights, without the tests for rows that have no key, when they guard these very weights."""
    users = list(node.users)
    tests = [u for u in users if is_op(u, aten.isnan, aten.ne) and all(is_op(v, aten.where) for v in u.users)]
    guards = [u for u in users if is_op(u, aten.where) and u.args[2] is node]
    if len(guards) == 1 and _guards(guards[0], node):
        return [u for u in users if u not in tests]
    return users


def _guards(where: fx.Node, weights: fx.Node) -> bool:
    """``where(no key at all, 0, weights)``: the condition is on the weights themselves or on their scores."""
    condition: Any = where.args[0]
    source: Any = condition
    while is_op(source, aten.isnan, aten.eq, aten.ne, aten.all, aten.logical_not, aten.amax):
        source = source.args[0]
    softmax: Any = weights
    while not is_op(softmax, *SOFTMAX):
        softmax = softmax.args[0]
    return source in (weights, softmax, softmax.args[0])


def _drops_last(node: fx.Node) -> bool:
    before, after = node.args[0].meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
    return str(before[-1] - 1) == str(after[-1]) and (node.args[2] if len(node.args) > 2 else 0) in (0, None)


def _name(node: fx.Node) -> str:
    if node.op != "call_function":
        return {"get_attr": "a weight", "placeholder": "an input", "output": "an output"}.get(node.op, node.op)
    return str(node.target).removesuffix(".default")


def is_default_scale(scale: float, head_dim: Any) -> bool:
    """Whether a scale is what attention takes when none is given, 1/sqrt(head_dim)."""
    return isinstance(head_dim, int) and math.isclose(scale, 1 / math.sqrt(head_dim), rel_tol=1e-6)
