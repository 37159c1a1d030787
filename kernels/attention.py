"""Scaled dot-product attention with what ATen's has no word for: a soft cap of the scores, and attention sinks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from .define import operator

if TYPE_CHECKING:
    from torch import fx


def _macs(node: fx.Node) -> Any:
    """Both products in full, whatever the mask leaves out."""
    from ..ir.cost_rules import attention_macs

    return attention_macs(node)


@operator(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask=None, *, bool is_causal=False, float? scale=None,"
    " float? softcap=None, Tensor? sinks=None) -> Tensor",
    macs=_macs,
)
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """``softmax(cap(query @ key^T * scale) + mask) @ value``.

    Args:
        query: [..., heads, queries, head_dim].
        key: [..., kv_heads, keys, head_dim]; ``kv_heads`` divides ``heads``, and each serves neighbouring heads.
        value: [..., kv_heads, keys, value_dim].
        mask: broadcastable to [..., heads, queries, keys]; boolean (True takes part) or added to the scores.
        is_causal: query i sees the keys up to the i-th.
        scale: of the scores; 1/sqrt(head_dim) when None.
        softcap: scores become ``softcap * tanh(score / softcap)`` before the mask (Gemma 2, arXiv:2408.00118, sec. 2).
        sinks: [heads]: a score for each head that takes part in its softmax and has no value (gpt-oss,
            arXiv:2508.10925, sec. 2.2).

    Returns:
        [..., heads, queries, value_dim]. A query that sees no key gets zero.
    """
    groups = query.shape[-3] // key.shape[-3] if query.dim() > 2 else 1
    if groups != 1:
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = query @ key.transpose(-1, -2) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    hidden = None
    if is_causal:
        rows, columns = (torch.arange(size, device=scores.device) for size in scores.shape[-2:])
        hidden = columns > rows.unsqueeze(-1)
    if mask is not None and mask.dtype is torch.bool:
        hidden = ~mask if hidden is None else hidden | ~mask
    elif mask is not None:
        scores = scores + mask
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    if sinks is not None:
        sink = sinks.reshape(-1, 1, 1).to(scores.dtype).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    else:
        # Only a row without any key is all minus infinity; its softmax would be not-a-number.
        empty = (scores == -math.inf).all(-1, keepdim=True)
        weights = scores.softmax(-1).masked_fill(empty, 0.0)
    return weights @ value
