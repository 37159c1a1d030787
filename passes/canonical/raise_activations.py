"""Activations spelled out become one operator, and so does an activation that gates.

    %a = aten.div.Tensor(%x, 1.4142135623730951)
    %b = aten.erf(%a)
    %c = aten.add.Tensor(%b, 1)
    %d = aten.mul.Tensor(%x, %c)
    %e = aten.mul.Tensor(%d, 0.5)           %e = aten.gelu(%x)

    %g = aten.linear(%x, %gate)             %g = aten.linear(%x, %gate)
    %u = aten.linear(%x, %up)               %u = aten.linear(%x, %up)
    %s = aten.silu(%g)
    %p = aten.mul.Tensor(%s, %u)            %p = graphlathe.gated_activation(%g, %u, activation="silu")

`activation_spelling` lists the activations, `gating` says what counts as gating. Constants may differ from the exact
ones by what their type rounds. A quick GELU, ``x sigmoid(1.702 x)``, has no operator and stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from ...ir.program import Program
from ...ir.rewrite import Rewriter
from ...kernels import gated_activation
from ..base import Context, Effect, Pass, Prop, Stats
from .activation_spelling import activation_at
from .gating import gating_at
from .refusal import Refused


@dataclass(frozen=True, kw_only=True)
class RaiseActivations(Pass):
    """Write activations that are spelled out (GELU, SiLU, Mish, hard swish) and gated ones as one operator."""

    name: ClassVar[str] = "raise-activations"
    effect: ClassVar[Effect] = Effect.EXACT
    needs: ClassVar[frozenset[Prop]] = frozenset({Prop.CANONICAL})
    breaks: ClassVar[frozenset[Prop]] = frozenset()

    def run(self, program: Program, ctx: Context) -> Stats:
        """First the activations themselves, then the products with them."""
        stats = Stats()
        for name in program.graphs:
            rewriter = Rewriter(program, self.name, name)
            for read in (_plain, _gated):
                for node in list(rewriter.graph.nodes):
                    if node.op != "call_function":
                        continue
                    try:
                        hit = read(rewriter, node)
                    except Refused as refused:
                        stats.miss(refused.reason, node)
                        stats.attempts += 1
                        continue
                    stats.hits += hit
                    stats.attempts += hit
                if rewriter.mutations:
                    rewriter.erase_dead()
        return stats


def _plain(rewriter: Rewriter, node: fx.Node) -> bool:
    found = activation_at(rewriter.program, node)
    if found is None:
        return False
    with rewriter.before(found.result):
        new = rewriter.call(found.target, found.x, like=found.result, **found.options)
    rewriter.replace(found.result, new)
    return True


def _gated(rewriter: Rewriter, node: fx.Node) -> bool:
    found = gating_at(node)
    if found is None:
        return False
    with rewriter.before(node):
        new = rewriter.call(gated_activation, found.gate, found.up, activation=found.activation, like=node)
    rewriter.replace(node, new)
    return True
