"""Scores that something else computes: relevance propagated back from the outputs, once that family is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ....ir.errors import PreconditionError
from ....ir.program import Program
from ...base import Context
from ..sites import ChannelSite
from .base import AtomScores

Provider = Callable[[Program, Sequence[ChannelSite], Context], AtomScores]

_PROVIDERS: list[Provider] = []


def register_relevance(provider: Provider | None) -> None:
    """Say who computes relevance.

    Args:
        provider: as `base.ChannelScore`'s function; None for nobody. It takes the place of an earlier one.
    """
    _PROVIDERS[:] = [] if provider is None else [provider]


def relevance(program: Program, sites: Sequence[ChannelSite], ctx: Context) -> AtomScores:
    """What the registered provider says.

    Args, returns: as `base.ChannelScore`.

    Raises:
        PreconditionError: nothing is registered.
    """
    if not _PROVIDERS:
        raise PreconditionError(
            "nothing computes relevance: that family of analyses is not installed",
            remedy="use another score, or register a provider with `register_relevance`",
        )
    return _PROVIDERS[0](program, sites, ctx)
