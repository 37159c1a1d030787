"""Put what the removed columns contributed on average into the bias.

    y = W x   ->   y' = W_kept x_kept + W_removed E[x_removed]

Exact where the removed channels are constant.

Source: FLAP (An et al. 2023, arXiv 2312.11983, bias compensation).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .base import Compensated, kept_columns, scattered, statistic


def bias(weight: Tensor, kept: Sequence[int] | Tensor, mean: Tensor) -> Compensated:
    """Replace the removed channels by their means.

    Args:
        weight: [out, in] of ``y = W x``.
        kept: the columns that stay.
        mean: [in], ``E[x]``.

    Raises:
        PreconditionError: see `kept_columns`; or the mean does not fit the weight, or is not finite.
    """
    columns = kept_columns(weight, kept)
    average = statistic("mean", mean, (weight.shape[1],), weight.device).clone()
    average[columns] = 0.0
    shift = (weight.double() @ average).to(weight.dtype)
    return Compensated(scattered(weight, columns, weight[:, columns]), shift)
