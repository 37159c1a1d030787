"""Local rewrites as rules: a pattern, a check that may refuse with a reason, and a rewrite.

::

    aten = torch.ops.aten
    rule = Rule(
        "double-negation",
        Op(aten.neg.default, Op(aten.neg.default, Value("x"))),
        rewrite=lambda rewriter, match: match["x"],
    )
    stats = apply_rules(program, [rule])
    nearest = why_not(program, rule)[:3]

Arguments that a pattern does not mention must have their default values: ``add(x, y, alpha=2)`` is no ``add(x, y)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from .program import ORIGIN, Program
from .rewrite import Rewriter

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


@dataclass(frozen=True)
class Rule:
    """A local rewrite.

    Attributes:
        name: for reports.
        pattern: what to look for; its outermost operator is what gets replaced.
        check: None if the match may be rewritten, else the reason why not (the same text for the same reason, so that
            reasons can be counted).
        rewrite: creates the replacement through the rewriter (new nodes go before the root) and returns it.
    """

    name: str
    pattern: Op
    check: Callable[[Match], str | None] = lambda match: None
    rewrite: Callable[[Rewriter, Match], fx.Node] = lambda rewriter, match: match.root


@dataclass
class RuleStats:
    """What `apply_rules` did.

    Attributes:
        hits: how many matches were rewritten.
        attempts: how many places had a rule's outermost operator.
        misses: reasons why places were not rewritten, with counts (places that were rewritten later do not count).
        by_rule: hits by rule.
        rounds: how many rounds it took.
        converged: False if rules were still applicable after the last round.
    """

    hits: int = 0
    attempts: int = 0
    misses: dict[str, int] = field(default_factory=dict)
    by_rule: dict[str, int] = field(default_factory=dict)
    rounds: int = 0
    converged: bool = True


@dataclass(frozen=True)
class NearMiss:
    """A place where a rule almost applied.

    Attributes:
        rule: the rule's name.
        node: the place: the node that the outermost operator matched.
        origin: where that node came from.
        reason: why the rule did not apply.
        blamed: the node at which matching stopped.
        progress: how many parts of the pattern did match.
    """

    rule: str
    node: str
    origin: str
    reason: str
    blamed: str
    progress: int

    def __str__(self) -> str:
        where = f" (from {self.origin})" if self.origin else ""
        return f"{self.rule} at %{self.node}{where}: {self.reason}"


class _Probe:
    """Matches one pattern at one node, and remembers how far it came and what stopped it."""

    def __init__(self, root: fx.Node) -> None:
        self.root = root
        self.progress = -1
        self.reason = ""
        self.blamed = root

    def matches(self, pattern: Op) -> Iterator[Bindings]:
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


def find(rule: Rule, node: fx.Node) -> Match | NearMiss:
    """Try a rule at one node: the match that its check accepts, or why there is none."""
    probe = _Probe(node)
    refusal: NearMiss | None = None
    for bound in probe.matches(rule.pattern):
        match = Match(node, bound)
        reason = rule.check(match)
        if reason is None:
            return match
        refusal = refusal or _near_miss(rule, node, reason, node, _parts(rule.pattern))
    return refusal or _near_miss(rule, node, probe.reason, probe.blamed, probe.progress)


def _near_miss(rule: Rule, node: fx.Node, reason: str, blamed: fx.Node, progress: int) -> NearMiss:
    return NearMiss(rule.name, node.name, node.meta.get(ORIGIN) or "", reason, blamed.name, progress)


def apply_rules(target: Program | Rewriter, rules: Sequence[Rule], max_rounds: int = 8) -> RuleStats:
    """Apply rules until none applies, revisiting only nodes near a change.

    Args:
        target: a program (all its graphs, nested ones included), or the rewriter of one graph.
        rules: tried in order at every node; the first that applies wins.
        max_rounds: stop after this many rounds; the first one visits every node, each later one what the round before
            has touched.

    Returns:
        Hits, attempts, and reasons for misses.

    Raises:
        VerifyError: a rewrite returned a value of another type.
    """
    stats = RuleStats()
    rewriters = (
        [target] if isinstance(target, Rewriter) else [Rewriter(target, "rules", name) for name in target.graphs]
    )
    for rewriter in rewriters:
        _Worklist(rewriter, rules, stats).run(max_rounds)
    return stats


class _Worklist:
    def __init__(self, rewriter: Rewriter, rules: Sequence[Rule], stats: RuleStats) -> None:
        self.rewriter = rewriter
        self.stats = stats
        self.reach = max((_depth(rule.pattern) for rule in rules), default=1)
        self.by_target: dict[Any, list[Rule]] = {}
        self.rules = rules
        self.missed: dict[tuple[str, fx.Node], str] = {}
        self.next: dict[fx.Node, None] = {}

    def run(self, max_rounds: int) -> None:
        work: Iterable[fx.Node] = list(self.rewriter.graph.nodes)
        for _ in range(max_rounds):
            self.stats.rounds += 1
            self.next = {}
            for node in work:
                self._visit(node)
            work = list(self.next)
            if not work:
                break
        if any(self._applies(node) for node in work):
            self.stats.converged = False
        for (_, node), reason in self.missed.items():
            if not node._erased:
                self.stats.misses[reason] = self.stats.misses.get(reason, 0) + 1

    def _candidates(self, node: fx.Node) -> list[Rule]:
        if node._erased or node.op != "call_function":
            return []
        known = self.by_target.get(node.target)
        if known is None:
            known = self.by_target[node.target] = [r for r in self.rules if r.pattern.accepts(node.target)]
        return known

    def _applies(self, node: fx.Node) -> bool:
        return any(isinstance(find(rule, node), Match) for rule in self._candidates(node))

    def _visit(self, node: fx.Node) -> None:
        for rule in self._candidates(node):
            self.stats.attempts += 1
            found = find(rule, node)
            if isinstance(found, NearMiss):
                self.missed[rule.name, node] = f"{rule.name}: {found.reason}"
                continue
            self.missed.pop((rule.name, node), None)
            self._rewrite(rule, found)
            return

    def _rewrite(self, rule: Rule, match: Match) -> None:
        rewriter, root = self.rewriter, match.root
        created: list[fx.Node] = []

        def listener(by: str, kind: str, node: fx.Node) -> None:
            if kind == "create":
                created.append(node)

        rewriter.program.listeners.append(listener)
        try:
            with rewriter.before(root):
                new = rule.rewrite(rewriter, match)
        finally:
            rewriter.program.listeners.remove(listener)
        self.stats.hits += 1
        self.stats.by_rule[rule.name] = self.stats.by_rule.get(rule.name, 0) + 1
        if new is not root:
            rewriter.replace(root, new, erase=False)
            self._erase_dead(root)
        self._touch([*created, new])

    def _erase_dead(self, root: fx.Node) -> None:
        """Erase what only the replaced node needed; a value that has one user left may match now."""
        stack = [root]
        while stack:
            node = stack.pop()
            if node._erased or node.users or node.op not in ("call_function", "get_attr"):
                continue
            operands = node.all_input_nodes
            self.rewriter.erase(node)
            for operand in operands:
                stack.append(operand)
                if len(operand.users) == 1:
                    self._touch([operand])

    def _touch(self, nodes: Iterable[fx.Node]) -> None:
        """Visit these nodes again, and the users in whose patterns they may stand."""
        layer = [n for n in nodes if not n._erased]
        for _ in range(self.reach):
            for node in layer:
                self.next[node] = None
            layer = [user for node in layer for user in node.users if user not in self.next]


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


def _depth(pattern: Any) -> int:
    """How many operators are nested in a pattern."""
    return isinstance(pattern, Op) + max(map(_depth, _inner(pattern)), default=0)


def _parts(pattern: Any) -> int:
    """How many parts a pattern has: the progress of a full match, or more."""
    return 1 + sum(map(_parts, _inner(pattern)))


def why_not(program: Program, rule: Rule, limit: int | None = None) -> list[NearMiss]:
    """The places where a rule's outermost operator stands but the rule does not apply, nearest misses first.

    Args:
        program: searched in all its graphs.
        rule: the rule.
        limit: return at most this many.
    """
    misses: list[NearMiss] = []
    for graph in program.graphs.values():
        for node in graph.nodes:
            if node.op == "call_function" and rule.pattern.accepts(node.target):
                found = find(rule, node)
                if isinstance(found, NearMiss):
                    misses.append(found)
    return sorted(misses, key=lambda miss: -miss.progress)[:limit]
