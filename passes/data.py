"""Example inputs and calibration data: from what callers have to named inputs that fit the signature."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree

from ..ir.errors import InputError
from ..ir.program import Program
from .base import Batch


def named_inputs(program: Program, inputs: Any, where: str) -> dict[str, Any]:
    """One call's inputs by name, checked against the signature.

    Args:
        program: whose inputs.
        inputs: a tuple or list (positional), a mapping (keyword), or one tensor. Arrays are converted.
        where: what to call it in errors (``example_inputs``, ``calibration batch 3``).

    Raises:
        InputError: it does not fit the signature.
    """
    try:
        if isinstance(inputs, Mapping):
            feeds = program.feeds(**{str(name): _tensors(value) for name, value in inputs.items()})
        elif isinstance(inputs, (tuple, list)):
            feeds = program.feeds(*(_tensors(value) for value in inputs))
        elif isinstance(inputs, (torch.Tensor, np.ndarray)):
            feeds = program.feeds(_tensors(inputs))
        else:
            raise InputError(
                f"got a {type(inputs).__name__}", expected="a tuple of inputs, a dict of named inputs, or one tensor"
            )
        program.check_feeds(feeds)
    except InputError as error:
        raise InputError(f"{where}: {error.message}", expected=error.expected, remedy=error.remedy) from error
    return feeds


def calibration_batches(program: Program, calibration: Iterable[Any] | None) -> list[Batch] | None:
    """Materialise calibration data once (it may be a generator), checking every batch.

    Raises:
        InputError: it is empty, no iterable of batches, or a batch does not fit the signature.
    """
    if calibration is None:
        return None
    if isinstance(calibration, (Mapping, torch.Tensor, str, bytes)) or not isinstance(calibration, Iterable):
        raise InputError(
            f"calibration is a {type(calibration).__name__}",
            expected="an iterable of batches, each a tuple or dict of inputs",
            remedy="put a single batch in a list",
        )
    batches: list[Batch] = [
        named_inputs(program, batch, f"calibration batch {index}") for index, batch in enumerate(calibration)
    ]
    if not batches:
        raise InputError("the calibration data is empty", remedy="give at least one batch, or calibration=None")
    return batches


def _tensors(value: Any) -> Any:
    """Arrays as tensors, through nested structures."""
    return pytree.tree_map(lambda v: torch.as_tensor(v) if isinstance(v, np.ndarray) else v, value)
