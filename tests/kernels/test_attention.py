"""Our attention equals PyTorch's where PyTorch has the words, and a closed form where it has not."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import graphlathe
from graphlathe.kernels import attention

_SPELLINGS = list(itertools.product([False, True], [1, 2, 4], [None, 0.3]))


def _operands(heads: int = 4, kv_heads: int = 2, queries: int = 5, keys: int = 5) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    shapes = [(heads, queries), (kv_heads, keys), (kv_heads, keys)]
    return tuple(torch.randn(2, h, n, 8, dtype=torch.float64) for h, n in shapes)


@pytest.mark.parametrize(("causal", "kv_heads", "scale"), _SPELLINGS)
def test_it_is_scaled_dot_product_attention(causal: bool, kv_heads: int, scale: float | None) -> None:
    q, k, v = _operands(kv_heads=kv_heads)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
    torch.testing.assert_close(attention(q, k, v, is_causal=causal, scale=scale), expected)


def test_masks_hide_or_add_and_an_empty_row_is_zero() -> None:
    q, k, v = _operands()
    mask = torch.rand(2, 1, 5, 5) > 0.4
    mask[0, 0, 2] = False
    expected = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    torch.testing.assert_close(attention(q, k, v, mask), expected)
    assert not attention(q, k, v, mask)[0, :, 2].any()
    bias = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=True)
    torch.testing.assert_close(attention(q, k, v, bias), expected)


def test_the_soft_cap_bounds_the_scores() -> None:
    """With the identity for values the output is the weights, whose ratios give the scores back."""
    q, k, _ = _operands(kv_heads=4)
    weights = attention(q * 50, k, torch.eye(5, dtype=torch.float64).expand(2, 4, 5, 5), softcap=2.0)
    scores = q * 50 @ k.transpose(-1, -2) / math.sqrt(8)
    capped = 2.0 * torch.tanh(scores / 2.0)
    torch.testing.assert_close(weights.log() - weights.log()[..., :1], capped - capped[..., :1])


def test_a_sink_takes_its_share() -> None:
    q, k, v = _operands(kv_heads=4)
    sinks = torch.randn(4, dtype=torch.float64)
    total = (q @ k.transpose(-1, -2) / math.sqrt(8)).logsumexp(-1, keepdim=True)
    share = torch.sigmoid(total - sinks.reshape(4, 1, 1))
    torch.testing.assert_close(attention(q, k, v, sinks=sinks), attention(q, k, v) * share)


class _Capped(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(16, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return torch.ops.graphlathe.attention(q, k, v, is_causal=True, softcap=3.0)


def test_a_graph_keeps_it_whole_and_everything_else_knows_it() -> None:
    """Traced, costed, differentiated, printed and parsed, exported: one definition serves all."""
    model = _Capped().eval()
    x = torch.randn(2, 5, 16)
    program = graphlathe.trace(model, (x,), dynamic={"x": {1: "seq"}})
    assert program.to_text().count("graphlathe.attention") == 1
    assert not program.cost().unknown
    torch.testing.assert_close(program(x), model(x))
    torch.testing.assert_close(program(x[:, :3]), model(x[:, :3]))
    model(x).sum().backward()
    assert model.qkv.weight.grad is not None and model.qkv.weight.grad.any()
