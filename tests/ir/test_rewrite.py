"""The rewriter keeps a program sound: types, order, origins, provenance, counts, and no trace of what it refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import fx

from graphlathe.ir.errors import VerifyError
from graphlathe.ir.infer import Inference
from graphlathe.ir.program import MADE_BY, ORIGIN, Program
from graphlathe.ir.rewrite import Rewriter, is_op
from graphlathe.ir.text import parse_program, print_program
from graphlathe.ir.verify import verify
from graphlathe.ir.weights import Weight
from tests.strategies import feeds_of, programs

aten = torch.ops.aten

TEXT = """\
program @main(%x: f32[S, 4], %p: bool[]) -> (%y) {
  dim S = 3 in [1, inf]
  %w0 = weight "a" : f32[4, 4] #00000000
  %0 = aten.linear(%x, %w0) : f32[S, 4]  ; from block
  %1 = aten.relu(%0) : f32[S, 4]  ; from block.act
  %2 = higher_order.cond(%p, @yes, @no, (%1,)) : (f32[S, 4],)
  %3 = operator.getitem(%2, 0) : f32[S, 4]
  return (%3,)
}

graph @yes(%a0: f32[S, 4]) {
  %w0 = weight "a" : f32[4, 4] #00000000
  %0 = aten.linear(%a0, %w0) : f32[S, 4]
  return (%0,)
}

graph @no(%a0: f32[S, 4]) {
  %0 = aten.neg(%a0) : f32[S, 4]
  return (%0,)
}
"""


@pytest.fixture
def program() -> Program:
    return parse_program(TEXT)


def op(program: Program, target: object, graph: str = "main") -> fx.Node:
    return next(n for n in program.graphs[graph].nodes if n.target == target)


def test_call_infers_stamps_and_counts(program: Program) -> None:
    seen: list[tuple[str, str, str]] = []
    program.listeners.append(lambda made_by, kind, node: seen.append((made_by, kind, node.name)))
    rewriter = Rewriter(program, "my-pass")
    relu = op(program, aten.relu.default)
    with rewriter.after(relu):
        size = rewriter.call(aten.sym_size.int, relu, 0)
        view = rewriter.call(aten.view.default, relu, [size, 2, 2])
        fresh = rewriter.call(aten.relu.default, view, like=op(program, aten.linear.default))
    assert program.main.dims.format(view.meta["val"].shape[0]) == "S" and view.meta["val"].shape[1:] == (2, 2)
    assert program.main.dims.format(size.meta["val"]) == "S"
    assert [n.meta[MADE_BY] for n in (size, view, fresh)] == ["my-pass"] * 3
    assert (view.meta[ORIGIN], fresh.meta[ORIGIN]) == ("block.act", "block")
    assert seen == [("my-pass", "create", n.name) for n in (size, view, fresh)]
    assert rewriter.mutations == program.mutations == 3


def test_call_takes_nested_graphs(program: Program) -> None:
    """Control flow can be created and inferred like any operator."""
    rewriter = Rewriter(program, "test")
    cond = op(program, torch.ops.higher_order.cond)
    with rewriter.after(cond):
        again = rewriter.call(cond.target, *cond.args)
    assert [tuple(map(str, v.shape)) for v in again.meta["val"]] == [tuple(map(str, v.shape)) for v in cond.meta["val"]]
    rewriter.replace(cond, again)
    verify(program, 2)


def test_clones_infer_once(program: Program) -> None:
    """What was inferred in one clone is known in the others, as a value of its own; it is what inference gives."""
    results: list[torch.Tensor] = []
    for each in (program, program.clone()):
        rewriter, relu = Rewriter(each, "test"), op(each, aten.relu.default)
        with rewriter.after(relu):
            results.append(rewriter.call(aten.transpose.int, relu, 0, 1).meta["val"])
    first, second = results
    assert first is not second
    assert (first.shape, first.stride(), first.dtype) == (second.shape, second.stride(), second.dtype)
    inference = Inference(program, common=program.inferred)
    assert inference.value(op(program, aten.transpose.int)).shape == first.shape
    assert inference.runs == 0
    assert Inference(program).value(op(program, aten.transpose.int)).shape == first.shape


def test_clones_do_not_take_their_nested_graphs_for_each_others(program: Program) -> None:
    clone = program.clone()
    for name in ("yes", "no"):
        rewriter = Rewriter(clone, "test", name)
        output = next(iter(clone.graphs[name].find_nodes(op="output")))
        with rewriter.before(output):
            twice = rewriter.call(aten.cat.default, [output.args[0][0]] * 2, 1)
        output.args = ((twice,),)
    for each, width in ((program, 4), (clone, 8), (program, 4)):
        rewriter, cond = Rewriter(each, "test"), op(each, torch.ops.higher_order.cond)
        with rewriter.after(cond):
            again = rewriter.call(cond.target, *cond.args)
        assert again.meta["val"][0].shape[1] == width


def test_what_is_remembered_is_bounded(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphlathe.ir.infer._MOST", 3)
    rewriter, relu = Rewriter(program, "test"), op(program, aten.relu.default)
    for width in (4, 2, 1, 4, 2, 1):
        with rewriter.after(relu):
            view = rewriter.call(aten.view.default, relu, [-1, width])
        assert view.meta["val"].shape[1] == width
        assert len(program.inferred) <= 3


def test_a_refused_call_leaves_nothing_behind(program: Program) -> None:
    before = print_program(program)
    rewriter = Rewriter(program, "test")
    relu = op(program, aten.relu.default)
    with rewriter.after(relu), pytest.raises(VerifyError, match="refuses its arguments"):
        rewriter.call(aten.view.default, relu, [7, 7, 7])
    with pytest.raises(VerifyError, match="refuses its arguments"):
        rewriter.set_args(relu, [relu.args[0], 1, 2])
    assert print_program(program) == before and rewriter.mutations == program.mutations == 0
    verify(program, 2)


def test_replace_moves_every_user_and_erases(program: Program) -> None:
    rewriter = Rewriter(program, "test")
    relu = op(program, aten.relu.default)
    with rewriter.before(relu):
        new = rewriter.call(aten.sigmoid.default, relu.args[0])
    rewriter.replace(relu, new)
    assert relu._erased and not any(is_op(n, aten.relu) for n in program.graph.nodes)
    verify(program, 2)
    assert rewriter.mutations == 3  # create, replace, erase


def test_a_value_may_be_replaced_by_a_function_of_it(program: Program) -> None:
    """Everything else reads the new value; what computes it keeps reading the old one."""
    rewriter = Rewriter(program, "test")
    relu = op(program, aten.relu.default)
    with rewriter.after(relu):
        inner = rewriter.call(aten.neg.default, relu)
    with rewriter.after(inner):
        outer = rewriter.call(aten.add.Tensor, inner, relu)
    rewriter.replace(relu, outer)
    assert not relu._erased and inner.args == (relu,) and outer.args == (inner, relu)
    verify(program, 2)
    x, p = torch.randn(2, 4), torch.tensor(False)
    assert torch.equal(program(x, p)["y"], torch.zeros(2, 4))


def test_replace_refuses_what_does_not_fit(program: Program) -> None:
    rewriter = Rewriter(program, "test")
    relu, cond = op(program, aten.relu.default), op(program, torch.ops.higher_order.cond)
    with rewriter.after(cond):
        late = rewriter.call(aten.neg.default, relu.args[0])
        double = rewriter.call(aten._to_copy.default, relu, dtype=torch.float64)
        flat = rewriter.call(aten.reshape.default, relu, [-1])
        wide = rewriter.call(aten.cat.default, [relu, relu], 1)
    for other in (double, flat, wide):
        with pytest.raises(VerifyError, match="cannot stand for it"):
            rewriter.replace(relu, other)
    with pytest.raises(VerifyError, match=f"its user %{cond.name} comes before that"):
        rewriter.replace(relu, late)
    for other in (late, double, flat, wide):
        rewriter.erase(other)
    verify(program, 2)


def test_replace_in_changes_one_user(program: Program) -> None:
    rewriter = Rewriter(program, "test")
    linear, relu = op(program, aten.linear.default), op(program, aten.relu.default)
    with rewriter.after(relu):
        other = rewriter.call(aten.tanh.default, linear)
    rewriter.replace_in(relu, linear, program.main.placeholders[0])
    assert relu.args == (program.main.placeholders[0],) and other.args == (linear,)


def test_erase_refuses_a_used_value(program: Program) -> None:
    rewriter = Rewriter(program, "test")
    with pytest.raises(VerifyError, match="cannot erase a value that %relu_default uses"):
        rewriter.erase(op(program, aten.linear.default))


def test_weights_have_one_node_and_its_type_follows(program: Program) -> None:
    """Also when two rewriters take turns, and for nested graphs that read the same weight."""
    a, b = Rewriter(program, "a"), Rewriter(program, "b")
    node = a.weight("a")
    assert b.weight("a") is node and a.mutations == 0
    new = b.weight("fresh", Weight.from_tensor(torch.ones(2, 3)))
    assert a.weight("fresh") is new and new.meta["val"].shape == (2, 3)
    a.erase(new)
    assert b.weight("fresh") is not new
    changed = a.weight("a", Weight.from_tensor(torch.ones(4, 4).double()))
    assert changed is node and node.meta["val"].dtype == torch.float64
    assert op(program, "a", "yes").meta["val"].dtype == torch.float64
    with pytest.raises(VerifyError, match="no weight 'missing'"):
        a.weight("missing")
    assert a.fresh_weight_name("a") == "a_2" and a.fresh_weight_name("b") == "b"
    with pytest.raises(VerifyError, match="no graph 'nowhere'"):
        Rewriter(program, "a", "nowhere")


def test_new_weights_can_be_used_anywhere(program: Program) -> None:
    rewriter = Rewriter(program, "test")
    linear = op(program, aten.linear.default)
    bias = rewriter.weight("bias", Weight.from_tensor(torch.ones(4)))
    rewriter.set_args(linear, [*linear.args, bias])
    verify(program, 2)


def test_erase_dead_keeps_what_has_an_effect(program: Program) -> None:
    rewriter = Rewriter(program, "test")
    x, p = program.main.placeholders
    with rewriter.before(program.main.output_node):
        rewriter.call(aten._assert_async.msg, p, "p must hold")
        a = rewriter.call(aten.neg.default, x)
        rewriter.call(aten.neg.default, a)
    before = program.mutations
    assert rewriter.erase_dead() == 2 and program.mutations == before + 2
    assert any(is_op(n, aten._assert_async) for n in program.graph.nodes)
    assert rewriter.erase_dead() == 0


@given(program=programs(symbolic=True))
@settings(max_examples=20)
def test_replacing_by_an_equal_value_changes_nothing(program: Program) -> None:
    """A law: every operator replaced by a copy of itself gives the same numbers and a sound program."""
    changed = program.clone()
    rewriter = Rewriter(changed, "test")
    for node in list(changed.graph.nodes):
        if node.op == "call_function":
            with rewriter.before(node):
                copy = rewriter.call(node.target, *node.args, **node.kwargs)
            rewriter.replace(node, copy)
    verify(changed, 2)
    verify(changed, 3, reference=program, feeds=[feeds_of(program, 2)], tol=0.0)
    assert changed.fingerprint() == program.fingerprint()


def test_is_op() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(aten.add.Tensor, (x, 1))
    assert is_op(node, aten.add.Tensor) and is_op(node, aten.add) and is_op(node, aten.mul, aten.add)
    assert not is_op(node, aten.add.Scalar) and not is_op(x, aten.add) and not is_op(1, aten.add)
