"""One changed model against the dense one, both as ONNX files: everything that is measured of a method's result.

All methods' results come here as files, are opened in the same ONNX Runtime with the same options, read the same test
data, and are timed in turn with the dense file. The function runs in a process of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from ...ir.errors import GraphlatheError
from ...ir.load import load
from ...ir.verify import relative_error
from ...runtime.onnxruntime_backend import open_onnx
from ...runtime.session import Session
from .base import Row
from .compress_subject import Case, Feeds, subject_of
from .compress_timing import time_paired

TOLERANCE = 1e-3
"""Of a reloaded file's outputs against ONNX Runtime's, relative: whole networks in float32, in two implementations."""
_SMALL_INTEGERS = frozenset(
    getattr(onnx.TensorProto, name) for name in ("INT8", "UINT8", "INT4", "UINT4") if hasattr(onnx.TensorProto, name)
)
_FLOATS = frozenset({onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16})


def weights_of(model: onnx.ModelProto) -> Iterator[np.ndarray[Any, Any]]:
    """The model's numbers: floating tensors, and tensors of small integers (quantised ones), stored anywhere."""
    stored = list(model.graph.initializer)
    for node in model.graph.node:
        if node.op_type == "Constant":
            stored += [attribute.t for attribute in node.attribute if attribute.name == "value"]
    for tensor in stored:
        if tensor.data_type in _FLOATS or (tensor.data_type in _SMALL_INTEGERS and len(tensor.dims) > 1):
            yield numpy_helper.to_array(tensor)


def size_of(path: Path) -> Row:
    """Parameters, those that are not zero, and bytes on disk with the data file."""
    model = onnx.load(str(path), load_external_data=False)
    data = {entry.value for t in model.graph.initializer for entry in t.external_data if entry.key == "location"}
    model = onnx.load(str(path))
    parameters = nonzeros = 0
    for array in weights_of(model):
        parameters += array.size
        nonzeros += int(np.count_nonzero(array))
    files = [path, *(path.parent / name for name in data)]
    return {"parameters": parameters, "nonzeros": nonzeros, "file_bytes": sum(file.stat().st_size for file in files)}


def reload_of(path: Path, feeds: Feeds, session: Session, sizes: Mapping[str, int]) -> Row:
    """Whether the file opens again as a program with the same outputs, and that program's multiply-adds."""
    try:
        program = load(path)
        error = relative_error(program.run(feeds), session.run(feeds))
        known = program.cost().defaults
        macs = program.cost().at(**{name: size for name, size in sizes.items() if name in known}).macs
    except GraphlatheError as failure:
        return {"reload": f"no: {str(failure).splitlines()[0][:120]}", "macs": None}
    works = "yes" if error <= TOLERANCE else f"no: differs by {error:.1e}"
    return {"reload": works, "macs": int(macs)}


def evaluate(case: Mapping[str, Any], dense: str, changed: str) -> Row:
    """Measure one result.

    Args:
        case: a `Case` as JSON.
        dense: the dense model's file.
        changed: the result's file; the dense one's gives the row to compare with.

    Returns:
        The columns: quality, sizes, multiply-adds, times of both (``*_seconds``, ``dense_*_seconds``), rejected rounds.
    """
    chosen = Case.from_json(case)
    subject = subject_of(chosen)
    mine, theirs = (open_onnx(file, threads=1, inter_threads=1) for file in (changed, dense))
    inputs = set(theirs.inputs)
    if set(mine.inputs) - inputs:
        raise GraphlatheError(f"'{changed}' has other inputs: {mine.inputs}", expected=str(theirs.inputs))

    def call(session: Session, feeds: Feeds) -> Mapping[str, Any]:
        found = session.run({name: value for name, value in feeds.items() if name in session.inputs})
        # Some tools rename outputs; the first is the one that counts.
        return {name: value for name, value in zip(theirs.outputs, found.values(), strict=False)}

    row = subject.quality(lambda feeds: call(mine, feeds), lambda feeds: call(theirs, feeds))
    timed = subject.timed()
    rejected = 0
    for name, feeds in timed.items():
        calls = {"changed": mine, "dense": theirs}
        paired = time_paired(
            {key: lambda session=session, given=feeds: call(session, given) for key, session in calls.items()},
            chosen.rounds,
        )
        rejected += paired.rejected
        row |= {f"{name}_seconds": paired.seconds["changed"], f"dense_{name}_seconds": paired.seconds["dense"]}
    row["rejected_rounds"] = rejected
    last = timed[list(timed)[-1]]
    row |= size_of(Path(changed)) | reload_of(Path(changed), last, mine, subject.sizes())
    # NaN is no JSON; a time that could not be measured is null, and the record's reader sees a gap.
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
