"""ONNX front end: an ``.onnx`` file to `Program`, by partial evaluation.

The ONNX graph is walked in order, one small PyTorch function per operator, and `torch.export` traces the walk. Dynamic
dimensions keep the names that the file gives them; initializers become lazy weights under their own names; node names
become origins.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.fx import traceback

from ..calling import identifier
from ..errors import DataDependentError, ImportModelError, MissingOperatorError, suggest
from ..from_torch import trace
from ..program import ORIGIN, Program
from .limits import ImportLimitError, check_example
from .model_file import DTYPES, OnnxModel, fix_inputs, read_model
from .registry import supported
from .signature import fitting, read_recorded, restore
from .walk import Walk, check_supported, graph_inputs

_EXAMPLES: tuple[tuple[int, int], ...] = ((3, 224), (4, 64), (3, 7), (11, 96))
"""Example sizes to try, one after the other: that of the first dynamic dimension of token ids (and of any batch), and
that of the first spatial one. Sizes cost nothing (nothing is computed); only room for a few convolutions matters, and
positions must not run out. The last one is for models that cut sequences into blocks, of which there must be two."""

_FACTORS = (1, 2, 3, 5)
"""Multiples of the example sizes that a trace is asked for: which of two traces takes more sizes."""


def from_onnx(
    path: str | os.PathLike[str],
    *,
    sizes: Mapping[str, int] | None = None,
    static: bool = False,
    values: Mapping[str, Any] | None = None,
) -> Program:
    """Import an ONNX file.

    Args:
        path: the file; its external data must lie in the same folder (or below).
        sizes: example sizes of dynamic dimensions by name, for models that only take some (an image size that must be
            a multiple of 32). Sizes that the importer chooses do for most.
        static: fix dynamic dimensions at ``sizes``, which must then name all of them.
        values: inputs to fix at these tensors (or arrays): the program has them as weights, not as inputs. For inputs
            that hold a shape, an axis or a count, which cannot stay open.

    Returns:
        A program with the file's input and output names, its dynamic dimensions by name, its initializers as weights.

    Raises:
        ImportModelError: the file is missing, truncated or malformed; its data lies outside its folder; or a dimension
            that it declares dynamic is not.
        DataDependentError: a shape depends on data (an `ImportModelError`).
        MissingOperatorError: an operator is not known (an `ImportModelError`, and an `UnsupportedOpError`).
    """
    model = read_model(Path(path))
    fix_inputs(model, values or {})
    check_supported(model)
    ports = [_Port(port) for port in model.graph.input if port.name in set(graph_inputs(model))]
    names = list(dict.fromkeys(name for port in ports for name in port.dims.values()))
    for name in sizes or {}:
        if name not in names:
            raise ImportModelError(
                f"the model has no dynamic dimension '{name}'{suggest(name, names)}",
                expected=", ".join(names) or "none",
            )
    if static and any(name not in (sizes or {}) for name in names):
        raise ImportModelError("static=True needs the size of every dynamic dimension", expected=", ".join(names))
    recorded = read_recorded({entry.key: entry.value for entry in model.proto.metadata_props})
    tries = fitting(recorded, _examples(ports, sizes or {}), sizes or {})
    program, walk = _trace(model, ports, tries, static)
    _rename(program, walk, ports, [output.name for output in model.graph.output])
    program.metadata |= {
        "producer": model.proto.producer_name or "onnx",
        "source": model.source,
        "opset": str(model.opset),
    }
    restore(program, recorded)
    return program


class _Port:
    """A graph input: its name, element type, shape, and the names of its dynamic dimensions by axis."""

    def __init__(self, proto: Any) -> None:
        self.name: str = proto.name
        kind = proto.type.tensor_type
        if not proto.type.HasField("tensor_type") or kind.elem_type not in DTYPES:
            raise ImportModelError(f"the input '{self.name}' is no tensor of a type that torch has")
        if not kind.HasField("shape"):
            raise ImportModelError(
                f"the input '{self.name}' has no rank", remedy="give it a shape in the file; sizes may be dynamic"
            )
        self.dtype = DTYPES[kind.elem_type]
        self.fixed: list[int] = []
        self.dims: dict[int, str] = {}
        for axis, dim in enumerate(kind.shape.dim):
            self.fixed.append(dim.dim_value)
            if not dim.HasField("dim_value") or dim.dim_value < 0:  # older exporters write -1 for a dynamic one
                self.dims[axis] = identifier(dim.dim_param or f"{self.name}_{axis}")

    def example(self, sizes: Mapping[str, int]) -> torch.Tensor:
        """A tensor of that shape (of ones: a mask then hides nothing, an index exists)."""
        shape = [sizes[self.dims[a]] if a in self.dims else n for a, n in enumerate(self.fixed)]
        check_example(self.name, shape, self.dtype.itemsize)
        return torch.ones(shape, dtype=self.dtype)


def _examples(ports: list[_Port], given: Mapping[str, int]) -> list[dict[str, int]]:
    """Sizes to trace at: all different first; then equal by axis, for files that give one size two names."""
    spatial: dict[str, bool] = {}
    axes: dict[str, int] = {}
    for port in ports:
        for axis, name in port.dims.items():
            axes.setdefault(name, axis)
            spatial[name] = spatial.get(name, True) and axis > 0 and port.dtype.is_floating_point
    tries: list[dict[str, int]] = []
    for by_axis in (False, True):
        for small, large in _EXAMPLES:
            sizes = {
                name: large + 32 * (axes[name] if by_axis else i)
                if spatial[name]
                else small + (axes[name] if by_axis else i)
                for i, name in enumerate(axes)
            }
            tries.append(sizes | {name: size for name, size in given.items() if name in sizes})
    return [sizes for i, sizes in enumerate(tries) if sizes not in tries[:i]]


def _trace(model: OnnxModel, ports: list[_Port], tries: list[dict[str, int]], static: bool) -> tuple[Program, Walk]:
    """The trace that takes most sizes, of those at the sizes that no trace before takes; the first one, if in doubt.

    A trace at small sizes may take these alone, when the model cuts sequences into blocks.
    """
    failed: ImportModelError | None = None
    found: list[tuple[Program, Walk]] = []
    for sizes in tries:
        if any(_holds(program, sizes) for program, _ in found):
            continue
        try:
            found.append(_trace_at(model, ports, sizes, static))
        except (MissingOperatorError, DataDependentError, ImportLimitError):
            raise
        except ImportModelError as error:
            failed = failed or error
    if not found:
        assert failed is not None
        raise failed
    probes = [{name: size * factor for name, size in sizes.items()} for sizes in tries for factor in _FACTORS]
    return max(found, key=lambda traced: sum(_holds(traced[0], probe) for probe in probes))


def _trace_at(model: OnnxModel, ports: list[_Port], sizes: dict[str, int], static: bool) -> tuple[Program, Walk]:
    walk = Walk(model)
    dynamic = {f"inputs.{i}": port.dims for i, port in enumerate(ports) if port.dims}
    with traceback.preserve_node_meta():
        example = [port.example(sizes) for port in ports]
        return trace(walk, (example,), dynamic=None if static or not dynamic else dynamic), walk


def _holds(program: Program, sizes: Mapping[str, int]) -> bool:
    """Whether a program takes inputs of these sizes, as far as its guards go."""
    dims = program.main.dims
    known = {dim.symbol: sizes[name] for name, dim in dims.by_name.items() if name in sizes}
    return all(guard.holds(known) for guard in dims.guards if guard.expr.free_symbols <= known.keys())


def _rename(program: Program, walk: Walk, ports: list[_Port], outputs: list[str]) -> None:
    """Give inputs, outputs and weights the file's names, weights their numbers, and nodes their origins."""
    entry = program.main
    by_leaf = {f"inputs.{i}": port.name for i, port in enumerate(ports)}
    taken: set[str] = set()
    for name, node in zip(entry.inputs, entry.placeholders, strict=True):
        node.target = identifier(by_leaf[name], taken)
        node._rename(node.target)
        taken.add(node.target)
        node.meta[ORIGIN] = by_leaf[name]
    entry.inputs = tuple(by_leaf[name] for name in entry.inputs)
    entry.arguments = {name: (name,) for name in entry.inputs}
    entry.outputs = tuple(outputs)
    entry.bare_output = outputs == ["output"]
    for graph in program.graphs.values():
        for node in graph.nodes:
            if node.op == "get_attr" and str(node.target) in walk.names:
                node.target = walk.names[str(node.target)]
                node.meta[ORIGIN] = str(node.target).rpartition(".")[0]
    program.weights = {
        walk.names.get(name, name): walk.stored[walk.names[name]] if name in walk.names else weight
        for name, weight in program.weights.items()
    }
    program.tied = {walk.names.get(a, a): walk.names.get(b, b) for a, b in program.tied.items()}


__all__ = ["from_onnx", "supported"]
