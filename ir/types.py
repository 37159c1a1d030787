"""Types of values as text and back: dtypes, symbolic sizes, shapes; and whether two of them are provably the same.

A type prints as ``f32[B, S, 576]``, a number on the host as ``int(S + 1)``, several results as ``(f32[4], i64[4])``.
Printing a large graph asks for the same sizes thousands of times, and sympy prints slowly; hence the caches.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import sympy
import torch
from sympy.printing.precedence import PRECEDENCE, precedence
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy import functions as sf
from torch.utils._sympy.symbol import SymT, symbol_is_type

from .dims import SizePrinter
from .errors import GraphlatheError

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint64: "u64",
    torch.uint32: "u32",
    torch.uint16: "u16",
    torch.uint8: "u8",
    torch.bool: "bool",
    torch.complex32: "c32",
    torch.complex64: "c64",
    torch.complex128: "c128",
    torch.float8_e4m3fn: "f8e4m3fn",
    torch.float8_e5m2: "f8e5m2",
    torch.float8_e4m3fnuz: "f8e4m3fnuz",
    torch.float8_e5m2fnuz: "f8e5m2fnuz",
}
DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """The short name of a dtype (``f32``).

    Raises:
        GraphlatheError: the dtype has no text form.
    """
    if dtype not in DTYPE_NAMES:
        raise GraphlatheError(f"{dtype} has no text form", expected=f"one of {', '.join(DTYPES)}")
    return DTYPE_NAMES[dtype]


def is_unbacked(symbol: sympy.Basic) -> bool:
    """Whether a symbol stands for a size that depends on data (``nonzero``)."""
    return isinstance(symbol, sympy.Symbol) and symbol_is_type(symbol, (SymT.UNBACKED_INT, SymT.UNBACKED_FLOAT))


def expr_of(value: Any) -> Any:
    """The expression of a symbolic number; a plain number as it is."""
    return value.node.expr if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) else value


def symbols_of(value: Any) -> set[sympy.Symbol]:
    """The symbols in a value's type (its sizes, or itself when it is a symbolic number)."""
    if isinstance(value, torch.Tensor):
        return set().union(*(symbols_of(s) for s in value.shape if not isinstance(s, int)))
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return set(expr_of(value).free_symbols)
    if isinstance(value, (tuple, list)):
        return set().union(*map(symbols_of, value))
    return set()


class _ExprPrinter(SizePrinter):
    """Prints an expression as it is built, under other names, and in an order that depends on those names alone.

    Renaming by substitution would build the expression anew, and sympy may then simplify it: the text would not read
    back to itself. ``%`` stands for the function that `parse_expr` makes of it; the other one is spelled out.
    """

    def __init__(self, name_of: Callable[[sympy.Symbol], str]) -> None:
        super().__init__()
        self._name_of = name_of
        self._printed: dict[Any, str] = {}

    def _print(self, expr: Any, **kwargs: Any) -> str:
        # Operands are sorted by their text first, so without a memory each would be printed anew for all that hold it.
        if kwargs:
            return super()._print(expr, **kwargs)
        key = (type(expr), expr)
        text = self._printed.get(key)
        if text is None:
            text = self._printed[key] = super()._print(expr)
        return text

    def _print_Symbol(self, expr: sympy.Symbol) -> str:
        return self._name_of(expr)

    def _sorted(self, args: Iterable[Any], *, numbers_first: bool) -> list[Any]:
        return sorted(args, key=lambda arg: (bool(arg.is_number) != numbers_first, self._print(arg)))

    def _print_Add(self, expr: Any, order: str | None = None) -> str:
        return self.stringify(self._sorted(expr.args, numbers_first=False), " + ", precedence(expr))

    def _print_Mul(self, expr: Any) -> str:
        return self.stringify(self._sorted(expr.args, numbers_first=True), "*", precedence(expr))

    def _print_And(self, expr: Any) -> str:
        return self.stringify(self._sorted(expr.args, numbers_first=True), " and ", PRECEDENCE["And"])

    def _print_Or(self, expr: Any) -> str:
        return self.stringify(self._sorted(expr.args, numbers_first=True), " or ", PRECEDENCE["Or"])

    def _print_Max(self, expr: Any) -> str:
        return f"max({', '.join(map(self._print, self._sorted(expr.args, numbers_first=True)))})"

    def _print_Min(self, expr: Any) -> str:
        return f"min({', '.join(map(self._print, self._sorted(expr.args, numbers_first=True)))})"

    def _modulo(self, expr: Any) -> str:
        if _mod_function(*expr.args) is type(expr):
            tight: Any = PRECEDENCE["Atom"] - 0.5  # as PyTorch does: an operand that is no atom is in brackets
            return self.stringify(expr.args, " % ", tight)
        return f"{type(expr).__name__}({', '.join(map(self._print, expr.args))})"

    _print_Mod = _modulo
    _print_PythonMod = _modulo


class TypePrinter:
    """Prints types with the users' names for dimensions; symbols of data-dependent sizes become u0, u1... in order.

    Args:
        names: the names of known symbols.
        unbacked: names given to data-dependent sizes so far; filled while printing, shared by a program's graphs.
    """

    def __init__(self, names: Mapping[sympy.Symbol, str], unbacked: dict[sympy.Symbol, str] | None = None) -> None:
        self.names = dict(names)
        self.unbacked: dict[sympy.Symbol, str] = {} if unbacked is None else unbacked
        self._printer = _ExprPrinter(self._name)
        self._exprs: dict[Any, str] = {}

    def expr(self, expr: Any) -> str:
        """An expression over symbols, in Python's syntax."""
        text = self._exprs.get(expr)
        if text is None:
            text = self._exprs[expr] = self._expr(sympy.sympify(expr))
        return text

    def _expr(self, expr: sympy.Basic) -> str:
        symbols: list[Any] = sorted(expr.free_symbols, key=str)
        for symbol in symbols:  # new data-dependent sizes get their numbers in this order
            self._name(symbol)
        try:
            return self._printer.doprint(expr)
        except NotImplementedError as error:
            raise GraphlatheError(f"the size {expr} has no text form: {error}") from error

    def _name(self, symbol: Any) -> str:
        name = self.names.get(symbol) or self.unbacked.get(symbol)
        if name is None and is_unbacked(symbol):
            count = len(self.unbacked)
            while (name := f"u{count}") in self.names.values() or name in self.unbacked.values():
                count += 1
            self.unbacked[symbol] = name
        return name or str(symbol)

    def size(self, size: Any) -> str:
        """A size: a plain or symbolic number."""
        if not isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return str(size)
        raw = size.node._expr  # without resolving replacements: the cache's key must be cheap
        text = self._exprs.get(raw)
        if text is None:
            text = self._exprs[raw] = self.expr(size.node.expr)
        return text

    def type(self, value: Any) -> str:
        """The type of a value: a tensor, a number, None, or a tuple or list of those."""
        match value:
            case torch.Tensor():
                return f"{dtype_name(value.dtype)}[{', '.join(map(self.size, value.shape))}]"
            case torch.SymBool() | bool():
                return f"bool({self.size(value)})"
            case torch.SymInt() | int():
                return f"int({self.size(value)})"
            case torch.SymFloat() | float():
                return f"float({self.size(value)})"
            case None:
                return "none"
            case list():
                return f"[{', '.join(map(self.type, value))}]"
            case tuple():
                return f"({', '.join(map(self.type, value))}{',' if len(value) == 1 else ''})"
            case _:
                raise GraphlatheError(f"a value of type {type(value).__name__} has no text form")


def _mod_function(a: Any, b: Any) -> Any:
    """As for symbolic integers: the simpler function where neither side can be negative."""
    return sf.Mod if a.is_nonnegative and b.is_nonnegative else sf.PythonMod


def _mod(a: Any, b: Any) -> Any:
    return _mod_function(a, b)(a, b)


def _true_div(a: Any, b: Any) -> Any:
    return (sf.IntTrueDiv if a.is_integer and b.is_integer else sf.FloatTrueDiv)(a, b)


_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.FloorDiv: sf.FloorDiv,
    ast.Mod: _mod,
    ast.Div: _true_div,
    ast.Pow: sf.PowByNatural,
    ast.BitAnd: sf.BitwiseFn_bitwise_and,
    ast.BitOr: sf.BitwiseFn_bitwise_or,
    ast.BitXor: sf.BitwiseFn_bitwise_xor,
    ast.LShift: sf.LShift,
    ast.RShift: sf.RShift,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: sympy.Eq,
    ast.NotEq: sympy.Ne,
    ast.Lt: sympy.Lt,
    ast.LtE: sympy.Le,
    ast.Gt: sympy.Gt,
    ast.GtE: sympy.Ge,
}
_CALLS: dict[str, Callable[..., Any]] = {
    "Mod": sf.Mod,
    "PythonMod": sf.PythonMod,
    "max": sf.Max,
    "min": sf.Min,
    "abs": sympy.Abs,
    "float": sf.ToFloat,
    "round": lambda x, digits=None: sf.RoundToInt(x) if digits is None else sf.RoundDecimal(x, digits),
    "math.ceil": sf.CeilToInt,
    "math.floor": sf.FloorToInt,
    "math.trunc": sf.TruncToInt,
    **{
        f"math.{name}": getattr(sf, f"OpaqueUnaryFn_{name}")
        for name in ("sqrt", "cos", "cosh", "sin", "sinh", "tan", "tanh", "asin", "acos", "atan", "exp", "log", "log2")
        if hasattr(sf, f"OpaqueUnaryFn_{name}")
    },
}


def parse_expr(text: str, symbols: Mapping[str, sympy.Basic]) -> sympy.Basic:
    """Read an expression that `TypePrinter.expr` wrote.

    Args:
        text: Python syntax over dimension names.
        symbols: the symbol of each name.

    Raises:
        ValueError: bad syntax, or an unknown name; the message says which.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"'{text}' is no expression") from error
    return _read(tree, symbols)


def _factors(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return [*_factors(node.left), *_factors(node.right)]
    return [node]


def _read(node: ast.expr, symbols: Mapping[str, sympy.Basic]) -> Any:
    match node:
        case ast.Constant(value=bool() as value):
            return sympy.true if value else sympy.false
        case ast.Constant(value=int() | float() as value):
            return sympy.sympify(value)
        case ast.Name(id=name):
            if name not in symbols:
                raise ValueError(f"unknown dimension '{name}'")
            return symbols[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_read(operand, symbols)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return sympy.Not(_read(operand, symbols))
        case ast.BinOp(op=ast.Mult()):
            # At once: sympy distributes a number over a sum, but not over a product of sums.
            return sympy.Mul(*(_read(factor, symbols) for factor in _factors(node)))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_read(left, symbols), _read(right, symbols))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARE:
            return _COMPARE[type(op)](_read(left, symbols), _read(right, symbols))
        case ast.BoolOp(op=op, values=values):
            return (sympy.And if isinstance(op, ast.And) else sympy.Or)(*(_read(v, symbols) for v in values))
        case ast.IfExp(test=test, body=body, orelse=other):
            return sf.Where(_read(test, symbols), _read(body, symbols), _read(other, symbols))
        case ast.Call(func=func, args=args) if ast.unparse(func) in _CALLS:
            return _CALLS[ast.unparse(func)](*(_read(a, symbols) for a in args))
        case _:
            raise ValueError(f"'{ast.unparse(node)}' is not understood")


def same_size(a: Any, b: Any, env: ShapeEnv | None) -> bool:
    """Whether two sizes (numbers or expressions) are provably equal."""
    a, b = sympy.sympify(expr_of(a)), sympy.sympify(expr_of(b))
    if a == b:
        return True
    if not a.free_symbols and not b.free_symbols:
        return bool(a == b)
    if is_condition(a) or is_condition(b):
        return bool(sympy.simplify(sympy.Equivalent(a, b)) == sympy.true)
    if env is not None:
        a, b = env.replace(a), env.replace(b)
    difference = sympy.expand(a - b)
    if difference == 0:
        return True
    known = env._maybe_evaluate_static(sympy.Eq(a, b)) if env is not None else None
    if known is not None:
        return bool(known)
    # Cheap, and most unequal sizes end here; simplification can take seconds.
    return not _differs_somewhere(difference) and bool(sympy.simplify(difference) == 0)


def is_condition(expr: Any) -> bool:
    """Whether an expression is a condition (a plain symbol, which sympy also takes for one, is not)."""
    return isinstance(
        expr, (sympy.logic.boolalg.BooleanAtom, sympy.logic.boolalg.BooleanFunction, sympy.core.relational.Relational)
    )


def _differs_somewhere(difference: Any) -> bool:
    """Whether a difference of sizes is not 0 where the symbols are some small primes, or some larger ones."""
    symbols = sorted(difference.free_symbols, key=str)
    for start in (2, 47):
        sizes = {symbol: sympy.Integer(sympy.nextprime(start + 10 * i)) for i, symbol in enumerate(symbols)}
        value = difference.xreplace(sizes)
        if value.is_number and value != 0:
            return True
    return False


def same_type(a: Any, b: Any, env: ShapeEnv | None) -> bool:
    """Whether two values have provably the same type: kind, dtype and sizes."""
    if isinstance(a, (tuple, list)) or isinstance(b, (tuple, list)):
        both = isinstance(a, (tuple, list)) and isinstance(b, (tuple, list))
        return both and len(a) == len(b) and all(same_type(x, y, env) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
            return False
        return a.dtype == b.dtype and a.dim() == b.dim() and all_same(a.shape, b.shape, env)
    if a is None or b is None:
        return a is b
    return kind_of(a) is kind_of(b) and same_size(a, b, env)


def kind_of(value: Any) -> type:
    """bool, int or float, of a plain or symbolic number."""
    kinds = ((bool, (bool, torch.SymBool)), (int, (int, torch.SymInt)), (float, (float, torch.SymFloat)))
    return next((kind for kind, types in kinds if isinstance(value, types)), type(value))


def all_same(a: Iterable[Any], b: Iterable[Any], env: ShapeEnv | None) -> bool:
    """Whether sizes are provably equal one by one."""
    return all(same_size(x, y, env) for x, y in zip(a, b, strict=True))


def agrees(inferred: Any, declared: Any, given: Any, env: ShapeEnv | None) -> bool:
    """Whether an inferred type confirms a declared one: the same type, except for data-dependent sizes.

    Such a size is a new symbol in every inference, and may be declared as anything: as a symbol that had another number
    in the inference before, or as a plain number, where an assertion in the graph has fixed it.

    Args:
        inferred: what the operator gave.
        declared: what is to be confirmed.
        given: the operands, as a list of values; a symbol that they have is not new.
        env: the symbols' environment.
    """
    fresh = {symbol for symbol in symbols_of(inferred) - symbols_of(given) if is_unbacked(symbol)}
    if not fresh:
        return same_type(inferred, declared, env)
    if isinstance(inferred, (tuple, list)) and isinstance(declared, (tuple, list)):
        return len(inferred) == len(declared) and all(
            agrees(a, b, given, env) for a, b in zip(inferred, declared, strict=True)
        )
    if not isinstance(inferred, torch.Tensor) or not isinstance(declared, torch.Tensor):
        return not isinstance(declared, (torch.Tensor, tuple, list)) and kind_of(inferred) is kind_of(declared)
    if inferred.dtype != declared.dtype or inferred.dim() != declared.dim():
        return False
    sizes = zip(inferred.shape, declared.shape, strict=True)
    return all(symbols_of(a) & fresh or same_size(a, b, env) for a, b in sizes)
