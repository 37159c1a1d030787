"""What a search minimises: how far a candidate's outputs are from those of the model that it started from.

The mean KL divergence of the next-token distribution where an output looks like logits (`passes.fidelity`), else the
squared relative error. A reference is run once per batch and kept. Of a large vocabulary only the ``TOP`` most probable
entries are kept, and everything else as one event: the divergence of these coarser distributions is a lower bound of
the whole one, and for a trained model close to it (EvoPress, Sieberling et al. 2024, appendix: 512 entries suffice).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..base import Batch
from ..fidelity import logits_outputs, position_mask, squared_error

TOP = 512
_ALL_BELOW = 4096
"""Vocabularies up to this size are kept whole."""
_TINY = 1e-30


@dataclass(frozen=True)
class Reference:
    """What is kept of the outputs on one batch.

    Attributes:
        logits: for each output with logits: log-probabilities [rows, top], their entries [rows, top] (None: all of
            them, in order), the rows that a mask leaves [rows of the output] (None: all).
        others: all outputs, where none has logits at a position that counts.
    """

    logits: dict[str, tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]]
    others: dict[str, Any]

    @property
    def positions(self) -> int:
        """How many rows of logits count."""
        return sum(len(kept[0]) for kept in self.logits.values())


def keep(outputs: Mapping[str, Any], batch: Batch, top: int = TOP) -> Reference:
    """Keep of a reference's outputs what `distance` needs.

    Args:
        outputs: the outputs by name.
        batch: the inputs that they answer; a mask among them says which positions count.
        top: how many entries of a large vocabulary to keep.
    """
    names = logits_outputs(outputs)
    if not names:
        return Reference({}, _tensors(outputs))
    kept: dict[str, tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]] = {}
    for name in names:
        value = outputs[name]
        rows = _counted(value, position_mask(batch, value.shape[:-1]))
        if value.shape[-1] <= max(_ALL_BELOW, top):
            kept[name] = torch.log_softmax(_rows(value, rows).double(), -1), None, rows
        else:
            best = torch.log_softmax(_rows(value, rows).float(), -1).topk(top, dim=-1)
            kept[name] = best.values.clone(), best.indices.to(torch.int32), rows
    reference = Reference(kept, {})
    return reference if reference.positions else Reference({}, _tensors(outputs))


def distance(outputs: Mapping[str, Any], reference: Reference) -> float:
    """How far outputs are from a reference: nats per position, or the squared relative error of the worst output.

    A result that is not a number counts as infinite: such a candidate is never chosen.
    """
    if reference.logits:
        total = sum(_divergence(outputs[name], *kept) for name, kept in reference.logits.items())
        value = total / max(reference.positions, 1)
    else:
        errors = [_relative(outputs[name], want) for name, want in reference.others.items()]
        # `max` would lose a NaN that does not come first.
        value = math.nan if any(map(math.isnan, errors)) else max(errors, default=0.0)
    return math.inf if math.isnan(value) else max(value, 0.0)


def _divergence(
    value: torch.Tensor, want: torch.Tensor, entries: torch.Tensor | None, rows: torch.Tensor | None
) -> float:
    """Sum over rows of KL(reference || candidate), with what is not kept as one event."""
    logits = _rows(value, rows)
    if entries is None:
        terms = torch.where(want.isneginf(), 0.0, want.exp() * (want - torch.log_softmax(logits.double(), -1)))
        return float(terms.sum())
    logits = logits.float()
    got = logits.gather(-1, entries.long()) - logits.logsumexp(-1, keepdim=True)
    inside = torch.where(want.isneginf(), 0.0, want.exp() * (want - got)).sum(-1, dtype=torch.float64)
    rest = 1 - want.double().exp().sum(-1)
    rest_got = 1 - got.double().exp().sum(-1)
    outside = rest.clamp_min(0) * (rest.clamp_min(_TINY).log() - rest_got.clamp_min(_TINY).log())
    return float((inside + outside).sum())


def _relative(got: Any, want: torch.Tensor) -> float:
    error, norm = squared_error(got, want)
    if error == 0:
        return 0.0
    return error / norm if norm > 0 else math.inf


def _tensors(outputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}


def _counted(value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else (mask.reshape(-1) != 0).nonzero()[:, 0]


def _rows(value: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    flat = value.reshape(-1, value.shape[-1])
    return flat if rows is None else flat[rows]
