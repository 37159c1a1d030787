"""How often each head of an attention matters most, on data.

An attention writes a sum over its heads into the stream: ``sum_h o_h W_h``, with head h's output ``o_h`` and its slice
``W_h`` of the output projection. A token uses the head whose term has the largest norm, and a head's *usage* is the
share of tokens that use it. Where query heads share a key and value head, the group of them counts as one head: only
whole groups can be cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from ...ir.program import Program
from ..base import Batch
from ..fidelity import position_mask, seeded
from ..search.consumers import Consumer, input_rows, weight_matrix
from ..search.sites import ChannelSite

Progress = Callable[[Iterable[Any], int | None, str], Iterable[Any]]


def head_terms(consumer: Consumer, matrix: torch.Tensor, rows: torch.Tensor, size: int) -> torch.Tensor:
    """The norm of each head's term of the output projection, for each row.

    Args:
        consumer: the output projection.
        matrix: [out, in], its weight (`weight_matrix`).
        rows: [rows, in], what it reads.
        size: how many heads there are.

    Returns:
        [rows, heads].
    """
    norms: list[torch.Tensor] = []
    for head in range(size):
        columns = torch.from_numpy(np.flatnonzero(consumer.labels == head))
        own, slice_ = rows[:, columns], matrix[:, columns]
        # |o W^T|^2 = o (W^T W) o^T: a product of the head's width instead of the stream's.
        norms.append(((own @ (slice_.T @ slice_)) * own).sum(-1).clamp_min(0).sqrt())
    return torch.stack(norms, -1)


def kept_rows(consumer: Consumer, value: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The rows that a linear map reads, without those of positions that a mask hides."""
    rows = input_rows(consumer, value)
    mask = position_mask(batch, value.shape[:-1], inside=True)
    return rows if mask is None else rows[mask.reshape(-1) != 0]


def head_usage(
    program: Program, sites: Sequence[ChannelSite], batches: Sequence[Batch], progress: Progress
) -> list[torch.Tensor]:
    """The usage of each site's heads.

    Args:
        program: the program of the sites.
        sites: heads whose consumers are linear maps.
        batches: named inputs.
        progress: shows a bar.

    Returns:
        For each site float64 [heads] that sums to 1; NaN where the data gives no number.
    """
    counts = [torch.zeros(site.size, dtype=torch.float64) for site in sites]
    readers: dict[fx.Node, list[tuple[int, Consumer]]] = {}
    for number, site in enumerate(sites):
        for consumer in site.consumers:
            readers.setdefault(consumer.operand, []).append((number, consumer))
    matrices: Mapping[str, torch.Tensor] = {
        c.weight: weight_matrix(program, c) for site in sites for c in site.consumers
    }
    for batch in progress(batches, len(batches), "usage of heads"):

        def observe(node: fx.Node, value: Any, batch: Batch = batch) -> None:
            for number, consumer in readers.get(node, ()):
                matrix = matrices[consumer.weight]
                rows = kept_rows(consumer, value, batch).to(matrix.dtype)
                terms = head_terms(consumer, matrix, rows, sites[number].size)
                used = torch.bincount(terms.argmax(-1), minlength=sites[number].size)
                counts[number] += used if bool(terms.isfinite().all()) else torch.nan

        feeds = program.feeds(**batch)
        seeded(lambda feeds=feeds, observe=observe: program.run(feeds, observe=observe))
    return [count / count.sum().clamp_min(1) for count in counts]


def most_used(usage: torch.Tensor, count: int) -> list[int]:
    """The numbers of the most used heads, in order; of equally used ones the first."""
    order = sorted(range(len(usage)), key=lambda head: (-float(usage[head]), head))
    return sorted(order[:count])
