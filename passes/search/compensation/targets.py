"""What a distilled program is compared with: the teacher's outputs, small enough to be kept, and the loss.

- An output that looks like logits (`passes.fidelity.logits_outputs`): ``T^2 KL(p || q)`` of the distributions at
  temperature T, the mean over positions (Hinton et al. 2015, arXiv 1503.02531). Of a distribution over more than
  ``top_k`` entries the teacher's largest ``top_k`` are kept, and all others count as one: by the data processing
  inequality that KL is at most the whole one, and it is zero where the teacher is matched.
- Any other floating output, and every pair of features: ``|got - want|^2 / |want|^2``.

Positions that a mask hides count in neither (`passes.fidelity.position_mask`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ...base import Batch
from ...fidelity import logits_outputs, position_mask


@dataclass(frozen=True)
class Distribution:
    """The teacher's distribution, at a temperature.

    Attributes:
        log_p: [positions, classes], or [positions, top_k + 1] with the rest's logarithm last.
        index: [positions, top_k], the kept entries; None where all are.
    """

    log_p: torch.Tensor
    index: torch.Tensor | None


@dataclass(frozen=True)
class Target:
    """A batch's targets.

    Attributes:
        logits: the distributions of the outputs that look like logits.
        values: the other floating outputs.
        features: values inside the teacher, in the order of the pairs.
        nbytes: what they take.
    """

    logits: dict[str, Distribution]
    values: dict[str, torch.Tensor]
    features: tuple[torch.Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = [*self.values.values(), *self.features]
        for kept in self.logits.values():
            tensors += [kept.log_p] + ([] if kept.index is None else [kept.index])
        return sum(t.nbytes for t in tensors)


def target_of(
    outputs: Mapping[str, Any], features: Sequence[torch.Tensor], batch: Batch, temperature: float, top_k: int
) -> Target:
    """Reduce a teacher's answer to what the loss needs.

    Args:
        outputs: by name.
        features: values inside.
        batch: the inputs, for their mask.
        temperature: divides the logits.
        top_k: how many entries of a distribution are kept.
    """
    logits = {
        name: _distribution(_positions(outputs[name], batch) / temperature, top_k) for name in logits_outputs(outputs)
    }
    values = {
        name: value
        for name, value in outputs.items()
        if name not in logits and isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    return Target(logits, values, tuple(features))


def _positions(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[positions that count, classes]."""
    mask = position_mask(batch, logits.shape[:-1])
    flat = logits.reshape(-1, logits.shape[-1])
    flat = flat if mask is None else flat[mask.reshape(-1) != 0]
    return flat.float() if flat.dtype in (torch.float16, torch.bfloat16) else flat


def _distribution(scaled: torch.Tensor, top_k: int) -> Distribution:
    log_p = F.log_softmax(scaled, -1)
    if log_p.shape[-1] <= top_k + 1:
        return Distribution(log_p, None)
    top, index = log_p.topk(top_k, -1)
    return Distribution(torch.cat([top, _rest(top)], -1), index)


def _rest(log_p: torch.Tensor) -> torch.Tensor:
    """The logarithm of what the kept probabilities leave, [..., 1]; bounded, as rounding may leave nothing."""
    left = 1 - log_p.exp().sum(-1, keepdim=True)
    return left.clamp_min(torch.finfo(log_p.dtype).eps).log()


def divergence(target: Distribution, logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """``T^2 KL(target || softmax(logits / T))``, the mean over positions."""
    log_q = F.log_softmax(logits / temperature, -1)
    if target.index is not None:
        top = log_q.gather(-1, target.index)
        log_q = torch.cat([top, _rest(top)], -1)
    p = target.log_p
    # An entry that both rule out (-inf minus -inf) contributes nothing, and no gradient.
    ruled_out = p.isneginf()
    gap = torch.where(ruled_out, 0.0, p) - torch.where(ruled_out, 0.0, log_q)
    return temperature**2 * (p.exp() * gap).sum() / max(len(p), 1)


def relative_square(got: torch.Tensor, want: torch.Tensor, batch: Batch, *, inside: bool) -> torch.Tensor:
    """``|got - want|^2 / |want|^2`` over the positions that count, and over finite entries."""
    mask = position_mask(batch, want.shape[:2], inside=inside) if want.dim() > 2 else None
    if mask is not None:
        got, want = got[mask != 0], want[mask != 0]
    finite = want.isfinite()
    got, want = torch.where(finite, got, 0.0), torch.where(finite, want, 0.0)
    return (got - want).square().sum() / want.square().sum().clamp_min(torch.finfo(want.dtype).tiny)


def losses(
    outputs: Mapping[str, Any], features: Sequence[torch.Tensor], target: Target, batch: Batch, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of the outputs (a sum over them), and of the features (their mean)."""
    parts = [divergence(kept, _positions(outputs[name], batch), temperature) for name, kept in target.logits.items()]
    parts += [relative_square(outputs[name], want, batch, inside=False) for name, want in target.values.items()]
    inner = [relative_square(a, b, batch, inside=True) for a, b in zip(features, target.features, strict=True)]
    zero = torch.zeros(())
    return sum(parts, start=zero), sum(inner, start=zero) / max(len(inner), 1)
