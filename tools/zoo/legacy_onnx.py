"""Zoo models as files of PyTorch's older ONNX exporter, which traces with TorchScript.

Many of the files that users have were written by it: no sizes as such, only chains of ``Shape``, ``Gather`` and
``Concat`` that compute them, and constants where the trace met Python numbers.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from .model import Sizes, ZooModel

OPSET = 17


@dataclass(frozen=True)
class LegacyFile:
    """A file that the older exporter wrote, and the model that it was written from.

    Attributes:
        path: the file.
        model: the zoo's entry.
        module: the model as a function of positional tensors that returns a tuple of tensors.
    """

    path: Path
    model: ZooModel
    module: nn.Module

    def inputs(self, sizes: Sizes) -> dict[str, Tensor]:
        """Named inputs at some sizes: the zoo's, and the attention mask where the file has one."""
        return example_inputs(self.model, self.module, sizes)

    def expected(self, sizes: Sizes) -> list[Tensor]:
        """What the original model returns for these inputs."""
        with torch.no_grad():
            return list(self.module(*self.inputs(sizes).values()))


class _Flat(nn.Module):
    """Positional tensors in, a tuple of tensors out, as the older exporter wants it."""

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.module = module
        self.names = names

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        result: Any = self.module(**dict(zip(self.names, values, strict=True)))
        leaves = pytree.tree_leaves(dict(result) if isinstance(result, dict) else result)
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))


def example_inputs(model: ZooModel, module: nn.Module, sizes: Sizes) -> dict[str, Tensor]:
    """The zoo's inputs, and a mask of ones for the tokens of a text model that takes one.

    Without it most decoders build their mask in ways that the older exporter cannot write.
    """
    inputs = model.inputs(sizes)
    inner = module.module if isinstance(module, _Flat) else module
    accepted = inspect.signature(inner.forward).parameters
    if "input_ids" in inputs and "attention_mask" in accepted and "attention_mask" not in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs


def write_legacy_onnx(model: ZooModel, path: Path, *, opset: int = OPSET) -> LegacyFile:
    """Write a zoo model with ``torch.onnx.export(dynamo=False)``, its dynamic dimensions as ``dynamic_axes``.

    Raises:
        Exception: whatever the exporter raises: it cannot write every architecture.
    """
    module = model.module()
    inputs = example_inputs(model, module, model.trace_sizes)
    dynamic = {name: dict(axes) for name, axes in model.dynamic.items()}
    if "attention_mask" in inputs and "input_ids" in dynamic:
        dynamic["attention_mask"] = dynamic["input_ids"]
    flat = _Flat(module, list(inputs)).eval()
    with _quiet(), torch.no_grad():
        torch.onnx.export(
            flat,
            tuple(inputs.values()),
            str(path),
            dynamo=False,
            opset_version=opset,
            input_names=list(inputs),
            dynamic_axes=dynamic,
        )
    return LegacyFile(path, model, flat)


@contextmanager
def _quiet() -> Generator[None]:
    """The exporter warns about every Python number that a trace meets, and that it is old."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "transformers")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
