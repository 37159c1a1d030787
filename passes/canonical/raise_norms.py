"""RMSNorm and LayerNorm spelled out become one operator each.

    %a = aten.pow.Tensor_Scalar(%x, 2)
    %b = aten.mean.dim(%a, [-1], True)
    %c = aten.add.Tensor(%b, 1e-06)
    %d = aten.rsqrt(%c)
    %e = aten.mul.Tensor(%x, %d)
    %f = aten.mul.Tensor(%w, %e)            %f = aten.rms_norm(%x, [32], %w, 1e-06)

``rms_norm(x) = x / sqrt(mean(x^2) + eps) * weight`` (arXiv 1910.07467, eq. 4), ``layer_norm`` the same of
``x - mean(x)``, with a bias (arXiv 1607.06450, eq. 4), both over the last axis. `norm_spelling` says which spellings
are known. Statistics in half precision stay as they are: the operators compute in float32, where squares do not
overflow. A cast to float32 and back around the norm goes, as the operators do the same inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...ir.program import Program
from ...ir.rewrite import Rewriter
from ..base import Context, Effect, Pass, Prop, Stats
from .norm_spelling import SpelledNorm, is_root_of_statistic, norms_at
from .refusal import Refused
from .weight_forms import reshaped

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class RaiseNorms(Pass):
    """Write RMSNorm and LayerNorm that are spelled out as one operator."""

    name: ClassVar[str] = "raise-norms"
    effect: ClassVar[Effect] = Effect.EXACT
    needs: ClassVar[frozenset[Prop]] = frozenset({Prop.CANONICAL})
    breaks: ClassVar[frozenset[Prop]] = frozenset()

    def run(self, program: Program, ctx: Context) -> Stats:
        """Look at every root of a mean, a sum or a variance."""
        stats = Stats()
        for name in program.graphs:
            rewriter = Rewriter(program, self.name, name)
            for node in list(rewriter.graph.nodes):
                if not is_root_of_statistic(program, node):
                    continue
                stats.attempts += 1
                try:
                    norms = norms_at(program, node)
                except Refused as refused:
                    stats.miss(refused.reason, node)
                    continue
                for norm in norms:
                    _raise(rewriter, norm)
                stats.hits += 1
            if rewriter.mutations:
                rewriter.erase_dead()
        return stats


def _raise(rewriter: Rewriter, norm: SpelledNorm) -> None:
    with rewriter.before(norm.result):
        weight, bias = (v and reshaped(rewriter, v, [norm.size]) for v in (norm.weight, norm.bias))
        if norm.centred:
            values = norm.x, [norm.size], weight, bias, norm.eps
            new = rewriter.call(aten.layer_norm.default, *values, like=norm.result)
        else:
            new = rewriter.call(aten.rms_norm.default, norm.x, [norm.size], weight, norm.eps, like=norm.result)
    rewriter.replace(norm.result, new)
