"""ONNX Runtime's own attention operators: with packed projections, key padding, a cache, grouped heads and rotation."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..errors import ImportModelError
from .attention import attend, both, join_heads, rotate, split_heads, visible
from .microsoft_norms import MICROSOFT
from .registry import operator


def _key_padding(mask: Tensor, batch: Any, queries: Any, keys: Any, hidden: float) -> Tensor:
    """What is added to the scores, [batch, 1, 1 or queries, keys]: 0, or ``hidden`` where a key does not take part.

    Args:
        mask: [batch], how many keys there are; [2 * batch], where they end and where they begin; [batch, keys] or
            [batch, queries, keys], not zero where they take part; or [batch, 1, longest, longest], the same.
        batch: its size.
        queries: how many.
        keys: how many.
        hidden: the number.
    """
    if mask.dim() == 1:
        places = torch.arange(keys)
        if statically_known_true(mask.shape[0] == batch):
            kept = places < mask.unsqueeze(-1)
        elif statically_known_true(mask.shape[0] == 2 * batch):
            ends, starts = mask.reshape(2, -1, 1).unbind(0)
            kept = (places < ends) & (places >= starts)
        else:
            raise ImportModelError(
                f"a mask of {mask.shape[0]} numbers is not supported", expected="one or two for each batch element"
            )
    else:
        kept = mask != 0
    if kept.dim() == 2:
        kept = kept.unsqueeze(1)
    kept = kept.unsqueeze(1) if kept.dim() == 3 else kept[:, :, keys - queries : keys, :keys]
    return torch.where(kept, 0.0, hidden)


def _attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
    bias: Tensor | None,
    *,
    causal: bool,
    past: Any,
    scale: float,
    hidden: float,
) -> Tensor:
    """Attention over [batch, heads, length, width]; the queries stand behind ``past`` keys."""
    mask = None
    if padding is not None:
        mask = _key_padding(padding, query.shape[0], query.shape[2], key.shape[2], hidden).to(query.dtype)
    if bias is not None:
        mask = bias if mask is None else mask + bias
    plain = causal and mask is None and isinstance(past, int) and past == 0
    if causal and not plain:
        mask = both(mask, visible(query, key, past, None, 0))
    return attend(query, key, value, mask, causal=plain, scale=scale or None)


@operator("Attention", domain=MICROSOFT)
def attention(
    x: Tensor,
    weights: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    past: Tensor | None = None,
    attention_bias: Tensor | None = None,
    *,
    do_rotary: int = 0,
    mask_filter_value: float = -10000.0,
    num_heads: int,
    past_present_share_buffer: int = 0,
    qkv_hidden_sizes: Any = None,
    rotary_embedding_dim: int = 0,
    scale: float = 0.0,
    unidirectional: int = 0,
    n_used: int,
) -> Any:
    """One product makes queries, keys and values; past keys and values are [2, batch, heads, length, width]."""
    if do_rotary or past_present_share_buffer:
        raise ImportModelError(
            "com.microsoft.Attention with rotation or with a shared cache is not supported",
            expected="do_rotary and past_present_share_buffer 0",
        )
    packed = torch.matmul(x, weights)
    packed = packed if bias is None else packed + bias
    sizes = list(qkv_hidden_sizes or [int(weights.shape[1]) // 3] * 3)
    query, key, value = (split_heads(t, num_heads) for t in torch.split(packed, sizes, -1))
    if past is not None:
        old_key, old_value = past.unbind(0)
        key, value = torch.cat([old_key, key], 2), torch.cat([old_value, value], 2)
    result = join_heads(
        _attended(
            query,
            key,
            value,
            mask,
            attention_bias,
            causal=bool(unidirectional),
            past=0 if past is None else past.shape[3],
            scale=scale,
            hidden=mask_filter_value,
        )
    )
    return result if n_used == 1 else (result, torch.stack([key, value]))


def _heads(x: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """[batch, length, heads * width] to [batch, heads, length, width], the bias added; other ranks have heads."""
    if x.dim() == 4:
        return x
    return split_heads(x if bias is None else x + bias, heads)


@operator("MultiHeadAttention", domain=MICROSOFT)
def multi_head_attention(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    bias: Tensor | None = None,
    padding: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    *,
    mask_filter_value: float = -10000.0,
    num_heads: int,
    scale: float = 0.0,
    unidirectional: int = 0,
    n_used: int,
) -> Any:
    """Queries, keys and values come one by one, as [batch, length, heads, 3, width] in one, or with keys and values as
    [batch, length, heads, 2, width] in one; keys and values with four dimensions have their heads apart already.
    """
    if n_used > 3:
        raise ImportModelError("com.microsoft.MultiHeadAttention with its output 'qk' is not supported")
    if query.dim() == 5:
        query, key, value = (t.flatten(2) for t in query.unbind(3))
    elif key is not None and key.dim() == 5:
        key, value = (t.flatten(2) for t in key.unbind(3))
    if key is None or value is None:
        raise ImportModelError("com.microsoft.MultiHeadAttention without keys or values is not supported")
    biases: list[Tensor | None] = [None] * 3
    if bias is not None:
        last = int(value.shape[-1]) * (num_heads if value.dim() == 4 else 1)
        biases = list(torch.split(bias, [int(query.shape[-1])] * 2 + [last], 0))
    q, k, v = (_heads(t, b, num_heads) for t, b in zip((query, key, value), biases, strict=True))
    past: Any = 0
    if past_key is not None and past_value is not None:
        past = past_key.shape[2]
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    result = _attended(
        q,
        k,
        v,
        padding,
        attention_bias,
        causal=bool(unidirectional),
        past=past,
        scale=scale,
        hidden=mask_filter_value,
    )
    return (join_heads(result), k, v)[:n_used] if n_used > 1 else join_heads(result)


def _unpacked(query: Tensor, heads: int, kv_heads: int) -> list[Tensor]:
    width = int(query.shape[-1]) // (heads + 2 * kv_heads)
    return list(torch.split(query, [heads * width, kv_heads * width, kv_heads * width], -1))


@operator("GroupQueryAttention", domain=MICROSOFT)
def group_query_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    past_key: Tensor | None,
    past_value: Tensor | None,
    last: Tensor,
    total: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    positions: Tensor | None = None,
    attention_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    *,
    causal: int = 1,
    do_rotary: int = 0,
    k_norm_epsilon: float | None = None,
    k_quant_type: str = "NONE",
    kv_cache_bit_width: int = 0,
    kv_num_heads: int,
    local_window_size: int = -1,
    num_heads: int,
    q_norm_epsilon: float | None = None,
    qk_norm_epsilon: float = 1e-6,
    qk_output: int = 0,
    rotary_interleaved: int = 0,
    scale: float = 0.0,
    sliding_window_cache: int = 0,
    smooth_softmax: int = 0,
    softcap: float = 0.0,
    v_quant_type: str = "NONE",
    n_used: int,
) -> Any:
    """``last`` is, for each batch element, the place of its last token: new keys are written to the cache up to there.

    The new cache is the old one and as many places as there are new tokens: the form in which old and new caches are
    two tensors. Batch elements that are shorter than others have free places at the end.
    """
    if k_scale is not None or v_scale is not None or (k_quant_type, v_quant_type) != ("NONE", "NONE"):
        raise ImportModelError("com.microsoft.GroupQueryAttention with a quantised cache is not supported")
    if qk_output or n_used > 3 or sliding_window_cache or not causal:
        raise ImportModelError(
            "com.microsoft.GroupQueryAttention in this form is not supported",
            expected="qk_output 0, sliding_window_cache 0 and causal 1",
        )
    parts = _unpacked(query, num_heads, kv_num_heads) if key is None or value is None else [query, key, value]
    counts = (num_heads, kv_num_heads, kv_num_heads)
    q, k, v = (split_heads(t, n) for t, n in zip(parts, counts, strict=True))
    if q_norm is not None:
        q = F.rms_norm(q, [q.shape[-1]], q_norm, qk_norm_epsilon if q_norm_epsilon is None else q_norm_epsilon)
    if k_norm is not None:
        k = F.rms_norm(k, [k.shape[-1]], k_norm, qk_norm_epsilon if k_norm_epsilon is None else k_norm_epsilon)
    length: Any = q.shape[2]
    empty = past_key is None or statically_known_true(past_key.shape[2] == 0)
    # A prompt stands at the beginning, even where a batch element's last token comes before the prompt's end.
    start: Any = 0 if empty else (last.reshape(-1, 1).to(torch.int64) + 1 - length).clamp(min=0)
    if do_rotary:
        if cos is None or sin is None:
            raise ImportModelError("com.microsoft.GroupQueryAttention rotates without cos_cache and sin_cache")
        places = torch.arange(length).unsqueeze(0) + start if positions is None else positions
        angles = (cos[places].unsqueeze(1), sin[places].unsqueeze(1))
        q, k = (rotate(t, *angles, 2 * int(cos.shape[1]), bool(rotary_interleaved)) for t in (q, k))
    if not empty and past_key is not None and past_value is not None:
        k, v = _written(past_key, k, start), _written(past_value, v, start)
    mask = attention_bias
    plain = empty and mask is None and local_window_size <= 0
    if not plain:
        offset = start if isinstance(start, int) else start.reshape(-1, 1, 1, 1)
        left = local_window_size - 1 if local_window_size > 0 else None
        mask = both(mask, visible(q, k, offset, left, 0))
    if smooth_softmax and sinks is None:
        sinks = torch.zeros([num_heads], dtype=q.dtype)
    result = attend(q, k, v, mask, causal=plain, scale=scale or None, softcap=softcap, sinks=sinks)
    return (join_heads(result), k, v)[:n_used] if n_used > 1 else join_heads(result)


def _written(cache: Tensor, new: Tensor, start: Tensor) -> Tensor:
    """The cache [batch, heads, length, width], longer by what is new, which is written from ``start`` on."""
    longer = F.pad(cache, [0, 0, 0, new.shape[2]])
    places = (torch.arange(new.shape[2]).unsqueeze(0) + start).unsqueeze(1).unsqueeze(-1)
    return torch.scatter(longer, 2, places.expand(new.shape), new)


@operator("RotaryEmbedding", domain=MICROSOFT)
def rotary_embedding(
    x: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: int = 0,
    is_packed_batching: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
    scale: float = 1.0,
) -> Tensor:
    """``positions`` is the first one, [1], or all of them, [batch, length]."""
    if is_packed_batching or not math.isclose(scale, 1.0):
        raise ImportModelError(
            "com.microsoft.RotaryEmbedding of packed batches or with a scale is not supported",
            expected="is_packed_batching 0 and scale 1",
        )
    flat = x.dim() == 3
    width = rotary_embedding_dim or 2 * int(cos.shape[1])
    heads = split_heads(x, num_heads or int(x.shape[-1]) // width) if flat else x
    places = torch.arange(heads.shape[2]).unsqueeze(0) + positions if positions.dim() == 1 else positions
    result = rotate(heads, cos[places].unsqueeze(1), sin[places].unsqueeze(1), width, bool(interleaved))
    return join_heads(result) if flat else result
