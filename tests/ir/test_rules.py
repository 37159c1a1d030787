"""Rules: a hit, near misses with their reasons, shared weights, graph outputs, idempotence, termination, cost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import fx

from graphlathe.ir.errors import VerifyError
from graphlathe.ir.patterns import Constant, Match, OneOf, Op, Value, WeightValue
from graphlathe.ir.program import MADE_BY, Program
from graphlathe.ir.rewrite import Rewriter
from graphlathe.ir.rules import Rule, apply_rules, find, why_not
from graphlathe.ir.text import parse_program, print_program
from graphlathe.ir.verify import verify
from graphlathe.ir.weights import Weight
from tests.counting import assert_linear, calls
from tests.strategies import feeds_of, programs

aten = torch.ops.aten

DOUBLE_NEGATION = Rule(
    "double-negation",
    Op(aten.neg.default, Op(aten.neg.default, Value("x"))),
    rewrite=lambda rewriter, match: match["x"],
)


def _not_shared(match: Match) -> str | None:
    return "the weight has other readers" if len(match["w"].users) > 1 else None


def _fold_scale(rewriter: Rewriter, match: Match) -> fx.Node:
    old = str(match["w"].target)
    weight = Weight.from_tensor(rewriter.program.weights[old].tensor() * match["c"])
    name = rewriter.fresh_weight_name(old)
    return rewriter.call(aten.linear.default, match["x"], rewriter.weight(name, weight), like=match["linear"])


FOLD_SCALE = Rule(
    "fold-scale",
    Op(
        aten.mul,
        Op(aten.linear.default, Value("x"), WeightValue("w"), name="linear", users=1),
        Constant("c", where=lambda value: isinstance(value, (int, float)) and value != 0),
        commutative=True,
    ),
    check=_not_shared,
    rewrite=_fold_scale,
)


def program_of(*lines: str, returns: str) -> Program:
    """A program over ``%x: f32[S, 4]`` with two weights."""
    body = "\n".join(f"  {line}" for line in lines)
    count = sum(bool(value.strip()) for value in returns.split(","))
    outputs = ", ".join(f"%out{i}" for i in range(count))
    return parse_program(
        f"""program @main(%x: f32[S, 4]) -> ({outputs}) {{
  dim S = 2 in [1, inf]
  %w0 = weight "a" : f32[4, 4] #00000000
  %w1 = weight "b" : f32[4, 4] #00000000
{body}
  return ({returns})
}}
"""
    )


def check_same(before: Program, after: Program) -> None:
    verify(after, 2)
    verify(after, 3, reference=before, feeds=[{"x": torch.randn(3, 4)}])


def test_hit() -> None:
    """The match is rewritten, dead parts go, new nodes carry the maker, and the numbers stay."""
    program = program_of(
        "%0 = aten.linear(%x, %w0) : f32[S, 4]",
        "%1 = aten.mul.Tensor(%0, 2.0) : f32[S, 4]",
        "%2 = aten.relu(%1) : f32[S, 4]",
        returns="%2,",
    )
    before = program.clone()
    stats = apply_rules(program, [FOLD_SCALE])
    assert (stats.hits, stats.by_rule, stats.misses, stats.converged) == (1, {"fold-scale": 1}, {}, True)
    text = print_program(program)
    assert "mul" not in text and '"a_2"' in text and '"a"' not in text
    assert program.graph.find_nodes(op="call_function", target=aten.linear.default)[0].meta[MADE_BY] == "rules"
    check_same(before, program)


def test_near_miss_gives_its_reason() -> None:
    """Nothing is rewritten; the report counts reasons, and `why_not` ranks the places."""
    program = program_of(
        "%0 = aten.linear(%x, %w0) : f32[S, 4]",
        "%1 = aten.mul.Tensor(%0, 0) : f32[S, 4]",  # full structure, wrong constant
        "%2 = aten.relu(%1) : f32[S, 4]",
        "%3 = aten.mul.Tensor(%2, 2) : f32[S, 4]",  # only the root
        "%4 = aten.linear(%3, %w1) : f32[S, 4]",
        "%5 = aten.mul.Tensor(%4, 2) : f32[S, 4]",  # linear is used twice
        "%6 = aten.add.Tensor(%4, %5) : f32[S, 4]",
        returns="%6,",
    )
    before = program.fingerprint()
    stats = apply_rules(program, [FOLD_SCALE])
    assert stats.hits == 0 and stats.attempts == 3 and program.fingerprint() == before and program.mutations == 0
    assert stats.misses == {
        "fold-scale: other of aten.mul.Tensor is 0, not a fitting constant 'c'": 1,
        "fold-scale: self of aten.mul.Tensor is aten.relu.default, not aten.linear.default": 1,
        "fold-scale: self of aten.mul.Tensor (aten.linear.default) has 2 users, not 1": 1,
    }
    misses = why_not(program, FOLD_SCALE)
    assert [m.node for m in misses] == ["mul_tensor", "mul_tensor_2", "mul_tensor_1"]
    assert "a fitting constant" in misses[0].reason and misses[1].blamed == "linear_default_1"
    assert str(misses[2]).startswith("fold-scale at %mul_tensor_1: self of aten.mul.Tensor is aten.relu")
    assert len(why_not(program, FOLD_SCALE, limit=1)) == 1


def test_the_check_may_refuse_a_shared_weight() -> None:
    program = program_of(
        "%0 = aten.linear(%x, %w0) : f32[S, 4]",
        "%1 = aten.mul.Tensor(%0, 2) : f32[S, 4]",
        "%2 = aten.linear(%1, %w0) : f32[S, 4]",
        returns="%2,",
    )
    stats = apply_rules(program, [FOLD_SCALE])
    assert stats.hits == 0 and stats.misses == {"fold-scale: the weight has other readers": 1}
    assert why_not(program, FOLD_SCALE)[0].reason == "the weight has other readers"


def test_a_shared_weight_keeps_its_numbers_for_others() -> None:
    """Without the check, the rewrite makes a new weight; the other reader is not affected."""
    program = program_of(
        "%0 = aten.linear(%x, %w0) : f32[S, 4]",
        "%1 = aten.mul.Tensor(%0, 2) : f32[S, 4]",
        "%2 = aten.linear(%1, %w0) : f32[S, 4]",
        returns="%2,",
    )
    before = program.clone()
    stats = apply_rules(program, [Rule("careless", FOLD_SCALE.pattern, rewrite=_fold_scale)])
    assert stats.hits == 1
    check_same(before, program)


def test_a_value_that_is_also_a_graph_output() -> None:
    """Inside a match it counts as a use; as the root of a match it is simply replaced in the output."""
    lines = ("%0 = aten.linear(%x, %w0) : f32[S, 4]", "%1 = aten.mul.Tensor(%0, 2) : f32[S, 4]")
    inner = program_of(*lines, returns="%1, %0")
    assert apply_rules(inner, [FOLD_SCALE]).misses == {
        "fold-scale: self of aten.mul.Tensor (aten.linear.default) has 2 users, not 1": 1
    }
    outer = program_of(*lines, returns="%1, %1")
    before = outer.clone()
    assert apply_rules(outer, [FOLD_SCALE]).hits == 1
    check_same(before, outer)
    negated = program_of("%0 = aten.neg(%x) : f32[S, 4]", "%1 = aten.neg(%0) : f32[S, 4]", returns="%1, %0")
    before = negated.clone()
    assert apply_rules(negated, [DOUBLE_NEGATION]).hits == 1
    assert negated.main.output_values[0] is negated.main.placeholders[0]
    check_same(before, negated)


def test_idempotence() -> None:
    """A second run finds nothing and changes nothing."""
    lines = [f"%{i} = aten.neg(%{i - 1 if i else 'x'}) : f32[S, 4]" for i in range(7)]
    program = program_of(*lines, returns="%6,")
    before = program.clone()
    stats = apply_rules(program, [DOUBLE_NEGATION])
    assert stats.hits == 3 and len(program.graph.find_nodes(op="call_function", target=aten.neg.default)) == 1
    check_same(before, program)
    count, text = program.mutations, print_program(program)
    again = apply_rules(program, [DOUBLE_NEGATION])
    assert again.hits == 0 and program.mutations == count and print_program(program) == text


def test_a_rewrite_enables_another_one() -> None:
    """Users within the pattern's reach are visited again; so are values that lost all other users."""
    program = program_of(
        "%0 = aten.linear(%x, %w0) : f32[S, 4]",
        "%1 = aten.neg(%0) : f32[S, 4]",
        "%2 = aten.neg(%1) : f32[S, 4]",
        "%3 = aten.mul.Tensor(%2, 2) : f32[S, 4]",
        returns="%3,",
    )
    before = program.clone()
    stats = apply_rules(program, [FOLD_SCALE, DOUBLE_NEGATION])
    assert stats.by_rule == {"double-negation": 1, "fold-scale": 1} and stats.rounds >= 2 and stats.misses == {}
    check_same(before, program)


def test_rules_that_undo_each_other_stop() -> None:
    """`max_rounds` bounds the work, and the result says that it did not converge."""
    swap = [
        Rule("to-tanh", Op(aten.relu.default, Value("x")), rewrite=lambda r, m: r.call(aten.tanh.default, m["x"])),
        Rule("to-relu", Op(aten.tanh.default, Value("x")), rewrite=lambda r, m: r.call(aten.relu.default, m["x"])),
    ]
    program = program_of("%0 = aten.relu(%x) : f32[S, 4]", returns="%0,")
    stats = apply_rules(program, swap, max_rounds=5)
    assert (stats.hits, stats.rounds, stats.converged) == (5, 5, False)
    verify(program, 2)


def test_a_rewrite_of_another_type_is_refused() -> None:
    program = program_of("%0 = aten.relu(%x) : f32[S, 4]", returns="%0,")
    wrong = Rule("wrong", Op(aten.relu.default, Value("x")), rewrite=lambda r, m: r.call(aten.sum.default, m["x"]))
    with pytest.raises(VerifyError, match="cannot stand for it"):
        apply_rules(program, [wrong])


def _match(program: Program, pattern: Op) -> Match | None:
    root = program.main.output_values[0]
    found = find(Rule("probe", pattern), root)
    return found if isinstance(found, Match) else None


def test_commutative_patterns_backtrack() -> None:
    """Both orders are tried at every level, with one binding for one name."""
    program = program_of(
        "%0 = aten.relu(%x) : f32[S, 4]",
        "%1 = aten.mul.Tensor(%0, %x) : f32[S, 4]",
        "%2 = aten.add.Tensor(%x, %1) : f32[S, 4]",
        returns="%2,",
    )
    product = Op(aten.mul.Tensor, Value("a"), Op(aten.relu.default, Value("a")), commutative=True)
    found = _match(program, Op(aten.add.Tensor, product, Value("a"), commutative=True))
    assert found is not None and found["a"] is program.main.placeholders[0]
    assert _match(program, Op(aten.add.Tensor, product, Value("a"))) is None
    assert _match(program, Op(aten.add.Tensor, Value("a"), Value("a"))) is None


def test_arguments_that_are_not_mentioned_must_be_defaults() -> None:
    program = program_of("%0 = aten.add.Tensor(%x, %x, alpha=2) : f32[S, 4]", returns="%0,")
    assert _match(program, Op(aten.add.Tensor, Value("a"), Value("b"))) is None
    assert (
        "alpha of aten.add.Tensor is 2, not its default"
        in why_not(program, Rule("r", Op(aten.add.Tensor, Value(), Value())))[0].reason
    )
    assert _match(program, Op(aten.add.Tensor, Value("a"), Value("b"), rest=True)) is not None
    assert _match(program, Op(aten.add.Tensor, Value("a"), Value("b"), alpha=2)) is not None
    found = _match(program, Op(aten.add.Tensor, Value("a"), Value("b"), alpha=Constant("k")))
    assert found is not None and found["k"] == 2
    assert _match(program, Op(aten.add.Tensor, Value("a"), Value("b"), beta=2)) is None
    explicit = program_of("%0 = aten.add.Tensor(%x, %x, alpha=1) : f32[S, 4]", returns="%0,")
    assert _match(explicit, Op(aten.add.Tensor, Value("a"), Value("a"))) is not None


def test_lists_alternatives_and_any_operator() -> None:
    program = program_of(
        "%0 = aten.sigmoid(%x) : f32[S, 4]",
        "%1 = aten.cat([%0, %x], 1) : f32[S, 8]",
        returns="%1,",
    )
    activation = OneOf((Op(aten.relu.default, Value("v")), Op(aten.sigmoid.default, Value("v"))))
    assert _match(program, Op(aten.cat.default, [activation, Value("v")], 1)) is not None
    assert _match(program, Op(aten.cat.default, [activation], 1)) is None
    assert _match(program, Op(aten.cat.default, [Value("v"), activation], 1)) is None
    assert (
        _match(program, Op((aten.stack, aten.cat), [Op(None, Value("v"), name="any"), Value()], Constant("d")))
        is not None
    )


def test_nested_graphs_are_rewritten_too() -> None:
    program = parse_program("""\
program @main(%x: f32[4], %p: bool[]) -> %y {
  %0 = higher_order.cond(%p, @a, @b, (%x,)) : (f32[4],)
  %1 = operator.getitem(%0, 0) : f32[4]
  return (%1,)
}
graph @a(%a0: f32[4]) {
  %0 = aten.neg(%a0) : f32[4]
  %1 = aten.neg(%0) : f32[4]
  %2 = aten.relu(%1) : f32[4]
  return (%2,)
}
graph @b(%a0: f32[4]) {
  %0 = aten.tanh(%a0) : f32[4]
  return (%0,)
}
""")
    before = program.clone()
    assert len(why_not(program, DOUBLE_NEGATION)) == 1  # the inner one of the two
    assert apply_rules(program, [DOUBLE_NEGATION]).hits == 1
    verify(program, 2)
    feeds = {"x": torch.randn(4), "p": torch.tensor(True)}
    verify(program, 3, reference=before, feeds=[feeds], tol=0.0)


@given(program=programs())
@settings(max_examples=30)
def test_random_programs_keep_their_numbers(program: Program) -> None:
    before = program.clone()
    relu_twice = Rule(
        "relu-twice", Op(aten.relu.default, Op(aten.relu.default, Value("x"), name="r")), rewrite=lambda r, m: m["r"]
    )
    stats = apply_rules(program, [DOUBLE_NEGATION, relu_twice])
    assert stats.converged
    verify(program, 2)
    verify(program, 3, reference=before, feeds=[feeds_of(program)], tol=0.0)
    assert apply_rules(program, [DOUBLE_NEGATION, relu_twice]).hits == 0


def test_linear_in_the_number_of_nodes() -> None:
    """Four times the nodes are about four times the work, also when every other node is a hit."""

    def work(count: int) -> int:
        lines: list[str] = []
        for i in range(count):
            operator_ = "neg" if i % 3 else "relu"
            lines.append(f"%{i} = aten.{operator_}(%{i - 1 if i else 'x'}) : f32[S, 4]")
        program = program_of(*lines, returns=f"%{count - 1},")
        assert apply_rules(program.clone(), [DOUBLE_NEGATION, FOLD_SCALE]).hits == count // 3
        return calls(lambda: apply_rules(program.clone(), [DOUBLE_NEGATION, FOLD_SCALE]))

    assert_linear(work(600), work(2400), 4)
