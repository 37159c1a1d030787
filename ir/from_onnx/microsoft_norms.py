"""ONNX Runtime's own normalizations, which its optimizers write: with a residual, a bias or embeddings added first."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ImportModelError
from .registry import operator

MICROSOFT = "com.microsoft"


def _sum(x: Tensor, skip: Tensor, bias: Tensor | None) -> Tensor:
    total = x + skip  # the residual may lack the batch, or have a batch of one
    return total if bias is None else total + bias


def _with_sum(result: Tensor, total: Tensor, n_used: int) -> Any:
    """Outputs 1 and 2, statistics for training, are computed by nothing that infers."""
    return result if n_used == 1 else (result, None, None, total)[:n_used]


@operator("SkipLayerNormalization", domain=MICROSOFT)
def skip_layer_norm(
    x: Tensor,
    skip: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
    n_used: int,
) -> Any:
    total = _sum(x, skip, bias)
    return _with_sum(F.layer_norm(total, [x.shape[-1]], scale, shift, epsilon), total, n_used)


@operator("SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def skip_rms_norm(
    x: Tensor,
    skip: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
    n_used: int,
) -> Any:
    total = _sum(x, skip, bias)
    return _with_sum(F.rms_norm(total, [x.shape[-1]], scale, epsilon), total, n_used)


@operator("SimplifiedLayerNormalization", domain=MICROSOFT)
@operator("SimplifiedLayerNormalization")
def rms_norm(
    x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1, n_used: int
) -> Any:
    """ONNX Runtime registers it in the standard domain, whose specification does not have it."""
    dims = list(range(axis % x.dim(), x.dim()))
    result = F.rms_norm(x, [x.shape[d] for d in dims], scale, epsilon)
    if n_used == 1:
        return result
    return result, torch.rsqrt(x.float().square().mean(dims, keepdim=True) + epsilon)


@operator("EmbedLayerNormalization", domain=MICROSOFT)
def embed_layer_norm(
    ids: Tensor,
    segments: Tensor | None,
    words: Tensor,
    positions: Tensor,
    segment_table: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    mask: Tensor | None = None,
    places: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
    mask_index_type: int = 0,
    n_used: int,
) -> Any:
    """Tokens, positions and segments embedded, added and normalized; how many tokens the mask keeps; and the sum."""
    total = F.embedding(ids, words)
    total = total + F.embedding(places, positions) if places is not None else total + positions[: ids.shape[1]]
    if segments is not None and segment_table is not None:
        total = total + F.embedding(segments, segment_table)
    result = F.layer_norm(total, [words.shape[1]], scale, shift, epsilon)
    if n_used == 1:
        return result
    kept = torch.zeros([ids.shape[0]], dtype=torch.int32) if mask is None else mask.sum(1).to(torch.int32)
    return (result, kept, total)[:n_used]


def _group_norm(x: Tensor, scale: Tensor, shift: Tensor, groups: int, epsilon: float, silu: bool, last: bool) -> Tensor:
    x = x.movedim(-1, 1) if last else x
    result = F.group_norm(x, groups, scale.to(x.dtype), shift.to(x.dtype), epsilon)
    result = F.silu(result) if silu else result
    return result.movedim(1, -1) if last else result


@operator("GroupNorm", domain=MICROSOFT)
def group_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    activation: int,
    channels_last: int = 1,
    epsilon: float = 1e-5,
    groups: int,
) -> Tensor:
    return _group_norm(x, scale, shift, groups, epsilon, bool(activation), bool(channels_last))


@operator("SkipGroupNorm", domain=MICROSOFT)
def skip_group_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    skip: Tensor,
    bias: Tensor | None = None,
    *,
    activation: int,
    channels_last: int = 1,
    epsilon: float = 1e-5,
    groups: int,
    n_used: int,
) -> Any:
    if not channels_last:
        raise ImportModelError("SkipGroupNorm with channels in front is not supported", expected="channels_last 1")
    if skip.dim() == 2:
        skip = skip.unsqueeze(1).unsqueeze(1)
    total = _sum(x, skip, bias)
    result = _group_norm(total, scale, shift, groups, epsilon, bool(activation), True)
    return result if n_used == 1 else (result, total)
