"""The one mask of an attention operator, from all that was added to the scores or chosen instead of them.

Masks are joined from the product outwards, as they were applied: where a later one hides a key, it does not matter
what the earlier ones added there. So a query whose keys are all hidden gets what it got before: the mean of the values
that were hidden by the same number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ...ir.index_functions import IndexFunctions
from ...ir.masks import Mask, read_mask
from ...ir.rewrite import Rewriter
from .refusal import NoAttention
from .scores import LOWEST, Added, Floor, Hidden, Scores

aten = torch.ops.aten

Needed = list[Added | Hidden | Floor]

FAR_LOWER = LOWEST * 1e6
"""Next to this, `LOWEST` is nothing."""


def needed_masks(functions: IndexFunctions, found: Scores, causal: bool) -> tuple[Needed, bool]:
    """Masks without those that do nothing, and whether all that they say is 'causal'.

    Args:
        functions: reads how masks were computed.
        found: the attention.
        causal: whether the attention is causal besides its masks.

    Raises:
        NoAttention: one mask cannot say what they say together.
    """
    read = [(mask, _does(functions, mask)) for mask in found.masks]
    kept = [(mask, does) for mask, does in read if does is None or not does.everything]
    if all(does is None for _, does in kept):
        return [], causal  # floors alone
    if len(kept) == 1 and not causal:
        mask, does = kept[0]
        if does is not None and does.exactly_causal and not mask.inner:
            return [], True
    _check(kept, found.query.meta["val"].dtype)
    return [mask for mask, _ in kept], causal


def _does(functions: IndexFunctions, mask: Added | Hidden | Floor) -> Mask | None:
    if isinstance(mask, Floor):
        return None
    added = mask if isinstance(mask, Added) else mask.added
    if added is not None:
        return read_mask(functions, added.tensor, factor=added.factor)
    assert isinstance(mask, Hidden)
    return read_mask(functions, mask.condition, hides=not mask.visible)


def _check(kept: list[tuple[Added | Hidden | Floor, Mask | None]], dtype: torch.dtype) -> None:
    """Refuse masks of which the sum, or the type, would not be what they were."""
    added = [(i, m, does) for i, (m, does) in enumerate(kept) if isinstance(m, Added)]
    for _, mask, does in added:
        known = mask.tensor.meta["val"]
        if known.dtype.itemsize > dtype.itemsize and (known.dim() < 2 or (does is not None and does.bias)):
            raise NoAttention("the type of its queries is narrower than that of a bias")
    if all(does is None or does.exactly_causal or not _hides(does) for _, does in kept):
        return  # the first key is seen by all queries, so that nothing of hidden ones is left
    fills = [(i, m.fill) for i, (m, _) in enumerate(kept) if isinstance(m, Hidden) and m.fill != -math.inf]
    if len({fill for _, fill in fills}) > 1:
        raise NoAttention("its masks hide keys by different numbers")
    # A number that hides may be so low that what is added to it is lost; if it is not, nothing may be added but numbers
    # that are far lower still: a query whose seen keys are all hidden by those has the others left, and so it keeps.
    meets = [does for i, _, does in added if i < fills[-1][0] or (does is not None and _hides(does))] if fills else []
    if not meets or fills[0][1] <= max(LOWEST, torch.finfo(dtype).min):
        return
    if torch.finfo(dtype).min > FAR_LOWER or not all(d and d.hides_by and d.hides_by <= FAR_LOWER for d in meets):
        raise NoAttention(f"something is added to masked scores, which are {fills[0][1]:g}")


def _hides(does: Mask) -> bool:
    found = does.causal or does.padding or bool(does.other)
    return found or does.window is not None or does.chunk is not None


class MaskBuilder:
    """Writes masks as one operand of an attention operator.

    Args:
        rewriter: where nodes go.
        found: the attention.
        outer: gives a mask the leading axes that the scores have at the softmax.
    """

    def __init__(self, rewriter: Rewriter, found: Scores, outer: Callable[[fx.Node], fx.Node]) -> None:
        self.rewriter, self.found, self.outer = rewriter, found, outer
        self.dtype: torch.dtype = found.query.meta["val"].dtype

    def build(self, masks: Needed) -> fx.Node | None:
        """One mask: boolean if it only hides by minus infinity, else a tensor to add; None without masks."""
        conditions = [m for m in masks if isinstance(m, Hidden) and m.fill == -math.inf]
        if masks and len(conditions) == len(masks):
            seen = [self._seen(m) for m in conditions]
            while len(seen) > 1:
                seen = [self._call(aten.logical_and.default, seen[0], seen[1]), *seen[2:]]
            return self._matrix(seen[0])
        mask: fx.Node | None = None
        for step in reversed(masks):
            mask = self._joined(mask, step)
        return None if mask is None else self._matrix(mask)

    def _joined(self, mask: fx.Node | None, step: Added | Hidden | Floor) -> fx.Node | None:
        """A mask, and what is applied to the scores after it."""
        lowest = torch.finfo(self.dtype).min
        if isinstance(step, Floor):
            return None if mask is None else self._call(aten.clamp.default, mask, lowest)
        if isinstance(step, Added):
            term = self._term(step)
            return term if mask is None else self._call(aten.add.Tensor, mask, term)
        condition = self._condition(step)
        fill = step.fill
        if fill != -math.inf:  # all that absorb a score do the same alone, but keep those that are far lower apart
            fill = LOWEST if fill > LOWEST > FAR_LOWER >= lowest else lowest
        if mask is None:
            mask = self._call(aten.full.default, [], 0, dtype=self.dtype)
        if step.visible:
            return self._call(aten.where.ScalarOther, condition, mask, fill)
        return self._call(aten.where.ScalarSelf, condition, fill, mask)

    def _call(self, target: Any, *args: Any, **options: Any) -> fx.Node:
        return self.rewriter.call(target, *args, like=self.found.output, **options)

    def _condition(self, hidden: Hidden) -> fx.Node:
        condition = self._outer(hidden.condition, hidden.inner)
        if hidden.added is None:
            return condition
        return self._call(aten.ne.Scalar, condition, 0)  # it was a factor of 0 or 1

    def _seen(self, hidden: Hidden) -> fx.Node:
        condition = self._condition(hidden)
        return condition if hidden.visible else self._call(aten.logical_not.default, condition)

    def _term(self, added: Added) -> fx.Node:
        term = self._outer(added.tensor, added.inner)
        if added.factor != 1.0:
            term = self._call(aten.mul.Tensor, term, added.factor)
        given = term.meta["val"].dtype
        if given == self.dtype:
            return term
        if given.is_floating_point and torch.finfo(given).min < torch.finfo(self.dtype).min:
            term = self._call(aten.clamp.default, term, torch.finfo(self.dtype).min)  # not minus infinity
        return self._call(aten._to_copy.default, term, dtype=self.dtype)

    def _outer(self, mask: fx.Node, inner: bool) -> fx.Node:
        return self.outer(mask) if inner else mask

    def _matrix(self, mask: fx.Node) -> fx.Node:
        """A mask with at least the two axes of queries and keys."""
        rank = mask.meta["val"].dim()
        return mask if rank > 1 else self._call(aten.reshape.default, mask, [1, -1])
