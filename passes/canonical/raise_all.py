"""The raised form: canonical, and every computation that has a name written as the operator of that name.

Runs ``canonicalize`` and all raising passes in the order in which they help one another. Passes that ask for attention
or MLP sites then see one form, wherever the graph came from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...ir.program import Program
from ..base import Context, Effect, Pass, Prop, Stats
from .canonicalize import Canonicalize
from .raise_attention import RaiseAttention
from .raise_experts import RaiseExperts
from .raise_rotary import RaiseRotary

_PARTS: tuple[type[Pass], ...] = (RaiseExperts, RaiseRotary, RaiseAttention)


@dataclass(frozen=True, kw_only=True)
class RaiseAll(Pass):
    """Bring a graph to its raised form: attention, rotary embeddings and experts as one operator each."""

    name: ClassVar[str] = "raise"
    effect: ClassVar[Effect] = Effect.EXACT
    breaks: ClassVar[frozenset[Prop]] = frozenset()
    parts: ClassVar[tuple[str, ...]] = tuple(part.name for part in _PARTS)

    def run(self, program: Program, ctx: Context) -> Stats:
        """Run the parts in turn, each on a canonical graph."""
        stats = Stats()
        tidy = Canonicalize()
        stats.hits += tidy.run(program, ctx).hits
        for part in (make() for make in _PARTS):
            done = part.run(program, ctx)
            stats.hits += done.hits
            stats.attempts += done.attempts
            for reason, count in done.misses.items():
                stats.misses[f"{part.name}: {reason}"] = count
            stats.missed |= {node: f"{part.name}: {reason}" for node, reason in done.missed.items()}
            if done.hits:
                tidy.run(program, ctx)
        return stats
