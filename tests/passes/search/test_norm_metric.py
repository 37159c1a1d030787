"""Weights of errors in a stream: from norms as operators and spelled out, and what they do to fits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.ir.structure import structure
from graphlathe.passes.base import Context
from graphlathe.passes.search.norm_metric import Norms, position_weights
from graphlathe.passes.search.refit import refit
from graphlathe.passes.search.sample_sums import Sums
from graphlathe.passes.search.sites import channel_sites

WIDTH, HIDDEN, REMOVED = 8, 12, (1, 4, 5)


class Gain(nn.Module):
    """A norm: an operator of its own, or spelled out as in many model files."""

    def __init__(self, spelled: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, WIDTH))
        self.spelled = spelled

    def forward(self, x: Tensor) -> Tensor:
        if not self.spelled:
            return nn.functional.rms_norm(x, (WIDTH,), self.weight, 1e-6)
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Net(nn.Module):
    """One residual MLP; a norm before it and one after the sum."""

    def __init__(self, spelled: bool) -> None:
        super().__init__()
        self.before, self.after = Gain(spelled), Gain(spelled)
        self.up, self.down, self.head = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH, 5)

    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(self.up(self.before(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.after(x + self.down(self.hidden(x))))


def net(spelled: bool) -> tuple[Net, Program, list[Tensor]]:
    torch.manual_seed(0)
    module = Net(spelled).double().eval()
    batches = [torch.randn(2, 20, WIDTH, dtype=torch.float64) for _ in range(3)]
    for batch in batches:
        batch[:, 0] *= 300  # a first token
    return module, trace(module, (batches[0],), dynamic={"x": {0: "B", 1: "S"}}), batches


@pytest.mark.parametrize("spelled", [False, True])
def test_what_norms_read_and_multiply_by(spelled: bool) -> None:
    module, program, batches = net(spelled)
    norms = Norms(program)
    last = program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    down = next(n for n in last if str(n.args[1].target).startswith("down"))  # type: ignore[union-attr]
    stream = norms.after(down)
    assert stream is not None
    seen: dict[str, Tensor] = {}
    program.run({"x": batches[0]}, observe=lambda node, value: seen.__setitem__(node.name, value))
    torch.testing.assert_close(seen[stream.name], batches[0] + module.down(module.hidden(batches[0])))
    weights = norms.channel_weights(stream)
    assert weights is not None
    torch.testing.assert_close(weights, module.after.weight.detach())
    assert norms.after(last[-1]) is None, "nothing follows the head"
    assert norms.channel_weights(down) is None, "its own result goes into a sum alone"


def test_positions_weigh_as_little_as_they_are_large() -> None:
    torch.testing.assert_close(
        position_weights(torch.tensor([[3.0, 4.0], [0.0, 0.0]])),
        torch.tensor([1 / (12.5 + 1e-6), 1e6], dtype=torch.float64),
    )


def test_weighted_sums_are_repeated_rows() -> None:
    """A weight of three is the same as three equal rows."""
    z, x = torch.randn(4, 3), torch.randn(4, 3)
    weighted, repeated = Sums(), Sums()
    weighted.add(z, x, True, torch.tensor([1.0, 3.0, 2.0, 1.0]))
    repeats = torch.tensor([0, 1, 1, 1, 2, 2, 3])
    repeated.add(z[repeats], x[repeats], True)
    assert weighted.count == repeated.count == 7
    for name in ("now", "before", "gram", "cross"):
        torch.testing.assert_close(getattr(weighted, name), getattr(repeated, name))


@pytest.mark.parametrize("spelled", [False, True])
def test_fits_by_least_squares_count_as_the_norm_does(spelled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against `lstsq` on rows times the root of their weights, with an intercept, towards the old columns."""
    monkeypatch.setattr("graphlathe.passes.search.refit.chosen_damping", lambda *unused: 0.01)
    module, program, batches = net(spelled)
    (site,) = (s for s in channel_sites(program, structure(program), ("mlp",))[0] if s.size == HIDDEN)
    context = Context(calibration=[{"x": batch} for batch in batches])
    result = refit(program, structure(program), [(site, REMOVED)], {}, context, "least-squares")
    kept = [unit for unit in range(HIDDEN) if unit not in REMOVED]
    with torch.no_grad():
        x = torch.cat(batches).reshape(-1, WIDTH)
        hidden = module.hidden(x)
        stream = (x + module.down(hidden)).numpy()
        wanted = (hidden @ module.down.weight.T).numpy()
    old = module.down.weight.detach().numpy()[:, kept]
    counts = 1 / ((stream**2).mean(1) + 1e-6)
    share = np.sqrt(counts / counts.sum())[:, None]
    z = hidden.numpy()[:, kept]
    mean, target = np.average(z, 0, counts), np.average(wanted, 0, counts)
    rows = share * (z - mean)
    ridge = 0.01 * np.mean((rows**2).sum(0))
    left = np.concatenate([rows, np.sqrt(ridge) * np.eye(len(kept))])
    right = np.concatenate([share * (wanted - target) - rows @ old.T, np.zeros((len(kept), WIDTH))])
    weight = old + np.linalg.lstsq(left, right, rcond=None)[0].T
    got = result.weights["down.weight"].tensor().numpy()
    np.testing.assert_allclose(got[:, kept], weight, atol=1e-9)
    assert not got[:, list(REMOVED)].any()
    bias = result.weights["down.bias"].tensor().numpy() - module.down.bias.detach().numpy()
    np.testing.assert_allclose(bias, target - weight @ mean, atol=1e-9)
