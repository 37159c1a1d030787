"""Scaled dot-product attention in plain ONNX operators.

PyTorch's own translation masks with the smallest finite number, so that a row in which everything is masked (padding
under a sliding window) becomes an average over all values, where PyTorch gives zero. It also reshapes the key to
transpose it, and builds a causal mask anew in every layer.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import fx

if TYPE_CHECKING:
    from .translate import Translator


def attention(
    t: Translator,
    node: fx.Node,
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    attn_mask: ir.Value | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """``softmax(query @ key^T * scale + mask) @ value``; a row that is masked everywhere gives zero."""
    op = t.recorder.op
    q, k = node.args[0].meta["val"], node.args[1].meta["val"]  # type: ignore[union-attr]
    rank = k.dim()
    if dropout_p or not isinstance(q.shape[-1], int) or isinstance(scale, ir.Value):
        return NotImplemented
    if enable_gqa and q.shape[-3] != k.shape[-3]:
        groups = q.shape[-3] // k.shape[-3]
        key, value = (_repeat_heads(t, x, int(groups), int(q.shape[-3]), rank) for x in (key, value))
    assert query.dtype is not None
    factor = t.recorder.constant(1 / math.sqrt(q.shape[-1]) if scale is None else scale, query.dtype)
    order = [*range(rank - 2), rank - 1, rank - 2]
    scores = op("MatMul", op("Mul", query, factor), op("Transpose", key, perm=order))
    lowest = t.recorder.constant(-math.inf, query.dtype)
    if is_causal:
        scores = op("Add", scores, _as_bias(t, _causal(t, query, key, q, k), query.dtype))
    if attn_mask is None:
        return op("MatMul", op("Softmax", scores, axis=-1), value)
    if attn_mask.dtype == ir.DataType.BOOL:
        attn_mask = _as_bias(t, attn_mask, query.dtype)
    scores = op("Add", scores, op("Cast", attn_mask, to=int(query.dtype)))
    top = op("ReduceMax", scores, t.recorder.constant([-1], ir.DataType.INT64), keepdims=1)
    zero = t.recorder.constant(0.0, query.dtype)
    # The softmax of a row that is masked everywhere is not a number; what it makes of the values is replaced, which
    # touches less than the weights do wherever there are more positions than channels.
    return op("Where", op("Equal", top, lowest), zero, op("MatMul", op("Softmax", scores, axis=-1), value))


def _as_bias(t: Translator, mask: ir.Value, dtype: ir.DataType) -> ir.Value:
    """What a mask adds to the scores, as PyTorch has it; the same value in every layer that reads the mask.

    ONNX Runtime adds much faster than it selects.
    """
    made = ("bias", mask, dtype)
    if made not in t.shared:
        zero, lowest = (t.recorder.constant(number, dtype) for number in (0.0, -math.inf))
        t.shared[made] = t.recorder.op("Where", mask, zero, lowest)
    return t.shared[made]


def _repeat_heads(t: Translator, x: ir.Value, groups: int, heads: int, rank: int) -> ir.Value:
    """Each head ``groups`` times in a row: [..., heads/groups, length, width] to [..., heads, length, width]."""
    op = t.recorder.op
    axis = rank - 2
    wide = op("Unsqueeze", x, t.vector([axis]))
    wide = op("Expand", wide, t.vector([groups if i == axis else 1 for i in range(rank + 1)]))
    before = op("Shape", x, start=0, end=rank - 3) if rank > 3 else None
    after = op("Shape", x, start=rank - 2)
    parts = [*([before] if before is not None else []), t.vector([heads]), after]
    return op("Reshape", wide, op("Concat", *parts, axis=0))


def _causal(t: Translator, query: ir.Value, key: ir.Value, q: torch.Tensor, k: torch.Tensor) -> ir.Value:
    """Whether row i may see column j: ``i >= j``; the same value in every layer of the same sizes."""
    sizes = ("causal", str(q.shape[-2]), str(k.shape[-2]))
    if sizes not in t.shared:
        op, rank = t.recorder.op, q.dim()
        zero, one = (t.recorder.constant(n, ir.DataType.INT64) for n in (0, 1))
        rows, columns = (
            op("Range", zero, op("Squeeze", op("Shape", x, start=rank - 2, end=rank - 1), t.vector([0])), one)
            for x in (query, key)
        )
        t.shared[sizes] = op("GreaterOrEqual", op("Unsqueeze", rows, t.vector([1])), columns)
    return t.shared[sizes]
