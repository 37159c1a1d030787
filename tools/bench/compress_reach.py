"""Finding the ratio at which a tool's result keeps to a level, for tools that only take ratios.

A level that names parts of the model (a share of the neurons, of the heads) is a ratio already. One that names
parameters or multiply-adds is searched for by halving.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from ...ir.errors import GraphlatheError
from .compress_modules import parameters
from .compress_subject import Subject
from .compress_work import count_macs

T = TypeVar("T")
STEPS = 7
LARGEST = 0.95


def smallest_ratio(make: Callable[[float], T], keeps: Callable[[T], bool]) -> tuple[float, T]:
    """The smallest ratio in ``(0, LARGEST]`` whose result keeps to the limit, and that result; by halving.

    Raises:
        GraphlatheError: not even the largest one does.
    """
    best: tuple[float, T] | None = None
    low, high = 0.0, LARGEST
    for _ in range(STEPS):
        ratio = (low + high) / 2
        result = make(ratio)
        if keeps(result):
            best, high = (ratio, result), ratio
        else:
            low = ratio
    if best is None:
        result = make(LARGEST)
        if not keeps(result):
            raise GraphlatheError(f"the limit is not kept at a ratio of {LARGEST}, the largest that was tried")
        best = LARGEST, result
    return best


def module_macs(subject: Subject, module: nn.Module) -> int:
    """Multiply-adds of a module at the longest timed input."""
    feeds = list(subject.timed().values())[-1]
    with torch.no_grad():
        return count_macs(lambda: module(**feeds))


def reach(level: Mapping[str, Any], subject: Subject, make: Callable[[float], nn.Module]) -> tuple[float, nn.Module]:
    """A module at the level: at its ratio, or (where it has none) at the smallest ratio that keeps to its limit.

    A level in milliseconds is taken by its multiply-adds: no tool that is asked here measures time.
    """
    if level["ratio"]:
        return level["ratio"], make(level["ratio"])
    if level["params"]:
        return smallest_ratio(make, lambda module: parameters(module) <= level["params"])
    return smallest_ratio(make, lambda module: module_macs(subject, module) <= level["macs"])
