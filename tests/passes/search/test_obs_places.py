"""Levels that are refitted: against least squares on recorded inputs, in sequence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graphlathe.ir.errors import PreconditionError
from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.ir.structure import structure
from graphlathe.passes.base import Context
from graphlathe.passes.search.candidates import Candidates
from graphlathe.passes.search.obs_places import obs_places
from graphlathe.passes.search.sites import ChannelSite, channel_sites
from tests.passes.search.small_models import context, meter_of, same, sites_of
from tests.zoo_programs import traced

COUNTS = (2, 5, 8)


class Two(nn.Module):
    """Two residual MLPs."""

    def __init__(self) -> None:
        super().__init__()
        self.up1, self.down1 = nn.Linear(8, 12), nn.Linear(12, 8)
        self.up2, self.down2 = nn.Linear(8, 12), nn.Linear(12, 8)

    def hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What both second layers read."""
        a = torch.relu(self.up1(x))
        return a, torch.sigmoid(self.up2(x + self.down1(a)))

    def forward(self, x: Tensor) -> Tensor:
        """The stream after both."""
        x = x + self.down1(torch.relu(self.up1(x)))
        return x + self.down2(torch.sigmoid(self.up2(x)))


def model() -> tuple[Two, Program, list[ChannelSite], Context]:
    torch.manual_seed(0)
    module = Two().double().eval()
    program = trace(module, (torch.randn(60, 8).double(),))
    sites = channel_sites(program, structure(program), ("mlp", "channels"))[0]
    return module, program, sites, Context(calibration=[{"x": torch.randn(60, 8).double()} for _ in range(2)])


def test_levels_are_least_squares_in_sequence() -> None:
    module, program, sites, ctx = model()
    places, blocked = obs_places(
        program, sites, meter_of(program), ctx, {s.index: COUNTS for s in sites},
        middle={s.index: 5 for s in sites}, rounds={"mlp": 3}, damping=1e-12,
    )  # fmt: skip
    assert len(places) == 2 and not blocked
    x = torch.cat([b["x"] for b in ctx.calibration or ()])
    changed = Two().double()
    changed.load_state_dict(module.state_dict())
    with torch.no_grad():
        dense = module.hidden(x)
        for n, place in enumerate(places):
            layer = (module.down1, module.down2)[n]
            z, y = changed.hidden(x)[n].numpy(), (dense[n] @ layer.weight.T).numpy()
            assert [level.count for level in place.levels] == [0, *COUNTS]
            assert place.levels[0].weights(program) == {}
            for mild, harsh in zip(place.levels[1:], place.levels[2:], strict=False):
                assert set(mild.removed) < set(harsh.removed) and mild.cost > harsh.cost
            for level in place.levels[1:]:
                (weight,) = level.weights(program).values()
                kept = [i for i in range(12) if i not in level.removed]
                assert not weight.tensor()[:, list(level.removed)].any()
                best = np.linalg.lstsq(z[:, kept], y, rcond=None)[0].T
                np.testing.assert_allclose(weight.tensor()[:, kept].numpy(), best, rtol=1e-5, atol=1e-6)
                old = z @ layer.weight.T.numpy()
                error = ((z[:, kept] @ best.T - old) ** 2).sum() / (old**2).sum()
                assert level.error == pytest.approx(error, rel=1e-4, abs=1e-9)
            (middle,) = (level for level in place.levels if level.count == 5)
            (changed.down1, changed.down2)[n].weight.copy_(next(iter(middle.weights(program).values())).tensor())


class Fork(nn.Module):
    """A hidden layer with two readers, and an MLP that reads a function of both."""

    def __init__(self) -> None:
        super().__init__()
        self.up1, self.one, self.two = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(12, 8)
        self.up2, self.down2 = nn.Linear(8, 12), nn.Linear(12, 8)

    def hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the readers of both hidden layers read."""
        a = torch.relu(self.up1(x))
        return a, torch.relu(self.up2(x + self.one(a) * torch.tanh(self.two(a))))

    def forward(self, x: Tensor) -> Tensor:
        """[rows, 8] to [rows, 8]."""
        return self.down2(self.hidden(x)[1])


def test_each_reader_of_a_site_is_expected_to_have_its_own_mean() -> None:
    torch.manual_seed(1)
    module = Fork().double().eval()
    program = trace(module, (torch.randn(60, 8).double(),))
    first, last = (
        site for site in channel_sites(program, structure(program), ("channels", "mlp"))[0] if site.size == 12
    )
    assert len(first.consumers) == 2 and len(last.consumers) == 1
    ctx = Context(calibration=[{"x": torch.randn(60, 8).double()} for _ in range(2)])
    places, _ = obs_places(
        program, (first, last), meter_of(program), ctx, {first.index: (3, 6, 11), last.index: COUNTS},
        middle={first.index: 3, last.index: 5}, expected={first.index: {0, 3, 6}, last.index: ()}, rounds={},
        damping=1e-12,
    )  # fmt: skip
    x = torch.cat([b["x"] for b in ctx.calibration or ()])
    changed = Fork().double()
    changed.load_state_dict(module.state_dict())
    with torch.no_grad():
        y = (module.hidden(x)[1] @ module.down2.weight.T).numpy()
        mild, harsh = (places[0].levels[n].weights(program) for n in (1, 2))
        for name, reader in (("one.weight", changed.one), ("two.weight", changed.two)):
            reader.weight.copy_((12 * reader.weight + 9 * mild[name].tensor() + 6 * harsh[name].tensor()) / 27)
        z = changed.hidden(x)[1].numpy()
    for level in places[1].levels[1:]:
        kept = [i for i in range(12) if i not in level.removed]
        best = np.linalg.lstsq(z[:, kept], y, rcond=None)[0].T
        fitted = level.weights(program)["down2.weight"].tensor()
        np.testing.assert_allclose(fitted[:, kept].numpy(), best, rtol=1e-5, atol=1e-6)


def test_levels_can_be_tried_together() -> None:
    _, program, sites, ctx = model()
    places, _ = obs_places(
        program, sites, meter_of(program), ctx, {s.index: COUNTS for s in sites}, middle={s.index: 0 for s in sites},
        rounds={},
    )  # fmt: skip
    candidates = Candidates(program, places, structure(program), ctx.calibration or ())
    by_hand = program.clone()
    weights = {**places[0].levels[2].weights(program), **places[1].levels[3].weights(program)}
    by_hand.weights = {**by_hand.weights, **weights}
    same(candidates.outputs((2, 3), 0), by_hand.run((ctx.calibration or ())[0]), 0)
    assert candidates((1, 0), 0) < candidates((3, 3), 0)


def test_one_weight_is_fitted_for_one_site_only() -> None:
    """Heads and the channels inside them are columns of one weight."""
    sites = [s for s in sites_of("llama") if s.block == 0 and s.kind in ("heads", "value-channels")]
    places, blocked = obs_places(
        traced("llama"), sites, meter_of(traced("llama")), context("llama"), {s.index: (1,) for s in sites},
        middle={s.index: 1 for s in sites}, rounds={},
    )  # fmt: skip
    assert len(places) == 1 and "is fitted for another site already" in next(iter(blocked))


def test_sites_that_cannot_be_fitted_are_counted() -> None:
    sites = [s for s in sites_of("llama") if s.kind in ("stream", "qk-channels", "mlp")]
    arguments = traced("llama"), sites, meter_of(traced("llama"))
    counts = {s.index: () if s.block == 2 else (8,) for s in sites}
    places, blocked = obs_places(*arguments, context("llama"), counts, middle={s.index: 0 for s in sites}, rounds={})
    assert [place.block for place in places] == [0, 1] and sum(blocked.values()) == 3 and "too few atoms" in blocked
    with pytest.raises(PreconditionError, match="needs calibration data"):
        obs_places(*arguments, Context(), counts, middle={}, rounds={})


def test_nan_is_refused() -> None:
    _, program, sites, _ = model()
    bad = Context(calibration=[{"x": torch.full((60, 8), torch.nan).double()}])
    with pytest.raises(PreconditionError, match="holds NaN or infinity"):
        obs_places(
            program,
            sites,
            meter_of(program),
            bad,
            {s.index: (1,) for s in sites},
            middle={s.index: 0 for s in sites},
            rounds={},
        )
