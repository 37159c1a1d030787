"""A bias that is given changes nothing until it is written, and then is added to each output channel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from graphlathe.ir.axes import find_groups
from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.ir.rewrite import Rewriter
from graphlathe.ir.verify import verify
from graphlathe.ir.weights import Weight
from graphlathe.passes.search.biases import bias_of, give_bias, own_bias
from graphlathe.passes.search.consumers import Consumer, read_consumers


class Lambda(nn.Module):
    """Layers under names, and a function of them and the input."""

    def __init__(self, function: Callable[..., Tensor], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        """Call the function."""
        return self.function(self, x)


def noise(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


X = torch.randn(2, 3, 4)
FORMS: dict[str, Callable[..., Tensor]] = {
    "linear": lambda m, h: functional.linear(h, m.w),
    "linear with a bias": lambda m, h: functional.linear(h, m.w, m.b),
    "mm": lambda m, h: torch.mm(h.reshape(-1, 6), m.w.t()),
    "matmul": lambda m, h: h @ m.w.T,
    "matmul and an addition": lambda m, h: h @ m.w.T + m.b,
    "matmul and half an addition": lambda m, h: torch.add(h @ m.w.T, m.b, alpha=2),
    "matmul read twice": lambda m, h: (y := h @ m.w.T) * torch.sigmoid(y),
    "addmm": lambda m, h: torch.addmm(m.b, h.reshape(-1, 6), m.w.t()),
    "shared": lambda m, h: functional.linear(h, m.w, m.b) + m.b,
    "addmm, shared": lambda m, h: torch.addmm(m.b, h.reshape(-1, 6), m.w.t()) * m.b,
    "matmul, shared": lambda m, h: (h @ m.w.T + m.b) * m.b,
    "conv": lambda m, h: functional.conv1d(h.transpose(1, 2), m.w[:, :, None]),
}


def program_of(function: Callable[..., Tensor], *, bias: tuple[int, ...] = (5,)) -> tuple[Program, Consumer]:
    torch.manual_seed(0)
    module = Lambda(lambda m, x: function(m, torch.relu(m.up(x))), up=nn.Linear(4, 6), w=noise(5, 6), b=noise(*bias))
    program = trace(module.double().eval(), (X.double(),))
    return program, consumer_of(program)


def consumer_of(program: Program) -> Consumer:
    groups = [g for g in find_groups(program) if any(m.weight == "up.weight" and m.dim == 0 for m in g.members)]
    (consumer,) = read_consumers(program, groups[0])[0]
    return consumer


@pytest.mark.parametrize("form", [f for f in FORMS if f != "conv"])
def test_products(form: str) -> None:
    program, consumer = program_of(FORMS[form])
    had = own_bias(program, consumer)
    changed = program.clone()
    there = consumer_of(changed)
    assert give_bias(Rewriter(changed, "test"), there) == ""
    verify(changed, 2)
    assert torch.equal(changed(X.double()), program(X.double()))
    there = consumer_of(changed)
    name = own_bias(changed, there)
    assert name is not None and (name == had or had is None)
    # A number written there is added to the product, where it was made.
    values: dict[str, Tensor] = {}
    product = consumer.node.name
    program.run(program.feeds(X.double()), observe=lambda node, value: values.__setitem__(node.name, value))
    shift = torch.arange(5, dtype=torch.float64)
    changed.weights[name] = Weight.from_tensor(changed.weights[name].tensor() + shift)
    expected = program.run(program.feeds(X.double()), given={consumer.node: values[product] + shift})
    torch.testing.assert_close(changed(X.double()), next(iter(expected.values())), rtol=1e-12, atol=1e-12)
    before = changed.mutations
    assert give_bias(Rewriter(changed, "test"), there) == "" and changed.mutations == before


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_convolutions(rank: int, bias: bool) -> None:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    x = torch.randn(2, 3, *(6, 5, 4)[:rank]).double()
    module = Lambda(
        lambda m, x: m.down(torch.relu(m.up(x))), up=kind(3, 6, 1), down=kind(6, 5, 3, padding=1, bias=bias)
    )
    program = trace(module.double().eval(), (x,))
    changed = program.clone()
    assert give_bias(Rewriter(changed, "test"), consumer_of(changed)) == ""
    assert torch.equal(changed(x), program(x))
    name = own_bias(changed, consumer_of(changed))
    assert name == "down.bias"
    shift = torch.arange(5, dtype=torch.float64)
    changed.weights[name] = Weight.from_tensor(changed.weights[name].tensor() + shift)
    torch.testing.assert_close(changed(x), program(x) + shift.view(-1, *(1,) * rank), rtol=1e-12, atol=1e-12)


def test_what_others_read_stays_theirs() -> None:
    program, consumer = program_of(FORMS["shared"])
    give_bias(Rewriter(program, "test"), consumer)
    name = own_bias(program, consumer_of(program))
    assert name not in (None, "b") and torch.equal(program.weights[str(name)].tensor(), program.weights["b"].tensor())


REFUSED: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], str]] = {
    "the weight is on the left": (lambda m, h: m.w @ h.transpose(1, 2), (5,), "on the left"),
    "it adds a matrix": (lambda m, h: torch.addmm(m.b, h.reshape(-1, 6), m.w.t()), (6, 5), "no weight of its own"),
    "it adds a computed value": (
        lambda m, h: functional.linear(h, m.w, torch.exp(m.b)), (5,), "no weight of its own"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    function, shape, reason = REFUSED[case]
    program, consumer = program_of(function, bias=shape)
    before = program.to_text()
    assert reason in give_bias(Rewriter(program, "test"), consumer)
    assert program.to_text() == before


def test_what_is_added_on_the_left_is_no_bias() -> None:
    """Three tokens and a weight of three elements: along the tokens."""
    _, consumer = program_of(lambda m, h: m.w @ h.transpose(1, 2) + m.b, bias=(3,))
    assert bias_of(consumer) is None


def test_half_an_addition_is_no_bias() -> None:
    _, consumer = program_of(FORMS["matmul and half an addition"])
    assert bias_of(consumer) is None
    _, consumer = program_of(FORMS["matmul and an addition"])
    assert bias_of(consumer) == "b"
