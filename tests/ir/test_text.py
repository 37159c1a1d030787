"""The text form: canonical, complete, and read back to an equal program."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import fx, nn
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop

from graphlathe.ir.errors import GraphlatheError, ImportModelError
from graphlathe.ir.from_text import parse_again
from graphlathe.ir.from_torch import trace
from graphlathe.ir.infer import Inference
from graphlathe.ir.program import Program
from graphlathe.ir.rewrite import Rewriter
from graphlathe.ir.text import parse_program, print_program
from graphlathe.ir.verify import compare, verify
from graphlathe.ir.weights import Weight
from graphlathe.passes.base import Context
from graphlathe.passes.canonical.cse import CommonSubexpressions
from graphlathe.passes.canonical.raise_all import RaiseAll
from graphlathe.tools import zoo
from tests.counting import assert_linear, calls
from tests.strategies import feeds_of, programs
from tests.zoo_programs import over_zoo, traced

aten = torch.ops.aten


def assert_equal_programs(program: Program, again: Program, feeds: dict[str, Any]) -> None:
    """Same text, same fingerprint, bit-equal outputs."""
    assert print_program(again) == print_program(program)
    assert again.fingerprint() == program.fingerprint()
    verify(again, 1)
    compare(again, program, [feeds], tol=0.0)


@over_zoo(quick=("llama", "mixtral"))
def test_zoo_round_trip(name: str) -> None:
    """Every zoo model reads back to a program with the same text, fingerprint and numbers."""
    program, model = traced(name), zoo.get(name)
    sizes = model.unseen_sizes[0] if model.dynamic else model.trace_sizes
    text = print_program(program, origins=True)
    again = parse_program(text, program.weights)
    assert print_program(again, origins=True) == text
    assert_equal_programs(program, again, dict(model.inputs(sizes)))


@over_zoo(quick=("llama", "mixtral"))
def test_zoo_round_trip_when_raised(name: str) -> None:
    """A result of passes reads back where nothing is known of it (`verify` reads it where its sizes are known)."""
    program = traced(name).clone()
    RaiseAll().run(program, Context())
    text = print_program(program)
    assert print_program(parse_program(text, program.weights)) == text


def test_reading_again_infers_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what is known of a program, its text is read to the same text, and no operator is run."""
    program = traced("llama")
    known = Inference(program, share=True)
    for node in program.graph.nodes:
        if node.op == "call_function":
            known.value(node)
    text = print_program(program)

    def refuse(program: Program, node: fx.Node) -> Any:
        raise AssertionError(f"{node.target} is inferred anew")

    monkeypatch.setattr("graphlathe.ir.infer.infer", refuse)
    again = parse_again(text, known)
    assert print_program(again) == text
    assert again.main.dims.by_name == program.main.dims.by_name  # with their symbols


@given(program=programs())
@settings(max_examples=60)
def test_random_programs_round_trip(program: Program) -> None:
    """As the zoo, for random graphs, at a batch size that was not traced."""
    size = 5 if program.main.dims.by_name else 3
    again = parse_program(print_program(program), program.weights)
    assert_equal_programs(program, again, feeds_of(program, size))


class _Cond(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda v: self.a(v) + 1, lambda v: self.b(v) * 2, (x,))


class _While(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y * 2), (torch.tensor(0), x))


class _Scan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        def step(carry: torch.Tensor, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            new = carry + self.inner(row)
            return new, new * 2

        return scan(step, torch.zeros(4), x)


class _DataDependent(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.nonzero().float() * 2


def test_reading_again_keeps_data_dependent_sizes_apart() -> None:
    """What the text states of a size that depends on data is not told to the program at hand."""
    program = trace(_DataDependent(), (torch.arange(4.0),))
    again = parse_again(print_program(program), Inference(program))
    assert again.fake_mode is not program.fake_mode
    assert print_program(again) == print_program(program)


@pytest.mark.parametrize("model", [_Cond, _While, _Scan, _DataDependent])
@pytest.mark.parametrize("dynamic", [None, {"x": {0: "B"}}])
def test_control_flow_and_data_dependent_sizes_round_trip(model: type[nn.Module], dynamic: Any) -> None:
    """Nested graphs, and sizes that only the data decide, read back and run on both branches."""
    module = model().eval()
    program = trace(module, (torch.randn(3, 4),), dynamic=dynamic)
    verify(program, 2)
    again = parse_program(print_program(program), program.weights)
    for x in (torch.ones(3, 4), -torch.ones(3, 4)):
        assert_equal_programs(program, again, {"x": x})
        with torch.no_grad():
            expected = module(x)
        outputs = again(x)
        got = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs.values())
        want = [expected] if isinstance(expected, torch.Tensor) else list(expected)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


class _ReadTwice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = (x > 0).sum(), (x > 0).sum()
        return torch.ones(first.item(), second.item())


def test_two_readings_of_one_tensor_keep_their_two_names() -> None:
    """As they are left by merging the two equal tensors, but not the sizes that were read from them."""
    program = trace(_ReadTwice(), {"x": torch.randn(3, 4)})
    CommonSubexpressions().run(program, Context())
    items = [n for n in program.graph.nodes if "item" in str(n.target)]
    assert len(items) == 2
    assert items[0].args == items[1].args
    again = parse_program(print_program(program), program.weights)
    assert "f32[u0, u1]" in print_program(program)
    assert_equal_programs(program, again, {"x": torch.ones(3, 4)})


def test_golden_of_nested_graphs(golden: Callable[[str, str], None]) -> None:
    """The whole text of a small model with control flow, weights by their random stand-ins."""
    torch.manual_seed(0)
    program = trace(_Cond().eval(), (torch.ones(3, 4),), dynamic={"x": {0: "B"}})
    golden("ir/text_cond", print_program(parse_program(print_program(program)), origins=True))


HEADER = """\
history "drop-layers{ratio=0.2}"
tied "head.weight" -> "embed.weight"

program @main(%ids: i64[B, S], %"w0": f32[2*B, 4], %past.0.key: f16[4], %buf: f32[4]) -> (%logits, %"0", %buf.next) {
  dim B = 2 in [1, inf]
  dim S = 12 in [3, 512]
  guard 8 < S + ((8 + (-1)*(S % 8)) % 8)
  guard S // 2 != 5 or B == 4
  argument ids(%ids)
  argument "odd name"(%"w0", %past.0.key)
  constant use_cache = False
  constant cfg.mode = "a \\"quoted\\" ; string"
  state %buf -> %buf.next = weight "start" : f32[4] #00000000
  %w0 = weight "embed.weight" : f32[7, 4] #00000000
  %0 = aten.embedding(%w0, %ids) : f32[B, S, 4]
  %1 = aten.sym_size.int(%ids, 1) : int(S)
  %2 = operator.add(%1, 3) : int(S + 3)
  %3 = aten.view(%0, [-1, 4]) : f32[B*S, 4]
  %4 = aten.slice.Tensor(%3, 0, 0, 9223372036854775807, 2) : f32[(B*S + 1) // 2, 4]
  %5 = aten.full([%2, 2], -inf, device=cpu, dtype=f64, layout=strided, pin_memory=False) : f64[S + 3, 2]
  %6 = aten.clone(%buf, memory_format=contiguous_format) : f32[4]
  %7 = aten.split_with_sizes(%"w0", [1, 3], 1) : [f32[2*B, 1], f32[2*B, 3]]
  %8 = operator.getitem(%7, 0) : f32[2*B, 1]
  %9 = aten.div.Tensor_mode(%8, %8, rounding_mode="floor") : f32[2*B, 1]
  %10 = aten.nan_to_num(%9, nan) : f32[2*B, 1]
  return (%4, 3, %6)
}
"""


def _normalized(text: str) -> str:
    return re.sub(r"#[0-9a-f]{8}", "#00000000", text)


def test_header_and_arguments_round_trip() -> None:
    """History, ties, dims, guards, argument structure, constants, state, and every kind of argument."""
    text = HEADER.replace("S // 2 !=", "(S // 2) !=").replace("(B*S + 1) // 2", "((1 + B*S) // 2)")
    program = parse_program(text)
    printed = print_program(program)
    again = parse_program(printed, program.weights)
    assert print_program(again) == printed
    for line in HEADER.splitlines():
        if "//" not in line and "%4 =" not in line and "guard" not in line and "+" not in line:
            assert line in _normalized(printed).splitlines(), line
    entry = again.main
    assert entry.inputs == ("ids", "w0", "past.0.key", "buf")
    assert entry.outputs == ("logits", "0", "buf.next")
    assert entry.arguments == {"ids": ("ids",), "odd name": ("w0", "past.0.key")}
    assert entry.constants == {"use_cache": False, "cfg.mode": 'a "quoted" ; string'}
    assert [(s.input, s.output, s.initial) for s in entry.state] == [("buf", "buf.next", "start")]
    assert (entry.dims.by_name["S"].hint, entry.dims.by_name["S"].min, entry.dims.by_name["S"].max) == (12, 3, 512)
    assert entry.dims.by_name["B"].max is None
    assert again.history == ["drop-layers{ratio=0.2}"] and again.tied == {"head.weight": "embed.weight"}
    assert [g.expr.free_symbols == {entry.dims.by_name["S"].symbol} for g in entry.dims.guards] == [True, False]
    feeds = {"ids": torch.zeros(3, 9, dtype=torch.int64), "w0": torch.ones(6, 4), "past.0.key": torch.ones(4).half()}
    out = again.run(again.feeds(**feeds))
    assert out["logits"].shape == (14, 4) and out["0"] == 3
    verify(program, 2)


@pytest.mark.parametrize(
    "guard",
    [
        "2 <= 4*((-1) + (S // 10))*((-1) + (S // 10))",
        "((64*(S // 10) + (-96)) % (16*(S // 10) + (-24))) == 0",
        "Mod(S + (-9), 8) == 0 or PythonMod(S, 8) == 5",
        "max(1, S // 8)*max(1, S // 8)*max(1, S // 8) != max(1, S // 8)*max(1, S // 8)",
        "math.ceil(S / 3) > 2 and 2*S < T*T*T",
        "(S ** T) > 5",
    ],
)
def test_guards_read_back_to_themselves(guard: str) -> None:
    """Whatever sympy makes of an expression: its text is a fixed point, and means the same at every size."""
    text = f"""\
program @main(%x: f32[S, T]) -> (%y) {{
  dim S = 53 in [2, inf]
  dim T = 7 in [2, inf]
  guard {guard}
  return (%x,)
}}
"""
    program = parse_program(text)
    printed = print_program(program)
    again = parse_program(printed)
    assert print_program(again) == printed
    written = guard.replace("PythonMod(S, 8)", "(S % 8)").replace("Mod(S + (-9), 8)", "((S - 9) % 8)")
    for s in range(9, 80):
        sizes = {"S": s, "T": 7}
        for parsed in (program, again):
            symbols = {d.symbol: sizes[d.name] for d in parsed.main.dims.by_name.values()}
            truth = eval(written, {"math": __import__("math"), "max": max}, sizes)
            assert all(g.holds(symbols) for g in parsed.main.dims.guards) == truth


def test_bare_output_and_several_entries() -> None:
    """``-> %output`` is a program that returns the tensor itself; entries may share weights and nested graphs."""
    text = """\
program @main(%x: f32[S, 4]) -> %output {
  dim S = 2 in [1, inf]
  %w0 = weight "a" : f32[4, 4] #00000000
  %0 = aten.linear(%x, %w0) : f32[S, 4]
  return (%0,)
}

program @decode(%x: f32[1, 4]) -> (%y, %z) {
  %w0 = weight "a" : f32[4, 4] #00000000
  %w1 = weight "b" : f32[4] #00000000
  %0 = aten.linear(%x, %w0, %w1) : f32[1, 4]
  return (%0, %w1)
}
"""
    program = parse_program(text)
    assert _normalized(print_program(program)) == text
    assert program.main.bare_output and not program.entries["decode"].bare_output
    x = torch.ones(1, 4)
    assert torch.equal(program(x) + program.weights["b"].tensor(), program.run({"x": x}, entry="decode")["y"])


def test_text_ignores_names_and_orders() -> None:
    """Node names, dict order of weights, order of weight nodes, unused weights: none of it shows; contents do."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    program = trace(model, (torch.randn(2, 4),))
    other = program.clone()
    graph = other.graph
    for index, node in enumerate(graph.nodes):
        node.name = f"renamed_{index}"
    weights = list(graph.find_nodes(op="get_attr"))
    for node in weights[1:]:
        weights[0].prepend(node)  # the other way round
    other.weights = dict(reversed(other.weights.items()))
    other.weights["unused"] = Weight.from_tensor(torch.ones(3))
    assert print_program(other) == print_program(program)
    changed = program.clone()
    name = next(iter(changed.weights))
    changed.weights[name] = Weight.from_tensor(changed.weights[name].tensor() + 1)
    assert print_program(changed) != print_program(program)
    assert changed.fingerprint() != program.fingerprint()


def test_history_does_not_change_the_fingerprint() -> None:
    """Two ways to one program give one fingerprint."""
    program = parse_program("program @main(%x: f32[4]) -> (%y) {\n  return (%x,)\n}\n")
    before = program.fingerprint()
    program.history.append("dce")
    assert program.fingerprint() == before and 'history "dce"' in print_program(program)


def test_origins() -> None:
    """The variant with origins says where a node came from and which pass made it, and reads back."""
    program = trace(nn.Sequential(nn.Linear(4, 4)).eval(), (torch.randn(2, 4),))
    rewriter = Rewriter(program, "double it")
    root = program.main.output_values[0]
    with rewriter.after(root):
        new = rewriter.call(aten.mul.Scalar, root, 2)
    program.main.output_node.args = ((new,),)
    text = print_program(program, origins=True)
    assert re.search(r'aten\.mul\.Scalar\(%0, 2\) : f32\[2, 4\]  ; from 0 by "double it"$', text, re.M)
    assert ";" not in print_program(program)
    assert print_program(parse_program(text, program.weights), origins=True) == text


def test_without_a_store_weights_are_random_but_the_same() -> None:
    """Shapes and dtypes as declared, the same numbers at every call, and the program runs."""
    program = trace(nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)).eval().double(), (torch.randn(2, 8).double(),))
    a, b = (parse_program(print_program(program)) for _ in range(2))
    assert a.fingerprint() == b.fingerprint() != program.fingerprint()
    assert _normalized(print_program(a)) == _normalized(print_program(program))
    x = torch.randn(2, 8).double()
    assert torch.equal(a(x), b(x))


def test_declared_spelling_is_kept_where_it_is_provably_equal() -> None:
    """The author of a text may write a size in his own way; it must be equal, though."""
    text = """\
program @main(%x: f32[S, 4]) -> (%y) {
  dim S = 2 in [1, inf]
  %0 = aten.cat([%x, %x]) : f32[SIZE, 4]
  return (%0,)
}
"""
    for spelling in ("S + S", "2*S", "4*S // 2"):
        program = parse_program(text.replace("SIZE", spelling))
        assert program.outputs[0].shape[0] == 2 * program.inputs[0].shape[0]
    with pytest.raises(ImportModelError, match=re.escape("aten.cat gives f32[2*S, 4] here")):
        parse_program(text.replace("SIZE", "3*S"))


BASE = """\
program @main(%x: f32[S, 4]) -> (%y) {
  dim S = 2 in [1, 16]
  %w0 = weight "a" : f32[4, 4] #00000000
  %0 = aten.linear(%x, %w0) : f32[S, 4]
  return (%0,)
}
"""


@pytest.mark.parametrize(
    ("old", "new", "message", "line", "column"),
    [
        ("aten.linear", "aten.linaer", "unknown operator 'aten.linaer' (did you mean 'linear'?)", 4, 3),
        ("aten.linear", "aten.linear.old", "'aten.linear' has no overload 'old'", 4, 3),
        ("aten.linear", "mylib.linear", "unknown operator 'mylib.linear'", 4, 3),
        ("aten.linear", "operator.gte", "unknown function 'operator.gte' (did you mean 'operator.gt'?)", 4, 3),
        ("aten.linear", "operator.methodcaller", "unknown function 'operator.methodcaller'", 4, 3),
        ("aten.linear(%x, %w0)", 'torch.load("model.pt")', "unknown function 'torch.load'", 4, 3),
        ("aten.linear(%x, %w0)", 'aten.save(%x, "x.pt")', "'aten.save' has no overload 'default'", 4, 3),
        ("aten.linear(%x, %w0)", 'aten.from_file("x", True, 4)', "'aten.from_file' touches files", 4, 3),
        ("aten.linear", "aten.add", "'aten.add' has no overload 'default'", 4, 3),
        ("aten.linear", "higher_order.nothing", "unknown operator 'higher_order.nothing'", 4, 3),
        ("aten.linear(%x, %w0)", "aten.linear(%x, %w1)", "'%w1' is not defined", 4, 24),
        ("aten.linear(%x, %w0)", "aten.linear(%x, @body)", "no graph 'body'", 4, 24),
        ("aten.linear(%x, %w0)", "aten.linear(%x, w0)", "'w0' is no value", 4, 24),
        ("aten.linear(%x, %w0)", "aten.linear(%x, %x, %x, %x)", "refuses its arguments", 4, 3),
        ("aten.linear(%x, %w0)", "aten.linear(%x %w0)", "found '%w0'", 4, 23),
        ("aten.linear(%x, %w0) :", "aten.linear(%x, %w0)", "found 'f32'", 4, 29),
        ("aten.linear(%x, %w0)", "aten.linear(input=%x, %w0)", "a positional argument after a named one", 4, 30),
        (") : f32[S, 4]", ") : f32[S, 5]", "aten.linear gives f32[S, 4] here", 4, 31),
        (") : f32[S, 4]", ") : f64[S, 4]", "aten.linear gives f32[S, 4] here", 4, 31),
        (") : f32[S, 4]", ") : f32[S]", "aten.linear gives f32[S, 4] here", 4, 31),
        (") : f32[S, 4]", ") : int(S)", "aten.linear gives f32[S, 4] here", 4, 31),
        (") : f32[S, 4]", ") : f32[T, 4]", "unknown dimension 'T'", 4, 31),
        (") : f32[S, 4]", ") : f32[S +, 4]", "'S +' is no expression", 4, 31),
        (") : f32[S, 4]", ") : f32[S, 4", "a type is missing or not closed", 4, 31),
        ("(%x: f32[S, 4])", "(%x: g32[S, 4])", "'g32[S, 4]' is no type", 1, 19),
        ("dim S = 2 in [1, 16]", "dim S = 20 in [1, 16]", "the size 20 is outside the range of 'S'", 2, 3),
        ("dim S = 2 in [1, 16]", "dim class = 2 in [1, 16]", "'class' cannot name a dimension here", 2, 3),
        ("dim S = 2 in [1, 16]", "dim S = 2.5 in [1, 16]", "found '2.5'", 2, 11),
        ("  %w0", "  guard S < 2\n  %w0", "the guard does not hold at the sizes of the example", 3, 9),
        ("  %w0", "  guard S + 1\n  %w0", "a guard is a condition on sizes", 3, 9),
        ("  %w0", "  state %x -> %z\n  %w0", "a state pairs an output with an input of this program", 3, 3),
        ("  %w0", "  what\n  %w0", "'what' is not understood", 3, 3),
        ("f32[4, 4] #0", "f32[4, 5] #0", "the weight 'a' is torch.float32 [4, 4]", 3, 22),
        ('weight "a"', 'weight "b"', "no weight 'b' is given", 3, 22),
        ("%w0 = weight", "%x = weight", "'%x' is defined twice", 3, 21),
        ("return (%0,)", "return (%0, %0)", "the returned values do not match the signature", 5, 3),
        ("  return (%0,)\n", "", "'main' returns nothing", 1, 9),
        ("}\n", "", "'main' is not closed", 5, 15),
        ("program @main", "module @main", "'module' is not understood", 1, 1),
        ("  return", "  $eturn", "'$' is not understood", 5, 3),
        (BASE, "# nothing\n", "'#' is not understood", 1, 1),
        (BASE, "", "the text holds no program", 0, 1),
        (BASE, BASE + "\ngraph @lost(%a0: f32[4]) {\n  return %a0\n}\n", "nothing uses the graph 'lost'", 8, 7),
        (BASE, BASE + BASE, "a second program is called 'main'", 7, 9),
    ],
)
def test_errors_point_at_the_place(old: str, new: str, message: str, line: int, column: int) -> None:
    """Every mistake gives line, column, the line itself, and a caret under the place."""
    assert BASE.count(old) == 1 or old == "}\n"
    text = BASE.replace(old, new)
    with pytest.raises(ImportModelError) as caught:
        parse_program(text, {"a": Weight.from_tensor(torch.ones(4, 4))})
    shown = str(caught.value)
    assert message in shown
    found = re.match(r"line (\d+), column (\d+): ", shown)
    assert found is not None
    assert (int(found[1]), int(found[2])) == (line, column), shown
    if line:
        lines = shown.splitlines()
        at = next(i for i, text_ in enumerate(lines) if text_.strip() == "^")
        assert lines[at - 1].removeprefix("    ") == text.splitlines()[line - 1]
        assert lines[at].index("^") == 4 + column - 1


def test_a_graph_that_contains_itself_is_refused() -> None:
    """Nested graphs form a tree."""
    text = """\
program @main(%x: f32[4], %p: bool[]) -> (%y) {
  %0 = higher_order.cond(%p, @a, @a, (%x, %p)) : (f32[4],)
  %1 = operator.getitem(%0, 0) : f32[4]
  return (%1,)
}
graph @a(%a0: f32[4], %a1: bool[]) {
  %0 = higher_order.cond(%a1, @a, @a, (%a0, %a1)) : (f32[4],)
  return (%0,)
}
"""
    with pytest.raises(ImportModelError, match="the graph 'a' contains itself"):
        parse_program(text)


def test_what_has_no_text_form_says_so() -> None:
    """A Python function, or an argument, that no name can bring back."""
    program = trace(nn.ReLU(), (torch.randn(4),))
    node = program.main.output_values[0]
    node.target = lambda x: x
    with pytest.raises(GraphlatheError, match="has no text form"):
        print_program(program)
    node.target, node.args = aten.relu.default, (object(),)
    with pytest.raises(GraphlatheError, match="an argument of type object has no text form"):
        print_program(program)


def test_an_operator_outside_aten() -> None:
    """Any registered operator is found by namespace and name."""

    @torch.library.custom_op("graphlathe_test::twice", mutates_args=())
    def twice(x: torch.Tensor, scales: list[float]) -> torch.Tensor:
        return x * 2 * sum(scales)

    @twice.register_fake
    def _(x: torch.Tensor, scales: list[float]) -> torch.Tensor:
        return torch.empty_like(x)

    text = """\
program @main(%x: f32[4]) -> %y {
  %0 = graphlathe_test.twice(%x, [0.5, 1e-07]) : f32[4]
  return (%0,)
}
"""
    program = parse_program(text)
    assert print_program(program) == text
    assert torch.equal(program(torch.ones(4)), torch.full((4,), 2 * (0.5 + 1e-07)))


def test_printing_is_linear() -> None:
    def work(count: int) -> int:
        graph_text = ["program @main(%x: f32[S, 4]) -> (%y) {", "  dim S = 2 in [1, inf]"]
        graph_text += [
            f"  %{i} = aten.add.Tensor(%{i - 1 if i else 'x'}, 1.5, alpha=2) : f32[S, 4]" for i in range(count)
        ]
        program = parse_program("\n".join([*graph_text, f"  return (%{count - 1},)", "}"]))
        return calls(lambda: print_program(program))

    assert_linear(work(1500), work(6000), 4)


def test_the_caller_gets_nodes_of_its_own() -> None:
    """Blocks that repeat share no fake tensor: one remembers the data-dependent sizes that were read from it."""
    text = """\
program @main(%x: i64[4], %y: i64[4]) -> (%a, %b) {
  dim u0
  dim u1
  %0 = aten.neg(%x) : i64[4]
  %1 = aten.neg(%y) : i64[4]
  %2 = aten.nonzero(%0) : i64[u0, 1]
  %3 = aten.nonzero(%1) : i64[u1, 1]
  return (%2, %3)
}
"""
    program = parse_program(text)
    assert print_program(program) == text
    values = [n.meta["val"] for n in program.graph.nodes if isinstance(n, fx.Node) and "val" in n.meta]
    assert len({id(v) for v in values}) == len(values)
