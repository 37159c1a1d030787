"""Structure without names: the zoo's truth table, independence of names and order, and constructions by hand."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from graphlathe.ir.errors import GraphlatheError
from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.ir.structure import Structure, structure
from graphlathe.passes.base import Context
from graphlathe.passes.canonical.canonicalize import Canonicalize
from graphlathe.tools import zoo
from tests.counting import assert_linear, calls
from tests.ir.site_truth import BLOCKS
from tests.zoo_programs import SAMPLE, over_zoo, traced, zoo_parameters

KINDS: dict[str, list[str]] = {
    "llama": ["attention mlp"] * 3,
    "gptj": ["attention mlp"] * 2,
    "t5": ["attention mlp"] * 3 + ["attention attention mlp"] * 2,
    "mixtral": ["attention mlp"] * 2,
    "deepseek_v3": ["attention mlp"] * 3,
    "mamba": ["mixer"] * 2,
    "rwkv": ["mixer mlp"] * 2,
    "jamba": ["mixer mlp", "attention mlp", "mixer mlp"],
    "falcon_h1": ["mixer attention mlp"] * 2,
    "lfm2": ["conv mlp", "attention mlp", "conv mlp"],
    "nemotron_h": ["mixer", "attention", "mlp"],
    "fnet": ["mixer mlp"] * 2,
    "wav2vec2_conformer": ["mlp attention conv mlp"] * 2,
    "segformer": ["attention mlp"] * 3,
    "resnet": ["conv", "conv", "conv other", "conv"],
    "plain_inverted_residual": ["conv", "", "conv", "conv"],
}

Summary = list[list[tuple[tuple[str, ...], str, bool]]]


def kinds(found: Structure) -> list[str]:
    return [" ".join(branch.kind for branch in block.branches) for stream in found.streams for block in stream.blocks]


def summary(program: Program) -> Summary:
    """What must not depend on names or order."""
    return [
        [(tuple(branch.kind for branch in b.branches), b.shape_class, b.droppable) for b in stream.blocks]
        for stream in structure(program).streams
    ]


@over_zoo(quick=SAMPLE)
def test_blocks_are_the_configurations_layers(name: str) -> None:
    """For each stack; all of them can be dropped, but those of CNNs that change the stream."""
    found = structure(traced(name))
    assert tuple(len(stream.blocks) for stream in found.streams) == BLOCKS[name]
    blocks = [block for stream in found.streams for block in stream.blocks]
    expected = zoo.get(name).identity_blocks
    assert sum(block.droppable for block in blocks) == (len(blocks) if expected is None else expected)
    for stream in found.streams:
        place = {point: i for i, point in enumerate(stream.points)}
        for block in stream.blocks:
            assert place[block.start] < place[block.end]
            assert block.droppable == (not block.reason)
            for branch in block.branches:
                assert branch.output in branch.add.all_input_nodes
                assert branch.output in branch.nodes
                assert set(branch.nodes) & set(block.nodes)


@pytest.mark.parametrize("name", zoo_parameters(KINDS, quick=("llama", "t5", "gptj", "mamba", "resnet")))
def test_kinds_of_branches(name: str) -> None:
    assert kinds(structure(traced(name))) == KINDS[name]


def test_cross_attention_is_told_from_self_attention() -> None:
    _, decoder = structure(traced("t5")).streams
    for block in decoder.blocks:
        assert [branch.cross for branch in block.branches] == [False, True, False]


@over_zoo(quick=SAMPLE)
def test_the_same_after_canonicalization(name: str) -> None:
    before = traced(name)
    after = before.clone()
    Canonicalize().run(after, Context())
    old = [[(kinds, droppable) for kinds, _, droppable in stream] for stream in summary(before)]
    assert [[(kinds, droppable) for kinds, _, droppable in stream] for stream in summary(after)] == old


def scrubbed(program: Program) -> Program:
    """The program without a single telling name: nodes, weights, origins."""
    names = {name: f"w{i}" for i, name in enumerate(sorted(program.weights, reverse=True))}
    result = program.clone()
    result.weights = {names[name]: weight for name, weight in program.weights.items()}
    for graph in result.graphs.values():
        for i, node in enumerate(graph.nodes):
            if node.op == "get_attr" and node.target in names:
                node.target = names[str(node.target)]
            node.name = f"v{(i * 7919) % 100003}"
            node.meta.pop("origin", None)
            node.meta.pop("made_by", None)
    return result


def reordered(program: Program, seed: int) -> Program:
    """The same graph in another order that respects data flow."""
    result = program.clone()
    entry = result.main
    generator = random.Random(seed)
    nodes = list(entry.graph.nodes)
    fixed = [n for n in nodes if n.op == "placeholder"]
    left = {n: len(n.all_input_nodes) for n in nodes if n.op not in ("placeholder", "output")}
    order, seen = [], list(fixed)
    ready = [n for n, count in left.items() if count == 0]
    while seen or ready:
        for node in seen:
            for user in node.users:
                if user in left:
                    left[user] -= 1
                    if left[user] == 0:
                        ready.append(user)
        seen = []
        if ready:
            node = ready.pop(generator.randrange(len(ready)))
            order.append(node)
            seen.append(node)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in (*fixed, *order, entry.output_node):
        copies[node] = graph.node_copy(node, copies.__getitem__)
    assert len(graph.nodes) == len(nodes)
    entry.graph = graph
    return result


def with_dead_code(program: Program) -> Program:
    """Additions that no output needs, on every stream value and branch: they look like residual additions."""
    result = program.clone()
    for stream in structure(result).streams:
        for point in stream.points[1:]:
            with result.graph.inserting_after(point):
                dead = result.graph.call_function(torch.ops.aten.add.Tensor, (point, stream.points[0]))
                dead.meta["val"] = point.meta["val"]
    return result


VARIANTS: dict[str, Callable[[Program], Program]] = {
    "names": scrubbed,
    "order 1": lambda p: reordered(p, 1),
    "order 2": lambda p: reordered(p, 2),
    "dead code": with_dead_code,
    "all": lambda p: reordered(scrubbed(with_dead_code(p)), 3),
}
INDEPENDENCE = (*SAMPLE, "gptj", "clip", "mobilenet_v2", "whisper", "falcon_h1", "wav2vec2_conformer", "deepseek_v3")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", zoo_parameters(INDEPENDENCE, quick=("llama", "gptj", "t5", "resnet", "plain_resnet")))
def test_independent_of_names_order_and_dead_code(name: str, variant: str) -> None:
    expected = summary(traced(name))
    assert expected
    assert summary(VARIANTS[variant](traced(name))) == expected


def test_isomorphic_blocks_share_a_class_and_others_do_not() -> None:
    classes = [block.shape_class for block in structure(traced("llama")).streams[0].blocks]
    assert len(set(classes)) == 1
    wider = {block.shape_class for block in structure(trace(Stack(Norm(), 2, width=16), TOKENS)).streams[0].blocks}
    narrow = {block.shape_class for block in structure(trace(Stack(Norm(), 2, width=8), TOKENS)).streams[0].blocks}
    assert len(wider) == len(narrow) == 1 and wider != narrow


# Constructions by hand. A stack embeds token ids, runs a body a number of times, and predicts.

TOKENS = {"ids": torch.arange(12).reshape(2, 6)}
WIDTH = 8


class Mlp(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.relu(self.up(self.norm(x))))


class Attention(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory
        return self.o(functional.scaled_dot_product_attention(self.q(x), self.k(memory), self.v(memory)))


class Step(nn.Module):
    """How a layer joins the stream: overridden below."""

    def join(self, x: Tensor, f: nn.Module, first: Tensor) -> Tensor:
        return x + f(x)


class Norm(Step):
    pass


class Scaled(Step):
    """Deep norm: the stream is scaled, the sum normalized."""

    def join(self, x: Tensor, f: nn.Module, first: Tensor) -> Tensor:
        return functional.layer_norm(0.5 * x + f(x), (x.shape[-1],))


class LayerScale(Step):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((WIDTH,), 0.1))

    def join(self, x: Tensor, f: nn.Module, first: Tensor) -> Tensor:
        return x + functional.dropout(f(x), 0.3, False) * self.gamma


class FromTheStart(Step):
    """Every branch also reads the first embedding, which bypasses all layers before (Zamba)."""

    def join(self, x: Tensor, f: nn.Module, first: Tensor) -> Tensor:
        return x + f(x * torch.sigmoid(first))


class Stack(nn.Module):
    def __init__(self, step: Step, layers: int, *, width: int = WIDTH, tap: bool = False, skip: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, width), nn.Linear(width, 5)
        self.steps = nn.ModuleList([step] * (2 * layers))
        parts = [part(width) for _ in range(layers) for part in (Attention, Mlp)]
        self.parts, self.tap, self.skip = nn.ModuleList(parts), tap, skip

    def forward(self, ids: Tensor) -> Any:
        x = first = self.embed(ids)
        taps = []
        for step, part in zip(self.steps, self.parts, strict=True):
            x = step.join(x, part, first)  # type: ignore[operator]
            taps.append(x if len(taps) % 2 else functional.layer_norm(x, (x.shape[-1],)))
        if self.skip:
            x = x + first
        return (self.head(x), *taps) if self.tap else self.head(x)


def blocks_of(model: nn.Module, inputs: dict[str, Tensor]) -> list[str]:
    return kinds(structure(trace(model, inputs)))


@pytest.mark.parametrize("step", [Norm, Scaled, LayerScale, FromTheStart])
@pytest.mark.parametrize("layers", [1, 3])
def test_ways_to_join_a_stream(step: type[Step], layers: int) -> None:
    assert blocks_of(Stack(step(), layers), TOKENS) == ["attention mlp"] * layers


def test_values_tapped_from_the_stream_do_not_end_it() -> None:
    """Hidden-state outputs and heads in the middle: plain dominators would lose everything before the last tap."""
    assert blocks_of(Stack(Norm(), 3, tap=True), TOKENS) == ["attention mlp"] * 3


def test_a_skip_over_the_whole_stack_hides_nothing() -> None:
    assert blocks_of(Stack(Norm(), 3, skip=True), TOKENS) == ["attention mlp"] * 3


def test_a_post_norm_stack_ends_after_its_last_norm() -> None:
    found = structure(trace(Stack(Scaled(), 2), TOKENS)).streams[0]
    assert all("layer_norm" in str(block.end.target) for block in found.blocks)
    assert found.blocks[0].end is found.blocks[1].start


class CubicGate(nn.Module):
    """An addition of a value and a function of it that is no residual unit: a polynomial."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y + 0.04 * y**3 + y.mean(dim=-1, keepdim=True))


class TwoHeads(nn.Module):
    """Two linear maps of one value, added: no identity and no shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x))
        return self.a(y) + self.b(y)


def test_no_stream_where_there_is_none() -> None:
    assert not structure(trace(CubicGate(), {"x": torch.randn(2, 4)})).streams
    found = structure(trace(TwoHeads(), {"x": torch.randn(2, 4)}))
    assert not found.streams
    assert "none is that value itself" in found.candidates[0].reason
    assert "no residual stream" in str(found) and "none is that value itself" in str(found)


class Mixer(nn.Module):
    """MLP-Mixer: a linear map along positions, then one along channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.tokens = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.channels = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i in range(2):
            x = x + self.tokens[i](self.norms[2 * i](x).transpose(1, 2)).transpose(1, 2)
            x = x + self.channels[i](self.norms[2 * i + 1](x))
        return x


class TwoTowers(nn.Module):
    """Two stacks that meet only in their outputs' product."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Stack(Norm(), 3), Stack(LayerScale(), 2)

    def forward(self, ids: Tensor, other: Tensor) -> Tensor:
        return self.a(ids).mean(1) @ self.b(other).mean(1).T


def test_token_mixing_is_not_position_wise() -> None:
    assert blocks_of(Mixer(), {"x": torch.randn(2, 6, 4)}) == ["mixer mlp"] * 2


def test_towers_are_streams_of_their_own_in_the_order_of_their_inputs() -> None:
    found = structure(trace(TwoTowers(), {"ids": TOKENS["ids"], "other": TOKENS["ids"]}))
    assert [len(stream.blocks) for stream in found.streams] == [3, 2]


class PositionsAsInput(nn.Module):
    """Rotary angles computed from a user input: float data that enters every layer from the side."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(20, WIDTH), nn.ModuleList(Attention() for _ in range(3))
        self.register_buffer("frequencies", torch.rand(WIDTH))

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        angles = positions[..., None].float() * self.frequencies
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x * torch.cos(angles))
        return x


def test_a_side_chain_from_an_input_is_not_the_stream() -> None:
    inputs = {"ids": TOKENS["ids"], "positions": torch.arange(6).expand(2, 6)}
    assert blocks_of(PositionsAsInput(), inputs) == ["attention"] * 3


def test_why_a_block_cannot_be_dropped() -> None:
    reasons = [b.reason for b in structure(traced("plain_resnet")).streams[0].blocks]
    assert reasons[0] == reasons[2] == "" and "the stream changes from [B, 16," in reasons[1]
    reasons = [b.reason for b in structure(traced("plain_inverted_residual")).streams[0].blocks]
    assert reasons[1] == "it has no residual addition"


def test_printing_names_kinds_and_reasons() -> None:
    text = str(structure(traced("plain_resnet")))
    assert "stream 0" in text and "block 1" in text and "cannot be dropped" in text and "2 convolutions" in text
    assert "scaled_dot_product_attention" in str(structure(traced("llama")).streams[0].blocks[0].branches[0])


def test_unknown_entry() -> None:
    with pytest.raises(GraphlatheError, match="no entry 'prefill'"):
        structure(traced("plain_resnet"), entry="prefill")


@pytest.mark.slow
def test_work_is_linear_in_depth() -> None:
    counts: list[int] = []
    for layers in (12, 48):
        program = trace(Stack(Norm(), layers), TOKENS)
        assert len(structure(program).streams[0].blocks) == layers
        counts.append(calls(lambda program=program: structure(program)))
    assert_linear(*counts, 4)
