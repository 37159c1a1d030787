"""Pictures of a plan's sites: how much of each stays, and the scores that decided it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from .plot_data import PlanData, Site
from .plot_style import COLORS, FAINT, INK, MAP, number_ticks, room_below, wide

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

_NAMED = 48  # Bars up to which there is room for the name of each one's level.
_LEVEL = 12  # Bars up to which those names need not be turned,
_LETTERS = 14  # where they are no longer than that.
_CELLS = 64  # Units up to which each has a cell of its own.
_SHARES = 100  # Cells of a column that stand for more units than that.
_AROUND = 1.0  # Inches above and below the cells of a map.
_LOW = 1.0  # Inches of a color bar up to which there is room for the labels of its ends alone.
_MANY = 100  # Scores from which on a few may lie outside the color scale.


def keep_ratios(plan: PlanData) -> Figure:
    """A bar for each site: the share of its units, or of its weight, that stays. One panel for each kind."""
    from matplotlib.figure import Figure

    kinds = plan.kinds
    longest = max(len(sites) for sites in kinds.values())
    height = 0.7 + sum(1.9 + room_below(_names(sites)[0]) for sites in kinds.values())
    figure = Figure(figsize=(_width(longest), height), layout="constrained")
    panels = figure.subplots(len(kinds), 1, squeeze=False)[:, 0]
    for number, (axes, (kind, sites)) in enumerate(zip(panels, kinds.items(), strict=True)):
        _bars(axes, kind, sites, COLORS[number % len(COLORS)])
    for axes, below in pairwise(panels):
        if axes.get_xlabel() == below.get_xlabel() == "block":
            axes.set_xlabel("")  # once, at the bottom
    figure.suptitle("What stays of each site", x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def _bars(axes: Axes, kind: str, sites: Sequence[Site], color: str) -> None:
    places = range(len(sites))
    unknown = [i for i, site in enumerate(sites) if math.isnan(site.kept_percent)]
    kept = [0.0 if i in unknown else site.kept_percent for i, site in enumerate(sites)]
    axes.bar(places, [0 if i in unknown else 100 for i in places], width=0.8, color=FAINT, label="removed")
    axes.bar(places, kept, width=0.8, color=color, label="kept")
    gone = [i for i, share in enumerate(kept) if share == 0 and i not in unknown]
    if gone:
        axes.plot(gone, [6] * len(gone), "x", color=INK, markersize=5 if len(sites) <= _NAMED else 3)
    if len(sites) <= _NAMED:
        turned = len(sites) > _LEVEL or max(len(site.short_level) for site in sites) > _LETTERS
        for place, (site, share) in enumerate(zip(sites, kept, strict=True)):
            # Where little stays, the name stands above the bar, on the removed part.
            inside = share >= 50
            axes.text(
                place,
                4 if inside else min(share, 94) + (14 if share == 0 else 4),
                site.short_level,
                rotation=90 if turned else 0,
                ha="center",
                va="bottom",
                fontsize=7,
                color="white" if inside else INK,
            )
    dropped = f"; {len(gone)} of {len(sites)} gone altogether (×)" if gone else ""
    dropped += f"; {len(unknown)} of {len(sites)} do not say how much" if unknown else ""
    axes.set_title(f"{kind}: {_stays(sites)}{dropped}")
    axes.set_ylim(0, max(100, *kept))
    axes.set_yticks([0, 25, 50, 75, 100])
    axes.set_ylabel("kept (%)")
    axes.yaxis.grid(True)
    number_ticks(axes, *_names(sites))


def _stays(sites: Sequence[Site]) -> str:
    """How much of sites of one kind stays together. Untouched weights do not say how large they are."""
    if any(site.share is not None for site in sites):
        known = [site.kept_percent for site in sites if not math.isnan(site.kept_percent)]
        mean = f"{sum(known) / len(known):.0f} %" if known else "an unknown share"
        return f"{mean} stays on average"
    before, after = sum(s.units for s in sites), sum(s.units - len(s.removed) for s in sites)
    share = f" ({100 * after / before:.0f} %)" if before else ""
    return f"{after:,} of {before:,} units stay{share}"


def score_maps(plan: PlanData) -> dict[str, Figure]:
    """Heat maps of the scores, by kind: units over sites; kinds over sites where each site is one unit."""
    figures: dict[str, Figure] = {}
    scored = {k: sites for k, sites in plan.kinds.items() if any(s.scores for s in sites)}
    whole = {k: sites for k, sites in scored.items() if all(s.units == 1 for s in sites)}
    if whole:
        figures["scores"] = _whole_sites(whole)
    for kind, sites in scored.items():
        if kind not in whole:
            figures[f"scores-{kind}"] = _units(kind, sites)
    return figures


def _whole_sites(kinds: dict[str, list[Site]]) -> Figure:
    longest = max(len(sites) for sites in kinds.values())
    values = np.full((len(kinds), longest), math.nan)
    crosses: list[tuple[int, int]] = []
    for row, sites in enumerate(kinds.values()):
        for column, site in enumerate(sites):
            values[row, column] = site.scores[0] if site.scores else math.nan
            if site.removed:
                crosses.append((column, row))
    names, below = _names(max(kinds.values(), key=len))
    figure, axes = _map(values, 0.45 * len(kinds), room_below(names))
    _cross(axes, crosses, values.shape, 0.45 * len(kinds))
    axes.set_yticks(range(len(kinds)), list(kinds))
    axes.invert_yaxis()  # the first kind on top
    number_ticks(axes, names, below)
    total = sum(map(len, kinds.values()))
    marked = f"× removed ({len(crosses)} of {total}){_unknown(*kinds.values())}"
    axes.set_title(f"Score of each site; {marked}", fontweight="bold")
    return figure


def _units(kind: str, sites: Sequence[Site]) -> Figure:
    most = max(site.units for site in sites)
    crosses: list[tuple[int, int]] = []
    removed, total = sum(len(s.removed) for s in sites), sum(s.units for s in sites)
    names, below = _names(sites)
    if most <= _CELLS:
        values = np.full((most, len(sites)), math.nan)
        for column, site in enumerate(sites):
            values[: site.units, column] = site.scores or math.nan
            crosses += [(column, unit) for unit in site.removed]
        height = min(0.2 * most, 6.0)
        figure, axes = _map(values, height, room_below(names))
        _blank(axes, sites, most)
        _cross(axes, crosses, values.shape, height)
        axes.set_yticks(range(0, most, 1 if most <= 16 else 4 if most <= 32 else 8))
        axes.set_ylabel("unit")
        marked = f"× removed ({removed:,} of {total:,})"
    else:
        values = np.stack([_sorted_shares(site) for site in sites], axis=1)
        figure, axes = _map(values, 3.0, room_below(names))
        _removed_line(axes, sites)
        axes.set_yticks([-0.5 + p for p in (0, 25, 50, 75, 100)], ["0", "25", "50", "75", "100"])
        axes.set_ylabel("units by score, lowest first (%)")
        marked = f"below the line: the share removed ({removed:,} of {total:,})"
    number_ticks(axes, names, below)
    axes.set_title(f"{kind}: score of each unit; {marked}{_unknown(sites)}", fontweight="bold")
    return figure


def _unknown(*kinds: Sequence[Site]) -> str:
    """What gray cells are, where there are any."""
    known = all(site.scores and all(map(math.isfinite, site.scores)) for sites in kinds for site in sites)
    return "" if known else "; gray: no finite score"


def _sorted_shares(site: Site) -> np.ndarray[Any, Any]:
    """The scores from the lowest to the highest, at ``_SHARES`` even places."""
    scores = np.sort(np.array(site.scores or [math.nan], dtype=float))  # NaN comes last
    return scores[np.minimum((np.arange(_SHARES) + 0.5) / _SHARES * len(scores), len(scores) - 1).astype(int)]


def _map(values: np.ndarray[Any, Any], height: float, below: float) -> tuple[Figure, Axes]:
    """A heat map with its color bar; what is no finite number is gray.

    Args:
        values: [rows, columns].
        height: of the cells together, in inches.
        below: room for the labels of the columns, in inches.
    """
    import matplotlib
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_width(values.shape[1]), height + below + _AROUND), layout="constrained")
    axes = figure.subplots()
    shown = np.ma.masked_invalid(values)
    norm, extend = _scale(shown.compressed())
    image = axes.imshow(
        shown,
        cmap=matplotlib.colormaps[MAP].with_extremes(bad="#CFCFCF"),
        norm=norm,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
    )
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, extend=extend, pad=0.01, fraction=0.04, aspect=max(8, 7 * height))
    bar.set_label("score" + (" (log scale)" if isinstance(norm, LogNorm) else ""))
    bar.outline.set_visible(False)
    if height < _LOW:
        ends = [float(norm.vmin or 0.0), float(norm.vmax or 0.0)]
        bar.set_ticks(ends, labels=[f"{end:.3g}" for end in ends], minor=False)
        bar.minorticks_off()
    return figure, axes


def _scale(scores: np.ndarray[Any, Any]) -> tuple[Normalize, str]:
    """The color scale, and at which ends scores lie beyond it: among many, a few must not take up most of it."""
    from matplotlib.colors import LogNorm, Normalize

    if not len(scores):
        return Normalize(0, 1), "neither"
    share = 1.0 if len(scores) >= _MANY else 0.0
    low, high = (float(v) for v in np.percentile(scores, [share, 100 - share]))
    below, above = bool(scores.min() < low), bool(scores.max() > high)
    extend = {(True, True): "both", (True, False): "min", (False, True): "max", (False, False): "neither"}[below, above]
    if wide((low, high)):
        return LogNorm(low, high), extend
    return Normalize(low, high if high > low else low + 1), extend


def _blank(axes: Axes, sites: Sequence[Site], most: int) -> None:
    """Cover what lies above the units of the smaller sites: it is not gray as what has no score."""
    smaller = [(column, site.units) for column, site in enumerate(sites) if site.units < most]
    if smaller:
        columns, units = zip(*smaller, strict=True)
        bottoms = [u - 0.5 for u in units]
        axes.bar(columns, [most - u for u in units], bottom=bottoms, width=1.0, color="white", label="no unit")


def _cross(axes: Axes, places: Sequence[tuple[int, int]], shape: tuple[int, ...], height: float) -> None:
    """Mark cells (column, row), visibly on light and dark ones; ``height`` is that of all rows, in inches."""
    if not places:
        return
    xs, ys = zip(*places, strict=True)
    rows, columns = shape
    cell = 72 * min(height / rows, 0.85 * _width(columns) / columns)  # points
    size = min(max(0.8 * cell, 3.0), 6.0)
    axes.scatter(xs, ys, marker="x", s=size**2, color="black", linewidths=0.5 * size)
    axes.scatter(xs, ys, marker="x", s=size**2, color="white", linewidths=0.22 * size)


def _removed_line(axes: Axes, sites: Sequence[Site]) -> None:
    edges = [i - 0.5 for i in range(len(sites) + 1)]
    shares = [(100 - site.kept_percent) * _SHARES / 100 - 0.5 for site in sites]
    axes.stairs(shares, edges, baseline=None, color="black", linewidth=2.6)
    axes.stairs(shares, edges, baseline=None, color="white", linewidth=1.3)


def _names(sites: Sequence[Site]) -> tuple[list[str], str]:
    """What stands below the sites, and what that is."""
    blocks = [site.block for site in sites]
    if None in blocks:
        return [site.label for site in sites], "site"
    return [str(block) for block in blocks], "block"


def _width(columns: int) -> float:
    return min(max(0.22 * columns + 2.0, 7.0), 16.0)
