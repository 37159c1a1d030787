"""``raise-activations``: activations in many spellings, gating in all its forms, and what only looks like them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphlathe.passes.canonical.raise_activations import RaiseActivations
from tests.passes.canonical.spelled import raised
from tests.passes.rewriting import operators, rewritten

ROOT = math.sqrt(2 / math.pi)
CUBIC = 0.044715

ERF: dict[str, Callable[[Tensor], Tensor]] = {
    "definition": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "times the reciprocal": lambda x: x * 0.5 * (torch.erf(x * math.sqrt(0.5)) + 1.0),
    "half last": lambda x: (x * (1 + torch.erf(x / math.sqrt(2)))) * 0.5,
    "halved": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "half of the sum": lambda x: x * (0.5 * (1 + torch.erf(x / math.sqrt(2)))),
    "half each": lambda x: x * (0.5 + 0.5 * torch.erf(x / math.sqrt(2))),
    "sum of products": lambda x: 0.5 * x + 0.5 * x * torch.erf(x / math.sqrt(2)),
}
TANH: dict[str, Callable[[Tensor], Tensor]] = {
    "definition": lambda x: 0.5 * x * (1 + torch.tanh(ROOT * (x + CUBIC * x**3))),
    "three factors": lambda x: 0.5 * x * (1 + torch.tanh(ROOT * (x + CUBIC * x * x * x))),
    "square times x": lambda x: 0.5 * x * (1 + torch.tanh(ROOT * (x + CUBIC * x.square() * x))),
    "x outside": lambda x: x * 0.5 * (1.0 + torch.tanh(ROOT * x * (1 + CUBIC * x * x))),
    "scale inside": lambda x: 0.5 * x * (1 + torch.tanh(ROOT * x + ROOT * CUBIC * x.pow(3))),
    "half last": lambda x: x * (torch.tanh((x + CUBIC * torch.pow(x, 3.0)) * ROOT) + 1) * 0.5,
}
OTHER: dict[str, tuple[Callable[[Tensor], Tensor], str, Callable[[Tensor], Tensor]]] = {
    "silu": (lambda x: x * torch.sigmoid(x), "silu", F.silu),
    "silu, sigmoid first": (lambda x: torch.sigmoid(x) * x, "silu", F.silu),
    "silu by exp": (lambda x: x / (1 + torch.exp(-x)), "silu", F.silu),
    "silu by the reciprocal": (lambda x: x * (1 / (torch.exp(-x) + 1)), "silu", F.silu),
    "mish": (lambda x: x * torch.tanh(F.softplus(x)), "mish", F.mish),
    "mish by log1p": (lambda x: torch.tanh(torch.log1p(torch.exp(x))) * x, "mish", F.mish),
    "mish by log": (lambda x: x * torch.tanh(torch.log(1 + torch.exp(x))), "mish", F.mish),
    "hard swish": (lambda x: x * F.hardsigmoid(x), "hardswish", F.hardswish),
    "hard swish by relu6": (lambda x: x * F.relu6(x + 3) / 6, "hardswish", F.hardswish),
    "hard swish by clamp": (lambda x: x * ((x + 3).clamp(0, 6) / 6), "hardswish", F.hardswish),
    "hard swish scaled": (lambda x: (x / 6 + 0.5).clamp(0, 1) * x, "hardswish", F.hardswish),
}


def values(dtype: torch.dtype = torch.float64) -> Tensor:
    """From -20 to 20, with zero."""
    return torch.linspace(-20, 20, 81, dtype=torch.float64).reshape(3, 27).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ERF)
def test_spellings_of_gelu(name: str, dtype: torch.dtype) -> None:
    x = values(dtype)
    _, after, stats = raised(RaiseActivations(), ERF[name], x)
    assert operators(after) == ["gelu"]
    assert (stats.hits, stats.attempts, stats.misses) == (1, 1, {})
    torch.testing.assert_close(after(x), F.gelu(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", TANH)
def test_spellings_of_gelu_by_tanh(name: str, dtype: torch.dtype) -> None:
    x = values(dtype)
    _, after, stats = raised(RaiseActivations(), TANH[name], x)
    assert operators(after) == ["gelu"]
    assert (stats.hits, stats.misses) == (1, {})
    torch.testing.assert_close(after(x), F.gelu(x, approximate="tanh"))


@pytest.mark.parametrize("name", OTHER)
def test_spellings_of_other_activations(name: str) -> None:
    function, operator, reference = OTHER[name]
    x = values()
    _, after, stats = raised(RaiseActivations(), function, x)
    assert operators(after) == [operator]
    assert (stats.hits, stats.misses) == (1, {})
    torch.testing.assert_close(after(x), reference(x))


def test_constants_may_be_weights_of_one_element() -> None:
    """As in a file of ONNX, whose numbers are initialisers."""
    x = values(torch.float32)
    constants = {"root": 1.4142135381698608, "one": 1.0, "point": 0.5}
    weights = {name: torch.tensor(number) for name, number in constants.items()}
    _, after, _ = raised(
        RaiseActivations(), lambda x, root, one, point: point * (x * (torch.erf(x / root) + one)), x, **weights
    )
    assert operators(after) == ["gelu"]
    assert not after.used_weights()


def test_rounded_constants_are_those_of_their_type() -> None:
    """0.79788456 is the root in float32, and no more than that."""

    def bloom(x: Tensor) -> Tensor:
        return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))

    _, after, _ = raised(RaiseActivations(), bloom, values(torch.float32))
    assert operators(after) == ["gelu"]
    before, after, stats = raised(RaiseActivations(), bloom, values(torch.float64))
    assert after.to_text() == before.to_text()
    assert stats.misses == {"the argument of tanh is not that of GELU": 1}


def test_the_argument_may_be_a_multiple_of_something() -> None:
    x = values()
    for function in (ERF["definition"], TANH["x outside"], OTHER["silu"][0]):
        _, after, _ = raised(RaiseActivations(), lambda x, f=function: f(x * 2.0), x)
        assert operators(after)[0] == "mul.Tensor"
        assert len(operators(after)) == 2


NEAR_MISSES: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "erf of x": (lambda x: x * 0.5 * (1 + torch.erf(x)), "the argument of erf is not x / sqrt(2)"),
    "twice GELU": (
        lambda x: x * (1 + torch.erf(x / math.sqrt(2))),
        "'erf' is not scaled by its argument as in gelu",
    ),
    "another factor": (
        lambda x: x.flip(0) * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
        "'erf' is not scaled by its argument as in gelu",
    ),
    "another cubic": (
        lambda x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.0447 * x**3))),
        "the argument of tanh is not that of GELU",
    ),
    "quick GELU": (
        lambda x: x * torch.sigmoid(1.702 * x),
        "the sigmoid is of a multiple of what it scales (a quick GELU)",
    ),
    "the sigmoid is read elsewhere": (
        lambda x: (x * torch.sigmoid(x), torch.sigmoid(x)),
        "the result of 'sigmoid' inside is read elsewhere too",
    ),
    "the sum is an output": (
        lambda x: (ERF["definition"](x), 1 + torch.erf(x / math.sqrt(2))),
        "'erf' is not scaled by its argument as in gelu",
    ),
    "a hard swish of another slope": (lambda x: x * F.relu6(x + 2) / 6, ""),
    "a hard sigmoid": (lambda x: F.relu6(x + 3) / 6, ""),
    "plain tanh and sigmoid": (lambda x: torch.tanh(x) * torch.sigmoid(-x), ""),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_say_why(name: str) -> None:
    function, reason = NEAR_MISSES[name]
    before, after, stats = raised(RaiseActivations(), function, values())
    assert after.to_text() == before.to_text()
    assert (stats.hits, stats.misses) == (0, {reason: 1} if reason else {})


@settings(max_examples=20)
@given(data=st.data())
def test_gelu_in_any_order_of_its_factors(data: st.DataObject) -> None:
    """The factors ``x``, ``1/2``, ``1 + middle`` in random order and brackets; a wrong constant is refused."""
    tanh, wrong = data.draw(st.booleans()), data.draw(st.booleans())
    order, left = data.draw(st.permutations(range(3))), data.draw(st.booleans())
    half = 0.5 * (1.0001 if wrong else 1.0)
    flip = data.draw(st.booleans())

    def function(x: Tensor) -> Any:
        middle = torch.tanh(ROOT * (x + CUBIC * x * x * x)) if tanh else torch.erf(x * math.sqrt(0.5))
        factors: list[Any] = [x, half, 1 + middle if flip else middle + 1]
        a, b, c = (factors[i] for i in order)
        return (a * b) * c if left else a * (b * c)

    x = values()
    _, after, stats = raised(RaiseActivations(), function, x)
    assert stats.hits == (not wrong)
    torch.testing.assert_close(after(x), F.gelu(x, approximate="tanh" if tanh else "none") * (half * 2))


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
}


def matrices(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("flipped", [False, True])
def test_two_linear_maps_of_one_value(name: str, flipped: bool) -> None:
    x, g, u = matrices((3, 2, 4), (5, 4), (5, 4))

    def gated(x: Tensor, g: Tensor, u: Tensor) -> Tensor:
        activated, up = GATES[name](F.linear(x, g)), F.linear(x, u)
        return up * activated if flipped else activated * up

    _, after, stats = raised(RaiseActivations(), gated, x, g=g, u=u)
    assert operators(after) == ["linear", "linear", "graphlathe.gated_activation"]
    assert f'activation="{name}"' in after.to_text()
    assert (stats.hits, stats.misses) == (1, {})


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "halves by chunk": lambda x, w: F.silu(F.linear(x, w).chunk(2, -1)[0]) * F.linear(x, w).chunk(2, -1)[1],
    "second half gates": lambda x, w: F.linear(x, w)[..., :3] * F.silu(F.linear(x, w)[..., 3:]),
    "every other channel": lambda x, w: F.silu(F.linear(x, w)[..., ::2]) * F.linear(x, w)[..., 1::2],
    "matmul": lambda x, w: F.silu(x @ w[:3].T) * (x @ w[3:].T),
    "scaled and shifted": lambda x, w: F.silu(F.linear(x, w[:3]) * 0.5) * (F.linear(x, w[3:]) + 1),
    "viewed": lambda x, w: F.silu(F.linear(x.reshape(-1, 4), w[:3])) * F.linear(x.reshape(-1, 4), w[3:]),
    "spelled out": lambda x, w: F.linear(x, w[:3]) * torch.sigmoid(F.linear(x, w[:3])) * F.linear(x, w[3:]),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_gating(name: str) -> None:
    x, w = matrices((3, 2, 4), (6, 4))
    _, after, stats = raised(RaiseActivations(), FORMS[name], x, w=w)
    assert operators(after)[-1] == "graphlathe.gated_activation"
    assert not stats.misses


UNGATED: dict[str, tuple[Callable[..., Any], str]] = {
    "different values": (
        lambda x, g, u: F.silu(F.linear(x, g)) * F.linear(x + 1, u),
        "the gate and what is gated are linear maps of different values",
    ),
    "not linear": (
        lambda x, g, u: F.silu(F.linear(x, g)) * torch.tanh(F.linear(x, u)),
        "what is gated is no linear map",
    ),
    "gate not linear": (lambda x, g, u: F.silu(x[..., :1].abs()) * F.linear(x, u), "the gate is no linear map"),
    "broadcast": (
        lambda x, g, u: torch.sigmoid(F.linear(x, g[:1])) * F.linear(x, u),
        "the gate is broadcast to what is gated",
    ),
    "read elsewhere": (
        lambda x, g, u: (F.silu(F.linear(x, g)) * F.linear(x, u), F.silu(F.linear(x, g))),
        "the result of 'silu' inside is read elsewhere too",
    ),
    "a square": (lambda x, g, u: F.relu(F.linear(x, g)) * F.relu(F.linear(x, g)), ""),
    "a number": (lambda x, g, u: F.silu(F.linear(x, g)) * 2.0, ""),
    "a weight": (lambda x, g, u: F.silu(F.linear(x, g)) * u[:, 0], ""),
}


@pytest.mark.parametrize("name", UNGATED)
def test_what_gates_otherwise_stays(name: str) -> None:
    function, reason = UNGATED[name]
    x, g, u = matrices((3, 2, 4), (5, 4), (5, 4))
    before, after, stats = raised(RaiseActivations(), function, x, g=g, u=u)
    assert after.to_text() == before.to_text()
    assert (stats.hits, stats.misses) == (0, {reason: 1} if reason else {})


TEXT = """\
program @main(%x: f32[B, S, 8]) -> (%out) {
  dim B = 2 in [1, inf]
  dim S = 5 in [1, inf]
  %w0 = weight "up.weight" : f32[8, 8] #00000000
  %w1 = weight "gate.weight" : f32[8, 8] #00000000
  %0 = aten.linear(%x, %w0) : f32[B, S, 8]
  %1 = aten.linear(%x, %w1) : f32[B, S, 8]
  %2 = aten.sigmoid(%1) : f32[B, S, 8]
  %3 = aten.mul.Tensor(%1, %2) : f32[B, S, 8]
  %4 = aten.mul.Tensor(%0, %3) : f32[B, S, 8]
  %5 = aten.div.Tensor(%4, 1.4142135623730951) : f32[B, S, 8]
  %6 = aten.erf(%5) : f32[B, S, 8]
  %7 = aten.add.Tensor(%6, 1.0) : f32[B, S, 8]
  %8 = aten.mul.Tensor(%4, %7) : f32[B, S, 8]
  %9 = aten.mul.Tensor(%8, 0.5) : f32[B, S, 8]
  return (%9,)
}
"""


def test_before_and_after(golden: Callable[[str, str], None]) -> None:
    before, after, _ = rewritten(RaiseActivations(), TEXT)
    assert operators(after) == ["linear", "linear", "graphlathe.gated_activation", "gelu"]
    golden("passes/raise-activations", f"{before.to_text()}\n{after.to_text()}")
