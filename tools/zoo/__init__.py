"""The zoo: tiny, randomly initialised models of many architectures, for tests and benchmarks.

Real architectures, no downloads: a tracer, a pass or a back end that works on all of them works on what users bring.
Importing this does not import `transformers`; building one of its models does.
"""

from __future__ import annotations

from .audio import AUDIO
from .decoders import DECODERS
from .encoders import ENCODERS, PAIRS
from .mixtures import MIXTURES, STATE_SPACES
from .model import FAMILIES, ZooModel
from .multimodal import MULTIMODAL
from .plain import PLAIN
from .vision import VISION

ZOO: tuple[ZooModel, ...] = (
    *DECODERS,
    *MIXTURES,
    *STATE_SPACES,
    *ENCODERS,
    *PAIRS,
    *VISION,
    *AUDIO,
    *MULTIMODAL,
    *PLAIN,
)

UNTRACEABLE: dict[str, str] = {
    "vilt": "draws image patches with multinomial, in eval mode too, and resizes positions to sizes read from the mask",
}
"""Architectures that `torch.export` cannot trace at all, with the reason; none of them is in `ZOO`."""


def get(name: str) -> ZooModel:
    """The entry of that name."""
    for model in ZOO:
        if model.name == name:
            return model
    raise KeyError(f"no zoo model {name!r}; known: {', '.join(names())}")


def names(family: str | None = None) -> list[str]:
    """All names, or those of one family, in the zoo's order."""
    if family is not None and family not in FAMILIES:
        raise KeyError(f"no zoo family {family!r}; known: {', '.join(FAMILIES)}")
    return [model.name for model in ZOO if family in (None, model.family)]


__all__ = ["FAMILIES", "UNTRACEABLE", "ZOO", "ZooModel", "get", "names"]
