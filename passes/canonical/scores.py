"""Read attention that is spelled out: from a softmax down to the product of queries and keys, and up to the values.

Between the product and the softmax stand, in any order: a scale, a soft cap, masks and biases that are added, masks
that fill or choose, casts, and reshapes of the leading axes (heads folded into the batch, windows unfolded from it).
"""

from __future__ import annotations

import math
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
from .attention_weights import follow_weights, greatest_of, name_of
from .constants import scalar_of
from .polynomial import ROUNDING
from .refusal import NoAttention
from .sizes import same_shape

aten = torch.ops.aten

_DEPTH = 16  # operators between a softmax and its product
LOWEST = -1e30
"""A number below every score, so much that a score added to it is lost."""


@dataclass(frozen=True)
class Added:
    """A tensor added to the scores, times a factor; ``inner`` if it has the leading axes of queries and keys."""

    tensor: fx.Node
    factor: float
    inner: bool


@dataclass(frozen=True)
class Hidden:
    """A condition on keys: ``visible`` if it is true where a key is seen; ``fill`` is the score where it is not.

    Where the condition was spelled as a factor of 0 or 1, ``added`` is what was added to the product with it.
    """

    condition: fx.Node
    visible: bool
    fill: float
    inner: bool
    added: Added | None = None


@dataclass(frozen=True)
class Floor:
    """No score is below a number that is below every product of queries and keys."""

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
        masks: what is added to the scores, conditions that choose between them and a very negative number, and
            floors below them; the outermost first.
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
    masks: list[Added | Hidden | Floor] = field(default_factory=list)
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
    found = reader.down(softmax)
    output, value, back = follow_weights(softmax, found.sinks is not None, reader.number)
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
        self.bounded: set[fx.Node] = set()  # scores whose greatest one was subtracted from them
        self.shared = False  # whether something else reads the scores

    def number(self, value: Any) -> float | None:
        return scalar_of(self.program, value)

    def down(self, softmax: fx.Node) -> Scores:
        """From the softmax's operand to the product."""
        node, sinks = self._without_sinks(softmax.args[0])
        found = Scores(node, node, node, node, sinks=sinks)
        self.shared = is_op(node, aten.matmul) and len(node.users) != 1 and node not in self.bounded
        factor = 1.0
        for _ in range(_DEPTH):
            if is_op(node, aten.matmul):
                return self._product(found, node, factor)
            below, factor = self._below(found, node, factor)
            if not is_op(node, aten.reshape) and not same_shape(node.meta["val"], below.meta["val"]):
                raise NoAttention("its scores are broadcast on their way to the softmax")
            node = below
            self.shared = self.shared or (len(node.users) != 1 and node not in self.bounded)
        raise NoAttention("its scores do not come from a product of queries and keys")

    def _below(self, found: Scores, node: fx.Node, factor: float) -> tuple[fx.Node, float]:
        """One step from the softmax to the product: the next node, and what the scores are multiplied by above it."""
        args: Any = node.args
        if is_op(node, aten.mul, aten.div) and (scaled := self._scaled(node)) is not None:
            return scaled[0], factor * scaled[1]
        if is_op(node, aten.mul) and found.by is None and found.softcap is None and _is_per_head(args[1]):
            if found.lead is None and (found.back is not None or self._folds(args[0])):
                raise NoAttention("its scores are scaled head by head after they are reshaped")
            found.by = args[1]
            return args[0], factor
        if is_op(node, aten.add, aten.sub):
            return self._added(found, node, factor), factor
        if is_op(node, aten.masked_fill):
            return self._filled(found, args[0], args[1], self.number(args[2]), False, factor), factor
        if is_op(node, aten.where):
            if (fill := self.number(args[2])) is not None:
                return self._filled(found, args[1], args[0], fill, True, factor), factor
            return self._filled(found, args[2], args[0], self.number(args[1]), False, factor), factor
        if is_op(node, aten.maximum) and (bound := self.number(args[1])) is not None and bound * factor <= LOWEST:
            found.masks.append(Floor(found.lead is not None))
            return args[0], factor
        if is_op(node, aten.tanh):
            if found.softcap is not None or found.by is not None:
                raise NoAttention("two soft caps, or one before the scores are scaled head by head")
            found.softcap = factor
            return args[0], 1.0
        if is_op(node, aten.reshape):
            return self._regrouped(found, node), factor
        if is_op(node, aten._to_copy) and all(n.meta["val"].dtype.is_floating_point for n in (node, args[0])):
            return args[0], factor
        raise NoAttention(f"its scores come from {name_of(node)}, not from a product of queries and keys")

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
        if self.shared:
            raise NoAttention("its scores are used elsewhere too")
        found.query, found.key_t = query, key_t  # type: ignore[assignment]
        # cap * tanh(g * product) is cap * tanh(g * cap * product / cap).
        found.scale = factor if found.softcap is None else factor * found.softcap
        return found

    def _scaled(self, node: fx.Node) -> tuple[fx.Node, float] | None:
        if not is_op(node, aten.mul.Tensor, aten.div.Tensor):
            return None  # a quotient that is rounded
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
        inner = found.lead is not None
        second = Added(b, factor * sign * float(alpha), inner)
        chosen = self._multiplied(a, second)
        if chosen is not None:
            found.masks.append(chosen[1])
            return chosen[0]
        if self._leads(a, _DEPTH):
            found.masks.append(second)
            return a
        if self._leads(b, _DEPTH) and sign == 1.0 and alpha == 1:
            found.masks.append(Added(a, factor, inner))
            return b
        raise NoAttention("its scores are a sum without a product of queries and keys")

    def _multiplied(self, a: fx.Node, added: Added) -> tuple[fx.Node, Hidden] | None:
        """``scores * mask + lowest * (1 - mask)``, where the mask is 0 or 1: the scores, and what is hidden."""
        if not is_op(a, aten.mul) or not all(isinstance(x, fx.Node) for x in a.args):
            return None
        scores, mask = a.args
        if not isinstance(scores, fx.Node) or not isinstance(mask, fx.Node) or not self._leads(scores, _DEPTH):
            return None
        rank = a.meta["val"].dim()
        keep, add = (self.functions.at(x, _aligned(x, rank)) for x in (mask, added.tensor))
        keep, add = (sympy.piecewise_fold(number(x)) for x in (keep, add))
        seen, hidden = (_where(keep, add, value) for value in (1, 0))
        if seen != 0 or hidden is None or not hidden.is_number or hidden * added.factor > HIDES:
            return None
        return scores, Hidden(mask, True, float(hidden * added.factor), added.inner, added)

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
        if factor <= 0 or fill * factor > HIDES:
            raise NoAttention(f"masked scores become {fill * factor:g}, which does not hide them")
        if found.softcap is not None or found.by is not None:
            raise NoAttention("a mask stands under the soft cap, or before the scores are scaled head by head")
        found.masks.append(Hidden(condition, visible, fill * factor, found.lead is not None))
        return scores

    def _regrouped(self, found: Scores, node: fx.Node) -> fx.Node:
        source: Any = node.args[0]
        before, after = source.meta["val"].shape, node.meta["val"].shape
        if tuple(map(str, before[-2:])) != tuple(map(str, after[-2:])):
            raise NoAttention("its scores are reshaped across queries and keys")
        if any(mask.inner for mask in found.masks):
            raise NoAttention("its scores are reshaped twice, with masks between")
        if not found.masks and found.lead is None and found.back is None:
            found.back = list(node.args[1])  # type: ignore[arg-type]
            return source  # a softmax does not see the leading axes: as if reshaped after it
        if found.lead is None:
            found.lead = list(node.args[1])  # type: ignore[arg-type]
        return source

    def _without_sinks(self, node: Any) -> tuple[fx.Node, fx.Node | None]:
        """Scores without one more column for each head; the greatest score may have been subtracted from all."""
        if is_op(node, aten.sub.Tensor) and greatest_of(node.args[1]) is node.args[0]:
            node = node.args[0]
            if len(node.users) == 2:
                self.bounded.add(node)
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


def is_default_scale(scale: float, head_dim: Any, dtype: torch.dtype) -> bool:
    """Whether a scale is what attention takes when none is given, 1/sqrt(head_dim), as far as the type can tell."""
    rounding = min(ROUNDING.get(dtype, 0.0), 1e-6)
    return isinstance(head_dim, int) and math.isclose(scale, 1 / math.sqrt(head_dim), rel_tol=rounding)
