"""Attention in its many spellings becomes one operator.

    %s = aten.matmul(%q, %k_t)
    %s1 = aten.mul(%s, 0.125)
    %s2 = aten.add(%s1, %mask)
    %w = aten.softmax(%s2, -1)
    %o = aten.matmul(%w, %v)             %o = aten.scaled_dot_product_attention(%q, %k, %v, is_causal=True)

What the softmax's scores are made of is read by `passes.canonical.scores`, whichever way it is written: scale on either
side, masks added or filled in, boolean or not, biases, a soft cap, sinks, heads folded into the batch. Keys and values
that are repeated for grouped queries are taken before they are repeated. A mask that is proved causal (`ir.masks`, also
when it was computed by comparing positions) becomes ``is_causal``; one that hides nothing goes. Attention operators
that are there already are tidied in the same way. Soft caps and sinks need ``graphlathe.attention``; everything else
is ``aten.scaled_dot_product_attention``.

A score that a mask fills with -10000 or less counts as hidden. If masks hide *every* key of a query, the query gets
what it got before: the mean of the values where the masks were finite. Where they were minus infinity it gets zero, as
a guard makes it; without a guard it got not-a-number. In float16, whose lowest number is -65504, such a query gets what
its scores say, if the operator adds in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ...ir.errors import GraphlatheError
from ...ir.index_functions import IndexFunctions
from ...ir.program import Program
from ...ir.rewrite import Rewriter, is_op
from ...ir.views import permutation
from ...kernels import attention
from ..base import Context, Effect, Pass, Stats
from .arguments import argument
from .attention_masks import MaskBuilder, Needed, needed_masks
from .attention_weights import SOFTMAX
from .constants import scalar_of
from .heads import Repeated, unrepeated
from .products import spell_products
from .refusal import NoAttention
from .scores import Added, Hidden, Scores, is_default_scale, read_scores
from .sizes import same_type

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class RaiseAttention(Pass):
    """Write softmax(QK^T)V, however it is spelled, as one attention operator."""

    name: ClassVar[str] = "raise-attention"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, program: Program, ctx: Context) -> Stats:
        """Visit every softmax and every attention operator."""
        stats = Stats()
        for name in program.graphs:
            rewriter = Rewriter(program, self.name, name)
            products = spell_products(rewriter)
            stats.hits, stats.attempts = stats.hits + products, stats.attempts + products
            raising = _Raising(rewriter)
            for node in list(rewriter.graph.nodes):
                if node._erased:
                    continue
                if is_op(node, *SOFTMAX):
                    stats.attempts += 1
                    try:
                        raising.spelled_out(node)
                        stats.hits += 1
                    except NoAttention as reason:
                        stats.miss(str(reason), node)
                elif is_op(node, aten.scaled_dot_product_attention):
                    stats.attempts += 1
                    stats.hits += raising.tidied(node)
            rewriter.erase_dead()
        return stats


class _Raising:
    def __init__(self, rewriter: Rewriter) -> None:
        self.rewriter = rewriter
        self.functions = IndexFunctions(rewriter.program)

    def spelled_out(self, softmax: fx.Node) -> None:
        """Raise one softmax.

        Raises:
            NoAttention: why not.
        """
        found = read_scores(self.rewriter.program, softmax, self.functions)
        needed = needed_masks(self.functions, found, False)
        with self.rewriter.before(found.output):
            try:
                result = self._build(found, *needed)
            except GraphlatheError as error:
                raise NoAttention(f"one operator refuses these shapes: {error.message}") from error
        if not same_type(result.meta["val"], found.output.meta["val"]):
            raise NoAttention("one operator would give a result of another shape or type")
        self.rewriter.replace(found.output, result)

    def tidied(self, node: fx.Node) -> bool:
        """Tidy an attention operator; whether anything changed."""
        if argument(node, "dropout_p") or node.args[0].meta["val"].dim() < 3:  # type: ignore[union-attr]
            return False
        query, key, value = node.args[:3]
        found = Scores(query, key, value, node)  # type: ignore[arg-type]
        given = argument(node, "scale")
        width = query.meta["val"].shape[-1]  # type: ignore[union-attr]
        if (given is not None and not isinstance(given, float)) or not isinstance(width, int):
            return False
        found.scale = 1 / math.sqrt(width) if given is None else given
        mask = argument(node, "attn_mask")
        if mask is not None and mask.meta["val"].dtype is torch.bool:
            found.masks.append(Hidden(mask, True, -math.inf, False))
        elif mask is not None:
            found.masks.append(Added(mask, 1.0, False))
        causal = bool(argument(node, "is_causal"))
        needed = needed_masks(self.functions, found, causal)
        if needed == (found.masks, causal) and self._is_tidy(query, key, value, given):
            return False
        with self.rewriter.before(node):
            result = self._operator(found, query, key, value, *needed)
        self.rewriter.replace(node, result)
        return True

    def _is_tidy(self, query: Any, key: Any, value: Any, scale: float | None) -> bool:
        """Whether an attention operator with the masks that it needs would come out as it is."""
        if any(self._unscaled(x)[1] != 1.0 for x in (query, key)):
            return False
        known = query.meta["val"]
        if scale is not None and is_default_scale(scale, known.shape[-1], known.dtype):
            return False
        return _repeats(query, key, value) is None

    def _build(self, found: Scores, masks: Needed, causal: bool) -> fx.Node:
        query, value = found.query, found.value
        key_t, by = self._unscaled(found.key_t)
        key = self._transposed(key_t)
        found.scale *= by
        if found.by is not None:
            query = self.rewriter.call(aten.mul.Tensor, query, found.by, like=query)
        if found.lead is not None:
            lead = found.lead
            query = self._reshaped(query, [*lead[:-1], query.meta["val"].shape[-1]])
            key = self._reshaped(key, [*lead[:-2], lead[-1], key.meta["val"].shape[-1]])
            if found.back is not None:
                value = self._reshaped(value, [*lead[:-2], lead[-1], value.meta["val"].shape[-1]])
        result = self._operator(found, query, key, value, masks, causal)
        if found.back is not None:
            result = self._reshaped(result, [*found.back[:-1], result.meta["val"].shape[-1]])
        return result

    def _operator(self, found: Scores, query: Any, key: Any, value: Any, masks: Needed, causal: bool) -> fx.Node:
        call = self.rewriter.call
        query, by = self._unscaled(query)
        key, and_by = self._unscaled(key)
        scale: float | None = found.scale * by * and_by
        key, value, grouped = self._ungrouped(query, key, value)
        mask = MaskBuilder(self.rewriter, found, lambda mask: self._outer(found, mask)).build(masks)
        if is_default_scale(scale, query.meta["val"].shape[-1], query.meta["val"].dtype):  # type: ignore[arg-type]
            scale = None
        like = found.output
        if found.softcap is not None or found.sinks is not None:
            options: dict[str, Any] = {
                "is_causal": causal,
                "scale": scale,
                "softcap": found.softcap,
                "sinks": self._sinks(found),
            }
            given = {name: o for name, o in options.items() if o is not None and o is not False}
            return call(attention, query, key, value, *([] if mask is None else [mask]), like=like, **given)
        options = {"is_causal": causal, "scale": scale, "enable_gqa": grouped}
        given = {name: o for name, o in options.items() if o is not None and o is not False}
        if mask is not None:
            given["attn_mask"] = mask
        sdpa = aten.scaled_dot_product_attention.default
        return call(sdpa, query, key, value, like=like, **given)

    def _sinks(self, found: Scores) -> fx.Node | None:
        """The sinks as [heads]."""
        sinks = found.sinks
        if sinks is None or sinks.meta["val"].dim() == 1:
            return sinks
        return self._reshaped(sinks, [-1])

    def _ungrouped(self, query: Any, key: Any, value: Any) -> tuple[Any, Any, bool]:
        """Keys and values before they were repeated for the heads, and whether there are fewer of them than heads."""
        repeats = _repeats(query, key, value)
        if repeats is not None:
            return repeats[0].build(self.rewriter), repeats[1].build(self.rewriter), True
        heads, *fewer = (x.meta["val"].shape[-3] for x in (query, key, value))
        return key, value, fewer[0] == fewer[1] and _divides(fewer[0], heads) and fewer[0] != heads

    def _outer(self, found: Scores, mask: fx.Node) -> fx.Node:
        """A mask with the leading axes that the scores have at the softmax."""
        if found.lead is None:
            return mask
        lead = found.query.meta["val"].shape[:-2]
        if [str(s) for s in mask.meta["val"].shape[:-2]] != [str(s) for s in lead]:
            call = self.rewriter.call
            given = [s if isinstance(s, int) else call(aten.sym_size.int, found.query, i) for i, s in enumerate(lead)]
            mask = call(aten.expand.default, mask, [*given, -1, -1], like=mask)
        own = [
            1 if size == 1 else given for size, given in zip(mask.meta["val"].shape[-2:], found.lead[-2:], strict=True)
        ]
        return self._reshaped(mask, [*found.lead[:-2], *own])

    def _reshaped(self, x: fx.Node, sizes: list[Any]) -> fx.Node:
        return self.rewriter.call(aten.reshape.default, x, sizes, like=x)

    def _transposed(self, x: fx.Node) -> fx.Node:
        """The last two axes swapped; through a permutation that is there already."""
        rank = x.meta["val"].dim()
        order = permutation(x)
        source: Any = x
        if order is not None:
            source = x.args[0]
            order = [*order[:-2], order[-1], order[-2]]
        else:
            order = [*range(rank - 2), rank - 1, rank - 2]
        if order == list(range(rank)):
            return source
        return self.rewriter.call(aten.permute.default, source, order, like=x)

    def _unscaled(self, x: fx.Node) -> tuple[fx.Node, float]:
        """A query or key before it was multiplied by a number."""
        if is_op(x, aten.mul, aten.div) and isinstance(x.args[0], fx.Node):
            by = scalar_of(self.rewriter.program, x.args[1])
            plain = is_op(x, aten.mul.Tensor, aten.div.Tensor) and same_type(x.meta["val"], x.args[0].meta["val"])
            if plain and by is not None and by > 0:
                return x.args[0], by if is_op(x, aten.mul) else 1 / by
        return x, 1.0


def _repeats(query: fx.Node, key: fx.Node, value: fx.Node) -> tuple[Repeated, Repeated] | None:
    """How keys and values were repeated, when both were, in the same way, for the heads of the queries."""
    heads, *others = (x.meta["val"].shape[-3] for x in (query, key, value))
    if not all(_divides(other, heads) for other in others):
        return None
    first, second = (unrepeated(x, x.meta["val"].dim() - 3) for x in (key, value))
    if first is None or second is None or first.groups != second.groups:
        return None
    return first, second


def _divides(few: Any, many: Any) -> bool:
    return isinstance(few, int) and isinstance(many, int) and few > 0 and many % few == 0
