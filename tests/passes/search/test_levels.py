"""Zeroed weights, alone and together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphlathe.ir.axes import cut
from graphlathe.ir.weights import Weight
from graphlathe.passes.search.levels import Level, Trial, ZeroedSource, combined, zeroed
from tests.passes.search.small_models import MODELS, batch, same, sites_of, unit_places, width_places
from tests.zoo_programs import traced, zoo_parameters


@pytest.mark.parametrize("name", zoo_parameters(MODELS))
def test_zeroed_is_cut(name: str) -> None:
    done: set[str] = set()
    for site in sites_of(name):
        if site.group.zeroable and site.kind not in done:
            done.add(site.kind)
            removed = [0, site.size - 1] if site.size > 2 else [1]
            masked, smaller = traced(name).clone(), traced(name).clone()
            masked.weights = {**masked.weights, **zeroed(masked, site, removed)}
            cut(smaller, site.group, [atom for atom in range(site.size) if atom not in removed])
            feeds = masked.feeds(**batch(name))
            same(masked.run(feeds), smaller.run(feeds), 1e-4)
    assert done


def test_sources_do_not_write_into_what_they_are_made_from() -> None:
    value = torch.arange(12.0).view(3, 4)
    weight = Weight(ZeroedSource(Weight.from_tensor(value), ((0, (1,)), (1, (0, 3)))))
    expected = torch.tensor([[0.0, 1, 2, 0], [0, 0, 0, 0], [0, 9, 10, 0]])
    assert torch.equal(weight.tensor(), expected) and torch.equal(value, torch.arange(12.0).view(3, 4))
    assert torch.equal(weight.select(1, [1, 2]).tensor(), expected[:, 1:3])
    assert (weight.shape, weight.dtype) == ((3, 4), torch.float32)


def test_what_several_places_zero_is_zero() -> None:
    program = traced("llama")
    name = next(n for n, w in program.weights.items() if len(w.shape) == 2)
    weight = program.weights[name]
    rows, columns = (Weight(ZeroedSource(weight, ((dim, (0, 2)),))) for dim in (0, 1))
    fitted = Weight.from_tensor(weight.tensor() + 5)
    for order in ([{name: rows}, {name: columns}], [{name: columns}, {}, {name: rows}]):
        expected = weight.tensor().clone()
        expected[[0, 2]] = 0
        expected[:, [0, 2]] = 0
        assert torch.equal(combined(program, order)[name].tensor(), expected)
    for order in ([{name: rows}, {name: fitted}], [{name: fitted}, {name: rows}]):
        expected = weight.tensor() + 5
        expected[[0, 2]] = 0
        assert torch.equal(combined(program, order)[name].tensor(), expected)
    assert combined(program, []) == {}


def test_levels_and_trials() -> None:
    order = np.array([3, 0, 2, 1], dtype=np.int64)
    assert Level("", 0.0, order=order, count=3).removed == (0, 2, 3) and Level("", 0.0).removed == ()
    places = [*width_places("llama", ("mlp",)), *unit_places("llama", "block")]
    trial = Trial(traced("llama"), places, (1, 0, 0, 0, 1, 0))
    unit = places[4].levels[1].drop
    assert unit is not None and trial.alias == {unit.replaced: unit.by}
    assert list(trial.weights) == [places[0].levels[1].site.consumers[0].weight]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"shorter|longer"):
        Trial(traced("llama"), places, (0,))
