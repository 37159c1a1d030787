"""Compensation: how the columns that stay make up for those that go.

A consumer ``y = W x`` loses some of its inputs. Each method here answers with the weight, and with a bias to be added,
that come nearest to the old output; they differ in what they may change and in the statistics that they need. One file
per method. They are pure functions of plain tensors, compute in float64, and know nothing of programs or passes.

| name          | may change                   | needs          |
|---------------|------------------------------|----------------|
| none          | nothing                      |                |
| bias          | the bias                     | mean           |
| mask-tuning   | one factor per unit          | gram           |
| least-squares | all kept columns             | gram           |

`low_rank` fits maps that are added beside a weight, or take the place of a branch.
"""

from __future__ import annotations

from . import bias, least_squares, mask_tuning, none
from .base import Compensated, Compensation

COMPENSATIONS: dict[str, Compensation] = {
    "none": none.none,
    "bias": bias.bias,
    "mask-tuning": mask_tuning.mask_tuning,
    "least-squares": least_squares.least_squares,
}
"""The methods by name: ``COMPENSATIONS[name](weight, kept, **statistics)``."""

NEEDS: dict[str, tuple[str, ...]] = {
    "none": (),
    "bias": ("mean",),
    "mask-tuning": ("gram",),
    "least-squares": ("gram",),
}
"""The statistics that each method must be given, by the names of its arguments."""

__all__ = ["COMPENSATIONS", "NEEDS", "Compensated", "Compensation"]
