"""Sites are known again by their elements, where names and sizes do not tell them apart."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from graphlathe.ir.axes import ChannelGroup
from graphlathe.ir.axes.groups import Member
from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.passes.search.same_site import Uncut
from graphlathe.passes.search.sites import ChannelSite


def program() -> Program:
    return trace(nn.Linear(2, 9), torch.zeros(1, 2))


def site(elements: list[list[int]], *more: str) -> ChannelSite:
    """A site of the rows of the linear map."""
    names = ("weight", "bias", *more)
    members = tuple(Member(name, 0, np.array(elements), False) for name in names)
    return ChannelSite(0, ChannelGroup("main", "channel", len(elements), members, {}), "channels", "", (), (), None, 0)


ROWS = site([[0, 1, 2], [3, 4, 5], [6, 7, 8]])
COLUMNS = site([[0, 3, 6], [1, 4, 7], [2, 5, 8]])


def test_sites_of_the_same_names_and_sizes() -> None:
    uncut = Uncut(program())
    assert uncut.before(ROWS) == uncut.now(ROWS) != uncut.now(COLUMNS) == uncut.before(COLUMNS)
    uncut.cut(ROWS, [1])
    # Elements 0, 1, 2, 6, 7, 8 are left, and are called 0 to 5 now.
    assert uncut.before(COLUMNS) == uncut.now(site([[0, 3], [1, 4], [2, 5]]))
    assert uncut.before(COLUMNS) != uncut.now(site([[0, 1, 2], [3, 4, 5]])), "what is left of the rows"
    assert uncut.before(COLUMNS) != uncut.now(site([[1, 4], [0, 3], [2, 5]])), "units in another order"
    uncut.cut(COLUMNS, [0, 2])
    assert uncut.now(site([[0, 1]])) == uncut.before(site([[1, 7]]))


def test_weights_that_came_later_tell_nothing() -> None:
    uncut = Uncut(program())
    assert uncut.now(site([[0, 3, 6], [1, 4, 7], [2, 5, 8]], "rescaled")) == uncut.before(COLUMNS)
