"""Every spelling of a rotary embedding becomes one operator; what only looks like one stays, with its reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.ir.rewrite import is_op
from graphlathe.ir.verify import verify
from graphlathe.kernels import rotary_embedding
from graphlathe.passes.base import Context, Stats
from graphlathe.passes.canonical.canonicalize import Canonicalize
from graphlathe.passes.canonical.raise_rotary import RaiseRotary
from tests.passes.rewriting import assert_same_outputs, rewritten

Spelling = Callable[[Tensor, Tensor, Tensor], Tensor]

WIDTH = 8


def halves_negated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def halves_by_chunk(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1) * sin + x * cos


def halves_one_by_one(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[..., :4], sin[..., :4]
    first, second = x[..., :4], x[..., 4:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def halves_added_the_other_way(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[..., :4], sin[..., :4]
    first, second = x.split(4, -1)
    return torch.cat((cos * first - sin * second, sin * first + cos * second), -1)


def neighbours_stacked(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * cos + turned * sin


def neighbours_one_by_one(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[..., :4], sin[..., :4]
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)


def times_minus_one(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.cat((x[..., 4:] * -1.0, x[..., :4]), -1) * sin


SPELLINGS: dict[str, tuple[Spelling, bool]] = {
    f.__name__: (f, f.__name__.startswith("neighbours"))
    for f in (
        halves_negated,
        halves_by_chunk,
        halves_one_by_one,
        halves_added_the_other_way,
        neighbours_stacked,
        neighbours_one_by_one,
        times_minus_one,
    )
}


class Model(nn.Module):
    """Heads rotated by the angles of their positions."""

    def __init__(self, spelling: Spelling, width: int = WIDTH) -> None:
        super().__init__()
        self.spelling = spelling
        self.q = nn.Linear(16, 2 * width)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        heads = self.q(x).unflatten(-1, (2, self.width)).transpose(1, 2)
        frequencies = 10.0 ** (-torch.arange(4) / 4.0)
        angles = torch.arange(x.shape[1]).unsqueeze(-1) * frequencies
        angles = torch.cat((angles, angles), -1)
        return self.spelling(heads, angles.cos(), angles.sin())


def raised(spelling: Spelling, width: int = WIDTH) -> tuple[Program, Program, Stats]:
    torch.manual_seed(1)
    model = Model(spelling, width).eval()
    before = trace(model, (torch.randn(2, 6, 16),), dynamic={"x": {0: "B", 1: "S"}})
    Canonicalize().run(before, Context())
    after = before.clone()
    stats = RaiseRotary().run(after, Context())
    verify(after, 2)
    assert_same_outputs(after, before)
    again = after.clone()
    RaiseRotary().run(again, Context())
    assert again.mutations == 0
    return before, after, stats


def operators(program: Program) -> list[fx.Node]:
    return [n for n in program.graph.nodes if is_op(n, rotary_embedding)]


@pytest.mark.parametrize(("spelling", "interleaved"), SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_is_one_operator(spelling: Spelling, interleaved: bool) -> None:
    _, after, stats = raised(spelling)
    (node,) = operators(after)
    assert node.kwargs["rotary_dim"] == WIDTH
    assert bool(node.kwargs.get("interleaved", False)) is interleaved
    assert not any(is_op(n, torch.ops.aten.cat, torch.ops.aten.stack) for n in node.users)
    assert (stats.attempts, stats.hits) == (1, 1)


@pytest.mark.parametrize("split", [False, True], ids=["sliced", "split"])
def test_channels_that_are_joined_again_are_left_by_the_one_operator(split: bool) -> None:
    def partial(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turn, rest = x.split((8, 4), -1) if split else (x[..., :8], x[..., 8:])
        return torch.cat((halves_negated(turn, cos, sin), rest), -1)

    _, after, _ = raised(partial, 12)
    (node,) = operators(after)
    assert node.kwargs["rotary_dim"] == 8
    assert node.meta["val"].shape[-1] == 12


def test_channels_joined_in_another_order_stay_apart() -> None:
    def behind(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.cat((x[..., 8:], halves_negated(x[..., :8], cos, sin)), -1)

    _, after, _ = raised(behind, 12)
    (node,) = operators(after)
    assert node.args[0].meta["val"].shape[-1] == 8  # type: ignore[union-attr]


def reflected(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.cat((x[..., 4:], x[..., :4]), -1) * sin


def of_another(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x.flip(-1) * cos + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin


def unequal_parts(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.cat((-x[..., 3:], x[..., :3]), -1) * sin


def wrong_sign(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[..., :4], sin[..., :4]
    return torch.cat((x[..., :4] * cos + x[..., 4:] * sin, x[..., 4:] * cos + x[..., :4] * sin), -1)


@pytest.mark.parametrize("spelling", [reflected, unequal_parts, wrong_sign])
def test_other_sums_of_products_are_no_rotations(spelling: Spelling) -> None:
    before, after, stats = raised(spelling)
    assert after.to_text() == before.to_text()
    assert not stats.hits


def test_a_near_miss_says_what_was_missing() -> None:
    before, after, stats = raised(of_another)
    assert after.to_text() == before.to_text()
    assert stats.misses == {"channels are turned, but not added to themselves times a cosine": 1}
    assert set(stats.missed) <= {n.name for n in after.graph.nodes}


HALVES = """\
program @main(%x: f32[B, 2, S, 8], %cos: f32[S, 8], %sin: f32[S, 8]) -> (%out) {
  dim B = 2 in [1, inf]
  dim S = 5 in [1, inf]
  %0 = aten.mul.Tensor(%x, %cos) : f32[B, 2, S, 8]
  %1 = aten.slice.Tensor(%x, 3, 4, 9223372036854775807) : f32[B, 2, S, 4]
  %2 = aten.neg(%1) : f32[B, 2, S, 4]
  %3 = aten.slice.Tensor(%x, 3, 0, 4) : f32[B, 2, S, 4]
  %4 = aten.cat([%2, %3], -1) : f32[B, 2, S, 8]
  %5 = aten.mul.Tensor(%4, %sin) : f32[B, 2, S, 8]
  %6 = aten.add.Tensor(%0, %5) : f32[B, 2, S, 8]
  return (%6,)
}
"""


def test_golden(golden: Callable[[str, str], None]) -> None:
    before, after, stats = rewritten(RaiseRotary(), HALVES)
    assert (stats.hits, stats.attempts) == (1, 1)
    golden("passes/raise-rotary", before.to_text() + "\n" + after.to_text())
