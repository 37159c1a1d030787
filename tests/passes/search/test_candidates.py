"""Candidates compute what the program after the cut computes, whatever the prefix cache holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.ir.structure import structure
from graphlathe.passes.base import Context
from graphlathe.passes.fidelity import output_distance
from graphlathe.passes.search.apply import apply_plan
from graphlathe.passes.search.candidates import Candidates, State
from graphlathe.passes.search.levels import Place
from graphlathe.passes.search.plan import Plan
from graphlathe.passes.search.sites import channel_sites
from graphlathe.passes.search.timed import _decision  # pyright: ignore[reportPrivateUsage]
from graphlathe.passes.search.widths import width_place
from tests.passes.search.small_models import MODELS, batch, found, meter_of, same, unit_places, width_places
from tests.zoo_programs import traced, zoo_parameters


def really(program: Program, places: Sequence[Place], state: State) -> Program:
    """The program that a plan with the state's levels gives."""
    chosen = [(place, place.levels[level]) for place, level in zip(places, state, strict=True) if level]
    smaller = program.clone()
    apply_plan(smaller, Plan(tuple(_decision(place, level) for place, level in chosen)), Context(), "test")
    return smaller


@cache
def places_of(name: str) -> tuple[Place, ...]:
    """Widths of every kind that the model has, and whole branches; the places of one kind of widths at a time."""
    kinds = ("stream", "mlp", "channels", "value-channels")
    places = width_places(name, kinds, steps=2)
    more = unit_places(name, "attention") + unit_places(name, "mlp") if name != "plain_resnet" else []
    return tuple(sorted(places + (more or unit_places(name, "block")), key=lambda place: place.first))


@pytest.mark.parametrize("name", zoo_parameters(MODELS))
def test_every_level_alone_and_all_together_equal_the_cut_program(name: str) -> None:
    kinds = ("stream", "heads", "query-heads", "value-channels", "qk-channels", "mlp", "channels", "groups")
    places = width_places(name, kinds, steps=2) + unit_places(name, "block")
    places.sort(key=lambda place: place.first)
    candidates = Candidates(traced(name), places, found(name), [batch(name)])
    untouched = (0,) * len(places)
    states = [(*untouched[:i], len(p.levels) - 1, *untouched[i + 1 :]) for i, p in enumerate(places)]
    # One of each class is enough.
    states = list(
        {(p.kind, p.levels[-1].label, p.levels[-1].cost): s for p, s in zip(places, states, strict=True)}.values()
    )
    changed = 0
    for state in states:
        smaller = really(traced(name), places, state)
        same(candidates.outputs(state, 0), smaller.run(smaller.feeds(**batch(name))), 1e-4)
        changed += candidates(state, 0) > 1e-9
    assert changed > len(states) // 2


@pytest.mark.parametrize("name", zoo_parameters(MODELS))
@pytest.mark.parametrize("seed", range(3))
def test_mixed_states_equal_the_cut_program(name: str, seed: int) -> None:
    places = places_of(name)
    draw = torch.Generator().manual_seed(seed)
    state = tuple(int(torch.randint(0, len(p.levels), (), generator=draw)) for p in places)
    candidates = Candidates(traced(name), places, found(name), [batch(name)])
    smaller = really(traced(name), places, state)
    same(candidates.outputs(state, 0), smaller.run(smaller.feeds(**batch(name))), 1e-4)


def test_attention_and_mlp_of_one_block_are_both_dropped() -> None:
    """Units of two granularities have numbers of their own: dropping in the order of numbers would leave one."""
    places = unit_places("llama", "attention") + unit_places("llama", "mlp")
    state = tuple(int(place.block == 1) for place in places)
    smaller = really(traced("llama"), places, state)
    blocks = unit_places("llama", "block")
    whole = really(traced("llama"), blocks, tuple(int(place.index == 1) for place in blocks))
    assert smaller.parameter_count == whole.parameter_count
    same(smaller.run(smaller.feeds(**batch("llama"))), whole.run(whole.feeds(**batch("llama"))), 0)


def test_overlapping_sites_are_zeroed_together() -> None:
    """Heads and channels inside heads are columns of one weight."""
    places = [p for p in width_places("llama", ("heads", "value-channels"), steps=1)]
    state = tuple(1 for _ in places)
    candidates = Candidates(traced("llama"), places, found("llama"), [batch("llama")])
    smaller = really(traced("llama"), places, state)
    same(candidates.outputs(state, 0), smaller.run(smaller.feeds(**batch("llama"))), 1e-4)


@settings(max_examples=12)
@given(
    data=st.data(),
    limit=st.sampled_from([2_000, 20_000, 1 << 30]),
    name=st.sampled_from(["bert", "t5", "plain_resnet"]),
)
def test_the_cache_never_changes_a_result(data: st.DataObject, limit: int, name: str) -> None:
    places = places_of(name)
    # States with common beginnings, as a search has them.
    one = st.tuples(*(st.integers(0, len(p.levels) - 1) for p in places))
    parent = data.draw(one)
    cut = st.integers(0, len(places))
    states = [parent] + [
        (*parent[:at], *other[at:]) for at, other in data.draw(st.lists(st.tuples(cut, one), min_size=2, max_size=5))
    ]
    batches = [batch(name, 0), batch(name, 1)]
    cached = Candidates(traced(name), places, found(name), batches, cache_bytes=limit)
    plain = Candidates(traced(name), places, found(name), batches, cache_bytes=0)
    for state in states:
        for number in range(2):
            a, b = cached.outputs(state, number), plain.outputs(state, number)
            assert all(torch.equal(a[k], b[k]) for k in a if isinstance(a[k], torch.Tensor))
    assert cached._held <= limit  # pyright: ignore[reportPrivateUsage]
    assert cached.tokens <= plain.tokens


@pytest.mark.parametrize("name", zoo_parameters(["bert", "t5"]))
def test_a_late_change_runs_only_what_comes_after_it(name: str) -> None:
    places = width_places(name, ("mlp",), steps=4)
    candidates = Candidates(traced(name), places, found(name), [batch(name)])
    plain = Candidates(traced(name), places, found(name), [batch(name)], cache_bytes=0)
    candidates((0,) * len(places), 0)
    before = candidates.tokens
    state = (*(0,) * (len(places) - 1), 2)
    candidates(state, 0)
    plain.outputs(state, 0)
    assert candidates.tokens - before < plain.tokens / 2
    before = candidates.tokens
    candidates(state, 0)
    assert candidates.tokens - before < plain.tokens / 4


def test_scores_are_those_of_fidelity_and_untouched_is_zero() -> None:
    places = width_places("bert", ("mlp", "heads"))
    candidates = Candidates(traced("bert"), places, found("bert"), [batch("bert")])
    assert candidates((0,) * len(places), 0) == 0
    state = tuple(len(p.levels) - 1 for p in places)
    expected = output_distance(candidates.outputs(state, 0), traced("bert").run(batch("bert")), batch("bert"))
    assert candidates(list(state), 0) == pytest.approx(expected, rel=1e-6, abs=1e-9)


class Concatenated(nn.Module):
    """A layer that reads the channels of two others, and itself feeds a norm that blows up without them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Both, side by side."""
        return self.out(torch.cat([torch.relu(self.a(x)), torch.tanh(self.b(x))], -1))


def test_a_reader_of_two_sites_is_zeroed_for_both() -> None:
    torch.manual_seed(0)
    program = trace(Concatenated(), (torch.randn(4, 6),))
    sites = channel_sites(program, structure(program), ("channels", "mlp"))[0]
    assert len(sites) == 2 and sites[0].consumers[0].node is sites[1].consumers[0].node
    places = [width_place(program, s, torch.rand(8).double().numpy(), meter_of(program), steps=None) for s in sites]
    feeds = {"x": torch.randn(4, 6)}
    candidates = Candidates(program, places, structure(program), [feeds])
    smaller = really(program, places, (3, 5))
    same(candidates.outputs((3, 5), 0), smaller.run(feeds))


class Fragile(nn.Module):
    """The square root of something that is negative without some channels."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 4), nn.Linear(4, 2, bias=False)
        with torch.no_grad():
            self.up.weight.zero_()
            self.up.bias.fill_(1.0)
            self.down.weight.copy_(torch.tensor([[5.0, -1, -1, -1], [5.0, -1, -1, -1]]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """NaN where the sum is negative."""
        return torch.sqrt(self.down(torch.relu(self.up(x))))


def test_nan_scores_infinity() -> None:
    program = trace(Fragile(), (torch.randn(4, 3),))
    (site,) = channel_sites(program, structure(program), ("channels", "mlp"))[0]
    scores = torch.tensor([0.0, 1, 2, 3], dtype=torch.float64).numpy()
    place = width_place(program, site, scores, meter_of(program), steps=None)
    candidates = Candidates(program, [place], structure(program), [{"x": torch.randn(4, 3)}])
    assert candidates((1,), 0) == math.inf


class Noisy(nn.Module):
    """Blocks with dropout that stays on."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Random in every block."""
        for block in self.blocks:
            x = x + nn.functional.dropout(block(x), 0.5, training=True)
        return x


def test_random_operators_switch_the_cache_off() -> None:
    torch.manual_seed(0)
    program = trace(Noisy(), (torch.randn(2, 8),))
    sites = channel_sites(program, structure(program), ("channels", "mlp"))[0]
    places = [width_place(program, s, torch.rand(16).double().numpy(), meter_of(program), steps=2) for s in sites]
    candidates = Candidates(program, places, structure(program), [{"x": torch.randn(2, 8)}])
    first = candidates((0, 0, 1), 0)
    assert candidates((0, 0, 1), 0) == first
    assert candidates((0, 0, 0), 0) == 0
