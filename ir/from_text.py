"""Text form to `Program`: looks up operators, creates symbols and weights, infers every value and checks it."""

from __future__ import annotations

import keyword
import math
import operator
import re
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from .dims import Dim, Dims, Guard
from .errors import GraphlatheError, suggest
from .infer import Inference, fake_weight
from .parse import DimLine, OperatorLine, Place, Ref, Section, TypeText, WeightLine, parse_document, public_name
from .program import MADE_BY, ORIGIN, Entry, Program, StatePair
from .types import DTYPES, TypePrinter, agrees, is_condition, is_unbacked, parse_expr, symbols_of
from .weights import RandomSource, Weight

_OPERATOR = (
    *("add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg", "pos", "abs", "invert", "lshift", "rshift"),
    *("and_", "or_", "xor", "not_", "eq", "ne", "lt", "le", "gt", "ge", "getitem"),
)
_MATH = ("ceil", "floor", "trunc", "sqrt", "exp", "log", "log2", "log10", "pow", "sin", "cos", "tan", "tanh", "fabs")
FUNCTIONS: dict[str, Any] = {
    **{f"operator.{name}": getattr(operator, name) for name in _OPERATOR},
    **{f"math.{name}": getattr(math, name) for name in _MATH},
    **{f"torch.{name}": getattr(torch, name) for name in dir(torch) if name.startswith(("sym_", "_sym_"))},
}
"""The Python functions (on symbolic sizes) that may stand in a graph. A text may come from anywhere: nothing else is
looked up in Python modules, and of the operators none that touches files (`torch.load` would run a pickle's code)."""

_TOUCHES_FILES = frozenset({"aten::from_file", "aten::save", "aten::load"})


def parse_program(text: str, weights: Mapping[str, Weight] | None = None) -> Program:
    """Read the text form of a program.

    Args:
        text: what `print_program` wrote.
        weights: the weights by name; without it, or for names that it lacks when it is None, weights are random
            numbers of the right shape and dtype, the same ones at every call. Contents are not compared with the hashes
            in the text.

    Returns:
        A program with the same text.

    Raises:
        ImportModelError: bad syntax, an unknown operator, a type that the operator does not give, a weight that is
            missing or of another shape; the message shows the line and column.
    """
    return _Builder(text, weights).program()


def parse_again(text: str, known: Inference) -> Program:
    """`parse_program` for the text of a program that is at hand: what was inferred for it is not inferred anew.

    Args:
        text: what `print_program` wrote of the program.
        known: an inference over the nodes of the program, whose weights and symbols are used.

    Returns:
        A program of its own graphs. It shares the symbols, unless the text has data-dependent sizes: reading them back
        states facts about their symbols, which those of the other program must not learn.

    Raises:
        ImportModelError: as `parse_program` does.
    """
    return _Builder(text, known.program.weights, known).program()


class _Builder:
    """Builds one program; nested graphs are built when their first user is reached."""

    def __init__(self, text: str, store: Mapping[str, Weight] | None, known: Inference | None = None) -> None:
        self.document = parse_document(text)
        self.store = store
        env = known.program.fake_mode.shape_env if known is not None else None
        if env is None or any(d.hint is None for s in self.document.sections for d in s.dims):
            known, env = None, ShapeEnv()
        self.env: ShapeEnv = env
        fresh = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
        self.built = Program({}, {}, fake_mode=known.program.fake_mode if known is not None else fresh)
        self.inference = Inference(self.built, known=known)
        self.shared = known.program.entries if known is not None else {}
        self.nested = {s.name: s for s in self.document.sections if s.kind == "graph"}
        self.symbols: dict[tuple[str, int, int | None, int | None], sympy.Symbol] = {}
        self.unbacked: dict[sympy.Symbol, str] = {}
        self.unbacked_dims = {d.name for s in self.document.sections for d in s.dims if d.hint is None}
        self.size_like = self._size_like()

    def program(self) -> Program:
        document, built = self.document, self.built
        for section in document.sections:
            if section.kind == "program":
                if section.name in built.entries:
                    section.place.fail(f"a second program is called '{section.name}'")
                built.entries[section.name] = self._entry(section)
        for name, section in self.nested.items():
            if name not in built.subgraphs:
                section.place.fail(f"nothing uses the graph '{name}'", remedy="remove it")
        built.history.extend(document.history)
        built.tied.update(document.tied)
        return built

    def _size_like(self) -> set[str]:
        """The data-dependent numbers that some tensor has as a size: they are not negative."""
        types = {line.type.text for section in self.document.sections for line in section.operators}
        sizes = {word for text in types if "[" in text for word in re.findall(r"[A-Za-z_]\w*", text)}
        return self.unbacked_dims & sizes

    def _entry(self, section: Section) -> Entry:
        scope = _Scope(self, section)
        graph = scope.graph(section)
        inputs = tuple(public_name(name) for name, _ in section.inputs)
        values = graph.find_nodes(op="output")[0].args[0]
        if not isinstance(values, tuple) or len(values) != len(section.outputs):
            (section.end or section.place).fail(
                "the returned values do not match the signature", expected=f"({', '.join(section.outputs)})"
            )
        for line in section.state:
            if line.input not in inputs or line.output not in section.outputs:
                line.place.fail("a state pairs an output with an input of this program")
            if line.initial is not None:
                self.weight(line.initial)
        return Entry(
            graph,
            inputs,
            tuple(section.outputs),
            arguments=section.arguments or {name: (name,) for name in inputs},
            constants=section.constants,
            dims=Dims(scope.dims, scope.guards),
            state=tuple(StatePair(s.input, s.output, s.initial.name if s.initial else None) for s in section.state),
            bare_output=section.bare_output,
        )

    def weight(self, line: WeightLine) -> Weight:
        """The weight of a line, from the store or random."""
        place = line.type.place
        dtype, shape = tensor_type(line.type)
        known = self.built.weights.get(line.name)
        if known is None and self.store is not None:
            known = self.store.get(line.name)
            if known is None:
                place.fail(f"no weight '{line.name}' is given{suggest(line.name, list(self.store))}")
        try:
            sizes = tuple(int(size) for size in shape)
        except ValueError:
            place.fail("the shape of a weight is plain numbers")
        if known is None:
            known = Weight(RandomSource(line.name, sizes, dtype))
        if known.shape != sizes or known.dtype != dtype:
            place.fail(f"the weight '{line.name}' is {known.dtype} {list(known.shape)}", expected=line.type.text)
        self.built.weights[line.name] = known
        return known


class _Scope:
    """The dimensions of one entry, under which its graph and the graphs nested in it are read."""

    def __init__(self, builder: _Builder, section: Section) -> None:
        self.builder = builder
        self.section = section.name
        self.env = builder.env
        self.dims: dict[str, Dim] = {}
        self.names: dict[str, sympy.Basic] = {}
        for line in section.dims:
            if line.hint is not None:
                self._dim(line)
        self.names.update({name: symbol for symbol, name in builder.unbacked.items()})
        self.types = TypePrinter({d.symbol: d.name for d in self.dims.values()}, builder.unbacked)
        self.sizes: dict[str, Any] = {}
        self.guards = tuple(self._guard(line) for line in section.guards)

    def _dim(self, line: DimLine) -> None:
        name, hint, env = line.name, line.hint, self.env
        assert hint is not None
        if not name.isidentifier() or keyword.iskeyword(name) or name in self.dims:
            line.place.fail(f"'{name}' cannot name a dimension here")
        low, high = line.min, line.max
        if not low <= hint <= (hint if high is None else high):
            line.place.fail(f"the size {hint} is outside the range of '{name}'")
        key = (name, hint, low, high)
        symbol = self.builder.symbols.get(key)
        if symbol is None and self.section in self.builder.shared:
            known = self.builder.shared[self.section].dims.by_name.get(name)
            if known is not None and (known.name, known.hint, known.min, known.max) == key:
                symbol = known.symbol
        if symbol is None:
            from torch._dynamo.source import ConstantSource

            # As in tracing: a dynamic size is at least 2, and sizes 0 and 1 are taken to behave like the others.
            example = max(hint, 2)
            source = ConstantSource(f"{name}.{len(self.builder.symbols)}")
            symbol = env.create_symbol(example, source, dynamic_dim=DimDynamic.DYNAMIC)
            assert isinstance(symbol, sympy.Symbol)
            if low > 2 or (high is not None and high >= 2):
                env.constrain_symbol_range(symbol, max(low, 2), int_oo if high is None else high)
        self.builder.symbols[key] = symbol
        self.dims[name] = Dim(name, symbol, hint, low, high)
        self.names[name] = symbol

    def _guard(self, line: TypeText) -> Guard:
        expr = self.expr(line.text, line.place)
        if not is_condition(expr):
            line.place.fail("a guard is a condition on sizes")
        if expr.free_symbols and not any(d.hint < 2 for d in self.dims.values()):
            held = self.env.evaluate_expr(expr)
            if held in (False, sympy.false):
                line.place.fail("the guard does not hold at the sizes of the example")
        return Guard(expr)

    def expr(self, text: str, place: Place) -> sympy.Basic:
        """An expression over this scope's dimensions."""
        try:
            return parse_expr(text, self.names)
        except ValueError as error:
            place.fail(str(error), expected=f"an expression over {', '.join(self.names) or 'plain numbers'}")

    def size(self, text: str, place: Place) -> Any:
        """A size as a plain or symbolic integer."""
        known = self.sizes.get(text)
        if known is None:
            expr = self.expr(text, place)
            if expr.is_integer is False or (expr.is_number and expr.is_negative):
                place.fail(f"'{text}' is no size")
            known = int(expr) if expr.is_Integer else self._symint(expr)  # type: ignore[arg-type]
            self.sizes[text] = known
        return known

    def _symint(self, expr: Any) -> Any:
        backed = not any(is_unbacked(s) for s in expr.free_symbols)
        hint = int(expr.xreplace(self.env.backed_var_to_val)) if backed else None
        return self.env.create_symintnode(expr, hint=hint)

    def fake(self, written: TypeText) -> Any:
        """A fake value of a declared type of an input."""
        place, text = written.place, written.text
        if text.startswith(("int(", "float(", "bool(")):
            inner = text[text.index("(") + 1 : -1]
            if text.startswith("int("):
                return self.size(inner, place)
            value = self.expr(inner, place)
            return float(value) if text.startswith("float(") and value.is_number else bool(value)  # type: ignore[arg-type]
        dtype, shape = tensor_type(written)
        sizes = [self.size(size, place) for size in shape]
        with self.builder.built.fake_mode:
            return torch.empty(sizes, dtype=dtype)

    def graph(self, section: Section) -> fx.Graph:
        """Build the graph of a section."""
        builder, graph = self.builder, fx.Graph()
        values: dict[str, fx.Node] = {}
        taken: set[str] = set()
        for name, written in section.inputs:
            node = graph.placeholder(_identifier(public_name(name), taken))
            node.meta["val"] = self.fake(written)
            if section.kind == "program":
                node.meta[ORIGIN] = public_name(name)
            _define(values, name, node, written.place)
        for line in section.weights:
            node = graph.create_node("get_attr", line.name)
            node.meta["val"] = fake_weight(builder.built, builder.weight(line))
            _stamp(node, line.origin)
            _define(values, line.result, node, line.type.place)
        for line in section.operators:
            target = find_operator(line.target, line.place)
            args = self._resolved(line.args, graph, values)
            kwargs = self._resolved(line.kwargs, graph, values)
            node = graph.call_function(target, args, kwargs)
            _stamp(node, line.origin)
            node.meta["val"] = self._checked(node, line)
            _define(values, line.result, node, line.place)
        if section.end is None:
            section.place.fail(f"'{section.name}' returns nothing", expected="return (...)")
        graph.output(self._resolved(section.returns, graph, values))
        return graph

    def _resolved(self, value: Any, graph: fx.Graph, values: dict[str, fx.Node]) -> Any:
        """An argument with its references replaced by nodes."""
        if isinstance(value, Ref):
            if value.nested:
                return self._nested(value, graph, values)
            if value.name not in values:
                known = [n for n in values if not n.startswith("@")]
                value.place.fail(f"'%{value.name}' is not defined{suggest(value.name, known)}")
            return values[value.name]
        if isinstance(value, (tuple, list)):
            return type(value)(self._resolved(v, graph, values) for v in value)
        if isinstance(value, dict):
            return {k: self._resolved(v, graph, values) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(*(self._resolved(v, graph, values) for v in (value.start, value.stop, value.step)))
        return value

    def _nested(self, ref: Ref, graph: fx.Graph, values: dict[str, fx.Node]) -> fx.Node:
        name = public_name(ref.name)
        node = values.get(f"@{name}")
        if node is None:
            section = self.builder.nested.get(name)
            if section is None:
                ref.place.fail(f"no graph '{name}'{suggest(name, list(self.builder.nested))}")
            if name not in self.builder.built.subgraphs:
                self.builder.built.subgraphs[name] = fx.Graph()  # seen: a graph that nests itself is caught below
                self.builder.built.subgraphs[name] = self.graph(section)
            elif not len(self.builder.built.subgraphs[name].nodes):
                ref.place.fail(f"the graph '{name}' contains itself")
            node = values[f"@{name}"] = graph.create_node("get_attr", name)
        return node

    def _checked(self, node: fx.Node, line: OperatorLine) -> Any:
        """The inferred value of a node; its type must be the declared one."""
        declared = line.type.text
        if any(name not in self.names for name in self.builder.unbacked_dims.intersection(_NAME.findall(declared))):
            _forget_sizes(node)
        try:
            value = self.builder.inference.value(node)
        except GraphlatheError as error:
            line.place.fail(error.message)
        self._bind(value, declared)
        # Data-dependent sizes without a name in the text: an assertion has fixed them, and numbers are written instead.
        unnamed = any(is_unbacked(s) and s not in self.builder.unbacked for s in symbols_of(value))
        printer = TypePrinter(self.types.names, dict(self.builder.unbacked)) if unnamed else self.types
        try:
            inferred = printer.type(value)
        except GraphlatheError as error:
            line.place.fail(error.message)
        if inferred == declared and not unnamed:
            return value
        wanted = self._declared(line.type, value)
        named = [self.env.create_symintnode(symbol, hint=None) for symbol in self.builder.unbacked] if unnamed else []
        given = [*(n.meta.get("val") for n in node.all_input_nodes), *named]
        if wanted is None or not agrees(value, wanted, given, self.env):
            line.type.place.fail(f"{line.target} gives {inferred} here", expected=f"the declared type, {declared}")
        return wanted

    def _declared(self, written: TypeText, like: Any) -> Any:
        """A value of the declared type, with the strides of ``like``; None if its structure is another one."""
        text, place = written.text, written.place
        if isinstance(like, (tuple, list)):
            opening, closing = ("(", ")") if isinstance(like, tuple) else ("[", "]")
            parts = split_top(text[1:-1]) if text.startswith(opening) and text.endswith(closing) else []
            if len(parts) != len(like):
                return None
            items = [self._declared(TypeText(p, place), v) for p, v in zip(parts, like, strict=True)]
            return None if any(i is None for i in items) else type(like)(items)
        if not isinstance(like, torch.Tensor):
            return self.fake(written) if text.startswith(("int(", "float(", "bool(")) else None
        if not _TENSOR.fullmatch(text):
            return None
        dtype, shape = tensor_type(written)
        if len(shape) != like.dim():
            return None
        sizes = [self.size(size, place) for size in shape]
        with self.builder.built.fake_mode:
            return torch.empty_strided(sizes, like.stride(), dtype=dtype, device=like.device)

    def _bind(self, value: Any, declared: str) -> None:
        """Give new data-dependent sizes the names under which they are declared."""
        if isinstance(value, (tuple, list)):
            for item, text in zip(value, split_top(declared[1:-1]), strict=False):
                self._bind(item, text)
            return
        inner = split_top(declared[declared.find("[" if isinstance(value, torch.Tensor) else "(") + 1 : -1])
        sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
        for size, name in zip(sizes, inner, strict=False):
            expr = size.node.expr if isinstance(size, (torch.SymInt, torch.SymFloat)) else None
            if expr is None or not is_unbacked(expr) or expr in self.builder.unbacked:
                continue
            if name not in self.builder.unbacked_dims or name in self.names:
                continue
            self.builder.unbacked[expr] = name
            self.names[name] = expr
            if name in self.builder.size_like:
                self.env._update_var_to_range(expr, ValueRanges(0, int_oo))
                self.env.size_like.add(expr)


def _forget_sizes(node: fx.Node) -> None:
    """Let a second reading of a tensor's data make a new symbol, as its name says, instead of the one remembered."""
    for operand in node.all_input_nodes:
        value = operand.meta.get("val")
        if isinstance(value, FakeTensor):
            value.item_memo = value.nonzero_memo = value.unique_memo = value.unique_consecutive_memo = None


_NAME = re.compile(r"[A-Za-z_]\w*")
_TENSOR = re.compile(r"([a-z]\w*)\[(.*)\]")


def tensor_type(written: TypeText) -> tuple[torch.dtype, list[str]]:
    """Dtype, and the texts of the sizes, of a tensor type such as ``f32[B, 4]``."""
    match = _TENSOR.fullmatch(written.text)
    if match is None or match[1] not in DTYPES:
        written.place.fail(f"'{written.text}' is no type", expected="such as f32[B, 4]")
    return DTYPES[match[1]], split_top(match[2])


def split_top(text: str) -> list[str]:
    """Split at the commas that are outside of brackets."""
    parts, depth, start = [], 0, 0
    for at, char in enumerate(text):
        if char == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
        depth += (char in "([") - (char in ")]")
    last = text[start:].strip()
    return [*parts, last] if last else parts


def find_operator(name: str, place: Place) -> Any:
    """The operator of a name that `ir.text.target_name` wrote."""
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    namespace, *rest = name.split(".")
    if namespace in ("operator", "math", "torch"):
        known = [function for function in FUNCTIONS if function.startswith(f"{namespace}.")]
        place.fail(f"unknown function '{name}'{suggest(name, known)}", expected=f"one of {', '.join(known)}")
    if not rest or len(rest) > 2:
        place.fail(f"unknown operator '{name}'", expected="namespace.name or namespace.name.overload, as aten.relu")
    if namespace == "higher_order":
        found = getattr(torch.ops.higher_order, rest[0], None)
        if found is None:
            place.fail(f"unknown operator '{name}'")
        return found
    try:
        packet = getattr(getattr(torch.ops, namespace), rest[0])
    except AttributeError:
        packet = None
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        known = dir(getattr(torch.ops, namespace))
        place.fail(
            f"unknown operator '{name}'{suggest(rest[0], known)}",
            remedy=None if namespace == "aten" else f"import the package that registers the operators '{namespace}::'",
        )
    overload = rest[1] if len(rest) == 2 else "default"
    # TorchScript registers overloads of its own, which the dispatcher (and hence a fake tensor) does not know.
    known = [o for o in packet.overloads() if torch._C._dispatch_has_kernel(getattr(packet, o).name())]
    if overload not in known:
        place.fail(f"'{namespace}.{rest[0]}' has no overload '{overload}'", expected=", ".join(known) or None)
    found = getattr(packet, overload)
    if found._schema.name in _TOUCHES_FILES:
        place.fail(f"'{name}' touches files and may not stand in a program")
    return found


def _define(values: dict[str, fx.Node], name: str, node: fx.Node, place: Place) -> None:
    if name in values:
        place.fail(f"'%{name}' is defined twice")
    values[name] = node


def _stamp(node: fx.Node, origin: tuple[str, str]) -> None:
    if origin[0]:
        node.meta[ORIGIN] = origin[0]
    elif node.op == "get_attr":
        node.meta[ORIGIN] = str(node.target).rpartition(".")[0]
    if origin[1]:
        node.meta[MADE_BY] = origin[1]


def _identifier(name: str, taken: set[str]) -> str:
    """A placeholder's own name, unique in its graph."""
    base = re.sub(r"\W", "_", name)
    base = base if base.isidentifier() and not keyword.iskeyword(base) else f"input_{base}"
    text, count = base, 1
    while text in taken:
        count += 1
        text = f"{base}_{count}"
    taken.add(text)
    return text
