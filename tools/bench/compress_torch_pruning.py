"""Torch-Pruning as its documentation recommends: `BasePruner`, with its LLM example's hints.

The hints are those of its ``examples/LLMs``: head counts of the query, key and value projections, whole heads rather
than their dimensions, group magnitude with a mean over the group, sizes rounded to 4, the output layer ignored. For
convolutions they are those of its README: the classifier ignored, sizes rounded to 8, and isomorphic global ranking as
an alternative. Taylor scores use gradients of the language model's loss on the calibration data.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...ir.errors import GraphlatheError
from .base import Row
from .compress_modules import Transformer, first_output, parameters
from .compress_peers import load_peer
from .compress_reach import reach
from .compress_subject import Case, Subject, export_module, subject_of
from .compress_work import Search

_ACTIVATION_BATCHES = 8  # its hook keeps the last call's statistics only: they must all be in one


def prune(case: Mapping[str, Any], level: Mapping[str, Any], target: str, parts: Sequence[str], importance: str) -> Row:
    """Prune parts of a transformer: ``mlp`` neurons, whole ``heads``, the ``hidden`` width."""
    chosen = Case.from_json(case)
    subject = subject_of(chosen)
    tool = load_peer(chosen.peers, "torch_pruning")
    dense = subject.module()
    search = Search(subject, dense)
    with search:
        ratio, module = reach(level, subject, _maker(tool, subject, dense, parts, importance))
    if parameters(module) == parameters(dense):
        raise GraphlatheError("Torch-Pruning ran, and removed nothing")
    export_module(subject, module, target)
    return {**search.row(), "plan": {"ratio": ratio}}


def _maker(tool: Any, subject: Subject, dense: nn.Module, parts: Sequence[str], importance: str) -> Any:
    score, gradients = _importance(tool, subject, dense, importance)

    def make(ratio: float) -> nn.Module:
        module = copy.deepcopy(dense)
        if gradients:
            for parameter, gradient in zip(module.parameters(), gradients, strict=True):
                parameter.grad = gradient
        if importance == "activation":
            _observe(score, subject, module)
        _prune(tool, subject, module, ratio, parts, score)
        return module

    return make


def _importance(tool: Any, subject: Subject, module: nn.Module, name: str) -> tuple[Any, list[torch.Tensor | None]]:
    if name == "magnitude":
        return tool.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"), []
    if name == "activation":
        return tool.importance.ActivationImportance(p=2, target_types=[nn.Linear]), []
    if name != "taylor":
        raise GraphlatheError(f"no importance '{name}'", expected="magnitude, activation, taylor")
    for feeds in subject.calibration():
        if "attention_mask" in feeds:
            raise GraphlatheError("Taylor scores need a loss, and the encoder's documentation names none")
        module(**feeds, labels=feeds["input_ids"]).loss.backward()
    gradients = [parameter.grad for parameter in module.parameters()]
    module.zero_grad()
    return tool.importance.GroupTaylorImportance(), gradients


def _observe(score: Any, subject: Subject, module: nn.Module) -> None:
    batches = subject.calibration()
    longest = max(batches, key=subject.units)
    alike = [feeds for feeds in batches if feeds["input_ids"].shape == longest["input_ids"].shape]
    together = {name: torch.cat([feeds[name] for feeds in alike[:_ACTIVATION_BATCHES]]) for name in longest}
    with torch.no_grad(), score.compute_importance(module):
        module(**together)


def _prune(tool: Any, subject: Subject, module: nn.Module, ratio: float, parts: Sequence[str], score: Any) -> None:
    transformer = Transformer(module)
    # Its analysis sees that query heads share keys and values only where that is an `expand` of five dimensions.
    transformer.module.set_attn_implementation("eager")
    query_heads, groups = transformer.heads
    heads: dict[nn.Module, int] = {}
    for attention in transformer.attentions():
        heads |= {attention.query: query_heads, attention.key: groups, attention.value: groups}
    ratios: dict[nn.Module, float] = {}
    ignored = transformer.head
    if "mlp" in parts:
        ratios = {maker: ratio for mlp in transformer.mlps() for maker in mlp.makers}
    else:
        ignored += [maker for mlp in transformer.mlps() for maker in mlp.makers]
    if "heads" in parts:
        # Whole heads are removed only from layers that have a ratio of their own, too.
        ratios |= dict.fromkeys(heads, ratio)
    else:
        ignored += [each for a in transformer.attentions() for each in (a.query, a.key, a.value)]
        heads = {}
    pruner = tool.pruner.BasePruner(
        module,
        example_inputs=subject.example(),
        importance=score,
        global_pruning=False,
        output_transform=first_output,
        pruning_ratio=ratio if "hidden" in parts else 0.0,
        pruning_ratio_dict=ratios,
        ignored_layers=ignored,
        num_heads=heads,
        prune_num_heads="heads" in parts,
        prune_head_dims=False,
        head_pruning_ratio=ratio if "heads" in parts else 0.0,
        in_channel_groups={},
        out_channel_groups={},
        round_to=4,
    )
    for group in pruner.step(interactive=True):
        group.prune()
    _update(transformer)
    transformer.module.set_attn_implementation("sdpa")


def _update(transformer: Transformer) -> None:
    """Tell the module its new sizes, as the example does: the library's code reads them."""
    config = transformer.module.config
    for attention in transformer.attentions():
        owner = attention.owner
        size = getattr(owner, "head_dim", None) or owner.attention_head_size
        queries, keys = attention.query.out_features // size, attention.key.out_features // size
        if hasattr(owner, "num_key_value_groups"):
            owner.num_key_value_groups = max(1, queries // max(1, keys))
        if hasattr(owner, "all_head_size"):
            owner.num_attention_heads, owner.all_head_size = queries, queries * size
        config.num_attention_heads = queries
    if transformer.llama:
        config.hidden_size = transformer.module.lm_head.in_features


def prune_vision(case: Mapping[str, Any], level: Mapping[str, Any], target: str, importance: str) -> Row:
    """Prune channels of the image classifier."""
    chosen = Case.from_json(case)
    subject = subject_of(chosen)
    tool = load_peer(chosen.peers, "torch_pruning")
    dense = subject.module()
    search = Search(subject, dense)

    def make(ratio: float) -> nn.Module:
        module = copy.deepcopy(dense)
        classifier = [m for m in module.modules() if isinstance(m, nn.Linear)]
        shared = importance == "isomorphic"
        tool.pruner.BasePruner(
            module,
            example_inputs=next(iter(subject.example().values())),
            importance=tool.importance.GroupMagnitudeImportance(p=2),
            global_pruning=shared,
            isomorphic=shared,
            pruning_ratio=ratio,
            ignored_layers=classifier,
            in_channel_groups={},
            out_channel_groups={},
            num_heads={},
            round_to=8,
        ).step()
        return module

    with search:
        ratio, module = reach(level, subject, make)
    export_module(subject, module, target)
    return {**search.row(), "plan": {"ratio": ratio}}
