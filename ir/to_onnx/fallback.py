"""The stock exporter, for programs that cannot be translated node by node (control flow, above all).

The program goes back into a module, which `torch.onnx.export` captures again; names are put back afterwards.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import onnx_ir as ir
import torch

from ..entry_module import EntryModule
from ..errors import ExportError
from ..program import Entry, Program


def stock_model(program: Program, entry: Entry, opset: int) -> ir.Model:
    """Export through ``torch.onnx.export(dynamo=True)``, with the program's names.

    Raises:
        ExportError: the stock exporter cannot export it either.
    """
    module = EntryModule(program, entry)
    examples, shapes = [], []
    for name, node in zip(entry.inputs, entry.placeholders, strict=True):
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            raise ExportError(f"input '{name}' is no tensor, which the stock exporter cannot take")
        examples.append(torch.zeros([entry.dims.evaluate(s, {}) for s in value.shape], dtype=value.dtype))
        dynamic = {i: torch.export.Dim.DYNAMIC for i, s in enumerate(value.shape) if isinstance(s, torch.SymInt)}
        shapes.append(dynamic or None)
    outputs = [name for name, value in zip(entry.outputs, entry.output_values, strict=True) if value is not None]
    try:
        with quiet(), torch.no_grad():
            exported = torch.export.export(module.body, tuple(examples), dynamic_shapes=tuple(shapes), strict=False)
            result = torch.onnx.export(
                exported,
                (),
                dynamo=True,
                opset_version=opset,
                input_names=list(entry.inputs),
                output_names=outputs,
                verbose=False,
            )
    except Exception as error:
        raise ExportError(f"the stock exporter fails: {_reason(error)}") from error
    assert result is not None
    _rename_weights(result.model, module.weight_names)
    _rename_dims(result.model, entry)
    return result.model


def _rename_weights(model: ir.Model, names: Mapping[str, str]) -> None:
    for value in list(model.graph.initializers.values()):
        if value.name is not None and value.name in names:
            value.name = names[value.name]


def _rename_dims(model: ir.Model, entry: Entry) -> None:
    from torch.onnx._internal.exporter import _ir_passes

    names: dict[Any, str] = {}
    by_name = {value.name: value for value in model.graph.inputs}
    for name, node in zip(entry.inputs, entry.placeholders, strict=True):
        value = by_name.get(name)
        if value is None or value.shape is None:
            continue
        for size, dim in zip(node.meta["val"].shape, value.shape, strict=True):
            if isinstance(size, torch.SymInt) and isinstance(dim, ir.SymbolicDim) and dim.value:
                names.setdefault(dim.value, entry.dims.format(size))
    _ir_passes.rename_axis(model, names)


@contextmanager
def quiet() -> Generator[None]:
    """The exporter reports its progress on standard output, and its warnings repeat what the result says."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
