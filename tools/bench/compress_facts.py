"""The dense model's file, and the numbers that a suite's levels are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .base import Row
from .compress_modules import Transformer, parameters
from .compress_subject import Case, subject_of


def write_dense(case: Mapping[str, Any], target: str) -> Row:
    """Write the dense model's ONNX file, and answer with `facts` and where the text is from."""
    subject = subject_of(Case.from_json(case))
    module = subject.module()
    subject.program(module).export_onnx(target, fallback=False)
    return {"source": getattr(subject, "source", ""), **facts(module)}


def facts(module: nn.Module) -> Row:
    """Parameters of the whole; for a transformer also its blocks, and the parameters of its parts in all layers.

    Keys: ``parameters``; ``blocks``, ``block`` (of one), ``neurons`` (of one MLP), ``neuron`` (one in every layer),
    ``groups`` (key-value heads), ``queries`` (query heads of one group), ``group`` and ``query`` (one in every layer).
    """
    found: Row = {"parameters": parameters(module)}
    if not (hasattr(module, "model") or hasattr(module, "encoder")):
        return found
    transformer = Transformer(module)
    blocks = list(transformer.blocks)
    mlp, attention = next(iter(transformer.mlps())), next(iter(transformer.attentions()))
    neurons = mlp.reader.in_features
    query_heads, groups = transformer.heads
    made = sum(parameters(each) for each in mlp.makers) + mlp.reader.weight.numel()
    query = (parameters(attention.query) + attention.output.weight.numel()) // query_heads
    key_value = (parameters(attention.key) + parameters(attention.value)) // groups
    ratio = query_heads // groups
    return found | {
        "blocks": len(blocks),
        "block": parameters(blocks[0]),
        "neurons": neurons,
        "neuron": made // neurons * len(blocks),
        "groups": groups,
        "queries": ratio,
        "group": (ratio * query + key_value) * len(blocks),
        "query": groups * query * len(blocks),
    }
