"""Coupled-channel groups and cutting: small modules for every rule, masked references, refusals, the zoo."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from graphlathe.ir.axes import cut, cut_all, find_groups
from graphlathe.ir.axes.relate import RULES
from graphlathe.ir.axes.reshape import digits
from graphlathe.ir.errors import PreconditionError, VerifyError
from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.kernels.expert_linear import expert_linear
from tests.masked import check_cut, half


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


def linear(a: int, b: int) -> nn.Linear:
    return nn.Linear(a, b)


def noise(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def attention(m: nn.Module, x: Tensor, heads: int, kv_heads: int, *, eager: bool = False) -> Tensor:
    """Self-attention with grouped heads; ``eager`` repeats keys and values and multiplies by hand."""
    b, s, _ = x.shape
    q = m.q(x).view(b, s, heads, -1).transpose(1, 2)
    k, v = (layer(x).view(b, s, kv_heads, -1).transpose(1, 2) for layer in (m.k, m.v))
    if eager:
        shape = (b, kv_heads, heads // kv_heads, s, k.shape[-1])
        k, v = (t[:, :, None].expand(shape).reshape(b, heads, s, -1) for t in (k, v))
        y = torch.softmax(q @ k.transpose(2, 3) * 0.3, -1) @ v
    else:
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
    return m.o(y.transpose(1, 2).reshape(b, s, -1))


def fused_attention(m: nn.Module, x: Tensor, how: str) -> Tensor:
    """Four heads of four channels, their queries, keys and values from one layer."""
    b, s, _ = x.shape
    qkv = m.qkv(x)
    if how == "view":
        q, k, v = qkv.view(b, s, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        parts = qkv.chunk(3, -1) if how == "chunk" else qkv.split([16, 16, 16], -1)
        q, k, v = (t.view(b, s, 4, 4).transpose(1, 2) for t in parts)
    y = functional.scaled_dot_product_attention(q, k, v)
    return m.o(y.transpose(1, 2).reshape(b, s, -1))


def rotary(m: nn.Module, x: Tensor) -> Tensor:
    """Scores of two heads whose queries and keys are rotated in pairs (t, t + 4)."""
    b, s, _ = x.shape
    angle = torch.arange(s, dtype=torch.float32)[:, None] * m.frequency
    cos, sin = (torch.cat((t, t), -1) for t in (angle.cos(), angle.sin()))

    def turn(t: Tensor) -> Tensor:
        return t * cos + torch.cat((-t[..., 4:], t[..., :4]), -1) * sin

    q, k = (turn(layer(x).view(b, s, 2, 8).transpose(1, 2)) for layer in (m.q, m.k))
    return m.o(functional.scaled_dot_product_attention(q, k, x[:, None].expand(-1, 2, -1, -1)).mean(1))


def merged_attention(m: nn.Module, x: Tensor) -> Tensor:
    """Four heads merged with the batch into one dimension of symbolic size."""
    b, s, _ = x.shape
    q, k, v = (layer(x).view(b, s, 4, 4).transpose(1, 2).reshape(b * 4, s, 4) for layer in (m.q, m.k, m.v))
    y = torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)), -1), v)
    return m.o(y.view(b, 4, s, 4).transpose(1, 2).reshape(b, s, -1))


def put_back(m: nn.Module, x: Tensor) -> Tensor:
    """Rows in another order, and back by number."""
    order = torch.tensor([3, 1, 0, 4, 2])
    y = m.a(x)[:, order].transpose(0, 1)
    return m.b(torch.zeros_like(y).index_put((order,), y).transpose(0, 1))


def rms(x: Tensor, gain: nn.Parameter) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * gain


def shuffled(m: nn.Module, x: Tensor) -> Tensor:
    y = m.a(m.stem(x)).unflatten(1, (4, 3)).transpose(1, 2).flatten(1, 2)
    return m.head(m.b(y))


@dataclass(frozen=True)
class Case:
    """A module, its input, the groups that can be cut, and how many of them can be zeroed."""

    module: Callable[[], nn.Module]
    shape: tuple[int, ...]
    groups: dict[tuple[str, int], int]
    zeroable: int | None = None


def conv(a: int, b: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(a, b, 3, padding=1, groups=groups)


TEXT, IMAGE = (2, 5, 16), (2, 3, 8, 8)

CASES: dict[str, Case] = {
    "mlp": Case(lambda: nn.Sequential(linear(16, 12), nn.GELU(), linear(12, 4)), TEXT, {("channel", 12): 1}),
    "gated mlp": Case(
        lambda: Lambda(
            lambda m, x: m.d(functional.silu(m.g(x)) * m.u(x)), g=linear(16, 12), u=linear(16, 12), d=linear(12, 4)
        ),
        TEXT,
        {("channel", 12): 1},
    ),
    "fused gate": Case(
        lambda: Lambda(lambda m, x: m.d(functional.glu(m.gu(x))), gu=linear(16, 24), d=linear(12, 4)),
        TEXT,
        {("channel", 12): 1},
    ),
    "sigmoid is not zero, its linear reader is": Case(
        lambda: nn.Sequential(linear(16, 12), nn.Sigmoid(), linear(12, 4)), TEXT, {("channel", 12): 1}
    ),
    "bounds that are values": Case(
        lambda: Lambda(
            lambda m, x: m.b(torch.clamp(m.a(x), m.low, m.high)), a=linear(16, 12), b=linear(12, 4), low=noise(1),
            high=noise(12),
        ),
        TEXT,
        {("channel", 12): 1},
    ),
    "maximum with bounds that are values": Case(
        lambda: Lambda(
            lambda m, x: m.b(torch.clamp(m.a(x), m.low, m.high).amax(-1, keepdim=True)), a=linear(16, 12),
            b=linear(1, 4), low=noise(1), high=noise(1),
        ),
        TEXT,
        {("channel", 12): 1},
        zeroable=0,
    ),
    "sum of bounded values": Case(
        lambda: Lambda(
            lambda m, x: m.b(torch.clamp(m.a(x), m.low, m.high).sum(-1, keepdim=True)), a=linear(16, 12),
            b=linear(1, 4), low=noise(1), high=noise(1),
        ),
        TEXT,
        {("channel", 12): 1},
        zeroable=0,
    ),
    "sum of sigmoids": Case(
        lambda: Lambda(lambda m, x: m.b(torch.sigmoid(m.a(x)).sum(-1, keepdim=True)), a=linear(16, 12), b=linear(1, 4)),
        TEXT,
        {("channel", 12): 1},
        zeroable=0,
    ),
    "sum of channels": Case(
        lambda: Lambda(lambda m, x: m.b(torch.tanh(m.a(x)).sum(-1, keepdim=True)), a=linear(16, 12), b=linear(1, 4)),
        TEXT,
        {("channel", 12): 1},
    ),
    "largest channel": Case(
        lambda: Lambda(lambda m, x: m.b(m.a(x).amax(-1, keepdim=True)), a=linear(16, 12), b=linear(1, 4)),
        TEXT,
        {("channel", 12): 1},
        zeroable=0,
    ),
    "division by a channel": Case(
        lambda: Lambda(lambda m, x: m.b(1.0 / m.a(x)), a=linear(16, 12), b=linear(12, 4)),
        TEXT,
        {("channel", 12): 1},
        zeroable=0,
    ),
    "layer norm": Case(
        lambda: nn.Sequential(linear(16, 12), nn.LayerNorm(12), linear(12, 4)), TEXT, {("channel", 12): 1}, zeroable=0
    ),
    "rms norm": Case(
        lambda: Lambda(lambda m, x: m.b(rms(m.a(x), m.gain)), a=linear(16, 12), b=linear(12, 4), gain=noise(12)),
        TEXT,
        {("channel", 12): 1},
        zeroable=0,
    ),
    "residual": Case(
        lambda: Lambda(
            lambda m, x: m.c(m.a(x) + m.b2(torch.relu(m.b1(m.a(x))))),
            a=linear(16, 8), b1=linear(8, 12), b2=linear(12, 8), c=linear(8, 4),
        ),
        TEXT,
        {("channel", 8): 1, ("channel", 12): 1},
    ),
    "tied weight": Case(
        lambda: Lambda(
            lambda m, x: m.c(functional.linear(torch.relu(functional.linear(x, m.w)), m.w.t())),
            w=noise(12, 16), c=linear(16, 4),
        ),
        TEXT,
        {("channel", 12): 1},
    ),
    "batch norm": Case(
        lambda: nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.Flatten(2)).eval(),
        IMAGE,
        {("channel", 8): 1},
    ),
    "depthwise": Case(
        lambda: nn.Sequential(conv(3, 8), conv(8, 16, groups=8), conv(16, 6)), IMAGE,
        {("convolution group", 8): 1, ("channel of every convolution group", 2): 1},
    ),
    "grouped convolution": Case(
        lambda: nn.Sequential(conv(3, 12), conv(12, 16, groups=4), conv(16, 6)),
        IMAGE,
        {("convolution group", 4): 1, ("channel of every convolution group", 3): 1,
         ("channel of every convolution group", 4): 1},
    ),
    "transposed convolution": Case(
        lambda: nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 6, 2, 2), conv(6, 4)),
        IMAGE,
        {("channel", 8): 1, ("channel", 6): 1},
    ),
    "channel shuffle": Case(
        lambda: Lambda(shuffled, stem=conv(3, 12), a=conv(12, 12, 4), b=conv(12, 12, 3), head=conv(12, 2)),
        IMAGE,
        {("convolution group", 3): 1, ("convolution group", 4): 1, ("channel of every convolution group", 3): 1,
         ("channel of every convolution group", 4): 1},
    ),
    "group norm": Case(
        lambda: nn.Sequential(conv(3, 12), nn.GroupNorm(4, 12), conv(12, 6)),
        IMAGE,
        {("normalization group", 4): 1, ("channel", 3): 1},
        zeroable=1,
    ),
    "dense concatenation": Case(
        lambda: Lambda(
            lambda m, x: m.c(torch.cat((m.a(x), m.b(m.a(x))), 1)), a=conv(3, 8), b=conv(8, 4), c=conv(12, 5)
        ),
        IMAGE,
        {("channel", 8): 1, ("channel", 4): 1},
    ),
    "flattened image": Case(
        lambda: nn.Sequential(conv(3, 6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), linear(96, 4)),
        IMAGE,
        {("channel", 6): 1},
    ),
    "squeeze and excite": Case(
        lambda: Lambda(
            lambda m, x: m.c(m.a(x) * torch.sigmoid(m.s(m.a(x).mean((2, 3), keepdim=True)))),
            a=conv(3, 8), s=nn.Conv2d(8, 8, 1), c=conv(8, 4),
        ),
        IMAGE,
        {("channel", 8): 1},
    ),
    "attention": Case(
        lambda: Lambda(lambda m, x: attention(m, x, 4, 4), q=linear(16, 16), k=linear(16, 16), v=linear(16, 16),
                       o=linear(16, 4)),
        TEXT,
        {("head", 4): 1, ("query and key channel", 4): 1, ("value channel", 4): 1},
    ),
    "grouped attention": Case(
        lambda: Lambda(lambda m, x: attention(m, x, 6, 2), q=linear(16, 24), k=linear(16, 8), v=linear(16, 8),
                       o=linear(24, 4)),
        TEXT,
        {("KV group", 2): 1, ("query head of every KV group", 3): 1, ("query and key channel", 4): 1,
         ("value channel", 4): 1},
    ),
    "eager grouped attention": Case(
        lambda: Lambda(lambda m, x: attention(m, x, 6, 2, eager=True), q=linear(16, 24), k=linear(16, 8),
                       v=linear(16, 8), o=linear(24, 4)),
        TEXT,
        {("KV group", 2): 1, ("query head of every KV group", 3): 1, ("channel", 4): 2},
    ),
    **{
        f"fused attention by {how}": Case(
            lambda how=how: Lambda(lambda m, x: fused_attention(m, x, how), qkv=linear(16, 48), o=linear(16, 4)),
            TEXT,
            {("head", 4): 1, ("query and key channel", 4): 1, ("value channel", 4): 1},
        )
        for how in ("chunk", "split")
    },
    # Queries, keys and values are one tensor here: the same channels go from all three.
    "fused attention by view": Case(
        lambda: Lambda(lambda m, x: fused_attention(m, x, "view"), qkv=linear(16, 48), o=linear(16, 4)),
        TEXT,
        {("head", 4): 1, ("query and key channel", 4): 1},
    ),
    "heads merged with the batch": Case(
        lambda: Lambda(merged_attention, q=linear(16, 16), k=linear(16, 16), v=linear(16, 16), o=linear(16, 4)),
        TEXT,
        {("head", 4): 1, ("channel", 4): 2},  # the channels of queries, and those of values
    ),
    "einsum": Case(
        lambda: Lambda(lambda m, x: m.o(torch.einsum("bsc,chd->bshd", x, m.w).flatten(2)), w=noise(16, 4, 6),
                       o=linear(24, 4)),
        TEXT,
        {("channel", 4): 1, ("channel", 6): 1},
    ),
    "repeated channels": Case(
        lambda: Lambda(lambda m, x: m.o(m.a(x).repeat_interleave(3, -1) + m.a(x).repeat(1, 1, 3)), a=linear(16, 4),
                       o=linear(12, 4)),
        TEXT,
        {},  # channel i is repeated at 3 i and at i + 4: all of them hang together
    ),
    "rows put back by number": Case(
        lambda: Lambda(put_back, a=linear(16, 12), b=linear(12, 4)), TEXT, {("channel", 12): 1}
    ),
    "heads repeated for every batch": Case(
        lambda: Lambda(
            lambda m, x: m.o(
                torch.bmm(
                    m.k(m.table).view(5, 4, 4).transpose(0, 1).repeat(x.shape[0], 1, 1),
                    m.v(x).view(-1, 5, 4, 4).transpose(1, 2).reshape(-1, 5, 4).transpose(1, 2),
                ).view(-1, 4, 5, 5).sum(-1).transpose(1, 2)
            ),
            k=linear(16, 16), v=linear(16, 16), o=linear(4, 4), table=noise(5, 16),
        ),
        TEXT,
        {("channel", 4): 2, ("channel", 16): 1},
    ),
    "a mask repeated for every batch and head": Case(
        lambda: Lambda(
            lambda m, x: m.o(
                torch.bmm(
                    m.mask.repeat(4 * x.shape[0], 1, 1), m.v(x).view(-1, 5, 4, 4).transpose(1, 2).reshape(-1, 5, 4)
                ).view(-1, 4, 5, 4).transpose(1, 2).flatten(2)
            ),
            v=linear(16, 16), o=linear(16, 4), mask=noise(5, 5),
        ),
        TEXT,
        {("channel", 4): 2},  # the heads, and the channels of each
    ),
    "mixture of experts": Case(
        lambda: Lambda(
            lambda m, x: m.o(
                expert_linear(
                    torch.relu(expert_linear(x, m.up, m.chosen.expand(x.shape[0], 5), m.bias)),
                    m.down, m.chosen.expand(x.shape[0], 5),
                )
            ),
            up=noise(3, 16, 12), bias=noise(3, 12), down=noise(3, 12, 8), o=linear(8, 4),
            chosen=nn.Parameter(torch.tensor([[0, 2, 1, 1, 0]]), requires_grad=False),
        ),
        TEXT,
        {("channel", 12): 1, ("channel", 8): 1},
    ),
    "rotary pairs": Case(
        lambda: Lambda(rotary, q=linear(16, 16), k=linear(16, 16), o=linear(16, 4), frequency=noise(4)),
        TEXT,
        {("query and key channel", 4): 1, ("head", 2): 1},
        zeroable=1,
    ),
}  # fmt: skip


def program_of(module: nn.Module, shape: tuple[int, ...], *, dynamic: bool = True) -> tuple[Program, dict[str, Tensor]]:
    """Trace a module on a random input, with a dynamic batch."""
    torch.manual_seed(1)
    x = torch.randn(shape)
    name = "x" if isinstance(module, Lambda) else "input"
    program = trace(module.eval(), {name: x}, dynamic={name: {0: "B"}} if dynamic else None)
    return program, {name: torch.randn(shape)}


@pytest.mark.parametrize("name", CASES)
def test_groups_of_small_modules(name: str) -> None:
    """The groups found are those known, and each, cut to half, is the masked module."""
    case = CASES[name]
    torch.manual_seed(0)
    program, feeds = program_of(case.module(), case.shape)
    groups = [g for g in find_groups(program) if g.prunable]
    assert Counter((g.unit, g.size) for g in groups) == case.groups
    assert sum(g.zeroable for g in groups) == (len(groups) if case.zeroable is None else case.zeroable)
    for group in groups:
        check_cut(program, group, feeds, half(group))
        check_cut(program, group, feeds, [group.size - 1])


# What blocks a cut: a function of a layer's 12 channels, and the words that the reason must contain.
BLOCKED: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "an output": (lambda m, x: m.a(x), "a dimension of an output"),
    "an input": (lambda m, x: m.a(x) + x[..., :12], "a dimension of an input"),
    "softmax": (lambda m, x: m.b(torch.softmax(m.a(x), -1)), "softmax is taken over it"),
    "sort": (lambda m, x: m.b(torch.sort(m.a(x), -1)[0]), "depends on the order"),
    "padding": (lambda m, x: m.c(functional.pad(m.a(x), (0, 2))), "adds to it"),
    "an operator without a rule": (lambda m, x: m.b(torch.fft.fft(m.a(x)).real), "no rule"),
    "rows of an output": (lambda m, x: m.b(m.a(x).transpose(1, 2) @ x[..., :12]), "a dimension of an output"),
    "rows of other rows": (
        lambda m, x: m.b(m.a(x)[:, 0] + x[:, 0, :12].reshape(-1).view(12, -1).t()),
        "outside a dimension of symbolic size",
    ),
    "the batch repeated": (
        lambda m, x: m.b(m.a(x)[:, 0] * x[:, 0, 0].repeat(12).view(-1, 12)),
        "repeats a dimension of symbolic size",
    ),
    "one channel picked": (lambda m, x: m.b(m.a(x) * m.a(x).select(-1, 3)[..., None]), "by number"),
}


@pytest.mark.parametrize("name", BLOCKED)
def test_what_is_blocked_says_why(name: str) -> None:
    function, words = BLOCKED[name]
    program, _ = program_of(Lambda(function, a=linear(16, 12), b=linear(12, 12), c=linear(14, 4)), TEXT)
    rows = [g for g in find_groups(program) if any((m.weight, m.dim) == ("a.weight", 0) for m in g.members)]
    assert rows
    assert not any(group.prunable or group.zeroable for group in rows)
    assert any(words in group.reason for group in rows)
    with pytest.raises(PreconditionError, match="cannot be cut"):
        cut(program, rows[0], [0])


def test_weights_that_are_joined_with_what_can_be_cut_say_why_not() -> None:
    """As in latent attention: rotary channels beside others in one dimension."""
    module = Lambda(
        lambda m, x: m.o(torch.cat((m.a(x), torch.softmax(m.b(x), -1)), -1)),
        a=linear(16, 8),
        b=linear(16, 4),
        o=linear(12, 4),
    )
    program, feeds = program_of(module, TEXT)
    (group,) = [g for g in find_groups(program) if g.prunable]
    assert group.size == 8
    check_cut(program, group, feeds, half(group))
    (blocked,) = [g for g in find_groups(program) if "softmax is taken over it" in g.reason]
    assert {(m.weight, m.dim) for m in blocked.members} == {("b.weight", 0), ("b.bias", 0)}


@pytest.mark.parametrize("keep", [[], [0, 0], [12], [-1]])
def test_keep_must_name_atoms_once(keep: list[int]) -> None:
    program, feeds = program_of(CASES["mlp"].module(), TEXT)
    group = next(g for g in find_groups(program) if g.prunable)
    text = program.to_text()
    with pytest.raises(PreconditionError, match="cannot keep"):
        cut(program, group, keep)
    assert program.to_text() == text
    assert program.run(program.feeds(**feeds))


def test_a_group_fits_the_graph_it_was_found_in() -> None:
    program, _ = program_of(CASES["mlp"].module(), TEXT)
    group = next(g for g in find_groups(program) if g.prunable)
    cut(program, group, [1, 2, 3])
    with pytest.raises(PreconditionError, match="another graph"):
        cut(program, group, [0])
    again = next(g for g in find_groups(program) if g.prunable)
    assert again.size == 3


def test_cutting_leaves_the_channels_that_stay() -> None:
    """The weights are the rows and columns that were kept, in their order, whatever the order of ``keep``."""
    torch.manual_seed(0)
    module = CASES["mlp"].module()
    program, feeds = program_of(module, TEXT)
    group = next(g for g in find_groups(program) if g.prunable)
    before = program.mutations
    cut(program, group, [7, 2, 5], made_by="test")
    assert program.mutations > before
    small = nn.Sequential(linear(16, 3), nn.GELU(), linear(3, 4))
    rows = [2, 5, 7]
    with torch.no_grad():
        small[0].weight.copy_(module[0].weight[rows])
        small[0].bias.copy_(module[0].bias[rows])
        small[2].weight.copy_(module[2].weight[:, rows])
        small[2].bias.copy_(module[2].bias)
        assert torch.allclose(program(**feeds), small(feeds["input"]), atol=1e-6)


def test_members_say_who_makes_and_who_reads() -> None:
    program, _ = program_of(CASES["grouped attention"].module(), TEXT)
    group = next(g for g in find_groups(program) if g.unit == "KV group")
    assert {(m.weight, m.dim) for m in group.consumers} == {("o.weight", 1)}
    assert {m.weight for m in group.producers} == {f"{n}.{kind}" for n in "qkv" for kind in ("weight", "bias")}
    blocks = {(m.weight, m.dim): m.index.tolist() for m in group.members}
    assert blocks["q.weight", 0] == [list(range(12)), list(range(12, 24))]
    assert blocks["k.weight", 0] == [list(range(4)), list(range(4, 8))]
    assert "o.weight[1]" in group.why


def test_the_scale_of_attention_stays() -> None:
    """Fewer query channels must not change what the scores are divided by."""
    program, _ = program_of(CASES["attention"].module(), TEXT)
    group = next(g for g in find_groups(program) if g.unit == "query and key channel")
    cut(program, group, [0, 1])
    node = next(n for n in program.graph.nodes if "scaled_dot" in str(n.target))
    assert node.kwargs["scale"] == pytest.approx(0.5)


def test_a_slice_that_is_no_longer_even_is_refused() -> None:
    module = Lambda(
        lambda m, x: m.b(m.a(x)[..., ::2]) + m.c(m.a(x)[..., 1::2]), a=linear(16, 12), b=linear(6, 4), c=linear(6, 4)
    )
    program, _ = program_of(module, TEXT)
    groups = [g for g in find_groups(program) if g.prunable]
    assert sorted(g.size for g in groups) == [6, 6]
    with pytest.raises(VerifyError, match="evenly spaced"):
        cut(program, groups[0], [0, 2, 3])


def test_state_is_part_of_the_interface() -> None:
    """Weights that start a state, or that another graph reads, are not cut."""
    program, _ = program_of(CASES["mlp"].module(), TEXT)
    program.entries["other"] = program.main.copy()
    assert not any(group.prunable for group in find_groups(program))
    assert any("'other' reads it" in group.reason for group in find_groups(program))


def test_every_dimension_of_a_weight_is_in_some_group() -> None:
    program, _ = program_of(CASES["grouped convolution"].module(), IMAGE)
    found = {(m.weight, m.dim) for group in find_groups(program) for m in group.members}
    wanted = {(n, d) for n in program.used_weights() for d, size in enumerate(program.weights[n].shape) if size > 1}
    assert found == wanted


def test_rules_have_no_operator_twice() -> None:
    assert len(RULES) > 100
    assert "linear" in RULES


@given(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4), st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_digits_rebuild_both_shapes(before: list[int], order: random.Random) -> None:
    """The digits of two shapes multiply to the dimensions of each, and keep the row-major order."""
    total = int(torch.tensor(before).prod())
    after: list[int] = []
    while total > 1:
        after.append(order.choice([f for f in range(2, total + 1) if total % f == 0]))
        total //= after[-1]
    found = digits(tuple(before), tuple(after))
    for side, shape in ((0, before), (1, after)):
        for dim in {(d.before, d.after)[side] for d in found}:
            sizes = [d.size for d in found if (d.before, d.after)[side] == dim]
            assert int(torch.tensor([1, *sizes]).prod()) == shape[dim]
    places = [(d.before, d.after) for d in found]
    assert places == sorted(places, reverse=True)


def test_digits_of_shapes_that_part() -> None:
    """Two dimensions are merged otherwise than they were split; what is around them keeps its digits."""
    assert [(d.size, d.before, d.after) for d in digits((5, 2, 6, 7), (5, 3, 4, 7))] == [(7, 3, 3), (5, 0, 0)]
    assert [(d.size, d.before, d.after) for d in digits((4, 3), (2, 6))] == [(3, 1, 1), (2, 0, 1), (2, 0, 0)]
    assert digits((2, 3), (3, 2)) == []


def two_heads(m: nn.Module, x: Tensor) -> Tensor:
    """Attention of four heads, then a gated MLP."""
    x = x + attention(m, x, 4, 2)
    return m.d(functional.silu(m.g(x)) * m.u(x))


def several() -> Program:
    torch.manual_seed(0)
    layers = {"q": linear(16, 16), "k": linear(16, 8), "v": linear(16, 8), "o": linear(16, 16)}
    module = Lambda(two_heads, **layers, g=linear(16, 12), u=linear(16, 12), d=linear(12, 4))
    return trace(module.eval(), (torch.randn(2, 5, 16),))


@given(seed=st.integers(0, 10_000))
@settings(max_examples=15)
def test_cutting_several_groups_at_once_is_cutting_them_one_after_the_other(seed: int) -> None:
    draw, program = random.Random(seed), several()
    groups = [g for g in find_groups(program) if g.prunable]
    apart: list[Any] = []
    for group in draw.sample(groups, len(groups)):
        if all(set(group.places).isdisjoint(other.places) for other, _ in apart):
            apart.append((group, sorted(draw.sample(range(group.size), draw.randint(1, group.size)))))
    at_once, one_by_one = program.clone(), program.clone()
    cut_all(at_once, apart)
    for group, keep in apart:
        again = [g for g in find_groups(one_by_one) if g.unit == group.unit and g.size == group.size]
        again = [
            g for g in again if [(m.weight, m.dim) for m in g.members] == [(m.weight, m.dim) for m in group.members]
        ]
        cut(one_by_one, again[0], keep)
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(at_once(x), one_by_one(x), rtol=1e-6, atol=1e-6)
    assert at_once.to_text() == one_by_one.to_text()


def test_two_groups_on_one_dimension_are_refused_and_nothing_changes() -> None:
    program = several()
    groups = {g.unit: g for g in find_groups(program) if g.prunable}
    assert {"KV group", "value channel"} <= set(groups)
    before, weights = program.to_text(), dict(program.weights)
    with pytest.raises(PreconditionError, match="two groups cut dimension"):
        cut_all(program, [(groups["channel"], [0]), (groups["KV group"], [1]), (groups["value channel"], [0, 2])])
    with pytest.raises(PreconditionError, match="nothing would be left"):
        cut_all(program, [(groups["channel"], [0]), (groups["KV group"], [])])
    assert program.to_text() == before and program.weights == weights and program.mutations == 0
    # A group all of whose atoms stay is in nobody's way.
    cut_all(program, [(groups["KV group"], [1]), (groups["value channel"], list(range(groups["value channel"].size)))])
    assert program.to_text() != before
    cut_all(program, [])
