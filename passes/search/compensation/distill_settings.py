"""How a distillation is done, and what it did."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from ....ir.errors import InputError


@dataclass(frozen=True)
class DistillSettings:
    """How to train.

    Attributes:
        steps: optimiser steps at most; 0 changes nothing.
        learning_rate: the highest one.
        warmup: steps in which it rises from zero.
        weight_decay: of AdamW.
        batches_per_step: batches whose gradients are averaged for one step.
        temperature: divides logits.
        top_k: how many entries of a teacher's distribution are kept.
        clip: the gradient's largest norm.
        hold_out: share of the batches that is never trained on, at least one batch; 0 for none, and then the last
            weights stay.
        evaluate_every: steps between two looks at the held-out batches.
        patience: looks without a better loss after which training stops.
        feature_weight: of the features' loss beside the outputs'.
        embeddings: whether tables that are looked up are trained, with the output maps that are tied to them. Few of
            their rows are seen in little data, and those would move away from the others.
        cache_bytes: memory for what the teacher says.
        seed: of the choice and the order of batches.

    Raises:
        InputError: a number is out of range.
    """

    steps: int = 300
    learning_rate: float = 3e-4
    warmup: int = 20
    weight_decay: float = 0.0
    batches_per_step: int = 1
    temperature: float = 1.0
    top_k: int = 256
    clip: float = 1.0
    hold_out: float = 0.1
    evaluate_every: int = 25
    patience: int = 4
    feature_weight: float = 1.0
    embeddings: bool = False
    cache_bytes: int = 1 << 30
    seed: int = 0

    def __post_init__(self) -> None:
        lowest = {
            "steps": 0, "warmup": 0, "weight_decay": 0, "batches_per_step": 1, "top_k": 1, "hold_out": 0,
            "evaluate_every": 1, "patience": 1, "feature_weight": 0, "cache_bytes": 0,
        }  # fmt: skip
        for name, least in lowest.items():
            if not getattr(self, name) >= least:
                raise InputError(f"{name} is {getattr(self, name)}", expected=f"at least {least}")
        for name in ("learning_rate", "temperature", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}", expected="a positive number")
        if not self.hold_out < 1:
            raise InputError(f"hold_out is {self.hold_out}", expected="a share below 1")


@dataclass(frozen=True)
class DistillReport:
    """What a distillation did.

    Attributes:
        steps: optimiser steps done.
        best_step: the step whose weights stayed; 0 if the first ones did.
        stopped: why it ended: ``steps``, ``patience`` or ``diverged`` (a loss that is no number).
        tokens: positions trained on, repeats included.
        parameters: how many numbers were trained.
        train_loss: the mean loss between two looks, as pairs of step and loss.
        held_out: loss of the held-out batches, as pairs of step and loss; empty without any.
        held_out_before, held_out_after: of the first weights, and of those that stayed.
        train_batches, held_out_batches: how many.
        cached: share of the batches whose targets were kept.
    """

    steps: int = 0
    best_step: int = 0
    stopped: str = "steps"
    tokens: int = 0
    parameters: int = 0
    train_loss: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    held_out_before: float | None = None
    held_out_after: float | None = None
    train_batches: int = 0
    held_out_batches: int = 0
    cached: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """The fields, as JSON-serialisable data."""
        return dataclasses.asdict(self)
