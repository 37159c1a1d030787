"""The canonical form: one spelling per computation, nothing that changes nothing, nothing twice, nothing constant.

Runs ``remove-noops``, the spellings of `passes.canonical.spelling`, ``fold-constants``, ``cse`` and ``dce`` until a
round changes nothing. All of them are exact. Other passes may then rely on one form; `Prop.CANONICAL` says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...ir.program import Program
from ...ir.rewrite import Rewriter
from ..base import Context, Effect, Pass, Prop, Stats, option
from .cse import CommonSubexpressions
from .dce import DeadCode
from .fold_constants import FoldConstants
from .remove_noops import RemoveNoops
from .spelling import respell


@dataclass(frozen=True, kw_only=True)
class Canonicalize(Pass):
    """Bring a graph to its canonical form: one spelling, constants folded, nothing idle, repeated or unused."""

    name: ClassVar[str] = "canonicalize"
    effect: ClassVar[Effect] = Effect.EXACT
    breaks: ClassVar[frozenset[Prop]] = frozenset()

    max_bytes: int = option(1 << 20, ge=0, help="largest folded constant, in bytes")
    max_rounds: int = option(
        10,
        ge=1,
        help="rounds after which to stop although the last one still changed something",
    )

    def run(self, program: Program, ctx: Context) -> Stats:
        """Run the parts in turn to a fixed point."""
        stats = Stats()
        parts = (
            RemoveNoops(),
            None,
            FoldConstants(max_bytes=self.max_bytes),
            CommonSubexpressions(),
            DeadCode(),
        )
        for round_ in range(self.max_rounds):
            start = program.mutations
            latest: dict[str, int] = {}
            for part in parts:
                if part is None:
                    stats.hits += sum(respell(Rewriter(program, self.name, name)) for name in program.graphs)
                    continue
                done = part.run(program, ctx)
                stats.hits += done.hits
                stats.attempts += done.attempts if round_ == 0 else 0
                for reason, count in done.misses.items():
                    latest[f"{part.name}: {reason}"] = count
            stats.misses = latest  # of the last round: what is still there
            if program.mutations == start:
                break
        else:
            stats.notes.append(f"stopped after {self.max_rounds} rounds although the last one changed something")
        return stats
