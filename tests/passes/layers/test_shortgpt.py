"""``shortgpt`` against the hidden states of eager models, and against eager models without the blocks."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from graphlathe.ir.errors import PipelineError
from graphlathe.passes.base import Batch
from graphlathe.passes.layers.shortgpt import ShortGpt
from graphlathe.tools import zoo
from tests.passes.channels.tiny import Mlp, Stack, data, program_of, refused, run, stack
from tests.zoo_programs import flat_outputs, module, traced

BLOCKS = 6


def six() -> Stack:
    return stack(*(Mlp(7) for _ in range(BLOCKS)), seed=4)


def streams(model: Stack, batches: Sequence[Batch]) -> list[torch.Tensor]:
    """The stream before each block and after the last: float64 [positions, width]."""
    found: list[list[torch.Tensor]] = [[] for _ in range(len(model.blocks) + 1)]
    with torch.no_grad():
        for batch in batches:
            x = model.first(batch["x"])
            found[0].append(x.flatten(0, 1))
            for number, block in enumerate(model.blocks, 1):
                x = block(x)
                found[number].append(x.flatten(0, 1))
    return [torch.cat(rows) for rows in found]


def influence(before: torch.Tensor, after: torch.Tensor) -> float:
    """1 - E[cos]."""
    lengths = before.square().sum(-1).sqrt() * after.square().sum(-1).sqrt()
    return 1 - float(((before * after).sum(-1) / lengths).mean())


def dropped(stats: Any) -> list[int]:
    return [site["index"] for site in stats.plan["sites"] if site["removed"]]


@pytest.mark.parametrize("count", range(1, BLOCKS))
def test_the_lowest_influences_go(count: int) -> None:
    model, batches = six(), data()
    x = streams(model, batches)
    scores = [influence(a, b) for a, b in itertools.pairwise(x)]
    after, stats = run(program_of(model), ShortGpt(blocks=count), batches)
    assert dropped(stats) == sorted(sorted(range(BLOCKS), key=scores.__getitem__)[:count])
    for site in stats.plan["sites"]:
        assert abs(site["scores"][0] - scores[site["index"]]) < 1e-12
    short = copy.deepcopy(model)
    short.blocks = torch.nn.ModuleList(b for n, b in enumerate(model.blocks) if n not in dropped(stats))
    with torch.no_grad():
        for batch in data(2, seed=7):
            assert torch.equal(after.run(batch)["output"], short(batch["x"]))
    assert after.parameter_count == sum(p.numel() for p in short.parameters())


@pytest.mark.parametrize("count", range(1, BLOCKS))
def test_the_window_is_that_of_least_change(count: int) -> None:
    model, batches = six(), data()
    x = streams(model, batches)
    scores = [influence(x[s], x[s + count]) for s in range(BLOCKS - count + 1)]
    best = min(range(len(scores)), key=scores.__getitem__)
    after, stats = run(program_of(model), ShortGpt(blocks=count, window=True), batches)
    assert dropped(stats) == list(range(best, best + count))
    short = copy.deepcopy(model)
    short.blocks = torch.nn.ModuleList([*model.blocks[:best], *model.blocks[best + count :]])
    with torch.no_grad():
        for batch in data(2, seed=7):
            assert torch.equal(after.run(batch)["output"], short(batch["x"]))


@pytest.mark.parametrize(
    ("name", "path"),
    [
        pytest.param("llama", "model.layers", marks=pytest.mark.xdist_group("llama")),
        pytest.param("gpt2", "transformer.h", marks=pytest.mark.xdist_group("gpt2")),
        pytest.param("bert", "encoder.layer", marks=pytest.mark.xdist_group("bert")),
    ],
)
def test_dropping_from_a_real_model_is_slicing_its_list_of_layers(name: str, path: str) -> None:
    """As a passthrough merge with slices [0, i) and [j, n) does it, bit for bit, and at other sizes than traced."""
    model = zoo.get(name)
    inputs = model.inputs(model.unseen_sizes[0])
    program = traced(name)
    _, stats = run(program, ShortGpt(blocks=1), [program.feeds(**inputs)])
    after, _ = run(program, ShortGpt(blocks=1), [program.feeds(**inputs)])
    (index,) = dropped(stats)
    short = copy.deepcopy(module(name))
    owner, _, attribute = path.rpartition(".")
    parents = [m for n, m in short.named_modules() if n == owner or n.endswith("." + owner)]
    layers = getattr(parents[0], attribute)
    setattr(parents[0], attribute, torch.nn.ModuleList([*layers[:index], *layers[index + 1 :]]))
    with torch.no_grad():
        wanted = flat_outputs(short(**inputs))
    got = after(**inputs)
    values = [got] if isinstance(got, torch.Tensor) else list(got.values())
    assert len(values) == len(wanted)
    for value, want in zip(values, wanted, strict=True):
        assert torch.equal(value, want)


def test_a_share_is_rounded_to_the_nearest_number() -> None:
    program, batches = program_of(six()), data(1)
    for ratio, count in ((0.0, 0), (0.05, 0), (0.2, 1), (0.26, 2), (0.5, 3), (0.76, 5)):
        stats = run(program, ShortGpt(ratio=ratio), batches)[1]
        assert len(dropped(stats)) == count
        assert any("nothing to remove" in note for note in stats.notes) == (ratio == 0.05)


def test_bad_input_is_refused() -> None:
    program = program_of(six())
    refused(program, ShortGpt(blocks=1), None, "needs calibration data")
    refused(program, ShortGpt(blocks=1), [], "needs calibration data")
    refused(program_of(stack()), ShortGpt(blocks=0), data(), "no residual stream, so it has no blocks")
    error = refused(program, ShortGpt(blocks=7), data(), "7 of 6 blocks are to go, but only 6 can be dropped")
    assert error.expected == "at most 6"
    refused(program, ShortGpt(blocks=7, window=True), data(), "7 of 6 blocks")
    bad = data()
    bad[2]["x"][0, 0, 0] = torch.nan
    for window in (False, True):
        refused(program, ShortGpt(blocks=1, window=window), bad, "NaN|not a number|not finite")
    for settings in ({}, {"ratio": 0.2, "blocks": 1}):
        with pytest.raises(PipelineError, match="one way to say how much"):
            ShortGpt(**settings)
