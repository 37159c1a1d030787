"""onnxsim's pruning zoo on the dense model's ONNX file, each pass with its calibrated variant, as it recommends.

Its patterns want shapes, and weights that nothing transposes at run time; a tied embedding that is transposed before
is two embeddings. So it gets our file with shapes and all other weights transposed; where it finds nothing to prune in
that, our file after its own simplification; and then the file of PyTorch's exporter after the same. Where a calibrated
pass changes nothing, its plain variant is taken; a model that comes back unchanged is a failure, not a result.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from ...ir.errors import GraphlatheError
from .base import Row
from .compress_evaluate import size_of, weights_of
from .compress_peers import load_peer
from .compress_reach import smallest_ratio
from .compress_subject import Case, Feeds, Subject, subject_of
from .compress_work import Search

_BATCHES = 8  # its own default number of samples
_PASSES = {
    "heads": ("apply_attention_head_wanda_pruning", "apply_attention_head_pruning"),
    "structured": ("apply_structured_wanda_pruning", "apply_structured_pruning"),
}


def prune(case: Mapping[str, Any], level: Mapping[str, Any], target: str, kinds: Sequence[str]) -> Row:
    """Apply its ``blocks``, ``heads`` and ``structured`` pruning, in this order, to a level.

    Raises:
        GraphlatheError: nothing was pruned, in either exporter's file.
    """
    chosen = Case.from_json(case)
    subject = subject_of(chosen)
    tool = load_peer(chosen.peers, "onnxsim")
    batches = subject.calibration()[:_BATCHES]
    data = [{name: value.numpy() for name, value in feeds.items()} for feeds in batches]
    search = Search(subject)
    for name, form in _FORMS.items():
        source = form(tool, subject, Path(target))
        before = _count(source)
        with search:
            ratio, model = _prune(tool, source, data, kinds, level)
        if _count(model) < before:
            onnx.save(model, target, save_as_external_data=_large(model), location=f"{Path(target).name}.data")
            runs = sum(map(subject.units, batches)) * len(kinds)
            return {
                **search.row(outside=runs),
                **size_of(Path(target)),
                "plan": {"from": name, "ratio": ratio},
            }
    raise GraphlatheError(f"onnxsim found nothing to prune ({', '.join(kinds)}) in {', '.join(_FORMS)}")


def _prune(
    tool: Any, source: onnx.ModelProto, data: list[dict[str, Any]], kinds: Sequence[str], level: Mapping[str, Any]
) -> tuple[float, onnx.ModelProto]:
    def make(ratio: float) -> onnx.ModelProto:
        model = onnx.ModelProto()
        model.CopyFrom(source)
        for kind in kinds:
            if kind == "blocks":
                count = {"num_blocks_to_drop": 2 * level["count"]} if level["count"] else {}  # attention and MLP apart
                model = tool.apply_transformer_block_pruning(model, data, sparsity=ratio, **count)
            else:
                calibrated, plain = (getattr(tool, name) for name in _PASSES[kind])
                before = _count(model)
                model = calibrated(model, data, sparsity=ratio)
                model = plain(model, sparsity=ratio) if _count(model) == before else model
        return model

    if level["ratio"]:
        return level["ratio"], make(level["ratio"])
    wanted = level["params"] or level["macs"]
    if not level["params"]:
        raise GraphlatheError("onnxsim has no budget but a share of the units, and the level names none")
    if _count(make(0.5)) == _count(source):
        return 0.5, source  # nothing matches: no ratio will do
    return smallest_ratio(make, lambda model: _count(model) <= wanted)


def _count(model: onnx.ModelProto) -> int:
    return sum(array.size for array in weights_of(model))


def _large(model: onnx.ModelProto) -> bool:
    return model.ByteSize() > 1 << 30


def fold_transposes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Transpose weights that only a Transpose reads beforehand, in place."""
    readers = Counter(name for node in model.graph.node for name in node.input)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in [node for node in model.graph.node if node.op_type == "Transpose"]:
        tensor = weights.get(node.input[0])
        if tensor is None or readers[tensor.name] > 1:
            continue
        order = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
        turned = np.ascontiguousarray(np.transpose(numpy_helper.to_array(tensor), order))
        tensor.CopyFrom(numpy_helper.from_array(turned, node.output[0]))
        model.graph.node.remove(node)
    return model


def _folded(tool: Any, subject: Subject, target: Path) -> onnx.ModelProto:
    return onnx.shape_inference.infer_shapes(fold_transposes(_ours(subject, target)))


def _simplified(tool: Any, subject: Subject, target: Path) -> onnx.ModelProto:
    return tool.simplify(_ours(subject, target))[0]


def _stock_simplified(tool: Any, subject: Subject, target: Path) -> onnx.ModelProto:
    return tool.simplify(_stock(subject, target))[0]


_FORMS: dict[str, Callable[[Any, Subject, Path], onnx.ModelProto]] = {
    "our export": _folded,
    "our export, simplified": _simplified,
    "the stock export, simplified": _stock_simplified,
}


def _ours(subject: Subject, target: Path) -> onnx.ModelProto:
    path = target.with_name("source.onnx")
    subject.program().export_onnx(path, fallback=False)
    return onnx.load(str(path))


def _stock(subject: Subject, target: Path) -> onnx.ModelProto:
    path = target.with_name("stock.onnx")
    module, feeds = subject.module(), subject.example()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            dynamic = {name: dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for name, axes in subject.dynamic.items()}
            torch.onnx.export(
                module, (), str(path), kwargs=_kwargs(feeds), dynamic_shapes=dynamic, dynamo=True, verbose=False
            )
    finally:
        logging.disable(logging.NOTSET)
    return onnx.load(str(path))


def _kwargs(feeds: Feeds) -> dict[str, Any]:
    return dict(feeds)
