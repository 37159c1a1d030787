"""Compensation over a whole model against plain references: lstsq on recorded activations, FLAP's formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graphlathe.ir.errors import PreconditionError
from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.ir.structure import structure
from graphlathe.passes.base import Context
from graphlathe.passes.search.apply import apply_plan
from graphlathe.passes.search.plan import Decision, Plan
from graphlathe.passes.search.refit import METHODS, counted_rows, refit
from graphlathe.passes.search.sites import ChannelSite, channel_sites
from graphlathe.passes.search.units import removable_units, replacements
from tests.passes.search.small_models import batch, found, sites_of
from tests.zoo_programs import traced

REMOVED = (0, 3, 4, 9)


class Two(nn.Module):
    """Two residual MLPs."""

    def __init__(self) -> None:
        super().__init__()
        self.up1, self.down1 = nn.Linear(8, 12), nn.Linear(12, 8)
        self.up2, self.down2 = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 5)

    def hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What both second layers read."""
        a = torch.relu(self.up1(x))
        b = torch.sigmoid(self.up2(x + self.down1(a)))
        return a, b

    def forward(self, x: Tensor) -> Tensor:
        """The head's output."""
        x = x + self.down1(torch.relu(self.up1(x)))
        return self.head(x + self.down2(torch.sigmoid(self.up2(x))))


@pytest.fixture
def same_damping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fit is damped alike; how damping is chosen has tests of its own."""
    monkeypatch.setattr("graphlathe.passes.search.refit.chosen_damping", lambda *unused: 0.01)


def model() -> tuple[Two, Program, list[ChannelSite]]:
    torch.manual_seed(0)
    module = Two().double().eval()
    program = trace(module, (torch.randn(50, 8).double(),))
    sites = channel_sites(program, structure(program), ("mlp", "channels"))[0]
    assert [site.size for site in sites] == [12, 12]
    return module, program, sites


def data() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(50, 8).double() for _ in range(3)]


def fitted(
    z: Tensor, y: Tensor, old: Tensor, kept: list[int], damping: float = 0.01
) -> tuple[np.ndarray[Any, Any], ...]:
    """Ridge regression towards the old columns with an intercept, by lstsq on stacked rows."""
    zk = z[:, kept].numpy()
    mean, target = zk.mean(0), y.numpy().mean(0)
    centred = zk - mean
    scale = damping * np.mean(np.diag(centred.T @ centred / len(z)))
    rows = np.concatenate([centred, np.sqrt(scale * len(z)) * np.eye(len(kept))])
    start = old[:, kept].numpy().T
    goal = np.concatenate([y.numpy() - target - centred @ start, np.zeros((len(kept), y.shape[1]))])
    weight = start + np.linalg.lstsq(rows, goal, rcond=None)[0]
    return weight.T, target - mean @ weight


@pytest.mark.usefixtures("same_damping")
@pytest.mark.parametrize("sequential", [True, False])
def test_least_squares_in_sequence(sequential: bool) -> None:
    module, program, sites = model()
    batches = data()
    result = refit(
        program, structure(program), [(s, REMOVED) for s in sites], {},
        Context(calibration=[{"x": x} for x in batches]), "least-squares", sequential=sequential,
    )  # fmt: skip
    kept = [i for i in range(12) if i not in REMOVED]
    x = torch.cat(batches)
    with torch.no_grad():
        a, b = module.hidden(x)
        changed = Two().double()
        changed.load_state_dict(module.state_dict())
        for name, dense in (("down1", a), ("down2", b)):
            layer, now = getattr(module, name), getattr(changed, name)
            y = dense @ layer.weight.T
            z = changed.hidden(x)[0 if name == "down1" else 1] if sequential else dense
            weight, shift = fitted(z, y, layer.weight, kept)
            whole = torch.zeros(8, 12, dtype=torch.float64)
            whole[:, kept] = torch.from_numpy(weight)
            bias = layer.bias + torch.from_numpy(shift)
            torch.testing.assert_close(result.weights[f"{name}.weight"].tensor(), whole, rtol=1e-8, atol=1e-10)
            torch.testing.assert_close(result.weights[f"{name}.bias"].tensor(), bias, rtol=1e-8, atol=1e-10)
            now.weight.copy_(whole)
            now.bias.copy_(bias)
    assert not result.skipped and set(result.weights) == {f"down{i}.{p}" for i in (1, 2) for p in ("weight", "bias")}


class Streamed(Two):
    """Two residual MLPs behind a linear map, so that their stream can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)

    def read(self, x: Tensor) -> dict[str, Tensor]:
        """What each reader of the stream reads."""
        a = self.first(x)
        b = a + self.down1(torch.relu(self.up1(a)))
        return {"up1": a, "up2": b, "head": b + self.down2(torch.sigmoid(self.up2(b)))}

    def forward(self, x: Tensor) -> Tensor:
        """The head's output."""
        return self.head(self.read(x)["head"])


@pytest.mark.usefixtures("same_damping")
@pytest.mark.parametrize("sequential", [True, False])
def test_readers_of_one_site_are_fitted_behind_one_another(sequential: bool) -> None:
    """The second reader of a stream reads what the first one, fitted, makes of it."""
    torch.manual_seed(0)
    module, removed, kept = Streamed().double().eval(), (1, 6), [0, 2, 3, 4, 5, 7]
    batches = data()
    program = trace(module, (batches[0],))
    (site,) = channel_sites(program, structure(program), ("stream",))[0]
    context = Context(calibration=[{"x": x} for x in batches])
    result = refit(program, structure(program), [(site, removed)], {}, context, "least-squares", sequential=sequential)
    x = torch.cat(batches)
    with torch.no_grad():
        dense = module.read(x)
        changed = Streamed().double()
        changed.load_state_dict(module.state_dict())
        for name in ("first", "down1", "down2"):
            getattr(changed, name).weight[list(removed)] = 0.0
            getattr(changed, name).bias[list(removed)] = 0.0
        for name in ("up1", "up2", "head"):
            layer, now = getattr(module, name), getattr(changed, name)
            z = changed.read(x)[name] if sequential else dense[name]
            weight, shift = fitted(z, dense[name] @ layer.weight.T, layer.weight, kept)
            now.weight.zero_()
            now.weight[:, kept] = torch.from_numpy(weight)
            now.bias += torch.from_numpy(shift)
            torch.testing.assert_close(result.weights[f"{name}.weight"].tensor(), now.weight.data, rtol=1e-8, atol=1e-9)
            torch.testing.assert_close(result.weights[f"{name}.bias"].tensor(), now.bias.data, rtol=1e-8, atol=1e-9)


def test_bias_is_flaps() -> None:
    """b + W[:, removed] E[x[removed]], on the unchanged model's inputs."""
    module, program, sites = model()
    batches = data()
    ctx = Context(calibration=[{"x": x} for x in batches])
    result = refit(program, structure(program), [(s, REMOVED) for s in sites], {}, ctx, "bias", sequential=False)
    with torch.no_grad():
        for name, inputs in zip(("down1", "down2"), module.hidden(torch.cat(batches)), strict=True):
            layer, gone = getattr(module, name), list(REMOVED)
            expected = layer.bias + layer.weight[:, gone] @ inputs.mean(0)[gone]
            torch.testing.assert_close(result.weights[f"{name}.bias"].tensor(), expected, rtol=1e-12, atol=1e-12)


def test_what_is_fitted_is_what_the_cut_program_computes() -> None:
    _, program, sites = model()
    ctx = Context(calibration=[{"x": x} for x in data()])
    result = refit(program, structure(program), [(s, REMOVED) for s in sites], {}, ctx, "least-squares")
    masked = program.clone()
    masked.weights = {**masked.weights, **result.weights}
    smaller = program.clone()
    decisions = tuple(Decision(s.kind, s.index, s.label, s.block, 12, REMOVED) for s in sites)
    apply_plan(smaller, Plan(decisions, compensation="least-squares"), ctx, "test")
    x = torch.randn(50, 8).double()
    torch.testing.assert_close(smaller(x), masked(x), rtol=1e-10, atol=1e-10)


class Concatenated(nn.Module):
    """A layer that reads the channels of two others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(16, 5)

    def inside(self, x: Tensor) -> Tensor:
        """Both, side by side."""
        return torch.cat([torch.relu(self.a(x)), torch.tanh(self.b(x))], -1)

    def forward(self, x: Tensor) -> Tensor:
        """The reader."""
        return self.out(self.inside(x))


@pytest.mark.usefixtures("same_damping")
def test_a_reader_of_two_sites_is_fitted_on_what_both_leave() -> None:
    torch.manual_seed(0)
    module = Concatenated().double()
    program = trace(module, (torch.randn(60, 6).double(),))
    sites = channel_sites(program, structure(program), ("channels", "mlp"))[0]
    x = torch.randn(60, 6).double()
    cuts = [(sites[0], (0, 2)), (sites[1], (1, 5, 6))]
    result = refit(program, structure(program), cuts, {}, Context(calibration=[{"x": x}]), "least-squares")
    gone = {0, 2, 9, 13, 14} if sites[0].consumers[0].labels[0] == 0 else {8, 10, 1, 5, 6}
    kept = [i for i in range(16) if i not in gone]
    with torch.no_grad():
        z = module.inside(x)
        weight, shift = fitted(z, z @ module.out.weight.T, module.out.weight, kept)
        whole = torch.zeros(5, 16, dtype=torch.float64)
        whole[:, kept] = torch.from_numpy(weight)
        torch.testing.assert_close(result.weights["out.weight"].tensor(), whole, rtol=1e-8, atol=1e-10)
        bias = module.out.bias + torch.from_numpy(shift)
        torch.testing.assert_close(result.weights["out.bias"].tensor(), bias, rtol=1e-8, atol=1e-10)


class Tied(nn.Module):
    """Two MLPs that share their second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up1, self.up2, self.down = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        """One after the other."""
        x = x + self.down(torch.relu(self.up1(x)))
        return x + self.down(torch.relu(self.up2(x)))


def test_shared_weights_are_reported_and_only_zeroed() -> None:
    torch.manual_seed(0)
    program = trace(Tied(), (torch.randn(9, 6),))
    (site,) = channel_sites(program, structure(program), ("channels", "mlp"))[0]
    ctx = Context(calibration=[{"x": torch.randn(9, 6)}])
    result = refit(program, structure(program), [(site, (2,))], {}, ctx, "least-squares")
    assert result.skipped == {"weight 'down.weight' is read by several operators": 2}
    expected = program.weights["down.weight"].tensor().clone()
    expected[:, 2] = 0
    assert list(result.weights) == ["down.weight"] and torch.equal(result.weights["down.weight"].tensor(), expected)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_masked_positions_do_not_count(name: str) -> None:
    """GPT-2 multiplies flattened rows, BERT [batch, tokens, width]."""
    site = next(s for s in sites_of(name) if s.kind == "mlp")
    consumer = site.consumers[0]
    ids = batch(name)["input_ids"]
    values: dict[str, Tensor] = {}
    traced(name).run(traced(name).feeds(**batch(name)), observe=lambda node, v: values.__setitem__(node.name, v))
    mask = (torch.arange(ids.numel()) % 3 > 0).view(ids.shape).long()
    value = values[consumer.operand.name]
    rows = counted_rows(consumer, {"attention_mask": mask}, value)
    assert torch.equal(rows, value.reshape(ids.numel(), -1)[mask.reshape(-1) != 0])
    assert len(counted_rows(consumer, {}, value)) == ids.numel()


def test_nan_and_missing_data_are_refused() -> None:
    _, program, sites = model()
    cuts = [(sites[0], (1,))]
    for method in METHODS:
        with pytest.raises(PreconditionError, match="needs calibration data"):
            refit(program, structure(program), cuts, {}, Context(), method)
        with pytest.raises(PreconditionError, match="NaN or infinity"):
            ctx = Context(calibration=[{"x": torch.full((50, 8), torch.nan).double()}])
            refit(program, structure(program), cuts, {}, ctx, method)


def test_a_batch_without_positions_is_refused() -> None:
    site = next(s for s in sites_of("bert") if s.kind == "mlp")
    empty = {**batch("bert"), "attention_mask": torch.zeros_like(batch("bert")["attention_mask"])}
    with pytest.raises(PreconditionError, match=r"no position that counts|NaN"):
        refit(traced("bert"), found("bert"), [(site, (0,))], {}, Context(calibration=[empty]), "bias")


@pytest.mark.usefixtures("same_damping")
def test_dropped_units_are_seen_by_later_layers() -> None:
    """The second MLP is fitted on the stream without the first, to give what it gave with it."""
    module, program, sites = model()
    (batch_,) = data()[:1]
    units = [u for kind in ("block", "mlp") for u in removable_units(structure(program), kind) if not u.blocked]
    names = {site.consumers[0].weight: site for site in sites}
    alias = replacements(units[:1])
    result = refit(
        program, structure(program), [(names["down2.weight"], REMOVED)], alias, Context(calibration=[{"x": batch_}]),
        "least-squares",
    )  # fmt: skip
    kept = [i for i in range(12) if i not in REMOVED]
    with torch.no_grad():
        y = module.hidden(batch_)[1] @ module.down2.weight.T
        z = torch.sigmoid(module.up2(batch_))
        weight, _ = fitted(z, y, module.down2.weight, kept)
    got = result.weights["down2.weight"].tensor()[:, kept]
    torch.testing.assert_close(got, torch.from_numpy(weight), rtol=1e-8, atol=1e-10)
