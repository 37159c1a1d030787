"""Pictures of a compression plan: what stays, the scores that decided it, and how the search went.

Drawn from the plan's JSON alone, so that a saved plan can be looked at without its model:

    {"sites": [{"label", "kind", "block", "units", "removed": [...], "scores": [...] or None, "level"}],
     "search": None or {"history": [{"generation", "evaluations", "best", "cost"}],
                        "evaluated": [{"cost", "score", "origin": "seed: NAME" or "mutation"}],
                        "chosen": {"cost", "score"}, "budget": {"kind", "limit"}}}

Lower scores and costs are better. The package matplotlib is loaded when a picture is drawn (``graphlathe[plot]``).
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ir.errors import ExportError, InputError
from ..ir.files import write_atomically
from .plot_data import read_plan
from .plot_style import STYLE, load_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 130


def plan_figures(plan: Mapping[str, Any]) -> dict[str, Figure]:
    """All pictures that a plan has data for, by name.

    ``keep-ratios``; ``scores`` (a cell per site) and ``scores-KIND`` (a cell per unit, or per percentile where there
    are more than 64); ``search-front`` and ``search-progress``.

    Raises:
        GraphlatheError: matplotlib is not installed.
        InputError: the plan is not of the form above, or holds nothing to draw.
    """
    matplotlib = load_matplotlib()
    from . import plot_search, plot_sites

    data = read_plan(plan)
    figures: dict[str, Figure] = {}
    with matplotlib.rc_context(dict(STYLE)):
        if data.sites:
            figures["keep-ratios"] = plot_sites.keep_ratios(data)
            figures |= plot_sites.score_maps(data)
        if data.search is not None and data.search.evaluated:
            figures["search-front"] = plot_search.front(data.search)
        if data.search is not None and data.search.history:
            figures["search-progress"] = plot_search.progress(data.search)
    if not figures:
        raise InputError("the plan has nothing to draw", expected="sites, or a search with evaluations")
    return figures


def plan_figures_png(plan: Mapping[str, Any]) -> dict[str, bytes]:
    """The pictures of `plan_figures` as PNG files.

    Raises:
        GraphlatheError: see `plan_figures`.
    """
    return {name: _bytes(figure, "png") for name, figure in plan_figures(plan).items()}


def plan_figures_svg(plan: Mapping[str, Any]) -> dict[str, str]:
    """The pictures of `plan_figures` as SVG documents; equal plans give equal texts.

    Raises:
        GraphlatheError: see `plan_figures`.
    """
    return {name: _bytes(figure, "svg").decode() for name, figure in plan_figures(plan).items()}


def plot_plan(plan: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the pictures of `plan_figures` into a folder, which is made if there is none.

    Returns:
        The PNG files, in order.

    Raises:
        GraphlatheError: see `plan_figures`.
        ExportError: the folder or a file cannot be written. No file is left half-written.
    """
    figures = plan_figures(plan)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(
            f"cannot make the folder '{folder}': {error.strerror}", remedy="choose another folder"
        ) from error
    paths = {folder / f"{_file_name(name)}.png": figure for name, figure in figures.items()}
    for path, figure in paths.items():
        write_atomically(path, _bytes(figure, "png"))
    return list(paths)


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()


def _bytes(figure: Figure, form: str) -> bytes:
    matplotlib = load_matplotlib()
    with io.BytesIO() as file, matplotlib.rc_context(dict(STYLE)):
        metadata = {"Date": None} if form == "svg" else {"Software": None}
        figure.savefig(file, format=form, dpi=DPI, metadata=metadata)
        return file.getvalue()
