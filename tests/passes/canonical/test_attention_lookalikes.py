"""What looks like attention: it stays where one operator computes something else, and where it is raised, it is equal.

Rows of which every key is hidden count: there the numbers matter by which masks hide keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.ir.rewrite import is_op
from graphlathe.kernels import attention
from graphlathe.passes.base import Context, Stats
from graphlathe.passes.canonical.canonicalize import Canonicalize
from graphlathe.passes.canonical.raise_attention import RaiseAttention
from tests.passes.canonical.spelled import Spelled, raised

aten = torch.ops.aten
Spelling = Callable[..., Tensor]
HEADS, LENGTH, WIDTH = 4, 6, 8
LOWEST = torch.finfo(torch.float64).min


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


SHAPE = (2, HEADS, LENGTH, WIDTH)
Q, K, V = (drawn(*SHAPE, seed=i) for i in range(3))
BIAS = drawn(1, HEADS, LENGTH, LENGTH)
CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
SEEN = torch.ones(1, 1, 1, LENGTH, dtype=torch.bool)
SEEN[..., :2] = False  # the first queries see no key at all, if they see no later ones either


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) * WIDTH**-0.5


def added(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, LOWEST)


def rewritten(spelling: Spelling, *inputs: Tensor) -> tuple[Program, Stats]:
    """The raised program, which equals what it was; the first axis is dynamic where all inputs have one of two."""
    _, after, stats = raised(RaiseAttention(), spelling, *inputs)
    torch.testing.assert_close(after(*inputs), spelling(*inputs), rtol=1e-12, atol=1e-14)
    return after, stats


def guarded(q: Tensor, k: Tensor, v: Tensor, hides: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Attention with a condition on scores and weights, under which the weights become zero."""
    found = scores(q, k)
    weights = found.softmax(-1)
    return torch.where(hides(found, weights), 0.0, weights) @ v


REFUSED: dict[str, tuple[Spelling, str]] = {
    "masked after the softmax": (
        lambda q, k, v: torch.where(CAUSAL, 0.0, scores(q, k).softmax(-1)) @ v,
        "masked after the softmax",
    ),
    "condition on single scores": (lambda q, k, v: guarded(q, k, v, lambda s, w: s == 0.5), "masked after"),
    "condition on single weights": (lambda q, k, v: guarded(q, k, v, lambda s, w: w == 0.5), "2 users"),
    "rows with a key": (
        lambda q, k, v: guarded(q, k, v, lambda s, w: s.amax(-1, keepdim=True) != -math.inf),
        "masked after",
    ),
    "whole columns": (
        lambda q, k, v: guarded(q, k, v, lambda s, w: (s == -math.inf).all(-2, keepdim=True)),
        "masked after",
    ),
    "rounded scores": (
        lambda q, k, v: torch.div(scores(q, k), 0.5, rounding_mode="floor").softmax(-1) @ v,
        "come from aten.div",
    ),
    "whole numbers": (
        lambda q, k, v: scores(q, k).to(torch.int32).softmax(-1, dtype=torch.float64) @ v,
        "come from aten._to_copy",
    ),
    "weak mask": (
        lambda q, k, v: (scores(q, k).masked_fill(~CAUSAL, -1e4) * 1e-3).softmax(-1) @ v,
        "which does not hide them",
    ),
    "mask before a factor by heads": (
        lambda q, k, v: (scores(q, k).masked_fill(~CAUSAL, -1e9) * BIAS[0, :, :1, :1]).softmax(-1) @ v,
        "head by head",
    ),
    "soft cap before a factor by heads": (
        lambda q, k, v: (scores(q, k).tanh() * BIAS[0, :, :1, :1]).softmax(-1) @ v,
        "head by head",
    ),
    "factor by keys": (lambda q, k, v: (scores(q, k) * BIAS[0, :, :1]).softmax(-1) @ v, "come from aten.mul"),
    "negative scale": (lambda q, k, v: (scores(q, k) * -1.0).softmax(-1) @ v, "negative scale"),
    "subtracted scores": (lambda q, k, v: (BIAS - scores(q, k)).softmax(-1) @ v, "a sum without"),
    "scaled scores added to a bias": (
        lambda q, k, v: torch.add(BIAS, scores(q, k), alpha=2).softmax(-1) @ v,
        "a sum without",
    ),
    "softmax over heads": (lambda q, k, v: scores(q, k).softmax(1) @ v, "not over the last axis"),
    "weights on the right": (
        lambda q, k, v: v.transpose(-1, -2) @ scores(q, k).softmax(-1),
        "the second factor of a product",
    ),
    "transposed weights": (lambda q, k, v: scores(q, k).softmax(-1).mT @ v, "not to a product with values"),
    "scores read elsewhere": (
        lambda q, k, v: (lambda s: s.masked_fill(~CAUSAL, LOWEST).softmax(-1) @ v + s.sum(-1, True))(scores(q, k)),
        "used elsewhere too",
    ),
    "queries that a mask repeats": (lambda q, k, v: (scores(q[:, :, :1], k) + BIAS).softmax(-1) @ v, "broadcast"),
    "heads that a mask repeats": (
        lambda q, k, v: (scores(q[:, :1], k[:, :1]) + BIAS).softmax(-1) @ v,
        "broadcast",
    ),
    "a mask with more axes": (lambda q, k, v: ((scores(q, k) + BIAS[None]).softmax(-1) @ v)[0], "broadcast"),
    "different numbers": (
        lambda q, k, v: scores(q, k).masked_fill(~SEEN, -1e9).masked_fill(~CAUSAL, -1e4).softmax(-1) @ v,
        "by different numbers",
    ),
    "a hardly lower number added to a fill": (
        lambda q, k, v: (scores(q, k).masked_fill(~CAUSAL, -1e4) + torch.where(SEEN, 0.0, -1e9)).softmax(-1) @ v,
        "added to masked scores",
    ),
    "bias on masked scores": (
        lambda q, k, v: (scores(q, k).masked_fill(~(SEEN & CAUSAL), -1e4) + BIAS).softmax(-1) @ v,
        "added to masked scores",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_one_operator_cannot_say_stays(name: str) -> None:
    spelling, reason = REFUSED[name]
    after, stats = rewritten(spelling, Q, K, V)
    assert not any(is_op(n, aten.scaled_dot_product_attention, attention) for n in after.graph.nodes)
    assert list(stats.misses.values()) == [1] and reason in next(iter(stats.misses))


def subtracted(q: Tensor, k: Tensor, v: Tensor, greatest: Callable[[Tensor], Tensor]) -> Tensor:
    found = scores(q, k)
    return (found - greatest(found)).softmax(-1) @ v


RAISED: dict[str, Spelling] = {
    "two fills": lambda q, k, v: scores(q, k).masked_fill(~CAUSAL, LOWEST).masked_fill(~SEEN, LOWEST).softmax(-1) @ v,
    "two fills of -1e9": lambda q, k, v: (
        scores(q, k).masked_fill(~SEEN, -1e9).masked_fill(~CAUSAL, -1e9).softmax(-1) @ v
    ),
    "fill on an added mask": lambda q, k, v: (scores(q, k) + added(SEEN)).masked_fill(~CAUSAL, LOWEST).softmax(-1) @ v,
    "added mask on a fill": lambda q, k, v: (scores(q, k).masked_fill(~CAUSAL, LOWEST) + added(SEEN)).softmax(-1) @ v,
    "fill of -1e4 on an added mask": lambda q, k, v: (
        (scores(q, k) + added(SEEN)).masked_fill(~CAUSAL, -1e4).softmax(-1) @ v
    ),
    "infinite fill on a finite one": lambda q, k, v: (
        scores(q, k).masked_fill(~SEEN, -1e9).masked_fill(~CAUSAL, -math.inf).softmax(-1) @ v
    ),
    "two added masks and a floor": lambda q, k, v: (
        torch.maximum(
            scores(q, k) + added(SEEN) + added(CAUSAL),
            torch.tensor(LOWEST, dtype=torch.float64),
        ).softmax(-1)
        @ v
    ),
    "floor on an infinite fill": lambda q, k, v: (
        torch.maximum(
            scores(q, k).masked_fill(~(SEEN & CAUSAL), -math.inf), torch.tensor(-1e30, dtype=torch.float64)
        ).softmax(-1)
        @ v
    ),
    "guard on scores": lambda q, k, v: (lambda s: torch.where((s == -math.inf).all(-1, True), 0.0, s.softmax(-1)) @ v)(
        scores(q, k).masked_fill(~(SEEN & CAUSAL), -math.inf)
    ),
    "mask of one axis": lambda q, k, v: (scores(q, k) + BIAS[0, 0, 0]).softmax(-1) @ v,
    "scale that is almost the default": lambda q, k, v: (q @ k.mT * 0.3535534).softmax(-1) @ v,
    "greatest of a query": lambda q, k, v: subtracted(q, k, v, lambda s: s.amax(-1, keepdim=True)),
    "keys that are no matrix of one batch": lambda q, k, v: scores(q, k[:, :1]).softmax(-1) @ v[:, :1],
    "grouped, with a causal mask": lambda q, k, v: F.scaled_dot_product_attention(
        q, k[:, :2], v[:, :2], attn_mask=CAUSAL, enable_gqa=True
    ),
    "grouped, with scaled queries": lambda q, k, v: F.scaled_dot_product_attention(
        q * 0.5, k[:, :2], v[:, :2], enable_gqa=True
    ),
    "one query head for several keys": lambda q, k, v: (
        scores(q[:, :1], k[:, :1].expand(-1, HEADS, -1, -1)).softmax(-1) @ v[:, :1].expand(-1, HEADS, -1, -1)
    ),
    "heads in another order": lambda q, k, v: (
        scores(q, k[:, :2].repeat(1, 2, 1, 1)).softmax(-1) @ v[:, :2].repeat(1, 2, 1, 1)
    ),
}


@pytest.mark.parametrize("name", RAISED)
def test_what_is_raised_is_equal_in_every_row(name: str) -> None:
    after, stats = rewritten(RAISED[name], Q, K, V)
    assert any(is_op(n, aten.scaled_dot_product_attention) for n in after.graph.nodes), stats.misses


@pytest.mark.parametrize(
    ("seen", "hides", "stays"),
    [
        (SEEN & CAUSAL, lambda s: s.amax(-1, keepdim=True) == -math.inf, False),
        (SEEN & CAUSAL, lambda s: (s == -math.inf).all(-1, keepdim=True), False),
        (CAUSAL, lambda s: s.amax(-1, keepdim=True) > 0.5, True),
        (CAUSAL, lambda s: s[..., 1:2] == -math.inf, True),
    ],
    ids=["greatest", "all", "another number", "one key"],
)
def test_a_guard_after_the_values_is_part_of_the_operator(
    seen: Tensor, hides: Callable[[Tensor], Tensor], stays: bool
) -> None:
    """Where a query sees no key, the operator gives zero, too; any other condition stays, and so do its scores."""

    def zeroed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = scores(q, k) + torch.where(seen, 0.0, -math.inf)
        return torch.where(hides(found), 0.0, found.softmax(-1) @ v)

    after, stats = rewritten(zeroed, Q, K, V)
    assert stats.hits, stats.misses
    assert any(is_op(n, aten.matmul) for n in after.graph.nodes) == stays


@pytest.mark.parametrize(
    "greatest",
    [lambda s: s.amax(-2, keepdim=True), lambda s: s.max(-2, keepdim=True).values, lambda s: s.amax(-1)],
    ids=["of a key", "of a key, with its place", "without its axis"],
)
def test_a_greatest_score_that_differs_between_keys_is_a_bias(greatest: Callable[[Tensor], Tensor]) -> None:
    cube = tuple(drawn(LENGTH, LENGTH, LENGTH, WIDTH, seed=i) for i in range(3))
    module = Spelled(lambda q, k, v: subtracted(q, k, v, greatest), {})
    program = trace(module, cube)
    assert RaiseAttention().run(program, Context()).hits == 0
    torch.testing.assert_close(program(*cube), module(*cube), rtol=1e-12, atol=1e-14)


def test_a_mask_that_multiplies_hides_rows_as_before() -> None:
    """All keys are hidden from the first two queries, which get the mean of the values."""

    def multiplied(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep = (torch.arange(q.shape[2])[:, None] > 1).double()
        return (scores(q, k) * keep - 1e4 * (1 - keep)).softmax(-1) @ v

    module = Spelled(multiplied, {})
    program = trace(module, (Q, K, V), dynamic={f"inputs_{i}": {2: "S"} for i in range(3)})
    Canonicalize().run(program, Context())
    assert RaiseAttention().run(program, Context()).hits == 1
    torch.testing.assert_close(program(Q, K, V), module(Q, K, V), rtol=1e-12, atol=1e-14)


def test_an_added_mask_on_scores_times_a_mask() -> None:
    """As OpenAI's GPT does it: the first queries have only later keys left, all of them at -10000."""

    def multiplied(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        places = torch.arange(q.shape[2])
        keep = (places[:, None] >= places).double()
        return (scores(q, k) * keep + -1e4 * (1 - keep) + added(SEEN)[..., : q.shape[2]]).softmax(-1) @ v

    module = Spelled(multiplied, {})
    program = trace(module, (Q, K, V))
    assert RaiseAttention().run(program, Context()).hits == 1
    torch.testing.assert_close(program(Q, K, V), module(Q, K, V), rtol=1e-12, atol=1e-14)


def test_a_broadcast_einsum_stays() -> None:
    def spelling(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k[..., :1]).softmax(-1), v)

    _, stats = rewritten(spelling, Q, K, V)
    assert stats.misses == {"its scores come from aten.einsum, not from a product of queries and keys": 1}


def test_a_bias_is_not_narrowed() -> None:
    slopes = torch.arange(HEADS).reshape(HEADS, 1, 1) * 1000.0

    def spelling(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (scores(q, k).float() + slopes * torch.arange(LENGTH)).softmax(-1).half() @ v

    _, _, stats = raised(RaiseAttention(), spelling, Q.half(), K.half(), V.half())
    assert stats.misses == {"the type of its queries is narrower than that of a bias": 1}
