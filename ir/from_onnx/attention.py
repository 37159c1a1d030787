"""Attention of the standard domain, and rotary position embedding."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import attention as attention_operator
from ...kernels import rotary_embedding as rotary_operator
from ..errors import ImportModelError
from .model_file import DTYPES
from .registry import operator


@operator("Attention", since=23)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int = 0,
    left_window_size: int = -1,
    q_num_heads: int = 0,
    qk_matmul_output_mode: int = 0,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
    n_used: int,
) -> Any:
    """Three-dimensional inputs are split into heads; past keys and values come first; ``lengths`` says how many keys of
    each batch element are real. Query i stands at ``i + offset``, where the offset counts the keys before the queries.
    """
    flat = query.dim() == 3
    if flat:
        query, key, value = (
            split_heads(t, heads) for t, heads in ((query, q_num_heads), (key, kv_num_heads), (value, kv_num_heads))
        )
    if past_key is not None and past_value is not None:
        key, value = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
    if mask is not None:
        mask = _as_long_as(mask, key)
    windowed = left_window_size >= 0 or right_window_size >= 0
    plain_causal = bool(is_causal) and past_key is None and lengths is None and mask is None and not windowed
    if not plain_causal and (is_causal or windowed or lengths is not None):
        offset: Any = 0 if past_key is None else past_key.shape[2]
        if lengths is not None:
            offset = (lengths - query.shape[2]).reshape(-1, 1, 1, 1)
        left = left_window_size if left_window_size >= 0 else None
        right = right_window_size if right_window_size >= 0 else None
        if is_causal:
            right = 0 if right is None else min(right, 0)
        seen = visible(query, key, offset, left, right)
        if lengths is not None:
            real = torch.arange(key.shape[2]) < lengths.reshape(-1, 1, 1, 1)
            seen = real if seen is None else seen & real
        mask = both(mask, seen)
    if n_used > 3 or softmax_precision is not None:
        result, scores = _spelled_out(
            query, key, value, mask, plain_causal, scale, softcap, qk_matmul_output_mode, softmax_precision
        )
    else:
        result, scores = attend(query, key, value, mask, causal=plain_causal, scale=scale, softcap=softcap), None
    result = join_heads(result) if flat else result
    return result if n_used == 1 else (result, key, value, scores)[:n_used]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[batch, length, heads * width] to [batch, heads, length, width]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[batch, heads, length, width] to [batch, length, heads * width]."""
    return x.transpose(1, 2).flatten(2)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    causal: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """One attention node: PyTorch's, or ours where it has no word for something."""
    if softcap or sinks is not None:
        return attention_operator(
            query, key, value, mask, is_causal=causal, scale=scale, softcap=softcap or None, sinks=sinks
        )
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scale, enable_gqa=grouped)


def visible(query: Tensor, key: Tensor, offset: Any, left: int | None, right: int | None) -> Tensor | None:
    """Whether query i, at position ``i + offset``, sees key j: at most ``left`` before it and ``right`` behind it."""
    place = torch.arange(query.shape[2]).unsqueeze(-1) + offset
    columns = torch.arange(key.shape[2])
    seen = None if right is None else columns <= place + right
    if left is not None:
        near = columns >= place - left
        seen = near if seen is None else seen & near
    return seen


def both(mask: Tensor | None, seen: Tensor | None) -> Tensor | None:
    """A mask, boolean or additive, and a boolean one."""
    if mask is None or seen is None:
        return mask if seen is None else seen
    if mask.dtype == torch.bool:
        return mask & seen
    return torch.where(seen, mask, -math.inf)


def _as_long_as(mask: Tensor, key: Tensor) -> Tensor:
    """A mask that is shorter than the keys hides the rest."""
    if mask.shape[-1] == key.shape[2]:
        return mask
    missing = key.shape[2] - mask.shape[-1]
    return F.pad(mask, [0, missing], value=False if mask.dtype == torch.bool else -math.inf)


def _spelled_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    softcap: float,
    mode: int,
    precision: int | None,
) -> tuple[Tensor, Tensor]:
    """The result, and the scores as they are before the cap (mode 0), after it (1), with the mask (2), or as weights
    (3).
    """
    groups = query.shape[1] // key.shape[1]
    if groups != 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    root = math.sqrt(1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    scores = (query * root) @ (key * root).transpose(-1, -2)
    seen = [scores]
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    seen.append(scores)
    if causal:
        mask = both(mask, visible(query, key, 0, None, 0))
    if mask is not None and mask.dtype == torch.bool:
        scores = torch.where(mask, scores, -math.inf)
        empty = ~mask.any(-1, keepdim=True)
    elif mask is not None:
        scores = scores + mask
        empty = (mask == -math.inf).all(-1, keepdim=True)
    else:
        empty = None
    seen.append(scores)
    if precision is not None and precision not in DTYPES:
        raise ImportModelError(f"Attention with the softmax precision {precision} is not supported")
    wide = scores if precision is None else scores.to(DTYPES[precision])
    weights = wide.softmax(-1)
    if empty is not None:
        weights = weights.masked_fill(empty, 0.0)
    weights = weights.to(query.dtype)
    seen.append(weights)
    return weights @ value, seen[mode]


@operator("RotaryEmbedding", since=23)
def rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    """Rotates pairs (neighbours, or the two halves) of the first ``rotary_embedding_dim`` channels of each head."""
    flat = x.dim() == 3
    heads = split_heads(x, num_heads) if flat else x
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    result = rotate(heads, cos.unsqueeze(1), sin.unsqueeze(1), rotary_embedding_dim, bool(interleaved))
    return join_heads(result) if flat else result


def rotate(x: Tensor, cos: Tensor, sin: Tensor, width: int, interleaved: bool) -> Tensor:
    """Rotate [batch, heads, length, channels] by angles [batch or 1, 1, length, at least half of the width]."""
    width = width or int(x.shape[-1])
    cos, sin = cos[..., : width // 2], sin[..., : width // 2]
    return rotary_operator(x, cos, sin, rotary_dim=width, interleaved=interleaved)
