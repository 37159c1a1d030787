"""Passes for tests of what runs passes: one of every effect, honest and not, and one with every kind of option."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from graphlathe.ir.errors import PostconditionError
from graphlathe.ir.program import Program
from graphlathe.ir.rewrite import Rewriter, is_op
from graphlathe.passes.base import Context, Effect, Pass, Prop, Stats, option
from graphlathe.passes.registry import register

aten = torch.ops.aten

EVERY_KIND = ("flag", "count", "share", "word", "maybe", "maybe_word", "indices", "shares", "words", "flags", "some")


@register
@dataclass(frozen=True, kw_only=True)
class EveryKind(Pass):
    """Does nothing, with options of every kind."""

    name: ClassVar[str] = "test-every-kind"

    flag: bool = option(False, help="a truth value")
    count: int = option(3, help="a number")
    share: float = option(0.5, help="a number")
    word: str = option("x", help="text")
    maybe: int | None = option(None, help="a number or nothing")
    maybe_word: str | None = option(None, help="text or nothing")
    indices: tuple[int, ...] = option((), help="numbers")
    shares: tuple[float, ...] = option((1.0, 2.0), help="numbers")
    words: tuple[str, ...] = option((), help="texts")
    flags: tuple[bool, ...] = option((), help="truth values")
    some: tuple[str, ...] | None = option(None, help="texts or nothing")

    def run(self, program: Program, ctx: Context) -> Stats:
        return Stats()


def _scale_relus(program: Program, made_by: str, factor: float) -> Stats:
    stats = Stats()
    rewriter = Rewriter(program, made_by)
    for node in list(program.graph.nodes):
        if not is_op(node, aten.relu):
            continue
        stats.attempts += 1
        users = list(node.users)
        with rewriter.after(node):
            scaled = rewriter.call(aten.mul.Tensor, node, factor, like=node)
        for user in users:
            rewriter.replace_in(user, node, scaled)
        stats.hits += 1
    return stats


@dataclass(frozen=True, kw_only=True)
class Liar(Pass):
    """Says that it is exact, and is not."""

    name: ClassVar[str] = "test-liar"
    effect: ClassVar[Effect] = Effect.EXACT
    factor: float = option(1.5, help="what every relu is multiplied with")

    def run(self, program: Program, ctx: Context) -> Stats:
        return _scale_relus(program, self.name, self.factor)


@dataclass(frozen=True, kw_only=True)
class Approximate(Pass):
    """Multiplies every relu, and says so."""

    name: ClassVar[str] = "test-approximate"
    effect: ClassVar[Effect] = Effect.APPROXIMATE
    factor: float = option(1.5, help="what every relu is multiplied with")

    def run(self, program: Program, ctx: Context) -> Stats:
        stats = _scale_relus(program, self.name, self.factor)
        stats.plan = {"factor": self.factor}
        return stats


@dataclass(frozen=True, kw_only=True)
class Meddler(Pass):
    """An analysis that changes the graph."""

    name: ClassVar[str] = "test-meddler"
    effect: ClassVar[Effect] = Effect.ANALYSIS

    def run(self, program: Program, ctx: Context) -> Stats:
        return _scale_relus(program, self.name, 1.0)


@dataclass(frozen=True, kw_only=True)
class Counter(Pass):
    """An honest analysis."""

    name: ClassVar[str] = "test-counter"
    effect: ClassVar[Effect] = Effect.ANALYSIS

    def run(self, program: Program, ctx: Context) -> Stats:
        return Stats(plan={"relus": sum(is_op(n, aten.relu) for n in program.graph.nodes)})


@dataclass(frozen=True, kw_only=True)
class AddOutput(Pass):
    """Returns the first relu as well."""

    name: ClassVar[str] = "test-add-output"
    effect: ClassVar[Effect] = Effect.EXTENDS
    spoil: bool = option(False, help="whether the old outputs change, too")

    def run(self, program: Program, ctx: Context) -> Stats:
        if self.spoil:
            _scale_relus(program, self.name, 2.0)
        relu = next(n for n in program.graph.nodes if is_op(n, aten.relu))
        Rewriter(program, self.name).add_output("relu", relu)
        return Stats(hits=1)


@dataclass(frozen=True, kw_only=True)
class Crash(Pass):
    """Fails in the middle of its work, with an error that is not ours."""

    name: ClassVar[str] = "test-crash"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, program: Program, ctx: Context) -> Stats:
        _scale_relus(program, self.name, 3.0)
        raise ZeroDivisionError("by zero")


@dataclass(frozen=True, kw_only=True)
class BreaksItsLaw(Pass):
    """Runs, and then finds that its own law does not hold."""

    name: ClassVar[str] = "test-law"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, program: Program, ctx: Context) -> Stats:
        return Stats()

    def ensure(self, before: Program, program: Program, stats: Stats) -> None:
        raise PostconditionError("nothing was done")


@dataclass(frozen=True, kw_only=True)
class NeedsCanonical(Pass):
    """Wants the canonical form."""

    name: ClassVar[str] = "test-needs-canonical"
    effect: ClassVar[Effect] = Effect.EXACT
    needs: ClassVar[frozenset[Prop]] = frozenset({Prop.CANONICAL})
    breaks: ClassVar[frozenset[Prop]] = frozenset()

    def run(self, program: Program, ctx: Context) -> Stats:
        return Stats()


@dataclass(frozen=True, kw_only=True)
class NeedsData(Pass):
    """Wants calibration data."""

    name: ClassVar[str] = "test-needs-data"
    effect: ClassVar[Effect] = Effect.ANALYSIS
    needs: ClassVar[frozenset[Prop]] = frozenset({Prop.CALIBRATION})

    def run(self, program: Program, ctx: Context) -> Stats:
        assert ctx.calibration is not None
        return Stats(plan={"batches": len(ctx.calibration)})
