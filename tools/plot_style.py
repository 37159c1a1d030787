"""What all pictures share: the package, colors, marks and scales."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..ir.errors import GraphlatheError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ticker import Formatter

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F", "#5B5B5B")
"""Told apart with any kind of color vision (Okabe and Ito 2008; yellow and black replaced, which are weak on white)."""

INK = "#333333"
FAINT = "#E4E4E4"
MAP = "cividis"
"""Even in lightness, and the same to all kinds of color vision (Nunez et al. 2018)."""

STYLE: Mapping[str, Any] = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.axisbelow": True,
    "grid.color": "#E8E8E8",
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.family": "DejaVu Sans",  # comes with matplotlib: pictures are the same everywhere
    "font.size": 9,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "graphlathe",
}

_LARGE = {"params": "parameters", "bytes": "bytes", "macs": "multiply-accumulates"}
_LABELS = 32  # Tick labels on an axis at most.
_LONGEST = 28  # Letters of one at most.
_UPRIGHT = 3  # Letters up to which it is not turned.


def load_matplotlib() -> ModuleType:
    """The matplotlib package.

    Raises:
        GraphlatheError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise GraphlatheError("pictures need the package matplotlib", remedy="pip install graphlathe[plot]") from error
    return matplotlib


def number_ticks(axes: Axes, labels: Sequence[str], name: str) -> None:
    """Label places 0, 1, 2... of the x axis, as many of them as there is room for."""
    labels = [_short(label) for label in labels]
    step = next((s for s in (1, 2, 5, 10, 20, 25, 50, 100) if len(labels) / s <= _LABELS), len(labels) // _LABELS + 1)
    places = range(0, len(labels), step)
    turned = room_below(labels) > 0
    axes.set_xticks(
        list(places), [labels[i] for i in places], rotation=90 if turned else 0, fontsize=8 if turned else 9
    )
    axes.set_xlim(-0.5, len(labels) - 0.5)
    axes.set_xlabel(name)


def room_below(labels: Sequence[str]) -> float:
    """Inches that turned labels of the x axis take, beyond those of a number; 0 where they need not be turned."""
    longest = max((len(_short(label)) for label in labels), default=0)
    return 0.075 * longest if longest > _UPRIGHT else 0.0


def _short(label: str) -> str:
    return label if len(label) <= _LONGEST else label[: _LONGEST - 1] + "…"


def unit_name(unit: str) -> str:
    """A budget's kind in words."""
    return _LARGE.get(unit, unit)


def unit_formatter(unit: str) -> Formatter:
    """Ticks such as 120M for counts, and plain numbers for milliseconds and what is not known."""
    from matplotlib.ticker import EngFormatter, FormatStrFormatter

    return EngFormatter(sep="") if unit in _LARGE else FormatStrFormatter("%g")


def amount(value: float, unit: str) -> str:
    """A cost with its unit: ``134M parameters``, ``12.5 ms``."""
    if unit not in _LARGE:
        return f"{value:.4g} {unit}"
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter} {_LARGE[unit]}"
    return f"{value:g} {_LARGE[unit]}"


def wide(values: Iterable[float]) -> bool:
    """Whether values need a logarithmic scale: all positive, over more than a factor of 50."""
    found = [v for v in values if math.isfinite(v)]
    return bool(found) and min(found) > 0 and max(found) > 50 * min(found)
