"""ONNX's own backend tests, read from the ``onnx`` package: a model, its inputs, and the outputs that it must give.

``node`` holds one small model for each operator and setting; ``simple``, ``pytorch-operator`` and
``pytorch-converted`` hold whole small models; ``light`` holds real architectures whose weights are filled in by the
graph itself.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

KINDS = ("node", "simple", "light", "pytorch-operator", "pytorch-converted")
_SHARE = 10
"""One case in so many is in the sample."""
_EXCLUDED_TYPES = ("STRING", "FLOAT8", "FLOAT4", "INT4", "UINT4", "INT2", "UINT2", "UNDEFINED")
_EXCLUDED_DOMAINS = ("ai.onnx.preview.training", "ai.onnx.ml")


@dataclass(frozen=True)
class Case:
    """A test.

    Attributes:
        name: as in onnx, without ``test_``.
        kind: one of `KINDS`.
        operator: what it tests: the operator of a node test, the kind of a model.
        rtol, atol: onnx's own tolerances.
        source: onnx's own description of the test.
    """

    name: str
    kind: str
    operator: str
    rtol: float
    atol: float
    source: Any

    @property
    def in_sample(self) -> bool:
        """Whether it belongs to the fixed tenth that the quick run takes."""
        return zlib.crc32(self.name.encode()) % _SHARE == 0

    def model(self) -> Any:
        """The model (``ModelProto``)."""
        import onnx

        return self.source.model or onnx.load(_path(self))

    def data(self) -> list[tuple[list[np.ndarray], list[np.ndarray]]]:
        """Inputs in the model's order and the outputs to expect, for each set of data."""
        if self.kind == "node":
            return [([*map(_array, ins)], [*map(_array, outs)]) for ins, outs in self.source.data_sets]
        if self.kind == "light":
            return [self._light_data()]
        folders = sorted(Path(self.source.model_dir).glob("test_data_set_*"))
        return [(_stored(folder, "input"), _stored(folder, "output")) for folder in folders]

    def _light_data(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Inputs that rise evenly from 0 to 1, as onnx makes them; the outputs are stored beside the model."""
        import onnx

        model, path = self.model(), _path(self)
        stored = {tensor.name for tensor in model.graph.initializer}
        inputs: list[np.ndarray] = []
        for port in model.graph.input:
            if port.name not in stored:
                shape = [dim.dim_value or 1 for dim in port.type.tensor_type.shape.dim]
                count = int(np.prod(shape))
                inputs.append((np.arange(count).reshape(shape) / count).astype(np.float32))
        expected = [
            _array(onnx.load_tensor(path.with_name(f"{path.stem}_output_{i}.pb")))
            for i in range(len(model.graph.output))
        ]
        return inputs, expected


def _path(case: Case) -> Path:
    import onnx

    if case.kind == "light":
        return Path(onnx.__file__).parent.parent / case.source.url
    return Path(case.source.model_dir) / "model.onnx"


def _array(value: Any) -> np.ndarray:
    import onnx

    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


def _stored(folder: Path, what: str) -> list[np.ndarray]:
    import onnx

    return [_array(onnx.load_tensor(folder / f"{what}_{i}.pb")) for i in range(len(list(folder.glob(f"{what}_*.pb"))))]


def same(actual: np.ndarray, expected: np.ndarray, case: Case) -> str | None:
    """What differs, or None: shapes and element types exactly, numbers within the case's tolerances."""
    if actual.shape != expected.shape:
        return f"shape {list(actual.shape)} instead of {list(expected.shape)}"
    if actual.dtype != expected.dtype:
        return f"{actual.dtype} instead of {expected.dtype}"
    rtol = case.rtol
    if actual.dtype.name == "bfloat16":
        # Two units in the last place, as in onnx's own runner; numpy cannot compare this type.
        rtol, actual, expected = max(rtol, 2**-6), actual.astype(np.float32), expected.astype(np.float32)
    if np.allclose(actual, expected, rtol=rtol, atol=case.atol, equal_nan=True):
        return None
    with np.errstate(invalid="ignore", over="ignore"):
        return (
            f"numbers differ by up to {np.nanmax(np.abs(actual.astype(np.float64) - expected.astype(np.float64))):.3g}"
        )


@cache
def cases() -> dict[str, Case]:
    """All cases whose inputs and outputs are plain tensors, by name: no strings, sequences, optionals, floats below 16
    bits, integers below 8 bits, training, or ``ai.onnx.ml``.
    """
    from onnx.backend.test.loader import load_model_tests

    found: dict[str, Case] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tests are computed when they are loaded, infinities included
        for kind in KINDS:
            for source in load_model_tests(kind="real" if kind == "light" else kind):
                if kind == "light" and not str(source.url).startswith("onnx/backend/test/data/light/"):
                    continue
                name = source.name.removeprefix("test_")
                case = Case(name, kind, kind, source.rtol, source.atol, source)
                graph = case.model().graph
                if _is_plain(graph):
                    found[f"{kind}/{name}"] = Case(
                        name, kind, _operator(graph, name) if kind == "node" else kind, source.rtol, source.atol, source
                    )
    return _named_after(found)


def downloads() -> list[str]:
    """Names of the models whose files onnx would download: they are not run."""
    from onnx.backend.test.loader import load_model_tests

    return [
        source.name for source in load_model_tests(kind="real") if str(source.url).startswith(("http://", "https://"))
    ]


def _is_plain(graph: Any) -> bool:
    import onnx

    if any(node.domain in _EXCLUDED_DOMAINS for node in graph.node):
        return False
    for port in (*graph.input, *graph.output):
        if port.type.WhichOneof("value") != "tensor_type":
            return False
        kind = onnx.TensorProto.DataType.Name(port.type.tensor_type.elem_type)
        if kind.startswith(_EXCLUDED_TYPES):
            return False
    return True


def _operator(graph: Any, name: str) -> str:
    """The operator under test; for a definition written out, found later by the name of the test it belongs to."""
    if "_expanded" in name:
        return ""
    return next((node.op_type for node in graph.node if node.op_type != "Constant"), "Constant")


def _named_after(found: dict[str, Case]) -> dict[str, Case]:
    """Give each written-out definition the operator of the test that it writes out."""
    from dataclasses import replace

    by_name = {case.name: case.operator for case in found.values() if case.operator}
    return {
        key: case
        if case.operator
        else replace(case, operator=by_name.get(case.name.partition("_expanded")[0], "written out"))
        for key, case in found.items()
    }


def by_operator(chosen: list[Case]) -> Iterator[tuple[str, list[Case]]]:
    """Cases by operator, sorted by its name."""
    for operator in sorted({case.operator for case in chosen}):
        yield operator, [case for case in chosen if case.operator == operator]
