"""Patterns of operators, and matching them.

::

    aten = torch.ops.aten
    pattern = Op(aten.neg.default, Op(aten.neg.default, Value("x")))

Arguments that a pattern does not mention must have their default values: ``add(x, y, alpha=2)`` is no ``add(x, y)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

Bindings = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Value:
    """Any value (a node), bound to a name; a name that occurs twice must be the same value both times."""

    name: str = ""


@dataclass(frozen=True, eq=False)
class WeightValue:
    """A node that reads a weight."""

    name: str = ""


@dataclass(frozen=True, eq=False)
class Constant:
    """A plain argument (number, string, list of numbers, None), optionally one that ``where`` accepts."""

    name: str = ""
    where: Callable[[Any], bool] | None = None


@dataclass(frozen=True, eq=False)
class OneOf:
    """The first of several patterns that matches."""

    patterns: tuple[Any, ...]


class Op:
    """An operator node.

    Args:
        target: an overload, a packet (all its overloads), several of those, or None for any operator.
        args: patterns of the first arguments in order: a pattern, a list or tuple of patterns, or a plain value that
            the argument must equal.
        name: bind the node to this name.
        users: how many nodes may use it (1 for a value that must disappear with the match); None: any number.
        commutative: the first two arguments may be swapped.
        rest: whether arguments that are not mentioned may be anything, instead of their defaults.
        kwargs: patterns of arguments by their names in the operator's schema.
    """

    def __init__(
        self,
        target: Any,
        *args: Any,
        name: str = "",
        users: int | None = None,
        commutative: bool = False,
        rest: bool = False,
        **kwargs: Any,
    ) -> None:
        self.targets: tuple[Any, ...] | None = (
            None
            if target is None
            else tuple(target)
            if isinstance(target, (tuple, list, set, frozenset))
            else (target,)
        )
        self.args = args
        self.kwargs = kwargs
        self.name = name
        self.users = users
        self.commutative = commutative
        self.rest = rest

    def accepts(self, target: Any) -> bool:
        """Whether an operator is one of the targets."""
        if self.targets is None:
            return True
        return target in self.targets or getattr(target, "overloadpacket", None) in self.targets

    def __str__(self) -> str:
        return "an operator" if self.targets is None else " or ".join(map(str, self.targets))


Pattern = Value | WeightValue | Constant | OneOf | Op


@dataclass(frozen=True)
class Match:
    """Where a pattern matched: ``match["x"]`` is the value bound to x.

    Attributes:
        root: the node that the pattern's outermost operator matched; it is the one that a rewrite replaces.
        bound: values by name.
    """

    root: fx.Node
    bound: Bindings

    def __getitem__(self, name: str) -> Any:
        return self.bound[name]


class Probe:
    """Matches one pattern at one node, and remembers how far it came and what stopped it."""

    def __init__(self, root: fx.Node) -> None:
        self.root = root
        self.progress = -1
        self.reason = ""
        self.blamed = root

    def matches(self, pattern: Op) -> Iterator[Bindings]:
        """The values by name, for every way in which the pattern matches."""
        yield from (bindings for bindings, _ in self._match(pattern, self.root, {}, 0, self.root, ""))

    def _stop(self, progress: int, reason: str, blamed: fx.Node) -> None:
        if progress > self.progress:
            self.progress, self.reason, self.blamed = progress, reason, blamed

    def _match(
        self, pattern: Any, value: Any, bound: Bindings, progress: int, user: fx.Node, where: str
    ) -> Iterator[tuple[Bindings, int]]:
        """Every way in which a value matches: the bindings, and how many parts of the pattern matched so far."""
        match pattern:
            case Op():
                yield from self._match_op(pattern, value, bound, progress, user, where)
                return
            case OneOf(patterns):
                for choice in patterns:
                    yield from self._match(choice, value, bound, progress, user, where)
                return
            case list() | tuple():
                yield from self._match_list(pattern, value, bound, progress, user, where)
                return
            case Value():
                fits, wanted = isinstance(value, fx.Node), "a value"
            case WeightValue():
                fits, wanted = isinstance(value, fx.Node) and value.op == "get_attr", "a weight"
            case Constant():
                fits, wanted = not _holds_node(value), "a constant"
                if fits and pattern.where is not None and not pattern.where(value):
                    fits, wanted = False, f"a fitting constant '{pattern.name}'"
            case _:
                fits, wanted = not isinstance(value, fx.Node) and value == pattern, repr(pattern)
        if not fits:
            self._stop(progress, f"{where} is {_describe(value)}, not {wanted}", user)
            return
        named = self._bind(getattr(pattern, "name", ""), value, bound)
        if named is None:
            self._stop(progress, f"{where} is not the same '{pattern.name}' as before", user)
            return
        yield named, progress + 1

    @staticmethod
    def _bind(name: str, value: Any, bound: Bindings) -> Bindings | None:
        if not name:
            return bound
        if name in bound:
            known = bound[name]
            same = known is value if isinstance(value, fx.Node) or isinstance(known, fx.Node) else known == value
            return bound if same else None
        return {**bound, name: value}

    def _match_list(
        self, pattern: Sequence[Any], value: Any, bound: Bindings, progress: int, user: fx.Node, where: str
    ) -> Iterator[tuple[Bindings, int]]:
        if not isinstance(value, (list, tuple)) or len(value) != len(pattern):
            self._stop(progress, f"{where} is {_describe(value)}, not {len(pattern)} values", user)
            return
        parts = [(p, v, f"{where}[{i}]") for i, (p, v) in enumerate(zip(pattern, value, strict=True))]
        yield from self._match_all(parts, bound, progress, user)

    def _match_all(
        self, parts: Sequence[tuple[Any, Any, str]], bound: Bindings, progress: int, user: fx.Node
    ) -> Iterator[tuple[Bindings, int]]:
        if not parts:
            yield bound, progress
            return
        (pattern, value, where), *others = parts
        for named, reached in self._match(pattern, value, bound, progress, user, where):
            yield from self._match_all(others, named, reached, user)

    def _match_op(
        self, pattern: Op, value: Any, bound: Bindings, progress: int, user: fx.Node, where: str
    ) -> Iterator[tuple[Bindings, int]]:
        if not isinstance(value, fx.Node) or value.op != "call_function" or not pattern.accepts(value.target):
            self._stop(progress, f"{where or 'it'} is {_describe(value)}, not {pattern}", user)
            return
        if pattern.users is not None and len(value.users) != pattern.users:
            wanted = f"{len(value.users)} users, not {pattern.users}"
            self._stop(progress + 1, f"{where or 'it'} ({_describe(value)}) has {wanted}", value)
            return
        named = self._bind(pattern.name, value, bound)
        if named is None:
            self._stop(progress, f"{where} is not the same '{pattern.name}' as before", user)
            return
        parts = self._parts(pattern, value, progress + 1)
        if parts is None:
            return
        yield from self._match_all(parts, named, progress + 1, value)
        if pattern.commutative and len(pattern.args) >= 2:
            swapped = [(parts[0][0], *parts[1][1:]), (parts[1][0], *parts[0][1:]), *parts[2:]]
            yield from self._match_all(swapped, named, progress + 1, value)

    def _parts(self, pattern: Op, node: fx.Node, progress: int) -> list[tuple[Any, Any, str]] | None:
        """Pairs of pattern and argument; None if an argument that is not mentioned is no default."""
        arguments = _arguments(node)
        names = [name for name, _, _ in arguments]
        wanted = {**dict(zip(names, pattern.args, strict=False)), **pattern.kwargs}
        missing = [name for name in wanted if name not in names]
        if missing or len(pattern.args) > len(names):
            self._stop(progress, f"{node.target} has no argument {', '.join(missing) or len(names)}", node)
            return None
        parts: list[tuple[Any, Any, str]] = []
        by_name: dict[str, tuple[Any, Any, str]] = {}
        for name, value, is_default in arguments:
            if name in wanted:
                by_name[name] = (wanted[name], value, f"{name} of {node.target}")
            elif not is_default and not pattern.rest:
                self._stop(progress, f"{name} of {node.target} is {_describe(value)}, not its default", node)
                return None
        parts.extend(by_name[name] for name in wanted)
        return parts


def _arguments(node: fx.Node) -> list[tuple[str, Any, bool]]:
    """Name, value, and whether that is the default, of every argument of a node."""
    if not isinstance(node.target, torch._ops.OpOverload):
        positional = [(str(i), value, False) for i, value in enumerate(node.args)]
        return positional + [(name, value, False) for name, value in node.kwargs.items()]
    result: list[tuple[str, Any, bool]] = []
    for position, argument in enumerate(node.target._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        if position < len(node.args):
            value = node.args[position]
        elif argument.name in node.kwargs:
            value = node.kwargs[argument.name]
        else:
            result.append((argument.name, default, True))
            continue
        is_default = argument.has_default_value() and not _holds_node(value) and value == default
        result.append((argument.name, value, is_default))
    return result


def _holds_node(value: Any) -> bool:
    found: list[fx.Node] = []
    map_arg(value, found.append)
    return bool(found)


def _describe(value: Any) -> str:
    if isinstance(value, fx.Node):
        return str(value.target) if value.op == "call_function" else {"get_attr": "a weight"}.get(value.op, "an input")
    return repr(value) if len(repr(value)) <= 40 else f"a {type(value).__name__}"


def _inner(pattern: Any) -> Sequence[Any]:
    """The patterns that a pattern consists of."""
    match pattern:
        case Op():
            return (*pattern.args, *pattern.kwargs.values())
        case OneOf(patterns):
            return patterns
        case list() | tuple():
            return pattern
        case _:
            return ()


def depth(pattern: Any) -> int:
    """How many operators are nested in a pattern."""
    return isinstance(pattern, Op) + max(map(depth, _inner(pattern)), default=0)


def parts(pattern: Any) -> int:
    """How many parts a pattern has: the progress of a full match, or more."""
    return 1 + sum(map(parts, _inner(pattern)))
