"""Export a program to ONNX: translate, label, check, write."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import sympy
from onnx_ir.passes import common
from onnxscript import version_converter

from ..assumptions import assumptions
from ..dims import Guard
from ..errors import ExportError
from ..program import ORIGIN, Entry, Program
from . import local_functions
from .fallback import stock_model
from .initializers import WeightTensor
from .translate import NoTranslation, Translator
from .write import SMALL_BYTES, write_model

DEFAULT_OPSET = 20
"""What PyTorch's exporter recommends."""

OPSETS = range(18, 24)
"""What PyTorch's translations can target."""

IR_VERSION = 10

TRANSLATION_OPSET = 18
"""PyTorch's translations are written in this opset, whose operators later ones still have, but for a few."""

_CHANGED = frozenset({"DFT", "GridSample", "GroupNormalization"})
"""Operators whose form changed between `TRANSLATION_OPSET` and the last of `OPSETS`."""


@dataclass
class ExportResult:
    """An ONNX model and how it came about.

    Attributes:
        model: the model; weights are read when it is written.
        opset: the version of ONNX's operators.
        fallback_reason: why the stock exporter was used; None when it was not.
        decomposed: how often each operator had to be decomposed, for want of a translation.
        notes: what a user should know about the result.
        guards: size guards of the model besides the program's own: what decomposing an operator had to assume.
    """

    model: ir.Model
    opset: int
    fallback_reason: str | None = None
    decomposed: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    guards: tuple[Guard, ...] = ()


# The translations record through the evaluator of onnxscript, of which a process has one.
_ONE_AT_A_TIME = threading.RLock()


def to_onnx_model(
    program: Program, *, opset: int | None = None, entry: str = "main", metadata: bool = True, fallback: bool = True
) -> ExportResult:
    """Translate an entry of a program to an ONNX model in memory. Weights are not read.

    Names of inputs, outputs, weights and dynamic dimensions are the program's.

    Args:
        program: the program.
        opset: the version of ONNX's operators, 18 to 23; default 20.
        entry: which entry.
        metadata: whether the model says which passes made it, its size guards and its state.
        fallback: whether to use PyTorch's stock exporter when an operator has no translation.

    Raises:
        ExportError: the opset is not supported, or an operator cannot be exported (the message names it).
    """
    version = DEFAULT_OPSET if opset is None else opset
    if version not in OPSETS:
        raise ExportError(f"opset {version} is not supported", expected=f"{OPSETS.start} to {OPSETS.stop - 1}")
    with _ONE_AT_A_TIME:
        return _export(program, version, entry, metadata, fallback)


def _export(program: Program, version: int, entry: str, metadata: bool, fallback: bool) -> ExportResult:
    target = program.entries[entry]
    translator = Translator(program, target, version)
    with assumptions(program.fake_mode.shape_env) as added:
        model, reason = _translated(program, target, translator, version, fallback)
    notes = list(translator.notes)
    if reason is not None:
        notes = [f"exported by PyTorch's own exporter, because of {reason}"]
    if added:
        texts = ", ".join(target.dims.format_expr(guard.expr) for guard in added)
        notes.append(f"decomposing an operator had to assume sizes: {texts}")
    if metadata:
        model.metadata_props.update(_metadata(program, target, [*target.dims.guards, *added]))
        if notes:
            model.metadata_props["graphlathe.notes"] = "\n".join(notes)
    return ExportResult(model, version, reason, translator.decomposed, tuple(notes), tuple(added))


def _translated(
    program: Program, target: Entry, translator: Translator, version: int, fallback: bool
) -> tuple[ir.Model, str | None]:
    """The model, and why PyTorch's stock exporter had to make it (None: it did not)."""
    try:
        return _model(translator, version), None
    except NoTranslation as error:
        node = error.node
        place = {"node": node.name, "origin": node.meta.get(ORIGIN)}
        if not fallback:
            raise ExportError(
                f"cannot export {node.target}: {error.reason}",
                **place,
                remedy="allow the fallback to PyTorch's exporter",
            ) from error
        try:
            model = stock_model(program, target, version)
        except ExportError as stock:
            raise ExportError(f"cannot export {node.target}: {error.reason}; {stock.message}", **place) from stock
        return model, f"%{node.name} ({node.target}): {error.reason}"


def export_onnx(
    program: Program,
    path: str | os.PathLike[str],
    *,
    opset: int | None = None,
    entry: str = "main",
    metadata: bool = True,
    fallback: bool = True,
    external_data: bool | None = None,
    check: bool = True,
    notes: list[str] | None = None,
) -> Path:
    """Write an entry of a program as an ONNX file, completely or not at all.

    Args:
        program: the program.
        path: the file.
        opset: the version of ONNX's operators, 18 to 23; default 20.
        entry: which entry.
        metadata: whether the file says which passes made it, its size guards and its state.
        fallback: whether to use PyTorch's stock exporter when an operator has no translation.
        external_data: whether weights go to ``<name>.data`` beside the file; default: only above 2 GB.
        check: whether ONNX's checker and its strict shape inference must accept the graph. They see weights by type
            and shape only, so that the time and memory they take do not depend on the weights' size.
        notes: a list that takes what a user should know about the result (the fallback was used, and why); it is in
            the file's metadata too.

    Returns:
        The path.

    Raises:
        ExportError: an operator cannot be exported (or not for all sizes), the checker refuses the result, or the file
            cannot be written.
    """
    result = to_onnx_model(program, opset=opset, entry=entry, metadata=metadata, fallback=fallback)
    for value in result.model.graph.initializers.values():
        if isinstance(value.const_value, WeightTensor):
            value.const_value.require_numbers()
    fixed = [guard for guard in result.guards if guard.expr.has(sympy.Eq)]
    if fixed:
        # Whoever runs the file checks no guards: at other sizes its numbers would be wrong.
        texts = ", ".join(program.entries[entry].dims.format_expr(guard.expr) for guard in fixed)
        raise ExportError(
            f"the file would only be right where {texts}, which decomposing an operator had to assume",
            remedy="trace the model with that dimension fixed; a session (compile) runs it and checks the sizes",
        )
    if check:
        check_graph(result.model)
    if notes is not None:
        notes.extend(result.notes)
    return write_model(result.model, Path(path), external_data)


def check_graph(model: ir.Model) -> None:
    """Run ONNX's full checker on a model with its large weights declared as inputs.

    Raises:
        ExportError: the checker refuses it.
    """
    graph = model.graph
    large = [
        v for v in graph.initializers.values() if v.const_value is not None and v.const_value.nbytes >= SMALL_BYTES
    ]
    for value in large:
        assert value.name is not None
        del graph.initializers[value.name]
        graph.inputs.append(value)
    try:
        proto = ir.serde.serialize_model(model)
    finally:
        for value in large:
            graph.inputs.remove(value)
            graph.initializers.add(value)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"ONNX's checker refuses the exported graph: {str(error).splitlines()[0]}") from error


def _model(translator: Translator, opset: int) -> ir.Model:
    """Translate, and finish: no functions but our own operators, no unused nodes, every operator in its form of this
    opset.
    """
    graph = translator.translate()
    graph.opset_imports[""] = TRANSLATION_OPSET
    translated: list[Any] = list(translator.recorder.functions.values())
    functions = [ir.serde.deserialize_function(f.to_function_proto()) for f in translated]
    model = ir.Model(
        graph, ir_version=IR_VERSION, producer_name="graphlathe", producer_version=_version(), functions=functions
    )
    if functions:
        common.InlinePass()(model)
    if opset > TRANSLATION_OPSET and any(node.op_type in _CHANGED for node in graph):
        version_converter.convert_version(model, opset)
    graph.opset_imports[""] = opset
    _remove_unused(graph)
    for name in sorted(translator.recorder.called & {node.op_type for node in graph}):
        function = local_functions.function_of(name, opset)
        model.functions[function.identifier()] = function
        graph.opset_imports[local_functions.DOMAIN] = 1
    return model


def _remove_unused(graph: ir.Graph) -> None:
    """Remove nodes whose results nobody reads, in one backward walk."""
    outputs = {id(value) for value in graph.outputs}
    for node in reversed(graph):
        if not any(value.uses() or id(value) in outputs for value in node.outputs):
            graph.remove(node, safe=True)


def _metadata(program: Program, entry: Entry, guards: Sequence[Guard]) -> dict[str, str]:
    data = {"graphlathe.version": _version(), "graphlathe.pipeline": ",".join(program.history)}
    texts = [entry.dims.format_expr(guard.expr) for guard in guards]
    for dim in entry.dims.by_name.values():
        texts.append(f"{dim.min} <= {dim.name}" + (f" <= {dim.max}" if dim.max is not None else ""))
    if texts:
        data["graphlathe.guards"] = "\n".join(dict.fromkeys(texts))
    if program.tied:
        data["graphlathe.tied"] = json.dumps(program.tied, sort_keys=True)
    if entry.state:
        data["graphlathe.state"] = json.dumps(
            [{"input": p.input, "output": p.output, "initial": _fill(program, p.initial)} for p in entry.state]
        )
    report = getattr(program, "report", None)
    if report is not None:
        content = report.to_json()
        data["graphlathe.report"] = content if isinstance(content, str) else json.dumps(content)
    return data


def _fill(program: Program, name: str | None) -> float | None:
    """The number that fills a state's first value, if it is one number."""
    if name is None or program.weights[name].is_meta:
        return None
    values = program.weights[name].tensor()
    uniform = values.numel() > 0 and bool((values == values.reshape(-1)[0]).all())
    return values.reshape(-1)[0].item() if uniform else None


def _version() -> str:
    from importlib.metadata import version

    return version("graphlathe")
