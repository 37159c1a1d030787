"""Gated activation: the product of a feed-forward layer's two branches (GLU variants, arXiv:2002.05202, sec. 2)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from ..ir.errors import InputError
from .define import free, operator

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
}
"""What a gate may go through: GeGLU (exact and by tanh), ReGLU, GLU, SwiGLU."""


@operator("gated_activation(Tensor gate, Tensor up, *, str activation) -> Tensor", macs=free, elementwise=True)
def gated_activation(gate: torch.Tensor, up: torch.Tensor, *, activation: str) -> torch.Tensor:
    """``activation(gate) * up``.

    Args:
        gate: [..., width].
        up: [..., width].
        activation: one of `ACTIVATIONS`.

    Raises:
        InputError: there is no such activation.
    """
    if activation not in ACTIVATIONS:
        raise InputError(f"no activation '{activation}'", expected=f"one of: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[activation](gate) * up
