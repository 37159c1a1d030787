"""What a channel score is, and what all of them check and share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....ir.errors import PreconditionError
from ....ir.program import Program
from ...base import Context
from ..consumers import Consumer, columns_labels, rows_key
from ..sites import ChannelSite
from ..statistics import calibration

Values = np.ndarray[Any, np.dtype[np.float64]]
AtomScores = dict[int, Values]
"""By the site's index: float64 [atoms]; lower matters less."""


@dataclass(frozen=True)
class ChannelScore:
    """A way to rank the atoms of sites.

    Attributes:
        name: its name.
        function: computes it.
        about: one line for reports and the catalogue.
        paper: where it is from.
        calibration: whether it needs calibration data.
        consumers: whether it needs to read all operators that sum over the channels.
        gradients: whether it differentiates the program.
        runs: how often the program is run on each batch: ``once``, ``chunks`` (as often as Gram matrices need memory),
            ``atoms`` (once for each atom), or an empty text.
    """

    name: str
    function: Callable[[Program, Sequence[ChannelSite], Context], AtomScores]
    about: str
    paper: str = ""
    calibration: bool = True
    consumers: bool = True
    gradients: bool = False
    runs: str = "once"

    def __call__(self, program: Program, sites: Sequence[ChannelSite], ctx: Context) -> AtomScores:
        """Score the atoms of some sites.

        Args:
            program: the program in which the sites were found.
            sites: sites with different indices.
            ctx: calibration batches, progress, structure.

        Returns:
            By the site's index: float64 [atoms]; lower matters less.

        Raises:
            PreconditionError: the score lacks something (data, readers, gradients), two sites have one index, or a
                score is not a number.
        """
        if len({site.index for site in sites}) < len(sites):
            raise PreconditionError(
                "two sites have the same index", expected="sites that were found together, each once"
            )
        if self.calibration:
            calibration(ctx)
        for site in sites if self.consumers else ():
            self._check_readers(site)
        scores = self.function(program, sites, ctx) if sites else {}
        for site in sites:
            if not np.isfinite(scores[site.index]).all():
                raise PreconditionError(
                    f"the score '{self.name}' of {site.label} is not a number",
                    remedy="look for NaN or infinity in the weights and the calibration data",
                )
        return scores

    def _check_readers(self, site: ChannelSite) -> None:
        if site.consumers and not site.unread:
            return
        why = "; ".join(site.unread[:3]) or "no operator sums over its channels"
        raise PreconditionError(
            f"the score '{self.name}' cannot be had of {site.label}: {why}",
            expected="sites whose channels are summed over by linear maps or convolutions alone",
            remedy="use the score 'magnitude' or 'removal', which read no inputs, or leave these sites out",
        )


def per_atom(site: ChannelSite, consumer: Consumer, values: Tensor) -> Values:
    """The sum of a number per column of a consumer's matrix over the columns of each atom: float64 [atoms]."""
    labels = torch.from_numpy(columns_labels(consumer)).to(values.device)
    kept = labels >= 0
    total = torch.zeros(site.size, dtype=torch.float64, device=values.device)
    return total.index_add_(0, labels[kept], values.double()[kept]).cpu().numpy()


def atom_columns(site: ChannelSite, consumer: Consumer) -> Tensor:
    """int64 [atoms, columns]: the columns of a consumer's matrix that each atom consists of."""
    labels = columns_labels(consumer)
    order = np.argsort(labels, kind="stable")
    return torch.from_numpy(order[labels[order] >= 0].reshape(site.size, -1))


def all_consumers(sites: Sequence[ChannelSite]) -> list[Consumer]:
    """The consumers of all sites, in order, each once."""
    return list(dict.fromkeys(consumer for site in sites for consumer in site.consumers))


def distinct_inputs(site: ChannelSite) -> list[Consumer]:
    """One consumer for each value that the site's consumers read."""
    return list({rows_key(consumer): consumer for consumer in reversed(site.consumers)}.values())[::-1]


def element_sums(site: ChannelSite, values: dict[str, Tensor]) -> Values:
    """The sum over all elements of the site's weights that belong to an atom, each element once: float64 [atoms].

    Args:
        site: the site.
        values: a number for each element of its weights, by the weight's name.
    """
    total = torch.zeros(site.size, dtype=torch.float64)
    seen: dict[str, list[tuple[int, Tensor]]] = {}
    for member in site.group.members:
        value = values[member.weight]
        index = torch.from_numpy(member.index)
        along = value.movedim(member.dim, 0).reshape(value.shape[member.dim], -1)
        total += along.sum(1, dtype=torch.float64).cpu()[index].sum(1)
        # Where a weight has the atoms along two dimensions, what lies in both was counted twice.
        for dim, other in seen.get(member.weight, ()):
            both = value.movedim((dim, member.dim), (0, 1)).flatten(2 if value.dim() > 2 else 1)
            both = both.sum(-1, dtype=torch.float64).cpu() if value.dim() > 2 else both.double().cpu()
            total -= both[other[:, :, None], index[:, None, :]].sum((1, 2))
        seen.setdefault(member.weight, []).append((member.dim, index))
    return total.numpy()


def check_floating(program: Program, site: ChannelSite) -> None:
    """Refuse sites with weights that are no floating-point numbers.

    Raises:
        PreconditionError: there is one.
    """
    for member in site.group.members:
        dtype = program.weights[member.weight].dtype
        if not dtype.is_floating_point:
            raise PreconditionError(
                f"weight '{member.weight}' of {site.label} holds {dtype}",
                expected="floating-point weights",
                remedy="score the model before it is quantized",
            )
