"""How often an atom contributes most: the share of rows for which ``|W_g x_g|`` is the largest of all atoms.

Source: SHRP (stage A), which routes each token to one head and prunes by the heads' use; here nothing is trained, and a
head's weight for a token is the length of what it adds to the output. Equals share a row; a row to which no atom adds
anything counts for none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ....ir.errors import PreconditionError
from ....ir.program import Program
from ...base import Context
from ..consumers import rows_key, weight_matrix
from ..rows import RowReader
from ..sites import ChannelSite
from ..statistics import calibration
from .base import AtomScores, all_consumers, atom_columns

_EQUAL = 1e-9
"""Relative difference of squared lengths that are taken for equal: rounding must not choose."""

_PIECE = 1 << 22
"""Numbers that are looked at together."""


def usage(program: Program, sites: Sequence[ChannelSite], ctx: Context) -> AtomScores:
    """The share of rows for which an atom has the largest ``|W_g x_g|^2``, added up over consumers of the same value.

    Args, returns: as `base.ChannelScore`.

    Raises:
        PreconditionError: the consumers of a site read different values, so that no row stands for all of them.
    """
    by_key: dict[str, list[_Use]] = {}
    uses: dict[int, _Use] = {}
    for site in sites:
        keys = dict.fromkeys(map(rows_key, site.consumers))
        if len(keys) > 1:
            raise PreconditionError(
                f"the channels of {site.label} are read from {len(keys)} different values",
                expected="sites whose channels are read from one value, such as heads and MLPs",
                remedy="use another score for these sites",
            )
        uses[site.index] = use = _Use(program, site)
        by_key.setdefault(next(iter(keys)), []).append(use)

    def visit(key: str, rows: Tensor) -> None:
        for use in by_key[key]:
            use.add(rows)

    reader = RowReader(program, all_consumers(sites))
    batches = calibration(ctx)
    for batch in ctx.progress(batches, len(batches), "usage"):
        reader.read(batch, visit)
    return {index: (use.won / max(use.rows, 1)).cpu().numpy() for index, use in uses.items()}


class _Use:
    """Counts of one site.

    Attributes:
        won: float64 [atoms], the rows that each atom won.
        rows: all rows.
    """

    def __init__(self, program: Program, site: ChannelSite) -> None:
        self.columns = atom_columns(site, site.consumers[0])
        self.won = torch.zeros(site.size, dtype=torch.float64)
        self.rows = 0
        # |W_g x_g|^2 = x_g^T (W_g^T W_g) x_g, so the output's width costs nothing per row.
        self.products = torch.zeros(*self.columns.shape, self.columns.shape[1], dtype=torch.float64)
        for consumer in site.consumers:
            parts = weight_matrix(program, consumer).double().T[self.columns.to(self.products.device)]
            self.products = self.products + parts @ parts.transpose(1, 2)

    def add(self, rows: Tensor) -> None:
        """Count rows [n, columns]."""
        for part in rows.split(max(1, _PIECE // max(self.columns.numel(), 1))):
            picked = part.double()[:, self.columns].transpose(0, 1)
            lengths = ((picked @ self.products.to(picked.device)) * picked).sum(-1)
            most = lengths.max(0).values
            best = ((lengths >= most * (1 - _EQUAL)) & (most > 0)).double()
            self.won += (best / best.sum(0).clamp_min(1)).sum(1).cpu()
        self.rows += len(rows)
