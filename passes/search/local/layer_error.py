"""How far a changed weight moves a layer's outputs on the calibration rows."""

from __future__ import annotations

import math

from torch import Tensor

from ....ir.errors import InputError
from .damping import checked_layer


def layer_error(weight: Tensor, changed: Tensor, gram: Tensor) -> float:
    """``‖X (W' - W)ᵀ‖² / ‖X Wᵀ‖²``, from the gram matrix alone.

    Args:
        weight: [out, in], the weight that is right.
        changed: [out, in], what replaces it, for the same inputs.
        gram: [in, in], ``XᵀX`` summed or averaged over rows.

    Returns:
        The relative squared error: 0 for equal outputs, infinity if the right outputs are all zero and the others not.

    Raises:
        InputError, PreconditionError: as `damping.checked_layer`; or the two weights differ in shape.
    """
    if weight.shape != changed.shape:
        raise InputError(f"weights of shapes {list(weight.shape)} and {list(changed.shape)}", expected="equal shapes")
    before, matrix = checked_layer(weight, gram)
    after, _ = checked_layer(changed, gram)
    difference = after - before
    error = float(((difference @ matrix) * difference).sum())
    norm = float(((before @ matrix) * before).sum())
    if error <= 0:
        return 0.0
    return error / norm if norm > 0 else math.inf
