"""Dead code: erase what no output needs.

One backward walk over each graph, nested ones included; nodes with an effect (an assertion on data, a write) stay.

    %a = aten.mul(%x, %x)
    %b = aten.add(%x, %x)          %b = aten.add(%x, %x)
    return %b                      return %b
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...ir.program import Program
from ...ir.rewrite import Rewriter
from ..base import Context, Effect, Pass, Prop, Stats


@dataclass(frozen=True, kw_only=True)
class DeadCode(Pass):
    """Erase operators and weights that no output needs."""

    name: ClassVar[str] = "dce"
    effect: ClassVar[Effect] = Effect.EXACT
    breaks: ClassVar[frozenset[Prop]] = frozenset()

    def run(self, program: Program, ctx: Context) -> Stats:
        """Erase dead nodes of every graph."""
        stats = Stats()
        for name, graph in program.graphs.items():
            stats.attempts += sum(1 for node in graph.nodes if node.op not in ("placeholder", "output"))
            stats.hits += Rewriter(program, self.name, name).erase_dead()
        return stats
