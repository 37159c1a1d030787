"""Consumers read as matrix products: every form against the operator itself, and refusals with their reasons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from graphlathe.ir.axes import ChannelGroup, find_groups
from graphlathe.ir.errors import InputError, PreconditionError
from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.kernels.expert_linear import expert_linear
from graphlathe.passes.search.consumers import (
    Consumer,
    columns_labels,
    consumers_of,
    input_rows,
    other_readers,
    output_rows,
    read_consumers,
    weight_matrix,
    with_weight_matrix,
)
from graphlathe.tools import zoo
from tests.zoo_programs import traced


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


def program_of(function: Callable[..., Tensor], x: Tensor, **layers: nn.Module | nn.Parameter) -> Program:
    return trace(Lambda(function, **layers).double().eval(), (x.double(),))


def made_by(program: Program, weight: str) -> ChannelGroup:
    """The group whose channels are made by the rows of ``weight``."""
    groups = [g for g in find_groups(program) if g.prunable]
    found = [g for g in groups if any(m.weight == weight and m.dim == 0 for m in g.members)]
    assert len(found) == 1, [str(g) for g in found]
    return found[0]


def watched(program: Program, feeds: Any) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    program.run(program.feeds(*feeds), observe=lambda node, value: values.__setitem__(node.name, value))
    return values


def check(program: Program, consumer: Consumer, values: dict[str, Tensor], channel_dim: int = -1) -> None:
    """``rows @ matrix.T`` is what the operator computes, and the matrix can be put back."""
    rows, matrix = input_rows(consumer, values[consumer.operand.name]), weight_matrix(program, consumer)
    assert matrix.shape[1] == rows.shape[1] == len(columns_labels(consumer))
    product = rows @ matrix.T
    if consumer.bias is not None:
        product = product + program.weights[consumer.bias].tensor()
    value = values[consumer.node.name].movedim(channel_dim, -1)
    torch.testing.assert_close(product.reshape(value.shape), value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(output_rows(consumer, values[consumer.node.name]), product, rtol=1e-12, atol=1e-12)
    again = with_weight_matrix(program, consumer, matrix)
    weight = program.weights[consumer.weight]
    assert again.dtype == weight.dtype and torch.equal(again.tensor(), weight.tensor())


ROWS = torch.randn(2, 3, 4)
FORMS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], str | None]] = {
    "linear": (lambda m, h: functional.linear(h, m.w, m.b), (5, 6), "b"),
    "no bias": (lambda m, h: functional.linear(h, m.w), (5, 6), None),
    "matmul": (lambda m, h: torch.matmul(h, m.w), (6, 5), None),
    "matmul by the transposed": (lambda m, h: h @ m.w.T, (5, 6), None),
    "matmul by the permuted": (lambda m, h: h @ m.w.permute(1, 0), (5, 6), None),
    "mm": (lambda m, h: torch.mm(h.reshape(-1, 6), m.w), (6, 5), None),
    "addmm": (lambda m, h: torch.addmm(m.b, h.reshape(-1, 6), m.w), (6, 5), "b"),
    "addmm by the transposed": (lambda m, h: torch.addmm(m.b, h.reshape(-1, 6), m.w.t()), (5, 6), "b"),
}


@pytest.mark.parametrize("form", FORMS)
def test_linear_forms(form: str) -> None:
    function, shape, bias = FORMS[form]
    program = program_of(
        lambda m, x: function(m, torch.relu(m.up(x))), ROWS, up=nn.Linear(4, 6), w=noise(*shape), b=noise(5)
    )
    consumers, unread = read_consumers(program, made_by(program, "up.weight"))
    assert [(c.weight, c.weight_dim, c.bias) for c in consumers] == [("w", shape.index(6), bias)] and not unread
    assert (
        consumers[0].labels.tolist() == list(range(6))
        and consumers[0].channel_dim == consumers[0].operand.meta["val"].dim() - 1
    )
    check(program, consumers[0], watched(program, (ROWS.double(),)))


def test_weight_on_the_left() -> None:
    program = program_of(
        lambda m, x: m.w @ torch.relu(m.up(x)).transpose(1, 2), ROWS, up=nn.Linear(4, 6), w=noise(5, 6)
    )
    (consumer,) = consumers_of(program, made_by(program, "up.weight"))
    assert (consumer.channel_dim, consumer.weight_dim) == (1, 1)
    check(program, consumer, watched(program, (ROWS.double(),)), channel_dim=1)


CONVOLUTIONS = {
    "plain": {"kernel_size": 3},
    "padded": {"kernel_size": 3, "padding": 1, "bias": False},
    "strided": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)},
    "dilated": {"kernel_size": 3, "dilation": (2, 1), "padding": "same"},
    "even, same": {"kernel_size": 2, "padding": "same"},
    "pointwise": {"kernel_size": 1, "padding": "valid"},
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("form", CONVOLUTIONS)
def test_convolutions(form: str, rank: int) -> None:
    settings = {k: v[:1] * rank if isinstance(v, tuple) and rank != 2 else v for k, v in CONVOLUTIONS[form].items()}
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    x = torch.randn(2, 3, *(7, 6, 5)[:rank])
    program = program_of(lambda m, x: m.b(torch.relu(m.a(x))), x, a=kind(3, 4, 1), b=kind(4, 5, **settings))
    (consumer,) = consumers_of(program, made_by(program, "a.weight"))
    kernel = int(np.prod(program.weights["b.weight"].shape[2:]))
    assert columns_labels(consumer).tolist() == [i for i in range(4) for _ in range(kernel)]
    assert consumer.bias == (None if settings.get("bias") is False else "b.bias")
    check(program, consumer, watched(program, (x.double(),)), channel_dim=1)


def test_flattened_and_concatenated_channels_keep_their_atoms() -> None:
    x = torch.randn(2, 3, 2, 2)
    program = program_of(
        lambda m, x: m.out(torch.cat([torch.relu(m.a(x)), x], 1).flatten(1)),
        x,
        a=nn.Conv2d(3, 4, 1),
        out=nn.Linear(28, 5),
    )
    (consumer,) = consumers_of(program, made_by(program, "a.weight"))
    assert consumer.labels.tolist() == [i for i in range(4) for _ in range(4)] + [-1] * 12
    check(program, consumer, watched(program, (x.double(),)))


def test_experts_are_stacked() -> None:
    chosen = torch.tensor([[0, 2], [1, 0], [2, 2], [1, 1], [0, 1]])
    program = program_of(
        lambda m, x: expert_linear(torch.relu(expert_linear(x, m.up, m.chosen)), m.down, m.chosen),
        torch.randn(5, 1, 4), up=noise(3, 4, 6), down=noise(3, 6, 7), chosen=nn.Parameter(chosen, requires_grad=False),
    )  # fmt: skip
    x = torch.randn(5, 1, 4, dtype=torch.float64)
    (group,) = [g for g in find_groups(program) if any(m.weight == "up" and m.dim == 2 for m in g.members)]
    (consumer,) = consumers_of(program, group)
    assert (consumer.weight, consumer.weight_dim, consumer.bias) == ("down", 1, None)
    values = watched(program, (x,))
    matrix = weight_matrix(program, consumer)
    every = (input_rows(consumer, values[consumer.operand.name]) @ matrix.T).reshape(5, 2, 3, 7)
    picked = torch.stack([torch.stack([every[t, j, chosen[t, j]] for j in range(2)]) for t in range(5)])
    torch.testing.assert_close(picked, values[consumer.node.name], rtol=1e-12, atol=1e-12)
    assert torch.equal(with_weight_matrix(program, consumer, matrix).tensor(), program.weights["down"].tensor())
    with pytest.raises(PreconditionError, match="one expert's matrix"):
        output_rows(consumer, values[consumer.node.name])


def test_a_changed_matrix_changes_the_output() -> None:
    program = program_of(lambda m, x: torch.relu(m.up(x)) @ m.w, ROWS, up=nn.Linear(4, 6), w=noise(6, 5))
    (consumer,) = consumers_of(program, made_by(program, "up.weight"))
    matrix = torch.randn(5, 6, dtype=torch.float64)
    changed = program.clone()
    changed.weights["w"] = with_weight_matrix(program, consumer, matrix)
    values = watched(program, (ROWS.double(),))
    expected = values[consumer.operand.name] @ matrix.T
    torch.testing.assert_close(changed(ROWS.double()), expected, rtol=1e-12, atol=1e-12)
    matrix.zero_()
    assert changed.weights["w"].tensor().abs().sum() > 0  # it does not share the caller's memory
    with pytest.raises(InputError, match=r"shape \[6, 5\]"):
        with_weight_matrix(program, consumer, matrix.T)


def test_half_precision_is_read_in_float32_and_written_back() -> None:
    model = Lambda(lambda m, x: m.down(torch.relu(m.up(x))), up=nn.Linear(4, 6), down=nn.Linear(6, 5)).bfloat16()
    program = trace(model, (ROWS.bfloat16(),))
    (consumer,) = consumers_of(program, made_by(program, "up.weight"))
    matrix = weight_matrix(program, consumer)
    assert matrix.dtype == torch.float32
    again = with_weight_matrix(program, consumer, matrix)
    assert again.dtype == torch.bfloat16 and torch.equal(again.tensor(), program.weights["down.weight"].tensor())


def eager_attention(m: nn.Module, x: Tensor) -> Tensor:
    return torch.softmax(torch.relu(m.up(x)) @ torch.relu(m.up(x)).transpose(1, 2), -1)


REFUSED: dict[str, tuple[Callable[..., Tensor], dict[str, Any], str]] = {
    "grouped convolution": (
        lambda m, x: m.b(torch.relu(m.up(x)).transpose(1, 2)),
        {"b": nn.Conv1d(6, 4, 1, groups=2)},
        "2 groups of channels",
    ),
    "transposed convolution": (
        lambda m, x: m.b(torch.relu(m.up(x)).transpose(1, 2)),
        {"b": nn.ConvTranspose1d(6, 4, 2)},
        "transposed convolution",
    ),
    "scaled addmm": (
        lambda m, x: torch.addmm(m.b, torch.relu(m.up(x)).reshape(-1, 6), m.w, alpha=2),
        {"b": noise(5), "w": noise(6, 5)},
        "it scales",
    ),
    "a vector": (lambda m, x: torch.relu(m.up(x)) @ m.w, {"w": noise(6)}, "1 dimensions instead of 2"),
    "computed weight": (lambda m, x: torch.relu(m.up(x)) @ (m.w * m.w), {"w": noise(6, 5)}, "a computed value, %mul"),
    "attention": (eager_attention, {}, "multiplied by a computed value"),
    "einsum": (
        lambda m, x: torch.einsum("bsc,co->bso", torch.relu(m.up(x)), m.w),
        {"w": noise(6, 5)},
        "it is an einsum",
    ),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_cannot_be_read_is_said(form: str) -> None:
    function, layers, reason = REFUSED[form]
    program = program_of(function, ROWS, up=nn.Linear(4, 6), **layers)
    consumers, unread = read_consumers(program, made_by(program, "up.weight"))
    assert not consumers and len(unread) == 1 and reason in unread[0] and "%" in unread[0]


def test_depthwise_convolutions_sum_over_no_channels() -> None:
    x = torch.randn(2, 3, 5, 5)
    layers = {"a": nn.Conv2d(3, 4, 1), "d": nn.Conv2d(4, 4, 3, groups=4), "b": nn.Conv2d(4, 5, 1)}
    program = program_of(lambda m, x: m.b(m.d(m.a(x))), x, **layers)
    consumers, unread = read_consumers(program, made_by(program, "a.weight"))
    assert [c.weight for c in consumers] == ["b.weight"] and not unread


def test_other_readers_of_a_weight() -> None:
    program = program_of(
        lambda m, x: torch.relu(m.up(x)) @ m.w + (m.w.T @ m.w)[0, 0], ROWS, up=nn.Linear(4, 6), w=noise(6, 5)
    )
    (consumer,) = consumers_of(program, made_by(program, "up.weight"))
    assert len(other_readers(program, consumer)) == 2  # the other product reads it twice, once transposed
    plain = program_of(lambda m, x: torch.relu(m.up(x)) @ m.w, ROWS, up=nn.Linear(4, 6), w=noise(6, 5))
    assert other_readers(plain, consumers_of(plain, made_by(plain, "up.weight"))[0]) == ()


def test_a_group_of_another_program_is_refused() -> None:
    program = program_of(lambda m, x: m.down(torch.relu(m.up(x))), ROWS, up=nn.Linear(4, 6), down=nn.Linear(6, 5))
    with pytest.raises(PreconditionError, match="another program"):
        consumers_of(traced("llama"), made_by(program, "up.weight"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "plain_resnet"])
def test_zoo(name: str) -> None:
    """Every group that is summed over by a weight has all its readers, and each is the product that it says."""
    program = traced(name)
    values: dict[str, Tensor] = {}
    feeds = program.feeds(**zoo.get(name).example())
    program.run(feeds, observe=lambda node, value: values.__setitem__(node.name, value))
    found = 0
    for group in find_groups(program):
        if not group.prunable:
            continue
        consumers, unread = read_consumers(program, group)
        assert bool(unread) == (group.unit == "query and key channel"), (str(group), unread)
        assert {m.weight for m in group.consumers} <= {c.weight for c in consumers}
        for c in consumers:
            rows, matrix = input_rows(c, values[c.operand.name]), weight_matrix(program, c)
            product = rows @ matrix.T + (program.weights[c.bias].tensor() if c.bias else 0)
            torch.testing.assert_close(product, output_rows(c, values[c.node.name]), rtol=1e-4, atol=1e-5)
            found += 1
    assert found >= 6
