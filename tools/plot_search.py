"""Pictures of a search: what it evaluated, the front that this makes, and how it got there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .plot_data import Point, Search
from .plot_style import COLORS, INK, amount, unit_formatter, unit_name, wide

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKS = "osD^vP<>pX"
_SEED = "seed:"
_MARKED = 60  # Steps up to which each has a mark.


def front_of(points: Sequence[Point]) -> list[Point]:
    """The points that no other equals or beats in both cost and score, by ascending cost."""
    front: list[Point] = []
    for point in sorted((p for p in points if p.finite), key=lambda p: (p.cost, p.score)):
        if not front or point.score < front[-1].score:
            front.append(point)
    return front


def front(search: Search) -> Figure:
    """All evaluated candidates by cost and score, with the Pareto front, the seeds and the choice."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.8), layout="constrained")
    axes = figure.subplots()
    drawn = [p for p in search.evaluated if p.finite]
    others = [p for p in drawn if not p.origin.startswith(_SEED)]
    seeds: dict[str, list[Point]] = {}
    for point in drawn:
        if point.origin.startswith(_SEED):
            seeds.setdefault(point.origin.removeprefix(_SEED).strip(), []).append(point)
    _scatter(
        axes, others, f"evaluated ({len(others):,})", color="#A9B4BC", marker="o", size=14 if len(others) < 500 else 7
    )
    best = front_of(drawn)
    if best:
        # What costs more than the last one is not better than it: the line goes on to the dearest candidate.
        xs, ys = [*(p.cost for p in best), max(p.cost for p in drawn)], [*(p.score for p in best), best[-1].score]
        axes.plot(
            xs,
            ys,
            drawstyle="steps-post",
            color=INK,
            linewidth=1.4,
            marker=".",
            markevery=range(len(best)),
            label="Pareto front",
            zorder=3,
        )
    for number, (name, points) in enumerate(seeds.items()):
        color, marker = COLORS[number % len(COLORS)], _MARKS[number % len(_MARKS)]
        _scatter(axes, points, f"seed: {name}", color=color, marker=marker, size=50, edge="black", order=4)
    if search.chosen is not None and search.chosen.finite:
        _scatter(axes, [search.chosen], "chosen", color="#F0E442", marker="*", size=240, edge="black", order=6)
    if search.limit is not None:
        label = f"budget: {amount(search.limit, search.unit)}"
        axes.axvline(search.limit, color="#D55E00", linestyle="--", linewidth=1.2, label=label, zorder=2)
    if wide(p.score for p in drawn):
        axes.set_yscale("log")
    axes.xaxis.set_major_formatter(unit_formatter(search.unit))
    axes.set_xlabel(f"cost ({unit_name(search.unit)})")
    axes.set_ylabel("score (lower is better)")
    axes.grid(True)
    hidden = len(search.evaluated) - len(drawn)
    left_out = f"; {hidden:,} without a finite score left out" if hidden else ""
    axes.set_title(f"{len(search.evaluated):,} candidates by cost and score{left_out}", fontweight="bold")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)
    return figure


def _scatter(
    axes: Axes,
    points: Sequence[Point],
    label: str,
    *,
    color: str,
    marker: str,
    size: float,
    edge: str = "none",
    order: int = 1,
) -> None:
    if points:
        axes.scatter(
            [p.cost for p in points],
            [p.score for p in points],
            s=size,
            c=color,
            marker=marker,
            edgecolors=edge,
            linewidths=0.7,
            label=label,
            zorder=order,
            rasterized=len(points) > 2000,
        )


def progress(search: Search) -> Figure:
    """The best score after each generation over the evaluations so far, and its cost below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.8), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
    steps = search.history
    evaluations = [s.evaluations for s in steps]
    # The last step has no length of its own: it is always marked.
    marked = range(len(steps)) if len(steps) <= _MARKED else [len(steps) - 1]
    for axes, values, color in (
        (upper, [s.best for s in steps], COLORS[0]),
        (lower, [s.cost for s in steps], COLORS[2]),
    ):
        axes.plot(
            evaluations, values, drawstyle="steps-post", color=color, marker="o", markersize=3.5, markevery=marked
        )
        axes.grid(True)
    if wide(s.best for s in steps):
        upper.set_yscale("log")
    if search.limit is not None:
        label = f"budget: {amount(search.limit, search.unit)}"
        lower.axhline(search.limit, color="#D55E00", linestyle="--", linewidth=1.2)
        lower.set_title(f"– – {label}", loc="right", fontsize=8, color="#D55E00")
    lower.yaxis.set_major_formatter(unit_formatter(search.unit))
    upper.set_ylabel("best score\n(lower is better)")
    lower.set_ylabel(f"its cost\n({unit_name(search.unit)})")
    lower.set_xlabel("evaluations")
    lower.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    figure.align_ylabels([upper, lower])
    upper.set_title(
        # Number 0 is the choice among the starts.
        f"Best of {steps[-1].evaluations:,} evaluations in {steps[-1].generation:,} generations: {steps[-1].best:.4g}",
        fontweight="bold",
    )
    return figure
