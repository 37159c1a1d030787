"""What looks like a norm, activation, linear layer, batch norm or rotation, and is none: it stays, unharmed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphlathe.ir.from_torch import trace
from graphlathe.passes.base import Context, Pass
from graphlathe.passes.canonical.fold_batchnorm import FoldBatchNorm
from graphlathe.passes.canonical.raise_activations import RaiseActivations
from graphlathe.passes.canonical.raise_linear import RaiseLinear
from graphlathe.passes.canonical.raise_norms import RaiseNorms
from graphlathe.passes.canonical.raise_rotary import RaiseRotary
from tests.passes.canonical.spelled import raised

Function = Callable[..., Any]
N, EPS = 6, 1e-3


def drawn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def one(number: float, rank: int = 4) -> Tensor:
    """A constant of one element that adds axes to what it meets."""
    return torch.full([1] * rank, number, dtype=torch.float64)


@dataclass
class Case:
    """A function of inputs and weights that a pass must leave alone."""

    function: Function
    inputs: tuple[Tensor, ...] = field(default_factory=lambda: (drawn(3, 2, N),))
    weights: dict[str, Tensor] = field(default_factory=dict)


def unharmed(pass_: Pass, case: Case) -> None:
    """The pass has no hits, and the outputs stay (at other sizes too, wherever the first axis is dynamic)."""
    _, after, stats = raised(pass_, case.function, *case.inputs, **case.weights)
    assert stats.hits == 0, after.to_text()
    larger = tuple(torch.cat([x, x + 1]) if x.dim() > 1 else x for x in case.inputs)
    for inputs in (case.inputs, larger):
        expected = case.function(*inputs, **case.weights)
        torch.testing.assert_close(after(*inputs), expected, rtol=1e-12, atol=1e-14, equal_nan=True)


def squares(x: Tensor, dim: int | tuple[int, ...] = -1) -> Tensor:
    return x.pow(2).mean(dim, keepdim=True)


def centred(x: Tensor, dim: int = -1) -> Tensor:
    return x - x.mean(dim, keepdim=True)


def variance(x: Tensor, dim: int = -1) -> Tensor:
    return x.var(dim, unbiased=False, keepdim=True)


def folded(x: Tensor, join: Function) -> Tensor:
    scale = torch.rsqrt(variance(x) + EPS)
    return join(x * scale, x.mean(-1, keepdim=True) * scale)


NORMS: dict[str, Case] = {
    "variance of everything": Case(lambda x: (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + EPS)),
    "middle axis": Case(lambda x: x * torch.rsqrt(squares(x, 1) + EPS)),
    "several axes": Case(lambda x: centred(x) * torch.rsqrt(squares(centred(x), (1, 2)) + EPS)),
    "mean over another axis": Case(lambda x: centred(x, 1) * torch.rsqrt(variance(x) + EPS)),
    "unbiased": Case(lambda x: centred(x) * torch.rsqrt(x.var(-1, keepdim=True) + EPS)),
    "eps beside the root": Case(lambda x: centred(x) / (x.std(-1, unbiased=False, keepdim=True) + EPS)),
    "raw value": Case(lambda x: x * torch.rsqrt(squares(centred(x)) + EPS)),
    "raw statistics": Case(lambda x: centred(x) * torch.rsqrt(squares(x) + EPS)),
    "another value": Case(lambda x, y: y * torch.rsqrt(squares(x) + EPS), (drawn(3, 2, N), drawn(3, 1, N))),
    "lost axis": Case(lambda x: x * torch.rsqrt(x.pow(2).mean(-1) + EPS), (drawn(4, 1),)),
    "mean subtracted twice": Case(lambda x: folded(x, lambda a, b: torch.sub(a, b, alpha=2))),
    "eps that adds axes": Case(lambda x, e: x * torch.rsqrt(squares(x) + e), weights={"e": one(EPS)}),
    "exponent that adds axes": Case(
        lambda x, e: x * torch.rsqrt(x.pow(e).mean(-1, keepdim=True) + EPS), weights={"e": one(2)}
    ),
    "complex": Case(lambda x: centred(x) * torch.rsqrt(squares(centred(x)) + EPS), (drawn(3, 2, N) * 1j,)),
    "no axis": Case(lambda x: x * torch.rsqrt(squares(x) + EPS), (drawn(1)[0],)),
    "rounded quotient": Case(lambda x: torch.div(x, torch.sqrt(squares(x) + EPS), rounding_mode="floor")),
}


@pytest.mark.parametrize("name", NORMS)
def test_no_norm(name: str) -> None:
    unharmed(RaiseNorms(), NORMS[name])


def gelu(x: Tensor, scale: float, cubic: float) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(scale * (x + cubic * x**3)))


ACTIVATIONS: dict[str, Case] = {
    "0.0447": Case(lambda x: gelu(x, math.sqrt(2 / math.pi), 0.0447)),
    "0.7979": Case(lambda x: gelu(x, 0.7979, 0.044715)),
    "square for a cube": Case(lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**2)))),
    "1.4142": Case(lambda x: 0.5 * x * (1 + torch.erf(x / 1.4142))),
    "GELU of another value": Case(
        lambda x, y: 0.5 * y * (1 + torch.erf(x / math.sqrt(2))), (drawn(3, N), drawn(3, N) + 1)
    ),
    "complement": Case(lambda x: 0.5 * x * (1 - torch.erf(x / math.sqrt(2)))),
    "rounded half": Case(lambda x: torch.div(x, 2, rounding_mode="floor") * (1 + torch.erf(x / math.sqrt(2)))),
    "half that adds axes": Case(lambda x, h: x * h * (1 + torch.erf(x / math.sqrt(2))), weights={"h": one(0.5)}),
    "quick GELU": Case(lambda x: x * torch.sigmoid(1.702 * x)),
    "sigmoid of another value": Case(lambda x, y: x * torch.sigmoid(y), (drawn(3, N), drawn(3, N) + 1)),
    "sigmoid of a part": Case(lambda x: x * torch.sigmoid(x[:, :1])),
    "rising denominator": Case(lambda x: x / (1 + torch.exp(x))),
    "other summand": Case(lambda x: x / (2 + torch.exp(-x))),
    "softplus with beta": Case(lambda x: x * torch.tanh(F.softplus(x, beta=2.0))),
    "hard swish of other bounds": Case(lambda x: x * (x + 3).clamp(0, 5) / 6),
    "hard swish of another value": Case(lambda x, y: y * F.relu6(x + 3) / 6, (drawn(3, N), drawn(3, N) + 1)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_no_activation(name: str) -> None:
    unharmed(RaiseActivations(), ACTIVATIONS[name])


LINEAR: dict[str, Case] = {
    "weight from outside": Case(lambda x, w: x @ w, (drawn(3, 2, N), drawn(3, N, 4))),
    "vector": Case(lambda x, w: x @ w, weights={"w": drawn(N)}),
    "left factor": Case(lambda x, w: w @ x, weights={"w": drawn(4, 2)}),
    "matrix for each row": Case(lambda x, w: x.unsqueeze(-2) @ w, weights={"w": drawn(2, N, 4)}),
    "scaled addmm": Case(
        lambda x, w, b: torch.addmm(b, x, w, beta=0.5, alpha=2), (drawn(3, N),), {"w": drawn(N, 4), "b": drawn(4)}
    ),
    "number for a bias": Case(lambda x, w, b: torch.addmm(b, x, w), (drawn(3, N),), {"w": drawn(N, 4), "b": drawn(1)}),
    "einsum with a shared axis": Case(lambda x, w: torch.einsum("bsk,skn->bsn", x, w), weights={"w": drawn(2, N, 4)}),
    "einsum that sums one operand": Case(lambda x, w: torch.einsum("bsk,kn->bs", x, w), weights={"w": drawn(N, 4)}),
    "einsum that broadcasts": Case(
        lambda x, w: torch.einsum("bsk,kn->bsn", x, w), (drawn(3, 2, 1),), {"w": drawn(N, 4)}
    ),
}


@pytest.mark.parametrize("name", LINEAR)
def test_no_linear_layer(name: str) -> None:
    unharmed(RaiseLinear(), LINEAR[name])


@pytest.mark.parametrize(
    "add",
    [
        lambda y, b: torch.add(y, b, alpha=2),
        lambda y, b: torch.add(b, y, alpha=2),
        lambda y, b: b - y,
        lambda y, b: y + b[0],
        lambda y, b: y + b.reshape(1, 1, 1, 4),
        lambda y, b: y + b[:2].reshape(2, 1),
        lambda y, b: (y + b, y),
    ],
    ids=["scaled", "scaled product", "subtracted", "number", "more axes", "by rows", "product read elsewhere"],
)
def test_a_linear_layer_without_its_bias(add: Function) -> None:
    weights = {"w": drawn(N, 4), "b": drawn(4)}
    _, after, stats = raised(RaiseLinear(), lambda x, w, b: add(x @ w, b), drawn(3, 2, N), **weights)
    assert stats.hits == 1 and all(len(n.args) < 3 for n in after.graph.nodes if "linear" in str(n.target))


class Layers(nn.Module):
    """A function of layers that are called by name."""

    def __init__(self, function: Function, **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer.double())

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def batch_norm(channels: int, **options: Any) -> nn.BatchNorm2d:
    torch.manual_seed(channels)
    norm = nn.BatchNorm2d(channels, **options)
    for value in norm.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.1, 2.0)
    return norm


def of_batch(m: Any, x: Tensor) -> Tensor:
    return F.batch_norm(m.conv(x), None, None, m.norm.weight, m.norm.bias, training=True)


@pytest.mark.parametrize(
    ("function", "conv", "norm"),
    [
        (lambda m, x: m.norm(m.conv(x)) + m.conv(x * 2), nn.Conv2d(6, 4, 3), batch_norm(4)),
        (lambda m, x: (lambda y: m.norm(y) + y)(m.conv(x)), nn.Conv2d(6, 4, 3), batch_norm(4)),
        (lambda m, x: m.conv(m.norm(x)), nn.Conv2d(6, 4, 3, padding=1), batch_norm(6)),
        (lambda m, x: m.conv(F.pad(m.norm(x), (1, 1, 1, 1))), nn.Conv2d(6, 4, 3), batch_norm(6)),
        (lambda m, x: m.conv(m.norm(x)), nn.ConvTranspose2d(6, 4, 3), batch_norm(6)),
        (lambda m, x: (lambda y: m.conv(y) + y[:, :4, 1:-1, 1:-1])(m.norm(x)), nn.Conv2d(6, 4, 3), batch_norm(6)),
        (of_batch, nn.Conv2d(6, 4, 3), batch_norm(4)),
        (lambda m, x: m.norm(m.conv(x).transpose(1, 2)), nn.Conv2d(6, 6, 3, padding=1), batch_norm(8)),
        (lambda m, x: m.norm(m.conv(x).reshape(1, -1, 6, 6)), nn.Conv2d(6, 4, 3), batch_norm(8)),
    ],
    ids=[
        "shared weight",
        "result read elsewhere",
        "before padding",
        "before a pad",
        "before a transposed convolution",
        "normalised value read elsewhere",
        "statistics of the batch",
        "other axis",
        "batch joined to the channels",
    ],
)
def test_no_batch_norm_to_fold(function: Function, conv: nn.Module, norm: nn.Module) -> None:
    module = Layers(function, conv=conv, norm=norm).eval()
    x = drawn(2, 6, 8, 8)
    program = trace(module, (x,))
    stats = FoldBatchNorm().run(program, Context())
    assert (stats.hits, stats.attempts) == (0, 1)
    torch.testing.assert_close(program(x), module(x), rtol=1e-12, atol=1e-14)


def apart(x: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The two halves of a rotation of neighbouring channels."""
    a, b = x[..., ::2], x[..., 1::2]
    return a * c - b * s, b * c + a * s


def turned(x: Tensor) -> Tensor:
    return torch.cat((-x[..., 4:], x[..., :4]), -1)


ANGLES = {"c": drawn(1, 8), "s": drawn(2, 8)[:1]}
HALF_ANGLES = {name: angle[:, :4] for name, angle in ANGLES.items()}
ROTATIONS: dict[str, Case] = {
    "rows in another order": Case(
        lambda x, c, s: torch.stack(apart(x, c, s), -1).reshape(3, -1, 8), (drawn(2, 3, 8),), HALF_ANGLES
    ),
    "copy with other rows": Case(
        lambda x, c, s: x * c + torch.stack((-x[..., 1::2], x[..., ::2]), -1).reshape(1, -1, 8) * s,
        (drawn(5, 1, 8),),
        ANGLES,
    ),
    "half that is broadcast": Case(
        lambda x, y, c, s: torch.cat((x * c - y * s, y * c + x * s), -1), (drawn(3, 2, 4), drawn(4)), HALF_ANGLES
    ),
    "other sign": Case(lambda x, c, s: x * c - turned(x) * s, (drawn(3, 2, 8),), ANGLES),
    "both halves negated": Case(
        lambda x, c, s: x * c + torch.cat((-x[..., 4:], -x[..., :4]), -1) * s, (drawn(3, 2, 8),), ANGLES
    ),
    "scaled copy": Case(lambda x, c, s: torch.add(x * c, turned(x) * s, alpha=2), (drawn(3, 2, 8),), ANGLES),
    "another value": Case(lambda x, y, c, s: x * c + turned(y) * s, (drawn(3, 8), drawn(3, 8) + 1), ANGLES),
    "halves joined in the other order": Case(
        lambda x, c, s: torch.cat(apart(x, c, s)[::-1], -1), (drawn(3, 2, 8),), HALF_ANGLES
    ),
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_no_rotation(name: str) -> None:
    unharmed(RaiseRotary(), ROTATIONS[name])


def test_a_complex_product_over_a_dynamic_axis_is_no_rotation() -> None:
    class Product(nn.Module):
        def forward(self, x: Tensor, y: Tensor, c: Tensor, s: Tensor) -> Tensor:
            return torch.cat((x * c - y * s, y * c + x * s), -1)

    inputs = tuple(drawn(i, 6)[:1] for i in range(1, 5))
    program = trace(Product(), inputs, dynamic={name: {1: "L"} for name in "xycs"})
    stats = RaiseRotary().run(program, Context())
    assert stats.misses == {"the last axis has no fixed size": 1}
    longer = tuple(torch.cat([x, x], -1) for x in inputs)
    torch.testing.assert_close(program(*longer), Product()(*longer))
