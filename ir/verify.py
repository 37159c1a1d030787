"""Is a program well formed, and does it still compute what it should?

====== ====================================================================================================
level  checks
====== ====================================================================================================
0      nothing
1      structure: node kinds, order, weights, nested graphs, types present, signature, state, symbols
2      1, and shapes inferred anew from the operators, and the text round trip
3      2, and a differential run against a reference on given inputs
====== ====================================================================================================

Levels 1 and 2 take time linear in the number of nodes; level 2 infers each distinct operator and shape once.
"""

from __future__ import annotations

import keyword
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import sympy
import torch
from torch import fx

from .errors import GraphlatheError, VerifyError
from .infer import Inference
from .program import ORIGIN, Entry, Program
from .types import TypePrinter, agrees, is_unbacked, symbols_of

TOLERANCE: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.complex128: 1e-12,
    torch.float32: 1e-5,
    torch.complex64: 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}
"""Allowed ``max|a-b| / max|b|`` by dtype; half precision: a few units in the last place of its largest value."""


def verify(
    program: Program,
    level: int = 1,
    *,
    reference: Program | None = None,
    feeds: Sequence[Mapping[str, Any]] | None = None,
    tol: float | None = None,
    pass_name: str | None = None,
) -> None:
    """Check a program.

    Args:
        program: the program.
        level: 0 to 3, see the module's text.
        reference: level 3: the program whose outputs must be found again, by name, for every feed.
        feeds: level 3: calls of the main entry, as named inputs.
        tol: level 3: allowed ``max|a-b| / max|b|``; by default 1e-5 in float32, 1e-12 in float64.
        pass_name: the pass that ran last, for messages.

    Raises:
        VerifyError: a check failed; the message names the node, its origin, what was expected, and what to do.
    """
    if level not in (0, 1, 2, 3):
        raise VerifyError(f"no level {level}", expected="0, 1, 2 or 3")
    if level >= 1:
        _Structure(program, pass_name).check()
    if level >= 2:
        _check_text(_check_types(program, pass_name), pass_name)
    if level >= 3:
        if reference is None or not feeds:
            raise VerifyError(
                "level 3 compares with a reference",
                pass_name=pass_name,
                expected="reference=, and at least one call in feeds=",
            )
        compare(program, reference, feeds, tol=tol, pass_name=pass_name)


class _Structure:
    """Level 1."""

    def __init__(self, program: Program, pass_name: str | None) -> None:
        self.program = program
        self.pass_name = pass_name
        self.free: dict[Any, frozenset[sympy.Symbol]] = {}

    def fail(self, message: str, node: fx.Node | None = None, **more: str | None) -> NoReturn:
        raise VerifyError(
            message,
            pass_name=self.pass_name,
            node=node.name if node is not None else None,
            origin=node.meta.get(ORIGIN) if node is not None else None,
            **more,
        )

    def check(self) -> None:
        program = self.program
        if not program.entries:
            self.fail("the program has no entry")
        clash = set(program.entries) & set(program.subgraphs) | set(program.weights) & set(program.subgraphs)
        if clash:
            self.fail(f"two things are called {', '.join(sorted(clash))}", expected="entries, weights and graphs apart")
        known: set[sympy.Symbol] = set()
        for name, entry in program.entries.items():
            self._graph(name, entry.graph)
            self._signature(name, entry)
            known |= self._dims(name, entry)
        for name, graph in program.subgraphs.items():
            self._graph(name, graph)
        for graph in program.graphs.values():
            self._symbols(graph, known)

    def _graph(self, name: str, graph: fx.Graph) -> None:
        program = self.program
        seen: set[fx.Node] = set()
        weights: dict[str, fx.Node] = {}
        last: fx.Node | None = None
        for node in graph.nodes:
            if last is not None and last.op == "output":
                self.fail(f"a node of '{name}' follows the output", node)
            for operand in node.all_input_nodes:
                if operand not in seen:
                    where = "in another graph, or erased" if operand.graph is not graph else "later"
                    self.fail(
                        f"it reads %{operand.name}, which is computed {where}",
                        node,
                        remedy="insert new nodes before their users",
                    )
                if node not in operand.users:
                    self.fail(f"%{operand.name} does not know it as a user", node, remedy="change graphs by Rewriter")
            seen.add(node)
            last = node
            match node.op:
                case "placeholder" | "call_function":
                    if "val" not in node.meta:
                        self.fail("it has no type", node, expected="meta['val']", remedy="create nodes by Rewriter")
                    if node.op == "call_function":
                        self._operator(node)
                case "get_attr":
                    self._attribute(node, weights)
                case "output":
                    if name in program.entries and not isinstance(node.args[0], tuple):
                        self.fail("an entry returns a tuple", node)
                case _:
                    self.fail(
                        f"a node of kind {node.op} does not belong here",
                        node,
                        expected="placeholder, get_attr, call_function or output",
                    )
        if last is None or last.op != "output":
            self.fail(f"the graph '{name}' has no output", last, expected="an output node at the end")
        try:
            graph.lint()
        except (RuntimeError, AssertionError) as error:
            raise VerifyError(f"the graph '{name}' is malformed: {error}", pass_name=self.pass_name) from error

    def _operator(self, node: fx.Node) -> None:
        if not callable(node.target):
            self.fail(f"{node.target!r} is no operator", node)
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            self.fail(f"{node.target} writes into its argument", node, expected="functional operators only")

    def _attribute(self, node: fx.Node, weights: dict[str, fx.Node]) -> None:
        name = str(node.target)
        if name in self.program.subgraphs:
            return
        weight = self.program.weights.get(name)
        if weight is None:
            self.fail(f"no weight or nested graph '{name}' in the program", node)
        if name in weights:
            self.fail(
                f"the weight '{name}' is read by two nodes, %{weights[name].name} and this one",
                node,
                expected="one per graph",
                remedy="use Rewriter.weight",
            )
        weights[name] = node
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            self.fail("it has no type", node, expected="meta['val']", remedy="use Rewriter.weight")
        if value.dtype != weight.dtype or tuple(value.shape) != weight.shape:
            self.fail(
                f"its type is {value.dtype} {list(value.shape)}",
                node,
                expected=f"the weight's, {weight.dtype} {list(weight.shape)}",
                remedy="set a weight by Rewriter.weight, which infers the type anew",
            )

    def _signature(self, name: str, entry: Entry) -> None:
        placeholders, values = entry.placeholders, entry.output_values
        if len(placeholders) != len(entry.inputs):
            self.fail(
                f"'{name}' has {len(placeholders)} placeholders", expected=f"one for each input: {list(entry.inputs)}"
            )
        if len(values) != len(entry.outputs):
            self.fail(
                f"'{name}' returns {len(values)} values",
                entry.output_node,
                expected=f"one for each output: {list(entry.outputs)}",
            )
        for kind, names in (("inputs", entry.inputs), ("outputs", entry.outputs)):
            twice = sorted({n for n in names if names.count(n) > 1})
            if twice:
                self.fail(f"two {kind} of '{name}' are called {', '.join(twice)}")
        for argument, ports in entry.arguments.items():
            unknown = [p for p in ports if p not in entry.inputs]
            if unknown:
                self.fail(f"the argument '{argument}' of '{name}' consists of unknown inputs {', '.join(unknown)}")
        nodes = dict(zip(entry.inputs, placeholders, strict=True))
        results = dict(zip(entry.outputs, values, strict=True))
        for output, value in results.items():
            if isinstance(value, fx.Node) and value.op == "get_attr" and str(value.target) in self.program.subgraphs:
                self.fail(f"the output '{output}' is a nested graph", value)
        for pair in entry.state:
            if pair.input not in nodes or pair.output not in results:
                self.fail(
                    f"the state '{pair.input}' -> '{pair.output}' of '{name}' has no such input or output",
                    expected=f"inputs {list(entry.inputs)}, outputs {list(entry.outputs)}",
                )
            self._state(pair.initial, nodes[pair.input], results[pair.output])

    def _state(self, initial: str | None, node: fx.Node, result: Any) -> None:
        before = node.meta["val"]
        after = result.meta.get("val") if isinstance(result, fx.Node) else result
        if not same_kind(before, after):
            self.fail(
                f"a state turns into {describe(after)}",
                result if isinstance(result, fx.Node) else node,
                expected=f"the type of its input %{node.name}, {describe(before)}",
            )
        if initial is None:
            return
        weight = self.program.weights.get(initial)
        if weight is None:
            self.fail(f"no weight '{initial}', which a state starts from", node)
        fits = len(weight.shape) == before.dim() and all(
            not isinstance(size, int) or size == stored for size, stored in zip(before.shape, weight.shape, strict=True)
        )
        if weight.dtype != before.dtype or not fits:
            self.fail(
                f"a state starts from '{initial}', {weight.dtype} {list(weight.shape)}", node, expected=describe(before)
            )

    def _dims(self, name: str, entry: Entry) -> set[sympy.Symbol]:
        dims = entry.dims
        known = {dim.symbol for dim in dims.by_name.values()}
        if len(known) < len(dims.by_name):
            self.fail(f"two dimensions of '{name}' have one symbol")
        for key, dim in dims.by_name.items():
            if key != dim.name or not key.isidentifier() or keyword.iskeyword(key):
                self.fail(f"'{key}' cannot name a dimension", expected="an identifier, the same in key and dim")
            if not dim.min <= dim.hint <= (dim.hint if dim.max is None else dim.max):
                self.fail(
                    f"the dimension {key} is {dim.hint} in the example", expected=f"within [{dim.min}, {dim.max}]"
                )
        for guard in dims.guards:
            unknown = guard.expr.free_symbols - known
            if unknown:
                self.fail(
                    f"a guard of '{name}', {guard.expr}, is about {', '.join(sorted(map(str, unknown)))}",
                    expected=f"the dimensions {', '.join(dims.by_name) or '(none)'}",
                )
        return known

    def _symbols(self, graph: fx.Graph, known: set[sympy.Symbol]) -> None:
        for node in graph.nodes:
            value = node.meta.get("val")
            if value is None:
                continue
            for symbol in self._free(value):
                if symbol not in known and not is_unbacked(symbol):
                    self.fail(
                        f"its type depends on {symbol}, which is no dimension of the program",
                        node,
                        expected=f"{', '.join(sorted(map(str, known))) or 'plain sizes'}",
                    )

    def _free(self, value: Any) -> set[sympy.Symbol]:
        """`symbols_of` with a memory for expressions."""
        if isinstance(value, (tuple, list)):
            return set().union(*map(self._free, value))
        found: set[sympy.Symbol] = set()
        for size in value.shape if isinstance(value, torch.Tensor) else (value,):
            if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
                raw = size.node._expr
                if raw not in self.free:
                    self.free[raw] = frozenset(symbols_of(size))
                found |= self.free[raw]
        return found


def same_kind(a: Any, b: Any) -> bool:
    """Whether two values have the same dtype and rank (or are both numbers)."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.dim() == b.dim()
    return not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor)


def describe(value: Any) -> str:
    """A type for messages, with internal symbol names."""
    try:
        return TypePrinter({}).type(value)
    except GraphlatheError:
        return type(value).__name__


def _check_types(program: Program, pass_name: str | None) -> Inference:
    """Level 2: infer every value anew and compare its type. Returns what was inferred."""
    env = program.fake_mode.shape_env
    inference = Inference(program, share=True, common=program.checked)
    names = {d.symbol: d.name for e in program.entries.values() for d in e.dims.by_name.values()}
    printer = TypePrinter(names)
    # Looking must not change what the program assumes: no new guards, no new data-dependent sizes.
    with _undisturbed(env):
        for graph in program.graphs.values():
            for node in graph.nodes:
                if node.op != "call_function":
                    continue
                try:
                    inferred = inference.value(node)
                except GraphlatheError as error:
                    raise VerifyError(
                        error.message, pass_name=pass_name, node=node.name, origin=node.meta.get(ORIGIN)
                    ) from error
                declared = node.meta["val"]
                given = [operand.meta.get("val") for operand in node.all_input_nodes]
                if not agrees(inferred, declared, given, env):
                    raise VerifyError(
                        f"its type is {printer.type(declared)}",
                        pass_name=pass_name,
                        node=node.name,
                        origin=node.meta.get(ORIGIN),
                        expected=f"{printer.type(inferred)}, as {node.target} gives",
                        remedy="create and change nodes by Rewriter, which infers types",
                    )
    return inference


@contextmanager
def _undisturbed(env: Any) -> Generator[None]:
    if env is None:
        yield
        return
    with env.ignore_fresh_unbacked_symbols(), env.suppress_guards():
        yield


def _check_text(inference: Inference, pass_name: str | None) -> None:
    """Level 2: the text form reads back to the same text."""
    from .from_text import parse_again
    from .text import print_program

    program = inference.program
    try:
        text = print_program(program)
        with _undisturbed(program.fake_mode.shape_env):
            again = print_program(parse_again(text, inference))
    except GraphlatheError as error:
        raise VerifyError(f"the text form does not read back: {error}", pass_name=pass_name) from error
    if again != text:
        pairs = zip(text.splitlines(), [*again.splitlines(), ""], strict=False)
        before, after = next((a, b) for a, b in pairs if a != b)
        raise VerifyError(
            f"the text form does not read back the same: {after.strip()}", pass_name=pass_name, expected=before.strip()
        )


def compare(
    program: Program,
    reference: Program,
    feeds: Sequence[Mapping[str, Any]],
    *,
    tol: float | None = None,
    pass_name: str | None = None,
) -> None:
    """Run both programs on every feed and compare the outputs of the reference.

    Raises:
        VerifyError: an output differs by more than the tolerance, or is missing; the message names it.
    """
    for index, feed in enumerate(feeds):
        expected = reference.run(reference.feeds(**feed))
        actual = program.run(program.feeds(**feed))
        nodes = dict(zip(program.main.outputs, program.main.output_values, strict=True))
        for name, wanted in expected.items():
            if name not in actual:
                raise VerifyError(
                    f"the output '{name}' is gone", pass_name=pass_name, expected=f"outputs {', '.join(expected)}"
                )
            limit = tol if tol is not None else TOLERANCE.get(getattr(wanted, "dtype", None), 1e-5)  # type: ignore[arg-type]
            error = output_error(actual[name], wanted)
            if not error <= limit:
                node = nodes[name]
                raise VerifyError(
                    f"the output '{name}' differs by {error:.3g} (max|a-b| / max|b|) on input {index}",
                    pass_name=pass_name,
                    node=node.name if isinstance(node, fx.Node) else None,
                    origin=node.meta.get(ORIGIN) if isinstance(node, fx.Node) else None,
                    expected=f"at most {limit:g}",
                    remedy="bisect the pipeline to find the pass that broke it",
                )


def relative_error(actual: Mapping[Any, Any], expected: Mapping[Any, Any]) -> float:
    """The largest ``max|a-b| / max|b|`` over all outputs; infinite where they cannot be compared.

    Integers, booleans and plain values must be equal, shapes and dtypes too, NaNs and infinities must be in the same
    places; an output that is all zeros must be met exactly.
    """
    if set(actual) != set(expected):
        return float("inf")
    return max((output_error(actual[name], expected[name]) for name in expected), default=0.0)


def output_error(actual: Any, expected: Any) -> float:
    """`relative_error` of one output."""
    wrong = float("inf")
    if isinstance(expected, (tuple, list)):
        if not isinstance(actual, (tuple, list)) or len(actual) != len(expected):
            return wrong
        return max((output_error(a, b) for a, b in zip(actual, expected, strict=True)), default=0.0)
    if not isinstance(expected, torch.Tensor) or not isinstance(actual, torch.Tensor):
        return 0.0 if type(actual) is type(expected) and actual == expected else wrong
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return wrong
    if not (expected.dtype.is_floating_point or expected.dtype.is_complex):
        return 0.0 if torch.equal(actual, expected) else wrong
    wide = torch.complex128 if expected.dtype.is_complex else torch.float64
    a, b = actual.detach().to("cpu", wide), expected.detach().to("cpu", wide)
    finite = torch.isfinite(b)
    if not torch.equal(torch.isfinite(a), finite):
        return wrong
    odd_a, odd_b = a[~finite], b[~finite]
    if not torch.equal(torch.isnan(odd_a), torch.isnan(odd_b)):
        return wrong
    if not torch.equal(odd_a[~torch.isnan(odd_a)], odd_b[~torch.isnan(odd_b)]):
        return wrong
    a, b = a[finite], b[finite]
    difference = (a - b).abs().max().item() if a.numel() else 0.0
    if difference == 0.0:
        return 0.0
    scale = b.abs().max().item()
    return difference / scale if scale else wrong
