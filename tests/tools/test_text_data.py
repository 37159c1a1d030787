"""The packaged texts are prose, disjoint, and come with their licence."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.resources import files

import pytest

from graphlathe.tools.text_data import calibration_text, held_out_text


def shingles(text: str, words: int = 8) -> set[tuple[str, ...]]:
    """Every run of so many words, whatever the case and punctuation."""
    found = re.findall(r"\w+", text.lower())
    return {tuple(found[start : start + words]) for start in range(len(found) - words + 1)}


def test_the_texts_share_nothing() -> None:
    shared = shingles(calibration_text()) & shingles(held_out_text())
    assert len(shared) == 0, f"{len(shared)} shared runs of eight words, such as {next(iter(shared))}"


@pytest.mark.parametrize("text", [calibration_text, held_out_text])
def test_the_texts_are_plain_paragraphs(text: Callable[[], str]) -> None:
    assert 50_000 <= len(text().encode()) <= 70_000
    paragraphs = text().removesuffix("\n").split("\n\n")
    assert len(paragraphs) > 100
    assert len(set(paragraphs)) == len(paragraphs)
    for paragraph in paragraphs:
        assert "\n" not in paragraph
        assert paragraph[-1] in ".!?\"')", paragraph
        assert not re.search(r"[{}]|¶|</|&\w+;|[─-╿]", paragraph), paragraph


def test_licence_and_source_are_beside_them() -> None:
    data = files("graphlathe.tools").joinpath("data")
    assert "2001-2023 Python Software Foundation" in data.joinpath("LICENSE-PSF.txt").read_text(encoding="utf-8")
    readme = data.joinpath("README.md").read_text(encoding="utf-8")
    for needed in ("calibration.txt", "held_out.txt", "LICENSE-PSF.txt", "4.4.7", "public domain", "Changes"):
        assert needed in readme
