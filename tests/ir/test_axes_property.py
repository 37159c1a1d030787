"""The law of channel groups on random networks: a cut graph computes what the graph with those channels zeroed does."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from graphlathe.ir.axes import find_groups
from graphlathe.ir.from_torch import trace
from tests.masked import check_cut

MOST = 48
TEXT_STEPS = ("linear", "pointwise", "add", "gate", "cat", "split", "norm", "attention", "rows", "mean", "scale")
IMAGE_STEPS = ("conv", "pointwise", "add", "gate", "cat", "split", "norm", "shuffle", "pool", "squeeze", "scale")


class Network(nn.Module):
    """A random network on (batch, sequence, channels) or (batch, channels, height, width); channels are at ``dim``.

    Every step reads values that are there and adds new ones, so that values have many readers. Its width is what the
    draw says; an output layer keeps the widths of the values inside free.
    """

    def __init__(self, steps: list[str], rng: random.Random, image: bool) -> None:
        super().__init__()
        self.image, self.dim = image, 1 if image else 2
        self.layers = nn.ModuleList()
        self.program: list[tuple[Callable[..., Tensor | tuple[Tensor, ...]], tuple[int, ...]]] = []
        self.widths = [6]
        self._call(self._layer(6, 12), 0)
        for step in steps:
            getattr(self, f"_{step}")(rng)
        last = self._layer(self.widths[-1], 5)
        self._call(last, len(self.widths) - 1, width=5)

    def forward(self, x: Tensor) -> Tensor:
        """The last value."""
        values = [x]
        for function, reads in self.program:
            made = function(*(values[i] for i in reads))
            values.extend([made] if isinstance(made, Tensor) else made)
        return values[-1]

    def _call(self, function: Callable[..., Tensor | tuple[Tensor, ...]], *reads: int, width: int = 12) -> int:
        self.program.append((function, reads))
        self.widths.append(width)
        return len(self.widths) - 1

    def _layer(self, width: int, new: int, groups: int = 1) -> nn.Module:
        layer = nn.Conv2d(width, new, 3, padding=1, groups=groups) if self.image else nn.Linear(width, new)
        self.layers.append(layer)
        return layer

    def _pick(self, rng: random.Random) -> int:
        return max(rng.randrange(1, len(self.widths)) for _ in range(2))

    def _linear(self, rng: random.Random) -> None:
        at, new = self._pick(rng), rng.choice([4, 6, 8, 12])
        self._call(self._layer(self.widths[at], new), at, width=new)

    def _conv(self, rng: random.Random) -> None:
        at, new = self._pick(rng), rng.choice([4, 6, 8, 12])
        groups = rng.choice([g for g in (1, 1, 2, 4, self.widths[at]) if self.widths[at] % g == 0])
        new = self.widths[at] if groups == self.widths[at] else -(-new // groups) * groups
        self._call(self._layer(self.widths[at], new, groups), at, width=new)

    def _pointwise(self, rng: random.Random) -> None:
        at = self._pick(rng)
        self._call(rng.choice([torch.relu, torch.tanh, functional.silu, torch.sigmoid]), at, width=self.widths[at])

    def _same(self, rng: random.Random) -> tuple[int, int, int]:
        """Two values of one width, the second through a layer where it takes one."""
        a, b = self._pick(rng), self._pick(rng)
        if self.widths[a] != self.widths[b]:
            b = self._call(self._layer(self.widths[b], self.widths[a]), b, width=self.widths[a])
        return a, b, self.widths[a]

    def _add(self, rng: random.Random) -> None:
        a, b, width = self._same(rng)
        self._call(torch.add, a, b, width=width)

    def _gate(self, rng: random.Random) -> None:
        a, b, width = self._same(rng)
        self._call(lambda x, y: torch.sigmoid(x) * y, a, b, width=width)

    def _scale(self, rng: random.Random) -> None:
        at = self._pick(rng)
        weight = nn.Parameter(torch.randn(self.widths[at], *([1, 1] if self.image else [])))
        self.layers.append(nn.ParameterList([weight]))
        self._call(lambda x: x * weight, at, width=self.widths[at])

    def _cat(self, rng: random.Random) -> None:
        a, b = self._pick(rng), self._pick(rng)
        if self.widths[a] + self.widths[b] <= MOST:
            self._call(lambda x, y: torch.cat((x, y), self.dim), a, b, width=self.widths[a] + self.widths[b])

    def _split(self, rng: random.Random) -> None:
        at = self._pick(rng)
        if self.widths[at] == 1:
            return
        first = rng.randrange(1, self.widths[at])
        sizes = [first, self.widths[at] - first]
        self.program.append((lambda x: tuple(x.split(sizes, self.dim)), (at,)))
        self.widths += sizes

    def _norm(self, rng: random.Random) -> None:
        at = self._pick(rng)
        width = self.widths[at]
        groups = rng.choice([g for g in (1, 2, width) if width % g == 0])
        layer = rng.choice([nn.BatchNorm2d(width), nn.GroupNorm(groups, width)]) if self.image else nn.LayerNorm(width)
        for parameter in (*layer.parameters(), *layer.buffers()):
            if parameter.is_floating_point():
                nn.init.uniform_(parameter, 0.5, 1.5)
        self.layers.append(layer)
        self._call(layer, at, width=width)

    def _attention(self, rng: random.Random) -> None:
        at = self._pick(rng)
        heads, kv_heads, head_dim, fused = rng.choice([(2, 2, 4, True), (4, 2, 2, False), (3, 1, 2, False)])
        q, k, v = (self._layer(self.widths[at], n * head_dim) for n in (heads, kv_heads, kv_heads))
        qkv, out = self._layer(self.widths[at], 3 * heads * head_dim), self._layer(heads * head_dim, 8)

        def attend(x: Tensor) -> Tensor:
            parts = qkv(x).chunk(3, -1) if fused else (q(x), k(x), v(x))
            spread = [t.unflatten(2, (-1, head_dim)).transpose(1, 2) for t in parts]
            y = functional.scaled_dot_product_attention(*spread, enable_gqa=heads != kv_heads)
            return out(y.transpose(1, 2).flatten(2))

        self._call(attend, at, width=8)

    def _rows(self, rng: random.Random) -> None:
        """Softmax over the sequence, as weights of the values."""
        a, b, width = self._same(rng)
        self._call(lambda x, y: torch.softmax(x, 1) * y, a, b, width=width)

    def _mean(self, rng: random.Random) -> None:
        at = self._pick(rng)
        self._call(lambda x: x - x.mean(1, keepdim=True), at, width=self.widths[at])

    def _shuffle(self, rng: random.Random) -> None:
        at = self._pick(rng)
        groups = rng.choice([g for g in (2, 3, 4) if self.widths[at] % g == 0] or [1])
        self._call(lambda x: x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2), at, width=self.widths[at])

    def _pool(self, rng: random.Random) -> None:
        at = self._pick(rng)
        kind = rng.choice([functional.max_pool2d, functional.avg_pool2d])
        self._call(lambda x: functional.interpolate(kind(x, 2), size=4), at, width=self.widths[at])

    def _squeeze(self, rng: random.Random) -> None:
        """Squeeze and excitation: every channel times a factor that the means of all channels make."""
        at = self._pick(rng)
        down, up = nn.Conv2d(self.widths[at], 4, 1), nn.Conv2d(4, self.widths[at], 1)
        self.layers.extend((down, up))
        self._call(lambda x: x * torch.sigmoid(up(torch.relu(down(x.mean((2, 3), True))))), at, width=self.widths[at])


def check(network: nn.Module, x: Tensor, rng: random.Random) -> int:
    """Cut a random choice of every group that can be cut; how many were compared with a masked graph."""
    compared = 0
    program = trace(network.double().eval(), {"x": x}, dynamic={"x": {0: "batch"}})
    feeds = {"x": torch.randn(3, *x.shape[1:], dtype=x.dtype)}
    for group in find_groups(program):
        if not group.prunable:
            continue
        keep = sorted(rng.sample(range(group.size), rng.randint(1, group.size - 1)))
        compared += check_cut(program, group, feeds, keep, 1e-9)
    return compared


@given(st.lists(st.sampled_from(TEXT_STEPS), min_size=2, max_size=8), st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_networks_on_sequences(steps: list[str], seed: int) -> None:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    check(Network(steps, rng, image=False), torch.randn(2, 5, 6, dtype=torch.float64), rng)


@given(st.lists(st.sampled_from(IMAGE_STEPS), min_size=2, max_size=8), st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_networks_on_images(steps: list[str], seed: int) -> None:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    check(Network(steps, rng, image=True), torch.randn(2, 6, 4, 4, dtype=torch.float64), rng)


def test_the_law_is_tested() -> None:
    """Networks whose groups are known: the comparison is made, and is not trivial."""
    rng = random.Random(0)
    torch.manual_seed(0)
    network = Network(["linear", "pointwise", "attention", "norm"], rng, image=False)
    assert check(network, torch.randn(2, 5, 6, dtype=torch.float64), rng) >= 2
