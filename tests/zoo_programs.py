"""Traced zoo models for tests: each is built and traced once per process, and its tests stay in one worker."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pytest
import torch

from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.tools import zoo

# One per family and per trick of the trade: the sample that the quick run takes where the whole zoo would take minutes.
SAMPLE = ("llama", "gpt2", "bert", "t5", "vit", "swin", "resnet", "mixtral", "mamba", "plain_resnet")


@cache
def module(name: str) -> torch.nn.Module:
    """The zoo model ``name`` (do not change it: it is shared)."""
    return zoo.get(name).module()


@cache
def traced(name: str) -> Program:
    """The zoo model ``name`` as a program with its dynamic dimensions (clone it before changing it)."""
    model = zoo.get(name)
    return trace(module(name), model.example(), dynamic=model.dynamic or None)


def flat_outputs(value: Any) -> list[torch.Tensor]:
    """The tensors that a module returned, in order."""
    leaves = torch.utils._pytree.tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def zoo_parameters(names: Iterable[str] | None = None, *, quick: Iterable[str] | None = None) -> list[Any]:
    """Parametrisation over the zoo; models outside ``quick`` are marked slow, and one model keeps to one worker."""
    chosen = list(names) if names is not None else zoo.names()
    fast = set(chosen if quick is None else quick)
    return [
        pytest.param(n, marks=[pytest.mark.xdist_group(n), *([] if n in fast else [pytest.mark.slow])]) for n in chosen
    ]


def over_zoo(quick: Iterable[str] | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: run a test for every zoo model, as argument ``name``."""
    return pytest.mark.parametrize("name", zoo_parameters(quick=quick))
