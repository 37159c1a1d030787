"""What masks are read as, and whether a reading agrees with the numbers of the mask."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphlathe.ir.flow import Flow
from graphlathe.ir.from_torch import trace
from graphlathe.ir.index_functions import IndexFunctions
from graphlathe.ir.masks import Mask, read_mask

LOWEST = torch.finfo(torch.float32).min
LENGTH = 9


class Masked(nn.Module):
    """A mask made of a padding mask [batch, length], contents [batch, length] and a table of weights."""

    def __init__(self, mask: Callable[[Masked, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.mask = mask
        self.table = nn.Parameter(torch.randn(32, 2))
        self.register_buffer("slopes", torch.tensor([0.5, 0.25]))
        self.register_buffer("triangle", torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril())
        self.register_buffer("band", torch.ones(LENGTH, LENGTH).tril() - torch.ones(LENGTH, LENGTH).tril(-3))
        self.register_buffer("broken", torch.ones(LENGTH, LENGTH).tril() * torch.ones(LENGTH, LENGTH).tril().flip(0))

    def forward(self, seen: Tensor, contents: Tensor) -> Tensor:
        return self.mask(self, seen, contents)


def read(mask: Callable[[Masked, Tensor, Tensor], Tensor], *, dynamic: bool = True, hides: bool = False) -> Mask:
    torch.manual_seed(0)
    example = (torch.ones(2, LENGTH, dtype=torch.long), torch.randn(2, LENGTH))
    sizes = {"seen": {1: "S"}, "contents": {1: "S"}} if dynamic else None
    program = trace(Masked(mask), example, dynamic=sizes)
    return read_mask(IndexFunctions(program), program.main.output_values[0], Flow(program.main).data, hides=hides)


def positions(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of queries, as a column, and of keys, as a row."""
    numbers = torch.arange(x.shape[1])
    return numbers[:, None], numbers[None, :]


def causal(m: Masked, seen: Tensor, x: Tensor) -> Tensor:
    i, j = positions(x)
    return j <= i


def window(m: Masked, seen: Tensor, x: Tensor) -> Tensor:
    i, j = positions(x)
    return (j <= i) & (j > i - 4)


def both_sides(m: Masked, seen: Tensor, x: Tensor) -> Tensor:
    i, j = positions(x)
    return (i - j).abs() < 3


def chunked(m: Masked, seen: Tensor, x: Tensor) -> Tensor:
    i, j = positions(x)
    return (i // 4 == j // 4) & (j <= i)


def by_comparison(m: Masked, seen: Tensor, x: Tensor) -> Tensor:
    """As GPT-Neo, CodeGen and the first Llama did it: filled, compared, then filled again."""
    length = x.shape[1]
    mask = torch.full((length, length), LOWEST)
    i = torch.arange(length)
    return mask.masked_fill(i < (i + 1).view(length, 1), 0.0)


def triu(m: Masked, seen: Tensor, x: Tensor) -> Tensor:
    return torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)


def padded(m: Masked, seen: Tensor, x: Tensor) -> Tensor:
    """BERT's: added, one row for all queries."""
    return (1.0 - seen[:, None, None, :].float()) * LOWEST


def padded_causal(m: Masked, seen: Tensor, x: Tensor) -> Tensor:
    i, j = positions(x)
    return (j <= i) & seen[:, None, None, :].bool()


def sum_of_masks(m: Masked, seen: Tensor, x: Tensor) -> Tensor:
    return triu(m, seen, x) + padded(m, seen, x)


def alibi(m: Masked, seen: Tensor, x: Tensor) -> Tensor:
    j = torch.arange(x.shape[1])
    return m.slopes[:, None, None] * j + triu(m, seen, x)


def relative_and_nothing_hidden(m: Masked, seen: Tensor, x: Tensor) -> Tensor:
    """A mask of ones, added as it is: every score is one higher."""
    return relative(m, seen, x) + torch.ones(1, 1, x.shape[1], x.shape[1], dtype=torch.bool)


def relative(m: Masked, seen: Tensor, x: Tensor) -> Tensor:
    i, j = positions(x)
    return m.table[(j - i).clamp(-8, 8) + 8].permute(2, 0, 1)


def of_contents(m: Masked, seen: Tensor, x: Tensor) -> Tensor:
    return x[:, None, :, None] * x[:, None, None, :]


def everything(m: Masked, seen: Tensor, x: Tensor) -> Tensor:
    return torch.zeros(x.shape[1], x.shape[1])


def ahead(m: Masked, seen: Tensor, x: Tensor) -> Tensor:
    i, j = positions(x)
    return j <= i + 2


def weak(m: Masked, seen: Tensor, x: Tensor) -> Tensor:
    """Subtracting five hides nothing."""
    i, j = positions(x)
    return torch.where(j <= i, 0.0, -5.0)


CASES: dict[Callable[[Masked, Tensor, Tensor], Tensor], tuple[Mask, str]] = {
    causal: (Mask(causal=True, exactly_causal=True), "causal"),
    by_comparison: (Mask(causal=True, exactly_causal=True), "causal"),
    triu: (Mask(causal=True, exactly_causal=True), "causal"),
    window: (Mask(causal=True, window=4), "causal, window 4"),
    both_sides: (Mask(window=3, both_sides=True), "window 3 on both sides"),
    chunked: (Mask(causal=True, chunk=4), "causal, chunks of 4"),
    padded: (Mask(padding=True), "padding"),
    padded_causal: (Mask(causal=True, padding=True), "causal, padding"),
    sum_of_masks: (Mask(causal=True, padding=True), "causal, padding"),
    alibi: (Mask(causal=True, bias="alibi"), "causal, ALiBi"),
    relative: (Mask(bias="relative"), "relative bias"),
    relative_and_nothing_hidden: (Mask(bias="relative"), "relative bias"),
    of_contents: (Mask(bias="content"), "content bias"),
    everything: (Mask(everything=True), "no mask"),
    ahead: (Mask(other=("2 keys ahead",)), "(2 keys ahead)"),
}


@pytest.mark.parametrize("mask", CASES, ids=lambda f: f.__name__)
def test_masks(mask: Callable[[Masked, Tensor, Tensor], Tensor]) -> None:
    expected, words = CASES[mask]
    assert read(mask) == expected
    assert str(expected) == words


def test_a_small_penalty_is_a_bias_and_hides_nothing() -> None:
    found = read(weak)
    assert not found.causal
    assert found.bias


def test_a_boolean_mask_of_what_is_hidden() -> None:
    assert read(lambda m, s, x: causal(m, s, x).logical_not(), hides=True) == CASES[causal][0]


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ("triangle", Mask(causal=True, exactly_causal=True)),
        ("band", Mask(causal=True, window=3)),
    ],
)
def test_stored_tables(stored: str, expected: Mask) -> None:
    """GPT-2's triangle, sliced to the length, and a band."""

    def mask(m: Masked, seen: Tensor, x: Tensor) -> Tensor:
        return getattr(m, stored)[..., : x.shape[1], : x.shape[1]].bool()

    assert read(mask, dynamic=False) == expected


def test_a_stored_table_that_is_no_band() -> None:
    found = read(lambda m, s, x: m.broken.bool(), dynamic=False)
    assert not found.causal
    assert found.window is None
    assert found.other


@settings(max_examples=30)
@given(
    bound=st.integers(-3, 3), reach=st.integers(0, 4), strict=st.booleans(), turned=st.booleans(), added=st.booleans()
)
def test_bounds_are_read_exactly(bound: int, reach: int, strict: bool, turned: bool, added: bool) -> None:
    """Keys from ``reach`` before to ``bound`` after a query, written in several ways: the numbers say the same."""

    def mask(m: Masked, seen: Tensor, x: Tensor) -> Tensor:
        i, j = positions(x)
        until = (j < i + bound + 1) if strict else (i >= j - bound) if turned else (j - i <= bound)
        begin = (j > i - reach - 1) if strict else (i - reach <= j)
        both = until & begin
        return torch.where(both, 0.0, LOWEST) if added else both

    found = read(mask)
    x = torch.zeros(2, LENGTH)
    seen = mask(Masked(mask), x, x)
    seen = seen == 0 if added else seen
    i, j = positions(x)
    assert found.window == reach + 1
    assert found.causal == (bound <= 0)
    assert not found.exactly_causal
    if bound <= 0 and bound + reach >= 0:
        rebuilt = (j <= i) & (j > i - reach - 1)
        assert bool((seen <= rebuilt).all())  # what is read as hidden is hidden
    if bound > 0:
        assert f"{bound} keys ahead" in found.other
