"""Zoo models with places to choose at, for the tests of the search."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch

from graphlathe.ir.program import Program
from graphlathe.ir.structure import Structure, structure
from graphlathe.passes.base import Context
from graphlathe.passes.search.budget import Meter, sizes_of
from graphlathe.passes.search.levels import Place
from graphlathe.passes.search.sites import KINDS, ChannelSite, channel_sites
from graphlathe.passes.search.widths import drop_places, width_place
from graphlathe.tools import zoo
from tests.zoo_programs import traced

MODELS = ("llama", "bert", "gpt2", "plain_resnet", "t5")


@cache
def found(name: str) -> Structure:
    return structure(traced(name))


@cache
def sites_of(name: str) -> tuple[ChannelSite, ...]:
    return tuple(channel_sites(traced(name), found(name), KINDS)[0])


def batch(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of a zoo model by name, other ones for each seed."""
    feeds = traced(name).feeds(**zoo.get(name).example())
    generator = torch.Generator().manual_seed(seed)
    changed: dict[str, torch.Tensor] = {}
    for key, value in feeds.items():
        assert isinstance(value, torch.Tensor)
        if value.is_floating_point():
            changed[key] = torch.randn(value.shape, generator=generator, dtype=value.dtype)
        elif key.endswith("input_ids"):
            changed[key] = torch.randint(1, int(value.max()) + 1, value.shape, generator=generator, dtype=value.dtype)
        else:
            changed[key] = value
    return changed


def context(name: str, batches: int = 1) -> Context:
    return Context(calibration=[batch(name, seed) for seed in range(batches)])


def meter_of(program: Program, unit: str = "params", name: str | None = None) -> Meter:
    return Meter(program, unit, sizes_of(program, Context() if name is None else context(name)))


def width_places(name: str, kinds: Collection[str], steps: int = 3) -> list[Place]:
    """Every site of some kinds, its atoms in a shuffled order."""
    meter, random = meter_of(traced(name)), np.random.default_rng(0)
    sites = [site for site in sites_of(name) if site.kind in kinds]
    return [width_place(traced(name), site, random.random(site.size), meter, steps=steps) for site in sites]


def unit_places(name: str, granularity: str) -> list[Place]:
    return drop_places(traced(name), found(name), granularity, meter_of(traced(name)))[0]


def same(a: Mapping[str, Any], b: Mapping[str, Any], tolerance: float = 1e-5) -> None:
    """Equal outputs, up to the order in which sums are added."""
    assert list(a) == list(b)
    for name in a:
        if isinstance(a[name], torch.Tensor):
            torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)
