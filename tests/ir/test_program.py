"""Programs: calls by position and name, the signature's checks, clones, sharing, counts."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from torch import fx, nn

from graphlathe.ir.errors import GraphlatheError, InputError
from graphlathe.ir.execute import last_uses, needed, run_graph
from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Outputs, Program
from graphlathe.ir.rewrite import Rewriter
from graphlathe.ir.text import parse_program
from graphlathe.ir.weights import MetaSource, Weight
from tests.strategies import feeds_of, programs

aten = torch.ops.aten

TEXT = """\
program @main(%ids: i64[B, S], %past.key: f32[B, 4], %buf: f32[4]) -> (%logits, %past.next, %buf.next) {
  dim B = 2 in [1, 8]
  dim S = 6 in [2, inf]
  guard S % 2 == 0
  argument ids(%ids)
  argument past(%past.key)
  constant use_cache = True
  state %buf -> %buf.next = weight "start" : f32[4] #00000000
  state %past.key -> %past.next
  %w0 = weight "embed" : f32[7, 4] #00000000
  %0 = aten.embedding(%w0, %ids) : f32[B, S, 4]
  %1 = aten.sum.dim_IntList(%0, [1]) : f32[B, 4]
  %2 = aten.add.Tensor(%1, %past.key) : f32[B, 4]
  %3 = aten.add.Tensor(%buf, 1) : f32[4]
  return (%0, %2, %3)
}
"""


@pytest.fixture
def program() -> Program:
    return parse_program(TEXT)


IDS, PAST = torch.zeros(3, 4, dtype=torch.int64), torch.ones(3, 4)


def test_calls_by_position_name_and_flat_input(program: Program) -> None:
    """The traced callable's own arguments, or flat input names; state starts from its weight."""
    calls = [
        program(IDS, PAST),
        program(IDS, past={"key": PAST}),
        program(ids=IDS, past=[PAST]),
        program(IDS, **{"past.key": PAST}),
        program(IDS, PAST, use_cache=True),
        program(IDS, PAST, buf=program.weights["start"].tensor()),
    ]
    for outputs in calls:
        assert list(outputs) == ["logits", "past.next", "buf.next"]
        assert torch.equal(outputs["buf.next"], program.weights["start"].tensor() + 1)
        assert torch.equal(outputs[1], calls[0]["past.next"])


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, "missing input 'ids', 'past.key'"),
        ((IDS,), {}, "missing input 'past.key'"),
        ((IDS, PAST, PAST), {}, "3 positional inputs given"),
        ((IDS, PAST), {"past.key": PAST}, "input 'past.key' is given twice"),
        ((IDS, PAST), {"idss": IDS}, "unknown input 'idss' (did you mean 'ids'?)"),
        ((IDS, [PAST, PAST]), {}, "'past' holds 2 tensors"),
        ((IDS, PAST), {"use_cache": False}, "'use_cache' was fixed to True by tracing"),
        ((IDS.float(), PAST), {}, "input 'ids' has dtype torch.float32"),
        ((3, PAST), {}, "input 'ids' is a int"),
        ((IDS[0], PAST), {}, "input 'ids' has shape [4]"),
        ((IDS, PAST[:2]), {}, "input 'past.key' has size 2 in dimension 0"),
        ((IDS, torch.ones(3, 5)), {}, "input 'past.key' has size 5 in dimension 1"),
        ((IDS[:, :3], PAST), {}, "the sizes S=3 are outside what tracing assumed"),
        ((IDS[:, :1], PAST), {}, "dimension S is 1"),
        ((IDS.repeat(3, 1), PAST.repeat(3, 1)), {}, "dimension B is 9"),
    ],
)
def test_calls_outside_the_signature_are_refused(
    program: Program, args: tuple[object, ...], kwargs: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        program(*args, **kwargs)
    assert caught.value.message == message and caught.value.expected


def test_run_wants_exactly_the_inputs(program: Program) -> None:
    feeds = program.feeds(IDS, PAST)
    with pytest.raises(InputError, match="missing input 'buf'"):
        program.run({k: v for k, v in feeds.items() if k != "buf"})
    with pytest.raises(InputError, match="unknown input 'other'"):
        program.run({**feeds, "other": PAST})
    assert program.check_feeds(feeds) == {"B": 3, "S": 4}


def test_derived_sizes_bind_and_are_checked() -> None:
    """An input of size 2*S binds S; one of size A + B is checked although A and B come later."""
    text = """\
program @main(%x: f32[2*S], %y: f32[A + B], %a: f32[A], %b: f32[B]) -> (%out) {
  dim S = 3 in [2, 9]
  dim A = 4 in [1, inf]
  dim B = 5 in [1, inf]
  return (%x,)
}
"""
    program = parse_program(text)
    feeds = {"x": torch.ones(8), "y": torch.ones(7), "a": torch.ones(3), "b": torch.ones(4)}
    assert program.check_feeds(feeds) == {"S": 4, "A": 3, "B": 4}
    for name, tensor, message in [
        ("x", torch.ones(7), "input 'x' has size 7 in dimension 0"),
        ("x", torch.ones(20), "dimension S is 10"),
        ("y", torch.ones(8), "input 'y' has size 8 in dimension 0"),
    ]:
        with pytest.raises(InputError, match=re.escape(message)):
            program.run({**feeds, name: tensor})


def test_bare_outputs_and_named_outputs() -> None:
    outputs = Outputs(logits=1, hidden=2)
    assert outputs["logits"] == outputs.logits == outputs[0] == 1 and outputs[-1] == 2
    with pytest.raises(AttributeError, match=re.escape("no output 'logit' (did you mean 'logits'?)")):
        _ = outputs.logit


def test_clones_share_weights_and_nothing_else(program: Program) -> None:
    """A change of the clone, of its graph or weights, does not reach the original."""
    before = program.fingerprint()
    clone = program.clone()
    assert clone.fingerprint() == before
    assert all(clone.weights[name] is weight for name, weight in program.weights.items())
    rewriter = Rewriter(clone, "test")
    node = clone.main.output_values[0]
    assert isinstance(node, fx.Node)
    with rewriter.after(node):
        new = rewriter.call(aten.neg.default, node)
    rewriter.replace(node, new)
    rewriter.weight("embed", Weight.from_tensor(torch.ones(7, 4)))
    clone.history.append("x")
    clone.metadata["a"] = "b"
    clone.main.constants["use_cache"] = False
    clone.main.arguments.clear()
    assert program.fingerprint() == before and program.history == [] and program.metadata == {}
    assert program.main.constants == {"use_cache": True} and program.mutations == 0
    assert clone.fingerprint() != before


def test_counts_and_specs(program: Program) -> None:
    program.weights["unused"] = Weight(MetaSource((1000,), torch.float32))
    assert program.used_weights() == {"embed", "start"}
    assert (program.parameter_count, program.weight_nbytes) == (32, 128)
    assert [s.name for s in program.inputs] == ["ids", "past.key", "buf"]
    assert [str(s.dtype) for s in program.outputs] == ["torch.float32"] * 3
    assert repr(program).startswith("Program(ids, past.key, buf -> logits, past.next, buf.next; ")


def test_an_operator_that_fails_is_named(program: Program) -> None:
    program.graph.find_nodes(op="call_function", target=aten.embedding.default)[0].meta["origin"] = "model.embed"
    with pytest.raises(
        GraphlatheError, match=r"aten\.embedding\.default failed.*\(node %embedding_default, from model"
    ) as caught:
        program(IDS + 100, PAST)
    assert f"{int(IDS.max()) + 100} was looked up in a table of 7 rows" in (caught.value.remedy or "")


@given(program=programs())
@settings(max_examples=25)
def test_running_equals_generated_code(program: Program) -> None:
    """Node by node, with values freed at their last use, equals the graph module that fx generates."""
    feeds = feeds_of(program)
    root = {name: weight.tensor() for name, weight in program.weights.items()}
    expected = fx.GraphModule(root, program.clone().graph)(*feeds.values())
    seen: list[str] = []
    outputs = program.run(feeds, observe=lambda node, value: seen.append(node.name))
    assert all(torch.equal(a, b) for a, b in zip(outputs.values(), expected, strict=True))
    assert seen == [n.name for n in program.graph.nodes if n.op != "output"]


def test_values_are_freed_at_their_last_use() -> None:
    lines = [f"  %{i} = aten.relu(%{i - 1 if i else 'x'}) : f32[4]" for i in range(50)]
    program = parse_program("\n".join(["program @main(%x: f32[4]) -> (%y) {", *lines, "  return (%49,)", "}"]))
    freed = last_uses(program.graph)
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    assert all(freed[b] == [a] for a, b in pairwise(nodes))


def test_given_and_alias_try_a_change_without_making_it(program: Program) -> None:
    """Known values are not computed again, and an aliased node takes another one's value."""
    graph, feeds = program.graph, program.feeds(IDS, PAST)
    embedding, total, added, _ = (n for n in graph.nodes if n.op == "call_function")
    ran: list[fx.Node] = []
    by_target = {str(p.target): feeds[n] for n, p in zip(program.main.inputs, program.main.placeholders, strict=True)}
    known = torch.full((3, 4), 5.0)
    values = run_graph(
        graph,
        by_target,
        program.weights,
        given={total: known, embedding: torch.zeros(3, 4, 4)},
        observe=lambda node, value: ran.append(node),
    )
    assert torch.equal(values[1], known + PAST)
    assert not any(n.op == "get_attr" for n in ran)
    past = program.main.placeholders[1]
    values = run_graph(graph, by_target, program.weights, alias={added: past})
    assert torch.equal(values[1], PAST)
    assert total not in needed(graph, alias={added: past})


def test_nested_graphs_do_not_keep_their_weights_alive() -> None:
    """Running control flow leaves the program's graphs without a module of materialised weights."""

    class Cond(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, lambda v: self.inner(v), lambda v: v * 2, (x,))

    program = trace(Cond().eval(), (torch.ones(4),))
    program(torch.ones(4))
    program(-torch.ones(4))
    assert all(graph.owning_module is None for graph in program.graphs.values())
