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
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from .patterns import Match, Op, Probe, depth, parts
from .program import ORIGIN, Program
from .rewrite import Rewriter


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


def find(rule: Rule, node: fx.Node) -> Match | NearMiss:
    """Try a rule at one node: the match that its check accepts, or why there is none."""
    probe = Probe(node)
    refusal: NearMiss | None = None
    for bound in probe.matches(rule.pattern):
        match = Match(node, bound)
        reason = rule.check(match)
        if reason is None:
            return match
        refusal = refusal or _near_miss(rule, node, reason, node, parts(rule.pattern))
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
        self.reach = max((depth(rule.pattern) for rule in rules), default=1)
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
