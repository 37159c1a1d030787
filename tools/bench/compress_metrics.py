"""What the compression suites measure of two models' outputs: plain functions on arrays, each with its closed form.

Perplexity is ``exp`` of the mean negative log-likelihood of the next token. The KL divergence ``KL(dense || changed)``
and the agreement of first choices come from `passes.fidelity`, the same meter that the passes' reports use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...passes.fidelity import DriftMeter

_ROWS = 4
"""Rows of logits whose float64 copies stay in the processor's cache."""

Floats = npt.NDArray[np.floating[Any]]


@dataclass
class LanguageMeter:
    """Adds up the likelihood of text under a model, and its distance from the dense model.

    Attributes:
        nll: summed negative log-likelihood, in nats.
        tokens: how many tokens were predicted.
    """

    nll: float = 0.0
    tokens: int = 0

    def __post_init__(self) -> None:
        self._drift = DriftMeter("test text")

    def add(self, ids: Tensor, logits: Tensor, dense: Tensor) -> None:
        """Add one batch.

        Args:
            ids: token ids, [batch, tokens].
            logits: of the changed model, [batch, tokens, vocabulary].
            dense: of the original.
        """
        width = logits.shape[-1]
        # The last position predicts a token that is not there.
        guesses, truth = logits[:, :-1].reshape(-1, width), ids[:, 1:].reshape(-1)
        for some, right in zip(guesses.split(_ROWS), truth.split(_ROWS), strict=True):
            self.nll += float(torch.nn.functional.cross_entropy(some.double(), right, reduction="sum"))
        self.tokens += truth.numel()
        self._drift.add({"logits": logits}, {"logits": dense})

    @property
    def perplexity(self) -> float:
        """``exp(nll / tokens)``."""
        return math.exp(min(self.nll / self.tokens, 700.0))  # what overflows is no language model either way

    @property
    def kl(self) -> float:
        """Mean ``KL(dense || changed)``, in nats a position."""
        found = self._drift.result().kl
        return math.nan if found is None else found

    @property
    def top1(self) -> float:
        """Share of positions at which both put the same token first."""
        found = self._drift.result().top1
        return math.nan if found is None else found


def ranks(values: Floats) -> Floats:
    """Ranks from 0, [n]; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts + 1) / 2)[inverse], dtype=np.float64)


def spearman(a: Floats, b: Floats) -> float:
    """Spearman's rank correlation of two sequences of numbers, [n]; NaN where one of them is constant."""
    x, y = ranks(np.asarray(a)), ranks(np.asarray(b))
    x, y = x - x.mean(), y - y.mean()
    norm = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / norm if norm else math.nan


def unit_rows(vectors: Floats) -> Floats:
    """Rows scaled to length 1, in float64."""
    rows = np.asarray(vectors, dtype=np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)


def pairwise_cosines(vectors: Floats) -> Floats:
    """Cosines of all pairs of different rows, [n * (n - 1) / 2]."""
    rows = unit_rows(vectors)
    return np.asarray((rows @ rows.T)[np.triu_indices(len(rows), 1)])


def retrieval_at_1(queries: Floats, documents: Floats) -> float:
    """Share of queries whose nearest document (by cosine) is the one of the same index; a tie counts as a miss."""
    scores = unit_rows(queries) @ unit_rows(documents).T
    right = np.diagonal(scores)
    others = np.where(np.eye(len(scores), dtype=bool), -np.inf, scores)
    return float(np.mean(right > others.max(axis=1)))


def agreement(a: Floats, b: Floats) -> float:
    """Share of rows whose largest entry is at the same place."""
    return float(np.mean(np.argmax(a, axis=1) == np.argmax(b, axis=1)))


def mean_kl(logits: Floats, dense: Floats) -> float:
    """Mean over rows of ``KL(softmax(dense) || softmax(logits))``, in nats."""
    p = torch.log_softmax(torch.from_numpy(np.asarray(dense, dtype=np.float64)), -1)
    q = torch.log_softmax(torch.from_numpy(np.asarray(logits, dtype=np.float64)), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def mean_pool(states: Tensor, mask: Tensor) -> Tensor:
    """Mean of the states [batch, tokens, width] over the tokens that the mask [batch, tokens] shows."""
    shown = mask.to(states.dtype).unsqueeze(-1)
    return (states * shown).sum(1) / shown.sum(1)


def embeddings(
    run: Callable[[dict[str, Tensor]], Tensor], feeds: Sequence[dict[str, Tensor]], mask: str = "attention_mask"
) -> Floats:
    """One mean-pooled vector per feed, [n, width]; ``run`` gives states of shape [1, tokens, width]."""
    return np.concatenate([mean_pool(run(feed), feed[mask]).numpy() for feed in feeds])
