"""The packaged English texts: one to calibrate on, another to measure on (sources and licences: ``data/README.md``)."""

from __future__ import annotations

from importlib.resources import files


def calibration_text() -> str:
    """Prose of the Python documentation: paragraphs of one line each, a blank line between them."""
    return _read("calibration.txt")


def held_out_text() -> str:
    """Prose of the Jargon File, laid out likewise; it shares no run of eight words with the calibration text."""
    return _read("held_out.txt")


def _read(name: str) -> str:
    # From the parent package: `data` holds no Python, so it is no package of its own.
    return files(__package__ or "").joinpath("data", name).read_text(encoding="utf-8")
