"""The raised form: canonical, and every computation that has a name written as the operator of that name.

Runs ``canonicalize`` and all raising passes in the order in which they help one another: experts before the linear
layers that they consist of, attention and its rotary embedding before anything between their products is renamed,
gating after the activations and the linear layers that it joins. Passes that ask for sites then see one form, wherever
the graph came from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...ir.program import Program
from ..base import Context, Effect, Pass, Prop, Stats
from .canonicalize import Canonicalize
from .fold_batchnorm import FoldBatchNorm
from .raise_activations import RaiseActivations
from .raise_attention import RaiseAttention
from .raise_experts import RaiseExperts
from .raise_linear import RaiseLinear
from .raise_norms import RaiseNorms
from .raise_rotary import RaiseRotary

_PARTS: tuple[type[Pass], ...] = (
    RaiseExperts,
    RaiseRotary,
    RaiseAttention,
    FoldBatchNorm,
    RaiseLinear,
    RaiseNorms,
    RaiseActivations,
)


@dataclass(frozen=True, kw_only=True)
class RaiseAll(Pass):
    """Bring a graph to its raised form: attention, norms, activations, linear layers... as one operator each."""

    name: ClassVar[str] = "raise"
    effect: ClassVar[Effect] = Effect.EXACT
    breaks: ClassVar[frozenset[Prop]] = frozenset()
    parts: ClassVar[tuple[str, ...]] = tuple(part.name for part in _PARTS)

    def run(self, program: Program, ctx: Context) -> Stats:
        """Run the parts in turn, each on a canonical graph."""
        stats = Stats()
        tidy = Canonicalize()
        stats.hits = stats.attempts = tidy.run(program, ctx).hits  # what it finds, it rewrites
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
