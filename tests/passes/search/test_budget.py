"""What a meter says a change saves, against the program that the change gives."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from graphlathe.ir.axes import cut, cut_all, find_groups
from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.ir.rewrite import Rewriter
from graphlathe.ir.structure import structure
from graphlathe.passes.base import Context
from graphlathe.passes.search.apply import cut_sites, drop
from graphlathe.passes.search.biases import give_bias
from graphlathe.passes.search.budget import Meter, sizes_of
from graphlathe.passes.search.refit import why_not_fitted
from graphlathe.passes.search.sites import KINDS, ChannelSite, channel_sites
from graphlathe.passes.search.units import removable_units
from tests.passes.search.small_models import MODELS, context, found, meter_of, sites_of
from tests.zoo_programs import traced, zoo_parameters

UNITS = ("params", "bytes", "macs")


def one_of_each(sites: tuple[ChannelSite, ...]) -> list[ChannelSite]:
    return list({site.kind: site for site in reversed(sites)}.values())


def after(program: Program, site: ChannelSite, removed: list[int]) -> Program:
    smaller = program.clone()
    cut(smaller, site.group, [atom for atom in range(site.size) if atom not in removed])
    return smaller


@pytest.mark.parametrize("name", zoo_parameters([*MODELS, "mixtral"]))
@pytest.mark.parametrize("unit", UNITS)
def test_a_cut_saves_what_the_meter_says(name: str, unit: str) -> None:
    program = traced(name)
    sites = one_of_each(tuple(channel_sites(program, structure(program), KINDS)[0]))
    meter = Meter(program, unit, sizes_of(program, Context()))
    assert sites
    for site in sites:
        for removed in ([0], list(range(0, site.size, 2))):
            if len(removed) == site.size:
                continue
            real = meter.total - meter.measure(after(program, site, removed))
            assert meter.cut(site, removed) == pytest.approx(real, abs=1e-6 * meter.total), (str(site), removed)
        assert meter.cut(site, []) == 0


@pytest.mark.parametrize("unit", UNITS)
def test_sizes_of_the_first_batch_count(unit: str) -> None:
    program, site = traced("llama"), next(s for s in sites_of("llama") if s.kind == "mlp")
    data = Context(calibration=[{"input_ids": torch.ones(3, 9, dtype=torch.int64)}])
    small, large = meter_of(program, unit, "llama"), Meter(program, unit, sizes_of(program, data))
    macs = unit == "macs"
    assert (large.total != small.total) == macs == (large.cut(site, [0]) != small.cut(site, [0]))
    assert not macs or large.cut(site, [0]) == 3 * 9 * 3 * 32  # gate, up, down of width 32


def test_both_sides_of_one_weight_are_not_counted_twice() -> None:
    """The recurrent kind of layer, whose inputs and outputs are the same channels."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.square, self.out = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.relu(self.start(x))
            return self.out(h + torch.relu(self.square(h)))

    program = trace(Twice(), (torch.randn(2, 4),))
    (site,) = channel_sites(program, structure(program), KINDS)[0]
    for unit in UNITS:
        meter = Meter(program, unit, {})
        real = meter.total - meter.measure(after(program, site, [0, 2, 5]))
        assert meter.cut(site, [0, 2, 5]) == pytest.approx(real, abs=1e-9)


@pytest.mark.parametrize("unit", UNITS)
def test_cuts_that_share_nothing_add_up(unit: str) -> None:
    program = traced("llama")
    sites = [site for site in sites_of("llama") if site.kind in ("mlp", "heads")]
    meter = meter_of(program, unit, "llama")
    smaller = program.clone()
    cut_all(smaller, [(site.group, [0]) for site in sites])
    saved = sum(meter.cut(site, range(1, site.size)) for site in sites)
    assert saved == pytest.approx(meter.total - meter.measure(smaller), abs=1e-6 * meter.total)


@pytest.mark.parametrize("name", zoo_parameters(["llama", "t5", "plain_resnet"]))
@pytest.mark.parametrize("unit", UNITS)
def test_dropped_units_save_what_the_meter_says(name: str, unit: str) -> None:
    program = traced(name)
    meter = meter_of(program, unit, name)
    units = [u for kind in ("block", "attention", "mlp") for u in removable_units(found(name), kind) if not u.blocked]
    for chosen in itertools.chain(([u] for u in units), itertools.pairwise(units)):
        smaller = program.clone()
        names = {node.name: node for node in smaller.graph.nodes}
        there = [replace(u, replaced=names[u.replaced.name], by=names[u.by.name]) for u in chosen]
        drop(Rewriter(smaller, "test"), there)
        assert meter.drop(chosen) == meter.total - meter.measure(smaller), [u.label for u in chosen]


@pytest.mark.parametrize("unit", UNITS)
def test_the_whole_is_all_that_the_sites_touch(unit: str) -> None:
    program = traced("llama")
    meter = meter_of(program, unit, "llama")
    sites = [site for site in sites_of("llama") if site.kind == "mlp"]
    units = [u for u in removable_units(found("llama"), "mlp")]
    assert meter.whole(sites, []) == pytest.approx(sum(meter.cut(s, range(s.size)) for s in sites))
    # The norm before each MLP goes with it, and nothing is counted twice.
    assert meter.whole(sites, units) == meter.drop(units)
    assert meter.whole([*sites, *sites], units) == meter.whole(sites, units)


@pytest.mark.parametrize("name", zoo_parameters(["llama", "gpt2", "bert", "plain_resnet", "t5"]))
@pytest.mark.parametrize("unit", UNITS)
def test_biases_cost_what_the_meter_says(name: str, unit: str) -> None:
    program = traced(name).clone()
    meter = meter_of(program, unit, name)
    kinds = ("heads", "value-channels", "mlp", "channels", "stream")
    sites = channel_sites(program, structure(program), kinds)[0]
    said = meter.biases(sites)
    rewriter, given = Rewriter(program, "test"), set[object]()
    for site in sites:
        for consumer in site.consumers:
            if consumer.node not in given and not why_not_fitted(program, site, consumer):
                given.add(consumer.node)
                give_bias(rewriter, consumer)
    assert meter.measure(program) - meter.total == said
    assert (said > 0) == (unit != "macs" and name in ("llama", "t5", "plain_resnet"))
    assert meter.biases(channel_sites(program, structure(program), kinds)[0]) == 0


def test_overlapping_cuts_together() -> None:
    """Heads, then channels inside the heads that are left: less than both alone."""
    program = traced("llama").clone()
    meter = meter_of(program)
    sites = [s for s in channel_sites(program, structure(program), ("heads", "value-channels"))[0] if s.block == 0]
    alone = sum(meter.cut(site, [0]) for site in sites)
    cut_sites(program, [(site, (0,)) for site in sites], context("llama"), "test")
    assert 0 < meter.total - program.parameter_count < alone
    assert find_groups(program)
