"""What people do with mergekit's passthrough method: a model out of slices of its own layers, without training.

A plain reference on the framework's module. For ``k`` layers to remove:

- ``order``: the ``k`` of least block influence ``1 - E cos(x_i, x_i+1)`` (ShortGPT, arXiv 2403.03853);
- ``window``: slices ``[0, i)`` and ``[i + k, n)`` with the ``i`` at which ``E cos(x_i, x_i+k)`` is largest (Gromov et
  al., arXiv 2403.17887);
- ``tried``: the same slices, with the ``i`` of least KL to the dense model on calibration data: every window is run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Row
from .compress_modules import Transformer, block_states, first_output, parameters
from .compress_reach import module_macs
from .compress_subject import Case, Feeds, Subject, export_module, subject_of
from .compress_work import Search


def cosines(transformer: Transformer, batches: Sequence[Feeds], distance: int) -> list[float]:
    """``E cos(x_i, x_i+distance)`` over all tokens, for each ``i``; ``x_i`` is the stream before block ``i``."""
    sums: list[float] = []
    tokens = 0
    for feeds in batches:
        states = block_states(transformer, feeds)
        pairs = [(states[i], states[i + distance]) for i in range(len(states) - distance)]
        found = [float(torch.nn.functional.cosine_similarity(a.double(), b.double(), -1).sum()) for a, b in pairs]
        sums = [old + new for old, new in zip(sums or [0.0] * len(found), found, strict=True)]
        tokens += states[0].shape[:-1].numel()
    return [value / tokens for value in sums]


def least_influential(transformer: Transformer, batches: Sequence[Feeds], count: int) -> list[int]:
    """The ``count`` blocks of least influence, ascending."""
    scores = cosines(transformer, batches, 1)
    return sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:count])


def best_window(transformer: Transformer, batches: Sequence[Feeds], count: int) -> list[int]:
    """The ``count`` blocks in a row across which the stream turns least."""
    scores = cosines(transformer, batches, count)
    start = max(range(len(scores)), key=scores.__getitem__)
    return list(range(start, start + count))


def best_tried_window(transformer: Transformer, batches: Sequence[Feeds], count: int) -> list[int]:
    """The ``count`` blocks in a row without which the outputs change least: all windows are run."""
    blocks = list(range(len(transformer.blocks)))
    dense = [_outputs(transformer, feeds) for feeds in batches]
    losses: dict[int, float] = {}
    for start in range(len(blocks) - count + 1):
        with transformer.only([index for index in blocks if not start <= index < start + count]):
            losses[start] = sum(_loss(_outputs(transformer, f), d) for f, d in zip(batches, dense, strict=True))
    start = min(losses, key=losses.__getitem__)
    return list(range(start, start + count))


def _outputs(transformer: Transformer, feeds: Feeds) -> Tensor:
    with torch.no_grad():
        return first_output(transformer.module(**feeds))


def _loss(changed: Tensor, dense: Tensor) -> float:
    """KL of logits, as wide as a vocabulary; relative squared error of states."""
    if changed.shape[-1] < 4096:
        return float((changed - dense).square().sum() / dense.square().sum())
    p, q = dense.log_softmax(-1), changed.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


CHOICES = {"order": least_influential, "window": best_window, "tried": best_tried_window}


def passthrough(case: Mapping[str, Any], level: Mapping[str, Any], target: str, choice: str) -> Row:
    """Leave out as many layers as the level says (its count, else what its limit asks for), chosen as in `CHOICES`."""
    subject = subject_of(Case.from_json(case))
    module, batches = subject.module(), subject.calibration()
    transformer = Transformer(module)
    search = Search(subject, module)
    count = level["count"] or _count(subject, transformer, level)
    # An eighth of the data ranks the windows of a search that runs them all; the cost is counted either way.
    chosen = batches[: max(1, len(batches) // 8)] if choice == "tried" else batches
    with search:
        removed = CHOICES[choice](transformer, chosen, count)
    transformer.keep([index for index in range(len(transformer.blocks)) if index not in removed])
    export_module(subject, module, target)
    return {**search.row(), "plan": {"removed": removed}}


def _count(subject: Subject, transformer: Transformer, level: Mapping[str, Any]) -> int:
    """The fewest blocks without which the level's parameters or multiply-adds are kept to (all blocks are alike)."""
    if level["params"]:
        over, block = parameters(transformer.module) - level["params"], parameters(transformer.blocks[0])
    else:
        whole = module_macs(subject, transformer.module)
        everything = list(range(len(transformer.blocks)))
        with transformer.only(everything[1:]):
            block = whole - module_macs(subject, transformer.module)
        over = whole - level["macs"]
    return max(1, min(len(transformer.blocks) - 1, -(-over // block)))
