"""The plans of a compression as a part of the page: what they say, and their pictures."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

from ..plans import MadePlan


def compression(plans: Iterable[MadePlan]) -> tuple[tuple[dict[str, Any], ...], tuple[str, ...]]:
    """What the page shows of plans.

    Returns:
        For each plan its pass, facts and pictures (PNG as data URIs, with their sizes in pixels); and notes about what
        is missing.

    Raises:
        InputError: a plan cannot be drawn.
    """
    plans = list(plans)
    if not plans:
        return (), ()
    if find_spec("matplotlib") is None:
        return (), ("pictures of the plans need the package matplotlib: pip install graphlathe[plot]",)
    from ..plots import plan_figures_png

    return tuple(
        {
            "pass": made.text,
            "facts": made.facts(),
            "pictures": [_picture(name, png) for name, png in plan_figures_png(made.drawable()).items()],
        }
        for made in plans
    ), ()


def _picture(name: str, png: bytes) -> dict[str, Any]:
    width, height = struct.unpack(">II", png[16:24])  # of the first chunk, which is always the header
    uri = "data:image/png;base64," + base64.b64encode(png).decode("ascii")
    return {"name": name.replace("-", " "), "width": width, "height": height, "src": uri}
