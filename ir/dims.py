"""Symbolic dimensions: their names, and the size guards under which a program is valid.

`torch.export` records what it assumed about sizes as guards on symbols. They are part of a program's signature: every
call binds the symbols from the sizes of its inputs, then checks ranges and guards. Beyond them a traced graph may run
and return wrong numbers, which is worse than an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import CodeType
from typing import Any

import sympy
import torch
from torch.utils._sympy.printers import PythonPrinter

from .errors import InputError

Size = int | torch.SymInt

RESERVED = frozenset({"inf", "nan", "int", "bool", "float", "round", "abs", "max", "min", "math", "Mod", "PythonMod"})
"""Words that mean something else where sizes are printed: no dimension may be called so."""


class SizePrinter(PythonPrinter):
    """Prints an expression over sizes as Python that needs nothing but ``math``."""

    def _print_ToFloat(self, expr: Any) -> str:
        return f"float({self._print(expr.args[0])})"


@dataclass(frozen=True)
class Dim:
    """A named dynamic dimension.

    Attributes:
        name: the user's name for it (``B``, ``S``).
        symbol: the symbol that stands for it in shapes.
        hint: its size in the example that was traced.
        min, max: the sizes it may take, both included; ``max`` None means unbounded.
    """

    name: str
    symbol: sympy.Symbol
    hint: int
    min: int = 1
    max: int | None = None


@dataclass(frozen=True)
class Guard:
    """A condition on symbols that tracing relied on."""

    expr: sympy.Basic

    @cached_property
    def code(self) -> CodeType:
        """The condition as Python code over symbol names."""
        return compile(SizePrinter().doprint(self.expr), "<guard>", "eval")

    def holds(self, sizes: Mapping[sympy.Symbol, int]) -> bool:
        """Whether the condition is true at these sizes (unknown symbols: assumed true; divided by zero: it is not)."""
        if any(symbol not in sizes for symbol in self.expr.free_symbols):
            return True
        scope = {str(symbol): size for symbol, size in sizes.items()}
        try:
            return bool(eval(self.code, {"math": math, "max": max, "min": min}, scope))
        except ArithmeticError:
            return False


def size_expr(size: Size) -> sympy.Expr:
    """The symbolic expression of a size (an Integer for a plain int)."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


class Dims:
    """The named dimensions of a program and its guards."""

    def __init__(self, dims: Mapping[str, Dim] | None = None, guards: tuple[Guard, ...] = ()) -> None:
        self.by_name: dict[str, Dim] = dict(dims or {})
        self.guards: tuple[Guard, ...] = guards

    @property
    def names(self) -> dict[sympy.Symbol, sympy.Symbol]:
        """From each symbol to a symbol with the user's name, for printing."""
        return {dim.symbol: sympy.Symbol(dim.name, integer=True) for dim in self.by_name.values()}

    def format_expr(self, expr: sympy.Basic) -> str:
        """An expression over symbols as Python text with the users' names."""
        return SizePrinter().doprint(expr.xreplace(self.names)) if expr.free_symbols else str(expr)

    def format(self, size: Any) -> str:
        """A size (int or SymInt) as text with the users' names."""
        return self.format_expr(size.node.expr) if isinstance(size, (torch.SymInt, torch.SymBool)) else str(size)

    def evaluate(self, size: Any, sizes: Mapping[str, int]) -> int:
        """A size at given dimension sizes (by name); dimensions not given take their example's size."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        values = {dim.symbol: sizes.get(name, dim.hint) for name, dim in self.by_name.items()}
        return int(size.node.expr.xreplace({s: sympy.Integer(v) for s, v in values.items()}))

    def bind(
        self, name: str, declared: torch.Size | tuple[Size, ...], actual: torch.Size, sizes: dict[sympy.Symbol, int]
    ) -> None:
        """Bind the symbols of one input's declared shape to an actual shape, checking what is already bound.

        A size such as ``2*S`` binds S too. One that has several symbols is checked when all of them are bound: bind all
        inputs twice.

        Raises:
            InputError: wrong rank, a static size differs, or one dimension gets two sizes.
        """
        if len(declared) != len(actual):
            raise InputError(
                f"input '{name}' has shape {list(actual)}", expected=f"rank {len(declared)}: {self._shape(declared)}"
            )
        for axis, (want, got) in enumerate(zip(declared, actual, strict=True)):
            expr = size_expr(want)
            if isinstance(expr, sympy.Symbol) and expr not in sizes:
                sizes[expr] = int(got)
                continue
            value: Any = expr.xreplace({s: sympy.Integer(v) for s, v in sizes.items()})
            unbound = value.free_symbols
            if len(unbound) == 1 and (factor := value.diff(symbol := next(iter(unbound)))).is_Integer:
                solution = (int(got) - value.xreplace({symbol: sympy.Integer(0)})) / factor
                fits = bool(solution.is_Integer)
                if fits:
                    sizes[symbol] = int(solution)
            else:
                fits = bool(unbound) or int(value) == int(got)
            if not fits:
                again = f"trace again with dynamic={{'{name}': {{{axis}: 'NAME'}}}}"
                raise InputError(
                    f"input '{name}' has size {int(got)} in dimension {axis}",
                    expected=f"{self.format(want)}"
                    + (f" = {int(value)}" if expr.free_symbols and not unbound else "")
                    + f", of shape {self._shape(declared)}",
                    remedy="pass inputs of that size" + ("" if expr.free_symbols else f", or {again}"),
                )

    def _shape(self, declared: torch.Size | tuple[Size, ...]) -> str:
        return "[" + ", ".join(self.format(d) for d in declared) + "]"

    def check(self, sizes: Mapping[sympy.Symbol, int]) -> None:
        """Check ranges and guards.

        Raises:
            InputError: a size is outside its range, or a guard excludes it.
        """
        for dim in self.by_name.values():
            got = sizes.get(dim.symbol)
            if got is None:
                continue
            if got < dim.min or (dim.max is not None and got > dim.max):
                upper = "any" if dim.max is None else str(dim.max)
                raise InputError(f"dimension {dim.name} is {got}", expected=f"from {dim.min} to {upper}")
        for guard in self.guards:
            if not guard.holds(sizes):
                at = ", ".join(
                    f"{dim.name}={sizes[dim.symbol]}"
                    for dim in self.by_name.values()
                    if dim.symbol in guard.expr.free_symbols
                )
                raise InputError(
                    f"the sizes {at} are outside what tracing assumed",
                    expected=self.format_expr(guard.expr),
                    remedy="trace the model again with an example of such a size; the graph may differ there",
                )
