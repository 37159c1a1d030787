"""Recognises RMSNorm and LayerNorm over the last axis in a chain of elementary operators.

One walk starts at a root (``rsqrt``, ``sqrt``, ``pow`` with an exponent of 0.5 or -0.5):

- *down* through ``+ eps`` to a mean of squares or a variance, which gives the value that is normalised;
- *up* through the reciprocal to the product with that value, or with that value less its mean;
- *further up* through a cast back, the weight and the bias.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import torch
from torch import fx

from ...ir.program import Program
from ...ir.rewrite import is_op
from .arguments import argument, schema
from .constants import is_vector, scalar_of
from .refusal import Refused, readers_inside
from .sizes import same_shape

aten = torch.ops.aten

_REDUCTIONS = (aten.mean.dim, aten.sum.dim_IntList, aten.var, aten.var_mean)
_BETWEEN = (aten.add, aten.sub, aten.mul, aten.div, aten.clamp, operator.getitem)

HALF = (torch.float16, torch.bfloat16)

Nodes = frozenset[fx.Node]
_NONE: Nodes = frozenset()


@dataclass(frozen=True)
class SpelledNorm:
    """A norm that was spelled out.

    Attributes:
        result: the node that holds its value.
        x: what is normalised; it has the dtype of the result.
        size: the length of the last axis.
        eps: what is added to the mean of squares.
        centred: whether the mean is subtracted (LayerNorm) or not (RMSNorm).
        inside: the nodes between ``x`` and ``result``.
        weight, bias: vectors of ``size`` elements, perhaps with leading dimensions of size 1.
    """

    result: fx.Node
    x: fx.Node
    size: int
    eps: float
    centred: bool
    inside: Nodes = _NONE
    weight: fx.Node | None = None
    bias: fx.Node | None = None

    def up_to(self, node: fx.Node, **changes: Any) -> SpelledNorm:
        """The norm whose result is one node further up."""
        return replace(self, result=node, inside=self.inside | {self.result}, **changes)


@dataclass(frozen=True)
class _Statistic:
    """What a root is taken of: ``mean(value ** 2) + eps``, or ``var(value) + eps``."""

    value: fx.Node
    is_variance: bool
    size: int
    eps: float
    inside: Nodes


def is_root_of_statistic(program: Program, node: fx.Node) -> bool:
    """Whether a node is a root, or the reciprocal of one, of something reduced: where a norm may be."""
    is_root = is_op(node, aten.rsqrt, aten.sqrt) or _exponent(program, node) in (0.5, -0.5)
    return is_root and _reduces(node.args[0])


def norms_at(program: Program, root: fx.Node) -> list[SpelledNorm]:
    """The norms that use a root: several where they share their statistics and differ in their weights.

    Raises:
        Refused: it is no norm over the last axis, or its inner values are read elsewhere too.
    """
    walk = _Walk(program, root)
    norms = walk.grown(walk.product())
    results = {norm.result for norm in norms}
    readers_inside({node for norm in norms for node in norm.inside} - results, results)
    return norms


def _exponent(program: Program, node: Any) -> float | None:
    return scalar_of(program, node.args[1]) if is_op(node, aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor) else None


def _reduces(node: Any, depth: int = 0) -> bool:
    """Whether a value is a mean, a sum or a variance, perhaps scaled, bounded, or with something added."""
    if is_op(node, *_REDUCTIONS):
        return True
    return depth < 3 and is_op(node, *_BETWEEN) and any(_reduces(operand, depth + 1) for operand in node.args)


def _operands(node: fx.Node) -> list[tuple[Any, Any]]:
    """Both orders of a commutative operator's operands."""
    a, b = node.args[:2]
    return [(a, b), (b, a)]


def _dtype(node: fx.Node) -> torch.dtype:
    return node.meta["val"].dtype


def _unwidened(node: fx.Node) -> fx.Node:
    """What a value was before it was cast to a wider floating-point type, which loses nothing."""
    while is_op(node, aten._to_copy) and _dtype(node).is_floating_point:
        source: Any = node.args[0]
        if not _dtype(source).is_floating_point or _dtype(source).itemsize >= _dtype(node).itemsize:
            break
        node = source
    return node


class _Walk:
    def __init__(self, program: Program, root: fx.Node) -> None:
        self.program = program
        self.root = root

    def number(self, value: Any) -> float | None:
        return scalar_of(self.program, value)

    # Down: what the root is taken of.

    def statistic(self) -> _Statistic:
        below: Any = self.root.args[0]
        eps, inside = 0.0, frozenset({self.root})
        if is_op(below, aten.add.Tensor) and argument(below, "alpha") == 1:
            for term, other in _operands(below):
                number = self.number(other)
                if number is not None:
                    inside |= {below}
                    below, eps = term, number
                    break
        if is_op(below, operator.getitem) and is_op(below.args[0], aten.var_mean) and below.args[1] == 0:
            inside |= {below}
            below = below.args[0]
        if is_op(below, aten.var, aten.var_mean):
            base, is_variance, inside = below.args[0], True, inside | {below}
            self.check_axis(below)
            if not _is_biased(below):
                raise Refused("the variance is divided by n - 1", below)
        else:
            (base, passed), is_variance = self.mean_of_squares(below), False
            inside |= passed
        if _dtype(base) in HALF:
            raise Refused("the statistics are computed in half precision", below)
        if _dtype(base).is_complex:
            raise Refused("the values are complex numbers", below)
        return _Statistic(base, is_variance, int(base.meta["val"].shape[-1]), eps, inside)

    def mean_of_squares(self, node: Any) -> tuple[fx.Node, Nodes]:
        if is_op(node, aten.clamp):
            raise Refused("the mean of squares is clamped", node)
        if is_op(node, aten.sub):
            raise Refused("the variance is a difference of means, which rounds differently", node)
        mean = self.mean(node)
        if mean is None:
            raise Refused("the root is not taken of a mean and a constant", self.root)
        square, inside = mean
        if is_op(square, aten.square) or self.exponent(square) == 2:
            return square.args[0], inside | {square}  # type: ignore[return-value]
        if is_op(square, aten.mul.Tensor) and square.args[0] is square.args[1]:
            return square.args[0], inside | {square}  # type: ignore[return-value]
        raise Refused("what is averaged is no square", square)

    def exponent(self, node: Any) -> float | None:
        return _exponent(self.program, node)

    def mean(self, node: Any) -> tuple[fx.Node, Nodes] | None:
        """What is averaged over the last axis, and the nodes that do it: a mean, or a sum divided by the length."""
        inside, count = _NONE, None
        if is_op(node, operator.getitem) and is_op(node.args[0], aten.var_mean) and node.args[1] == 1:
            self.check_axis(node.args[0])
            return node.args[0].args[0], frozenset({node, node.args[0]})
        if is_op(node, aten.mul.Tensor, aten.div.Tensor) and is_op(node.args[0], aten.sum.dim_IntList):
            factor = self.number(node.args[1])
            if not factor:
                return None
            count = factor if is_op(node, aten.div) else 1 / factor
            inside, node = frozenset({node}), node.args[0]
        if not is_op(node, aten.mean.dim, aten.sum.dim_IntList):
            return None
        size = self.check_axis(node)
        if is_op(node, aten.sum) and (count is None or abs(count - size) > 1e-7 * size):
            raise Refused("a sum, not a mean (a Euclidean norm)", node)
        if _dtype(node) != _dtype(node.args[0]):
            raise Refused("the mean has another dtype", node)
        return node.args[0], inside | {node}

    def check_axis(self, node: fx.Node) -> int:
        """The length of the last axis, if that is what a reduction reduces."""
        source: Any = node.args[0]
        known = source.meta["val"]
        dims = argument(node, "dim") if "dim" in schema(node.target) else None  # type: ignore[arg-type]
        if not dims or not known.dim() or [d % known.dim() for d in dims] != [known.dim() - 1]:
            raise Refused("the statistics are not over the last axis", node)
        if not argument(node, "keepdim"):
            raise Refused("the statistics lose the reduced axis", node)
        if not isinstance(known.shape[-1], int):
            raise Refused("the last axis has no fixed size", node)
        return known.shape[-1]

    def centred(self, node: Any) -> tuple[fx.Node, Nodes] | None:
        """For ``x - mean(x)``: x, and the nodes that compute it."""
        if not is_op(node, aten.sub.Tensor, aten.add.Tensor) or argument(node, "alpha") != 1:
            return None
        pairs = [tuple(node.args[:2])] if is_op(node, aten.sub) else _operands(node)
        for x, mean in pairs:
            inside = frozenset({node})
            if is_op(node, aten.add):
                if not is_op(mean, aten.neg):
                    continue
                inside, mean = inside | {mean}, mean.args[0]
            found = self.mean(mean) if isinstance(x, fx.Node) and _reduces(mean) else None
            if found is not None and found[0] is x:
                return x, inside | found[1]
        return None

    # Up: what is multiplied with the reciprocal root.

    def product(self) -> SpelledNorm:
        """The normalised value, perhaps with a weight that meets the reciprocal or the value before they meet."""
        statistic = self.statistic()
        scale, divides = self.reciprocal()
        start = SpelledNorm(scale, statistic.value, statistic.size, statistic.eps, False, statistic.inside)
        only = next(iter(scale.users)) if len(scale.users) == 1 else None
        weight = _factor(only, start) if only is not None and not divides else None
        if only is not None and weight is not None:
            start, scale = start.up_to(only, weight=weight), only
        norm = self.folded_mean(start, statistic) if len(scale.users) == 2 and not divides else None
        for user in scale.users:
            if is_op(user, aten.mul.Tensor) and not divides:
                norm = norm or self.scaled(start, user, _other(user, scale), statistic)
            elif is_op(user, aten.div.Tensor) and divides and user.args[1] is scale:
                norm = norm or self.scaled(start, user, user.args[0], statistic)
        if norm is None:
            raise Refused("the root does not scale the value that it was computed from", scale)
        if _dtype(norm.result) != _dtype(norm.x):
            raise Refused("the product has another dtype than the statistics", norm.result)
        if not same_shape(norm.result.meta["val"], norm.x.meta["val"]):
            raise Refused("a constant of the norm adds axes", norm.result)
        return norm

    def scaled(self, start: SpelledNorm, user: fx.Node, value: Any, statistic: _Statistic) -> SpelledNorm | None:
        found = self.normalised(value, statistic)
        if found is not None:
            inside = start.inside | found[2] | {start.result}
            return replace(start, result=user, x=found[0], centred=found[1], inside=inside)
        if is_op(value, aten.mul.Tensor) and start.weight is None:
            for inner, weight in _operands(value):
                found = self.normalised(inner, statistic)
                if found is not None and is_vector(weight, start.size, value):
                    inside = start.inside | found[2] | {start.result, value}
                    return replace(start, result=user, x=found[0], centred=found[1], inside=inside, weight=weight)
        return None

    def folded_mean(self, start: SpelledNorm, statistic: _Statistic) -> SpelledNorm | None:
        """``x * scale + (bias - mean(x) * scale)``: TensorFlow's way to write LayerNorm."""
        below = (statistic.value, _NONE) if statistic.is_variance else self.centred(statistic.value)
        if below is None or not all(is_op(user, aten.mul.Tensor) for user in start.result.users):
            return None
        for ours, theirs in permutations(start.result.users):
            mean = self.mean(_other(theirs, start.result)) if _other(ours, start.result) is below[0] else None
            if mean is None or mean[0] is not below[0] or len(ours.users) != 1 or len(theirs.users) != 1:
                continue
            total, shift = next(iter(ours.users)), next(iter(theirs.users))
            inside = start.inside | below[1] | mean[1] | {start.result, ours, theirs}
            norm = replace(start, result=total, x=below[0], centred=True, inside=inside)
            if is_op(total, aten.sub.Tensor) and total.args == (ours, theirs) and not _scaled(total):
                return norm
            bias = shift.args[0] if is_op(shift, aten.sub.Tensor) else None
            known = is_op(shift, aten.neg) or is_vector(bias, start.size, ours)
            if known and is_op(total, aten.add.Tensor) and _other(total, ours) is shift and not _scaled(total, shift):
                return replace(norm, bias=bias, inside=inside | {shift})
        return None

    def reciprocal(self) -> tuple[fx.Node, bool]:
        """The node of ``1 / root``, or the root itself where values are divided by it; and whether they are."""
        root = self.root
        if is_op(root, aten.rsqrt) or self.exponent(root) == -0.5:
            return root, False
        user = next(iter(root.users))
        inverts = is_op(user, aten.div.Tensor) and user.args[1] is root and self.number(user.args[0]) == 1
        if len(root.users) == 1 and (inverts or is_op(user, aten.reciprocal) or self.exponent(user) == -1):
            return user, False
        return root, True

    def normalised(self, value: Any, statistic: _Statistic) -> tuple[fx.Node, bool, Nodes] | None:
        """Whether a value is what the statistic was computed of: that, whether the mean is gone, the nodes between."""
        base = statistic.value
        centred = self.centred(value)
        if statistic.is_variance:
            return (base, True, centred[1]) if centred is not None and centred[0] is base else None
        below = self.centred(base)
        if below is not None:
            x, inside = below
            if value is base or (centred is not None and centred[0] is x):
                return x, True, inside | (centred[1] if centred is not None else _NONE)
            return None
        same = isinstance(value, fx.Node) and _unwidened(value) is _unwidened(base)
        return (base, False, _NONE) if same else None

    # Further up: the cast back, the weight, the bias.

    def grown(self, norm: SpelledNorm) -> list[SpelledNorm]:
        """The norm with all that belongs to it; several if its value meets several weights."""
        users = list(norm.result.users)
        weights = [_factor(user, norm) for user in users]
        if users and norm.weight is None and norm.bias is None and all(weights):
            pairs = zip(users, weights, strict=True)
            return [one for user, weight in pairs for one in self.grown(norm.up_to(user, weight=weight))]
        if len(users) != 1:
            return [norm]
        user, source = users[0], _unwidened(norm.x)
        # The operators compute in float32 what they are given in half precision, but not in float64.
        casts_back = is_op(user, aten._to_copy) and _dtype(source) == _dtype(user) and _dtype(source) in HALF
        if casts_back and _dtype(norm.x) is torch.float32 and norm.weight is None and norm.bias is None:
            return self.grown(norm.up_to(user, x=source))
        if is_op(user, aten.add.Tensor) and norm.centred and norm.bias is None and not _scaled(user):
            bias = _other(user, norm.result)
            if is_vector(bias, norm.size, norm.result):
                return [norm.up_to(user, bias=bias)]
        return [norm]


def _is_biased(node: fx.Node) -> bool:
    """Whether a variance divides by n."""
    if any(a.name == "correction" for a in node.target._schema.arguments):  # type: ignore[union-attr]
        return argument(node, "correction") == 0
    return argument(node, "unbiased") is False


def _scaled(*nodes: fx.Node) -> bool:
    """Whether an addition or subtraction scales its second operand."""
    return any("alpha" in node.kwargs and node.kwargs["alpha"] != 1 for node in nodes)


def _other(node: fx.Node, operand: fx.Node) -> Any:
    """The operand of a binary operator that is not ``operand``; ``operand`` itself if both are."""
    return node.args[1] if node.args[0] is operand else node.args[0]


def _factor(user: fx.Node, norm: SpelledNorm) -> fx.Node | None:
    """The vector with which ``user`` multiplies a norm's value so far."""
    weight = _other(user, norm.result) if is_op(user, aten.mul.Tensor) else None
    return weight if is_vector(weight, norm.size, norm.result) else None
