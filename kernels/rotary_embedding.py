"""Rotary position embedding (RoFormer, arXiv:2104.09864, eq. 34)."""

from __future__ import annotations

import torch

from .define import free, operator


@operator(
    "rotary_embedding(Tensor x, Tensor cos, Tensor sin, *, int rotary_dim, bool interleaved=False) -> Tensor",
    macs=free,
)
def rotary_embedding(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, rotary_dim: int, interleaved: bool = False
) -> torch.Tensor:
    """Rotate pairs of channels by an angle for each position: ``(a, b)`` to ``(a cos - b sin, b cos + a sin)``.

    Args:
        x: [..., head_dim]; the first ``rotary_dim`` channels are rotated, the others stay.
        cos: of the angles, broadcastable to x, with one channel for each pair (``rotary_dim / 2``) or for each channel
            (``rotary_dim``, in the order of x).
        sin: like cos.
        rotary_dim: how many channels are rotated; even.
        interleaved: pairs are neighbours (0 and 1, 2 and 3...) instead of halves (0 and rotary_dim / 2...).
    """
    rotated = x[..., :rotary_dim]
    if interleaved:
        a, b = rotated[..., ::2], rotated[..., 1::2]
        turned = torch.stack((-b, a), -1).flatten(-2)
    else:
        a, b = rotated[..., : rotary_dim // 2], rotated[..., rotary_dim // 2 :]
        turned = torch.cat((-b, a), -1)
    if cos.shape[-1] != rotary_dim:
        cos, sin = (t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1) for t in (cos, sin))
    result = rotated * cos + turned * sin
    return result if rotary_dim == x.shape[-1] else torch.cat((result, x[..., rotary_dim:]), -1)
