"""Every rule of the verifier catches the defect that it is there for, and says where it is."""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Callable

import pytest
import sympy
import torch
from hypothesis import given, settings
from torch import fx

from graphlathe.ir.dims import Dim, Dims, Guard
from graphlathe.ir.errors import VerifyError
from graphlathe.ir.infer import Inference
from graphlathe.ir.program import ORIGIN, Program, StatePair
from graphlathe.ir.rewrite import Rewriter
from graphlathe.ir.text import parse_program, print_program
from graphlathe.ir.verify import output_error, relative_error, verify
from graphlathe.ir.weights import Weight
from tests.strategies import feeds_of, programs

aten = torch.ops.aten

TEXT = """\
program @main(%x: f32[S, 4], %p: bool[], %buf: f32[4]) -> (%y, %z, %buf.next) {
  dim S = 2 in [1, 16]
  guard S < 20
  state %buf -> %buf.next = weight "start" : f32[4] #00000000
  %w0 = weight "a" : f32[4, 4] #00000000
  %0 = aten.linear(%x, %w0) : f32[S, 4]  ; from block.0
  %1 = aten.relu(%0) : f32[S, 4]  ; from block.1 by act
  %2 = aten.add.Tensor(%buf, 1) : f32[4]
  %3 = higher_order.cond(%p, @yes, @no, (%1,)) : (f32[S, 4],)
  %4 = operator.getitem(%3, 0) : f32[S, 4]
  return (%1, %4, %2)
}

graph @yes(%a0: f32[S, 4]) {
  %0 = aten.neg(%a0) : f32[S, 4]
  return (%0,)
}

graph @no(%a0: f32[S, 4]) {
  %w0 = weight "a" : f32[4, 4] #00000000
  %0 = aten.linear(%a0, %w0) : f32[S, 4]
  return (%0,)
}
"""


@pytest.fixture
def program() -> Program:
    return parse_program(TEXT)


def op(program: Program, target: object, graph: str = "main") -> fx.Node:
    return next(n for n in program.graphs[graph].nodes if n.target == target)


def test_a_sound_program_passes_every_level(program: Program) -> None:
    feeds = {"x": torch.randn(3, 4), "p": torch.tensor(True), "buf": torch.ones(4)}
    for level in (0, 1, 2):
        verify(program, level)
    verify(program, 3, reference=program.clone(), feeds=[feeds, {**feeds, "p": torch.tensor(False)}])


def _no_entries(p: Program) -> None:
    p.entries.clear()


def _name_clash(p: Program) -> None:
    p.weights["yes"] = p.weights["a"]


def _after_output(p: Program) -> None:
    with p.graph.inserting_after(p.main.output_node):
        p.graph.call_function(aten.relu.default, (p.main.placeholders[0],)).meta["val"] = None


def _used_before(p: Program) -> None:
    relu = op(p, aten.relu.default)
    op(p, aten.linear.default).prepend(relu)


def _of_another_graph(p: Program) -> None:
    other = op(p, aten.neg.default, "yes")
    op(p, aten.relu.default).args = (other,)


def _lost_user(p: Program) -> None:
    linear = op(p, aten.linear.default)
    linear.users.clear()


def _no_type(p: Program) -> None:
    del op(p, aten.relu.default).meta["val"]


def _no_input_type(p: Program) -> None:
    del p.main.placeholders[0].meta["val"]


def _mutable(p: Program) -> None:
    op(p, aten.relu.default).target = aten.relu_.default


def _no_operator(p: Program) -> None:
    op(p, aten.relu.default).target = "aten.relu"


def _method(p: Program) -> None:
    node = op(p, aten.relu.default)
    node.op, node.target = "call_method", "relu"


def _no_tuple(p: Program) -> None:
    output = p.main.output_node
    output.args = (list(output.args[0]),)  # type: ignore[arg-type]


def _no_output(p: Program) -> None:
    p.graph.erase_node(p.main.output_node)


def _unknown_weight(p: Program) -> None:
    del p.weights["a"]


def _two_weight_nodes(p: Program) -> None:
    first = op(p, "a")
    with p.graph.inserting_after(first):
        p.graph.create_node("get_attr", "a").meta["val"] = first.meta["val"]


def _weight_shape(p: Program) -> None:
    p.weights["a"] = Weight.from_tensor(torch.ones(4, 5))


def _weight_dtype(p: Program) -> None:
    p.weights["a"] = Weight.from_tensor(torch.ones(4, 4).double())


def _weight_type(p: Program) -> None:
    del op(p, "a").meta["val"]


def _unknown_graph(p: Program) -> None:
    del p.subgraphs["no"]


def _input_count(p: Program) -> None:
    p.main.inputs = ("x", "p")


def _output_count(p: Program) -> None:
    p.main.outputs = ("y", "z")


def _inputs_twice(p: Program) -> None:
    p.main.inputs = ("x", "p", "x")


def _outputs_twice(p: Program) -> None:
    p.main.outputs = ("y", "y", "buf.next")


def _argument(p: Program) -> None:
    p.main.arguments = {"x": ("x", "missing")}


def _graph_as_output(p: Program) -> None:
    p.main.output_node.args = ((op(p, "yes"), *p.main.output_values[1:]),)


def _state_name(p: Program) -> None:
    p.main.state = (StatePair("buf", "nothing"),)


def _state_type(p: Program) -> None:
    p.main.state = (StatePair("buf", "y"),)


def _state_weight(p: Program) -> None:
    del p.weights["start"]


def _state_weight_type(p: Program) -> None:
    p.weights["start"] = Weight.from_tensor(torch.ones(4).half())


def _redim(p: Program, **changes: object) -> None:
    dim = dataclasses.replace(p.main.dims.by_name["S"], **changes)  # type: ignore[arg-type]
    p.main.dims = Dims({dim.name: dim}, p.main.dims.guards)


def _dim_name(p: Program) -> None:
    _redim(p, name="my dim")


def _dim_keyword(p: Program) -> None:
    _redim(p, name="for")


def _dim_hint(p: Program) -> None:
    _redim(p, hint=17)


def _dims_share_a_symbol(p: Program) -> None:
    dim = p.main.dims.by_name["S"]
    p.main.dims = Dims({"S": dim, "T": Dim("T", dim.symbol, 2)})


def _guard(p: Program) -> None:
    p.main.dims = Dims(p.main.dims.by_name, (Guard(sympy.Symbol("stranger") > 2),))


STRUCTURE: list[tuple[Callable[[Program], None], str, str]] = [
    (_no_entries, "the program has no entry", ""),
    (_name_clash, "two things are called yes", ""),
    (_after_output, "a node of 'main' follows the output", "relu_default_1"),
    (_used_before, "it reads %linear_default, which is computed later", "relu_default"),
    (_of_another_graph, "it reads %neg_default, which is computed in another graph, or erased", "relu_default"),
    (_lost_user, "%linear_default does not know it as a user", "relu_default"),
    (_no_type, "it has no type", "relu_default"),
    (_no_input_type, "it has no type", "x"),
    (_mutable, "aten.relu_.default writes into its argument", "relu_default"),
    (_no_operator, "'aten.relu' is no operator", "relu_default"),
    (_method, "a node of kind call_method does not belong here", "relu_default"),
    (_no_tuple, "an entry returns a tuple", "output"),
    (_no_output, "the graph 'main' has no output", ""),
    (_unknown_weight, "no weight or nested graph 'a' in the program", "a"),
    (_two_weight_nodes, "the weight 'a' is read by two nodes, %a and this one", "a_1"),
    (_weight_shape, "its type is torch.float32 [4, 4]", "a"),
    (_weight_dtype, "its type is torch.float32 [4, 4]", "a"),
    (_weight_type, "it has no type", "a"),
    (_unknown_graph, "no weight or nested graph 'no' in the program", "no"),
    (_input_count, "'main' has 3 placeholders", ""),
    (_output_count, "'main' returns 3 values", "output"),
    (_inputs_twice, "two inputs of 'main' are called x", ""),
    (_outputs_twice, "two outputs of 'main' are called y", ""),
    (_argument, "the argument 'x' of 'main' consists of unknown inputs missing", ""),
    (_graph_as_output, "the output 'y' is a nested graph", "yes"),
    (_state_name, "the state 'buf' -> 'nothing' of 'main' has no such input or output", ""),
    (_state_type, "a state turns into f32[", "relu_default"),
    (_state_weight, "no weight 'start', which a state starts from", "buf"),
    (_state_weight_type, "a state starts from 'start', torch.float16 [4]", "buf"),
    (_dim_name, "'my dim' cannot name a dimension", ""),
    (_dim_keyword, "'for' cannot name a dimension", ""),
    (_dim_hint, "the dimension S is 17 in the example", ""),
    (_dims_share_a_symbol, "two dimensions of 'main' have one symbol", ""),
    (_guard, "a guard of 'main', stranger > 2, is about stranger", ""),
]


@pytest.mark.parametrize(("plant", "message", "node"), STRUCTURE, ids=[p.__name__ for p, _, _ in STRUCTURE])
def test_structure(program: Program, plant: Callable[[Program], None], message: str, node: str) -> None:
    """Level 1 catches the planted defect and names the node, its origin and the pass."""
    plant(program)
    with pytest.raises(VerifyError) as caught:
        verify(program, 1, pass_name="some-pass")
    error = caught.value
    assert message in error.message
    assert (error.node or "") == node or node == ""
    assert str(error).startswith("some-pass: ")
    verify(program, 0)


def test_symbols_of_another_program_are_caught(program: Program) -> None:
    """Types may depend on the program's own dimensions and on data only."""
    dims = program.main.dims
    program.main.dims = Dims()
    with pytest.raises(VerifyError, match=r"its type depends on s\d+, which is no dimension of the program \(node %x"):
        verify(program, 1)
    program.main.dims = dims
    stranger = parse_program("program @main(%x: f32[Q]) -> (%y) {\n  dim Q = 2 in [1, inf]\n  return (%x,)\n}\n")
    node = op(program, aten.neg.default, "yes")
    node.meta["val"] = stranger.main.placeholders[0].meta["val"]
    with pytest.raises(VerifyError, match=r"is no dimension of the program \(node %neg_default\)"):
        verify(program, 1)


def test_origin_is_in_the_message(program: Program) -> None:
    node = op(program, aten.relu.default)
    assert node.meta[ORIGIN] == "block.1"
    del node.meta["val"]
    with pytest.raises(VerifyError, match=re.escape("(node %relu_default, from block.1)")):
        verify(program)


def _wrong(program: Program, size: Callable[[torch.Tensor], object]) -> None:
    node = op(program, aten.relu.default)
    node.meta["val"] = size(node.meta["val"])


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (lambda v: v.double(), "its type is f64[S, 4]"),
        (lambda v: torch.cat([v, v]), "its type is f32[2*S, 4]"),
        (lambda v: v.reshape(-1), "its type is f32[4*S]"),
        (lambda v: v.shape[0], "its type is int(S)"),
        (lambda v: (v,), "its type is (f32[S, 4],)"),
        (lambda v: None, "its type is none"),
    ],
)
def test_level_2_infers_types_anew(program: Program, change: Callable[[torch.Tensor], object], shown: str) -> None:
    with program.fake_mode:
        _wrong(program, change)
    verify(program, 1)
    with pytest.raises(VerifyError) as caught:
        verify(program, 2, pass_name="p")
    assert shown in caught.value.message
    assert caught.value.node == "relu_default" and caught.value.origin == "block.1"
    assert caught.value.expected == "f32[S, 4], as aten.relu.default gives"


def test_level_2_accepts_what_is_provably_equal(program: Program) -> None:
    """(S + S) / 2 is S, whatever way it is written."""

    def spelled(value: torch.Tensor) -> torch.Tensor:
        size = value.shape[0]
        return torch.empty((((size + 1) * (size + 1) - size * size - 1) // 2, 4))

    with program.fake_mode:
        _wrong(program, spelled)
    verify(program, 2)


def test_level_2_reports_an_operator_that_refuses_its_arguments(program: Program) -> None:
    op(program, aten.relu.default).args = (op(program, aten.linear.default), 3)
    with pytest.raises(
        VerifyError, match=r"aten.relu.default refuses its arguments.*\(node %relu_default, from block.1"
    ):
        verify(program, 2)


def test_level_2_looks_into_nested_graphs(program: Program) -> None:
    node = op(program, aten.neg.default, "yes")
    with program.fake_mode:
        node.meta["val"] = torch.empty(3)
    with pytest.raises(VerifyError, match="node %neg_default"):
        verify(program, 2)


def test_level_2_reads_the_text_back(program: Program) -> None:
    """An argument without a text form does not survive a save; level 2 says so."""
    node = op(program, aten.add.Tensor)
    node.args = (node.args[0], 1)
    node.kwargs = {"alpha": 1}
    verify(program, 2)
    program.main.constants["mode"] = object()
    with pytest.raises(VerifyError, match="the text form does not read back: an argument of type object"):
        verify(program, 2)


def test_level_2_leaves_no_trace(program: Program) -> None:
    """Inferring again adds no guards and changes no fingerprint."""
    env = program.fake_mode.shape_env
    assert env is not None
    before = len(env.guards), program.fingerprint()
    verify(program, 2)
    assert (len(env.guards), program.fingerprint()) == before


def test_data_dependent_sizes_agree_with_any_other() -> None:
    text = """\
program @main(%x: f32[4]) -> (%y) {
  dim u0
  %0 = aten.nonzero(%x) : i64[u0, 1]
  %1 = aten.cat([%0, %0]) : i64[2*u0, 1]
  return (%1,)
}
"""
    program = parse_program(text)
    verify(program, 2)
    verify(program, 2)
    nonzero, cat = op(program, aten.nonzero.default), op(program, aten.cat.default)
    with program.fake_mode:
        nonzero.meta["val"] = torch.empty(nonzero.meta["val"].shape[0], 1)
    with pytest.raises(VerifyError, match=r"its type is f32\[u0, 1\] \(node %nonzero_default"):
        verify(program, 2)
    program = parse_program(text)
    nonzero, cat = op(program, aten.nonzero.default), op(program, aten.cat.default)
    with program.fake_mode:
        cat.meta["val"] = torch.empty(nonzero.meta["val"].shape[0] + 1, 1, dtype=torch.int64)
    with pytest.raises(VerifyError, match="node %cat_default"):
        verify(program, 2)


def test_a_data_dependent_number_may_be_fixed_by_an_assertion() -> None:
    """Tracing then writes a plain number where inference gives a new symbol; the text reads back all the same."""
    text = """\
program @main(%x: f32[4], %flag: bool[]) -> (%y) {
  %0 = aten.nonzero(%x) : i64[3, 1]
  %1 = aten.item(%flag) : bool(True)
  %2 = aten.cat([%0, %0]) : i64[6, 1]
  return (%2,)
}
"""
    program = parse_program(text)
    assert print_program(program) == text
    verify(program, 2)


FEEDS = {
    "x": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    "p": torch.tensor(True),
    "buf": torch.ones(4),
}


def test_level_3_catches_a_wrong_number(program: Program) -> None:
    changed = program.clone()
    changed.weights["a"] = Weight.from_tensor(changed.weights["a"].tensor() * (1 + 1e-4))
    with pytest.raises(VerifyError) as caught:
        verify(changed, 3, reference=program, feeds=[FEEDS], pass_name="cse")
    error = caught.value
    assert "cse: the output 'y' differs by 9.99e-05" in str(error)
    assert (error.node, error.origin, error.expected) == ("relu_default", "block.1", "at most 1e-05")
    verify(changed, 3, reference=program, feeds=[FEEDS], tol=1e-3)


def test_level_3_wants_every_old_output(program: Program) -> None:
    """New outputs are welcome; old ones must stay."""
    fewer = program.clone()
    fewer.main.outputs = ("y", "renamed", "buf.next")
    with pytest.raises(VerifyError, match="the output 'z' is gone"):
        verify(fewer, 3, reference=program, feeds=[FEEDS])
    more = program.clone()
    more.main.output_node.args = ((*more.main.output_values, more.main.placeholders[0]),)
    more.main.outputs = (*more.main.outputs, "extra")
    verify(more, 3, reference=program, feeds=[FEEDS])


def test_level_3_needs_a_reference(program: Program) -> None:
    for given_ in ({}, {"reference": program}, {"reference": program, "feeds": []}):
        with pytest.raises(VerifyError, match="level 3 compares with a reference"):
            verify(program, 3, **given_)  # type: ignore[arg-type]
    with pytest.raises(VerifyError, match="no level 7"):
        verify(program, 7)


@given(program=programs())
@settings(max_examples=25)
def test_random_programs_verify(program: Program) -> None:
    verify(program, 2)
    verify(program, 3, reference=program.clone(), feeds=[feeds_of(program)], tol=0.0)


def test_blocks_that_repeat_are_inferred_once() -> None:
    """Level 2 runs each distinct operator and shape once, however deep the model is."""
    lines = [f"  %{i} = aten.relu(%{i - 1 if i else 'x'}) : f32[S, 4]" for i in range(400)]
    program = parse_program(
        "\n".join(["program @main(%x: f32[S, 4]) -> (%y) {", "  dim S = 2 in [1, 9]", *lines, "  return (%399,)", "}"])
    )
    inference = Inference(program, share=True)
    for node in program.graph.find_nodes(op="call_function", target=aten.relu.default):
        inference.value(node)
    # The input and the relu's result differ in nothing that inference looks at.
    assert inference.runs <= 2
    verify(program, 2)


def test_inference_tells_arguments_apart() -> None:
    """1, 1.0 and True are equal in Python, and give different types."""
    program = parse_program("program @main(%x: i64[4]) -> (%y) {\n  return (%x,)\n}\n")
    rewriter = Rewriter(program, "test")
    x = program.main.placeholders[0]
    inference = Inference(program)
    with rewriter.before(program.main.output_node):
        nodes = [rewriter.call(aten.mul.Tensor, x, value) for value in (1, 1.0, True)]
        pair = rewriter.call(aten.split.Tensor, x, 2)
        nodes += [rewriter.call(operator.getitem, pair, i) for i in (0, 1)]
    assert [inference.value(n).dtype for n in nodes[:3]] == [torch.int64, torch.float32, torch.int64]
    assert "aten.mul.Tensor(%x, 1.0) : f32[4]" in print_program(program)


def test_relative_error() -> None:
    a = torch.tensor([1.0, -2.0, 4.0])
    assert relative_error({"y": a}, {"y": a}) == 0.0
    assert relative_error({"y": a + torch.tensor([0.0, 0.0, 1.0])}, {"y": a}) == pytest.approx(0.25)
    assert relative_error({"y": a, "z": a * 2}, {"y": a, "z": a}) == pytest.approx(1.0)
    assert relative_error({}, {}) == 0.0
    assert relative_error({"y": a}, {"z": a}) == float("inf")
    assert relative_error({0: a}, {0: a}) == 0.0


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (torch.tensor([1, 2]), torch.tensor([1, 3])),
        (torch.tensor([True]), torch.tensor([False])),
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0])),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, float("nan")])),
        (torch.tensor([float("nan"), 1.0]), torch.tensor([1.0, float("nan")])),
        (torch.tensor([float("inf")]), torch.tensor([-float("inf")])),
        (torch.tensor([float("inf")]), torch.tensor([float("nan")])),
        (torch.tensor([1.0]), torch.tensor([float("inf")])),
        (torch.tensor([1e-30]), torch.tensor([0.0])),
        (torch.ones(2), torch.ones(3)),
        (torch.ones(2), torch.ones(1, 2)),
        (torch.ones(2), torch.ones(2).double()),
        (torch.ones(2), 1.0),
        (1, True),
        (1, 2),
        ((1,), (1, 2)),
    ],
)
def test_what_cannot_be_compared_is_infinitely_wrong(actual: object, expected: object) -> None:
    assert output_error(actual, expected) == float("inf")


def test_special_values_in_the_same_places_are_equal() -> None:
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 2.0])
    assert output_error(odd, odd.clone()) == 0.0
    assert output_error(odd + torch.tensor([0.0, 0.0, 0.0, 0.5]), odd) == pytest.approx(0.25)
    assert output_error(torch.zeros(3), torch.zeros(3)) == 0.0
    assert output_error(torch.zeros(0), torch.zeros(0)) == 0.0
    assert output_error(torch.tensor([1 + 1j]), torch.tensor([1 + 1j])) == 0.0
    assert output_error(torch.ones(2).bfloat16() * 1.01, torch.ones(2).bfloat16()) == pytest.approx(0.0078, abs=1e-3)
