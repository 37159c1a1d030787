"""What levels of linear layers are, in numbers: solved on the inputs that the unchanged program gives the layers.

Gram matrices are collected for as many layers at a time as `GRAM_BYTES` hold, and freed when their layers are solved.
The same program, calibration data and level give the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ir.errors import PreconditionError
from ...ir.program import Program
from ..base import Context
from .compensation.low_rank import metric_root
from .consumers import weight_matrix
from .linear_correction import fitted
from .linear_sites import LinearSite
from .linear_texts import Bits, LinearLevel, LowRank, Sparse, correction_of, needs_data
from .local.factorize import Factors, Whitened, whiten
from .local.gptq import gptq
from .local.layer_error import layer_error
from .local.ria import ria_corrected, ria_sparse
from .local.round_to_nearest import Quantized, quantize_groups
from .local.sparsegpt import magnitude_sparse, sparsegpt, wanda_sparse
from .local.storage import sparse_bytes
from .statistics import collect_in_chunks

GRAM_BYTES = 2 << 30
"""Gram matrices that are held at once."""

Stored = Tensor | Quantized | Factors
"""A layer's weight [outputs, inputs] as a level stores it."""


@dataclass(frozen=True, eq=False)
class Solved:
    """A level of a site, solved.

    Attributes:
        site, level: which.
        stored: its weight.
        error: relative squared error of the layer's outputs, `local.layer_error`; None without calibration data.
        correction: the maps beside it, where there are some.
    """

    site: LinearSite
    level: LinearLevel
    stored: Stored
    error: float | None
    correction: Factors | None = None

    def matrix(self) -> Tensor:
        """The weight [outputs, inputs] that is multiplied by, in the type of the layer's weight."""
        return as_matrix(self.stored, self.correction)


def as_matrix(stored: Stored, correction: Factors | None = None) -> Tensor:
    """The weight that a stored form stands for, together with the maps beside it."""
    if isinstance(stored, Quantized):
        matrix = stored.dequantize()
    elif isinstance(stored, Factors):
        matrix = (stored.left.double() @ stored.right.double()).to(stored.left.dtype)
    else:
        matrix = stored
    if correction is None:
        return matrix
    return (matrix.double() + correction.left.double() @ correction.right.double()).to(matrix.dtype)


def solve(
    program: Program, sites: Sequence[LinearSite], wanted: Mapping[int, Sequence[LinearLevel]], ctx: Context
) -> Iterator[Solved]:
    """Solve levels of sites.

    Args:
        program: the program, unchanged until the iterator ends.
        sites: sites of it.
        wanted: the levels of each site, by the site's index.
        ctx: calibration data; without any, levels that need none are still solved, with no error known.

    Yields:
        The levels; those of one site one after the other, sites in graph order.

    Raises:
        PreconditionError: a level needs calibration data and there is none, or data or weights are not finite.
    """
    todo = sorted((site for site in sites if wanted.get(site.index)), key=lambda site: site.first)
    if not ctx.calibration:
        for site in todo:
            blind = next((level for level in wanted[site.index] if needs_data(level)), None)
            if blind is not None:
                raise PreconditionError(
                    f"'{blind}' needs calibration data",
                    expected="batches of inputs",
                    remedy="pass calibration= (or --calibration FILE), or use magnitude or round-to-nearest alone",
                )
        for site in ctx.progress(todo, len(todo), "linear layers"):
            yield from _levels(program, site, wanted[site.index], None)
        return
    owner = {consumer: site for site in todo for consumer in site.consumers}
    position = {node: i for i, node in enumerate(program.graph.nodes)}
    consumers = sorted(owner, key=lambda consumer: position[consumer.node])
    grams: dict[int, Tensor] = {}
    left = {site.index: len(site.consumers) for site in todo}
    for chunk in collect_in_chunks(program, consumers, ctx, limit_bytes=GRAM_BYTES):
        ready: list[LinearSite] = []
        for consumer, found in chunk.items():
            site = owner[consumer]
            assert found.gram is not None
            known = grams.get(site.index)
            # Not in place: consumers of the same rows share one matrix.
            grams[site.index] = found.gram.matrix if known is None else known + found.gram.matrix
            left[site.index] -= 1
            if not left[site.index]:
                ready.append(site)
        for site in ctx.progress(ready, len(ready), "linear layers"):
            yield from _levels(program, site, wanted[site.index], grams.pop(site.index))


def _levels(program: Program, site: LinearSite, levels: Sequence[LinearLevel], gram: Tensor | None) -> Iterator[Solved]:
    # In the weight's own type, so that scales and factors are of that type.
    matrix = weight_matrix(program, site.consumers[0]).to(program.weights[site.weight].dtype)
    whitened: Whitened | None = None
    root: Tensor | None = None
    for level in levels:
        if isinstance(level, LowRank):
            assert gram is not None
            whitened = whiten(matrix, gram) if whitened is None else whitened
            stored: Stored = whitened.factors(level.rank, level.nonzeros)
        else:
            stored = _sparse(matrix, gram, level) if isinstance(level, Sparse) else _codes(matrix, gram, level)
        correction: Factors | None = None
        if correction_of(level):
            assert gram is not None
            root = metric_root(gram) if root is None else root
            correction = fitted(matrix, as_matrix(stored), root, correction_of(level))
        error = None if gram is None else layer_error(matrix, as_matrix(stored, correction), gram)
        yield Solved(site, level, stored, error, correction)


def _sparse(matrix: Tensor, gram: Tensor | None, level: Sparse) -> Tensor:
    if gram is None or level.method == "magnitude":
        return magnitude_sparse(matrix, level.nonzeros)
    methods = {"sparsegpt": sparsegpt, "wanda": wanda_sparse, "ria": ria_sparse, "ria-corrected": ria_corrected}
    return methods[level.method](matrix, gram, level.nonzeros)


def _codes(matrix: Tensor, gram: Tensor | None, level: Bits) -> Quantized:
    if gram is None or level.method == "round-to-nearest":
        return quantize_groups(matrix, level.bits, level.group)
    return gptq(matrix, gram, level.bits, level.group)


def counted_params(level: LinearLevel, site: LinearSite) -> int:
    """Numbers that are not zero by construction: what papers count. Positions and scales are not among them."""
    if isinstance(level, Sparse):
        return level.nonzeros + correction_params(level, site)
    if isinstance(level, Bits):
        return site.size + correction_params(level, site)
    each = level.rank if level.nonzeros is None else level.nonzeros
    return level.rank * site.inputs + each * site.outputs


def counted_bytes(level: LinearLevel, site: LinearSite, dtype: torch.dtype) -> int:
    """Bytes with everything that is needed to read the weight: positions of nonzeros, scales, zero points.

    For codes this is what the program holds (`linear_codes`). Zeros are stored like other numbers when a program
    is saved; for sparse forms this is what a file with positions would take.
    """
    each = dtype.itemsize
    beside = correction_params(level, site) * each
    if isinstance(level, Sparse):
        return sparse_bytes(site.outputs, site.inputs, level.nonzeros, each) + beside
    if isinstance(level, Bits):
        groups = 1 if level.group is None else math.ceil(site.inputs / level.group)
        row = sum(math.ceil(site.inputs * part / 8) for part in parts_of(level.bits))
        return site.outputs * (row + groups * (each + 1)) + beside
    used = site.outputs * (level.rank if level.nonzeros is None else level.nonzeros)
    return level.rank * site.inputs * each + sparse_bytes(site.outputs, level.rank, used, each)


def correction_params(level: LinearLevel, site: LinearSite) -> int:
    """Numbers in the maps beside a layer's weight."""
    return correction_of(level) * (site.inputs + site.outputs)


def parts_of(bits: int) -> list[int]:
    """How many bits of a code go into each of its packed parts, the lowest bits first: 3 is 2 and 1, 7 is 4, 2 and 1.

    A part's width divides 8, so that a byte holds a whole number of them.
    """
    return [width for width in (8, 4, 2, 1) if bits & width]


def executed_macs(level: LinearLevel, site: LinearSite) -> int:
    """Multiply-adds per row as runtimes run it: zeros count."""
    if isinstance(level, LowRank):
        return level.rank * (site.inputs + site.outputs)
    return site.size + correction_params(level, site)
