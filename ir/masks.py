"""What an attention mask lets through, read from how it was computed.

A mask is a tensor added to scores, or a boolean one; `read_mask` says which queries see which keys: causal, within a
window, within a chunk, not padding; and whether what is added is a bias: relative positions, ALiBi, or one that depends
on the contents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from .coordinates import choice_of, coordinate, is_condition, number
from .flow import op_name
from .index_functions import IndexFunctions

HIDES = -1e4
"""Added numbers up to this hide a key: after the softmax nothing of it is left (some models write -10000)."""


@dataclass(frozen=True)
class Mask:
    """What a mask does.

    Attributes:
        causal: a query sees no later key; ``exactly_causal`` if that is all the mask does, from the first key on.
        exactly_causal: nothing else is hidden or added: key j is seen by query i when ``j <= i``.
        window: a query sees the last ``window`` keys only, itself included; None: all.
        both_sides: the window reaches as far ahead as back.
        chunk: a query sees only the keys of its own chunk of this length; None: no chunks.
        padding: some keys are hidden by a tensor that depends on the inputs.
        bias: what is added to the scores besides: '' for nothing, 'alibi', 'relative' (looked up by the distance of
            query and key), 'positions' (another function of positions and weights), or 'content'.
        everything: it hides nothing and adds nothing.
        other: conditions that are none of these, as text.
        hides_by: the number that is added where keys are hidden, if it is known and nothing else is added.
    """

    causal: bool = False
    exactly_causal: bool = False
    window: int | None = None
    both_sides: bool = False
    chunk: int | None = None
    padding: bool = False
    bias: str = ""
    everything: bool = False
    other: tuple[str, ...] = ()
    hides_by: float | None = field(default=None, compare=False)

    def __str__(self) -> str:
        words = ["causal"] if self.causal else []
        if self.window is not None:
            words.append(f"window {self.window}" + (" on both sides" if self.both_sides else ""))
        words += [f"chunks of {self.chunk}"] if self.chunk is not None else []
        words += ["padding"] if self.padding else []
        words += [f"{self.bias} bias" if self.bias != "alibi" else "ALiBi"] if self.bias else []
        words += [f"({text})" for text in self.other]
        return ", ".join(words) or "no mask"


def read_mask(
    functions: IndexFunctions, node: fx.Node, contents: Any = None, *, hides: bool = False, factor: float = 1.0
) -> Mask:
    """Read a mask of shape [..., queries, keys].

    Args:
        functions: the graph's index functions.
        node: the mask: boolean (True is seen) or added to the scores.
        contents: which nodes depend on the contents of an input (``Flow.data``); None: all unknown values do.
        hides: a boolean mask is True where a key is *not* seen.
        factor: what an added mask is multiplied by.
    """
    rank = node.meta["val"].dim()
    if rank < 2:
        return Mask(padding=True)
    reader = _Reader(functions, coordinate(rank - 2), coordinate(rank - 1), rank, contents)
    shape = node.meta["val"].shape
    if any(isinstance(s, int) and s == 1 for s in shape[-1:]):
        reader.key = sympy.Symbol("no_key")
    if node.meta["val"].dtype is not torch.bool:
        return reader.added(node, factor)
    condition = functions.within(functions.read(node), node.meta["val"].shape)
    return reader.seen(sympy.Not(condition) if hides else condition)


class _Reader:
    def __init__(self, functions: IndexFunctions, query: Any, key: Any, rank: int, contents: Any) -> None:
        self.functions, self.query, self.key, self.rank, self.contents = functions, query, key, rank, contents

    def added(self, node: fx.Node, factor: float) -> Mask:
        """A tensor added to the scores: a sum of choices between 0 and a very negative number, and of biases."""
        found = Mask(everything=True)
        for term in _terms(node):
            found = _join(found, self._term(term, node, factor))
        return found

    def _term(self, term: fx.Node, whole: fx.Node, factor: float) -> Mask:
        rank = whole.meta["val"].dim()
        lead = rank - term.meta["val"].dim()
        value = self.functions.read(term)
        value = value.xreplace({coordinate(i): coordinate(i + lead) for i in range(rank)})
        value = number(self.functions.within(value, whole.meta["val"].shape))  # True adds one
        if factor != 1.0:
            value = sympy.piecewise_fold(sympy.expand(sympy.sympify(factor) * value))
        if value == 0:
            return Mask(everything=True)
        hiding = _hiding(value)
        if hiding is not None:
            condition, by = hiding
            return replace(self.seen(condition), hides_by=by)
        parted = _hiding_bias(value)
        if parted is not None:
            seen = self.seen(parted[0])
            return replace(seen, bias=self._bias(parted[1], term), exactly_causal=False, everything=False)
        return Mask(bias=self._bias(value, term))

    def seen(self, condition: Any) -> Mask:
        """A condition under which a key is seen."""
        if condition == sympy.true:
            return Mask(everything=True)
        found = Mask(exactly_causal=True)
        for part in sympy.And.make_args(condition):
            found = self._part(found, part)
        return replace(found, exactly_causal=found.exactly_causal and found.causal)

    def _part(self, found: Mask, part: Any) -> Mask:
        free = part.free_symbols
        gap = self._gap(part)
        if gap is not None:
            return self._from_gap(found, *gap)
        found = replace(found, exactly_causal=False)
        chunk = self._chunk(part)
        if chunk is not None:
            return replace(found, chunk=chunk)
        symmetric = self._distance(part)
        if symmetric is not None:
            return replace(found, window=symmetric, both_sides=True)
        if self.query not in free and part.has(AppliedUndef):
            return replace(found, padding=True)
        unknown = [f for f in part.atoms(AppliedUndef)]
        if unknown and all(not ({self.query, self.key} <= f.free_symbols) for f in unknown):
            return replace(found, padding=True)
        text = str(part)
        return replace(found, other=(*found.other, text if len(text) < 80 else text[:77] + "..."))

    def _gap(self, part: Any) -> tuple[str, Any] | None:
        """``key - query`` bounded from above ('<=', bound) or below ('>=', bound)."""
        if not isinstance(part, (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)):
            return None
        left, right = _sides(part)
        difference = sympy.expand(left - right)
        strict = isinstance(part, (sympy.Lt, sympy.Gt))
        upper = isinstance(part, (sympy.Le, sympy.Lt))
        slope = difference.coeff(self.key)
        if slope not in (1, -1) or difference.coeff(self.query) != -slope:
            return None
        rest = sympy.expand(difference - slope * (self.key - self.query))
        if {self.key, self.query} & rest.free_symbols or rest.has(AppliedUndef):
            return None
        if slope == -1:
            upper, rest = not upper, -rest
        # key - query + rest (<=, <, >=, >) 0
        bound = -rest
        if strict:
            bound = bound - 1 if upper else bound + 1
        return ("<=" if upper else ">="), bound

    def _from_gap(self, found: Mask, side: str, bound: Any) -> Mask:
        if side == "<=":
            if bound.is_Integer and bound > 0:
                return replace(found, exactly_causal=False, other=(*found.other, f"{bound} keys ahead"))
            return replace(found, causal=True, exactly_causal=found.exactly_causal and bound == 0)
        window = int(1 - bound) if bound.is_Integer else None
        other = found.other if window is not None else (*found.other, f"keys from {bound} on")
        return replace(found, exactly_causal=False, window=window, other=other)

    def _distance(self, part: Any) -> int | None:
        """``|query - key| <= w``, however it is written."""
        if not isinstance(part, (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)):
            return None
        small, large = (part.lhs, part.rhs) if isinstance(part, (sympy.Le, sympy.Lt)) else (part.rhs, part.lhs)
        inner = small.args[0] if isinstance(small, sympy.Abs) else None
        if inner is None or (sympy.expand(inner - (self.query - self.key)) != 0 and inner != self.key - self.query):
            return None
        if not large.is_number:
            return None
        whole = sympy.floor(large)
        return int(whole - 1 if whole == large and isinstance(part, (sympy.Lt, sympy.Gt)) else whole) + 1

    def _chunk(self, part: Any) -> int | None:
        if not isinstance(part, sympy.Eq):
            return None
        pair = [a for a in part.args if isinstance(a, sympy.floor)]
        if len(pair) != 2:
            return None
        a, b = (p.args[0] for p in pair)
        size = sympy.Integer(1) / a.coeff(self.query) if a.coeff(self.query) else None
        if size is None:
            a, b = b, a
            size = sympy.Integer(1) / a.coeff(self.query) if a.coeff(self.query) else None
        return int(size) if size is not None and size.is_Integer and b.coeff(self.key) == 1 / size else None

    def _bias(self, value: Any, term: fx.Node) -> str:
        value = sympy.expand(value)
        slope = value.coeff(self.key)
        rest = sympy.expand(value - slope * self.key)
        linear = self.key not in slope.free_symbols | rest.free_symbols and self.query not in slope.free_symbols
        if slope != 0 and linear and self.contents is not None and not self.contents.get(term):
            return "alibi"
        if slope != 0 and linear and self.query not in rest.free_symbols and _per_head(slope):
            return "alibi"
        if self.contents is not None and self.contents.get(term):
            return "content"
        return "relative" if _looks_up_distance(self.functions, term) else "positions"


def _per_head(slope: Any) -> bool:
    return not is_condition(slope) and len(slope.atoms(AppliedUndef)) <= 1


def _terms(node: fx.Node) -> Iterator[fx.Node]:
    """The summands of a mask, through what does not change numbers."""
    while op_name(node) in ("_to_copy", "expand", "clone", "contiguous") and isinstance(node.args[0], fx.Node):
        source = node.args[0]
        if not source.meta["val"].dtype.is_floating_point or source.meta["val"].dim() != node.meta["val"].dim():
            break
        node = source
    operands = node.args[:2]
    if op_name(node) == "add" and not node.kwargs.get("alpha") and all(isinstance(a, fx.Node) for a in operands):
        for operand in operands:
            yield from _terms(operand)  # type: ignore[arg-type]
    else:
        yield node


def _sides(comparison: Any) -> tuple[Any, Any]:
    return comparison.lhs, comparison.rhs


def _hiding(value: Any) -> tuple[Any, float] | None:
    """The condition under which nothing is added, and the number that hides which is added otherwise."""
    if is_condition(value):
        return None
    if (choice := choice_of(value)) is not None:
        yes, condition, no = choice
        if no.is_number and yes.is_zero and no <= HIDES:
            return condition, float(no)
        if yes.is_number and no.is_zero and yes <= HIDES:
            return sympy.Not(condition), float(yes)
    # (1 - mask) * lowest, where the mask is a number that an input gave.
    unknown = value.atoms(AppliedUndef)
    if len(unknown) == 1:
        (mask,) = unknown
        lowest: Any = value.xreplace({mask: sympy.Integer(0)})
        if lowest.is_number and lowest <= HIDES and value.xreplace({mask: sympy.Integer(1)}) == 0:
            return sympy.Ne(mask, 0), float(lowest)
    return None


def _hiding_bias(value: Any) -> tuple[Any, Any] | None:
    """A choice between a bias and a number that hides: the condition under which the bias is added, and the bias."""
    if (choice := choice_of(value)) is not None:
        yes, condition, no = choice
        if no.is_number and no <= HIDES:
            return condition, yes
        if yes.is_number and yes <= HIDES:
            return sympy.Not(condition), no
    return None


def _looks_up_distance(functions: IndexFunctions, node: fx.Node) -> bool:
    """Whether a bias was looked up in a table by something that depends on both positions."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack and len(seen) < 60:
        current = stack.pop()
        if current in seen or current.op != "call_function":
            continue
        seen.add(current)
        if op_name(current) in ("embedding", "index", "index_select", "gather", "take"):
            return True
        stack.extend(current.all_input_nodes)
    return False


def _join(a: Mask, b: Mask) -> Mask:
    """Two masks at once."""
    if a.everything:
        return b
    if b.everything:
        return a
    windows = [m for m in (a, b) if m.window is not None]
    window = min((m.window for m in windows if m.window is not None), default=None)
    same_chunk = next((m.chunk for m in (a, b) if m.chunk is not None), None)
    return Mask(
        causal=a.causal or b.causal,
        exactly_causal=a.exactly_causal and b.exactly_causal,
        window=window,
        both_sides=bool(windows) and all(m.both_sides for m in windows) and not (a.causal or b.causal),
        chunk=same_chunk,
        padding=a.padding or b.padding,
        bias=a.bias or b.bias,
        other=(*a.other, *b.other),
        hides_by=None if a.hides_by is None or b.hides_by is None else max(a.hides_by, b.hides_by),
    )
