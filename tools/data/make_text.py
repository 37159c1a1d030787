"""Make the two texts beside this file from two Debian packages (see README.md): ``make_text.py FOLDER``.

FOLDER is where both were unpacked. Paragraphs of running prose are kept, each on one line; code, tables, lists, verse
and headings are not.
"""

from __future__ import annotations

import gzip
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

LIMIT = 64_000
"""Characters of each text, at most."""
SHORTEST = 120
"""Characters of a paragraph, at least: shorter ones are mostly captions."""

PYTHON_PAGES = ("faq/general", "faq/design", "howto/sockets", "tutorial/appetite", "howto/unicode")
JARGON_SECTIONS = (
    "Chapter 1. ",
    "Chapter 2. ",
    "Chapter 3. ",
    "Chapter 4. ",
    "Verb Doubling",
    "Soundalike Slang",
    "The -P Convention",
    "Overgeneralization",
    "Anthropomorphization",
    "Chapter 5. ",
    "Chapter 6. ",
    "Chapter 7. ",
    "Chapter 8. ",
    "Chapter 9. ",
    "Chapter 10. ",
    "Chapter 11. ",
    "The Meaning of ‘Hack’",
)


class _Paragraphs(HTMLParser):
    """The text of the ``<p>`` elements in the body of a page."""

    SKIPPED = frozenset({"pre", "table", "dl", "nav", "script", "style"})
    VOID = frozenset({"br", "img", "hr", "meta", "link", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._current: list[str] | None = None
        self._skipping = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.SKIPPED:
            self._skipping += 1
        elif tag == "p" and not self._skipping:
            self._current = []

    def handle_endtag(self, tag: str) -> None:
        if tag in self.SKIPPED:
            self._skipping -= 1
        elif tag == "p" and self._current is not None:
            self.found.append("".join(self._current))
            self._current = None

    def handle_data(self, data: str) -> None:
        if self._current is not None and not self._skipping:
            self._current.append(data)


def python_paragraphs(folder: Path) -> Iterator[str]:
    """Paragraphs of the Python documentation's pages."""
    for page in PYTHON_PAGES:
        parser = _Paragraphs()
        html = (folder / "usr/share/doc/python3.11/html" / f"{page}.html").read_text(encoding="utf-8")
        parser.feed(html.partition('role="main"')[2].partition('role="navigation"')[0])
        yield from parser.found


def jargon_paragraphs(folder: Path) -> Iterator[str]:
    """Paragraphs of the Jargon File's essays: flush with its margin of three spaces."""
    with gzip.open(folder / "usr/share/doc/jargon-text/jargon.txt.gz", "rt", encoding="utf-8") as file:
        blocks = re.split(r"\n\s*\n", file.read().replace("\xa0", " "))
    inside = False
    for block in blocks:
        if not block.startswith(" "):
            inside = block.startswith(JARGON_SECTIONS)
        elif inside and all(re.match(r" {3}\S", line) for line in block.strip("\n").split("\n")):
            yield block


def clean(paragraphs: Iterator[str]) -> str:
    """Running prose, paragraphs apart by a blank line, up to `LIMIT` characters."""
    kept: list[str] = []
    length = 0
    for paragraph in paragraphs:
        text = " ".join(paragraph.replace("¶", "").split())
        text = re.sub(r"\{([^{}]+)\}", r"\1", text)  # the Jargon File's mark of a cross-reference
        text = text.translate(str.maketrans("‘’“”", "''\"\""))
        if len(text) < SHORTEST or not re.search(r"[.!?][\"')]*$", text) or not re.match(r"[\"'(]*[A-Z]", text):
            continue
        if length + len(text) > LIMIT:
            break
        kept.append(text)
        length += len(text) + 2
    return "\n\n".join(kept) + "\n"


def main(folder: Path) -> None:
    """Write both texts."""
    here = Path(__file__).parent
    (here / "calibration.txt").write_text(clean(python_paragraphs(folder)), encoding="utf-8")
    (here / "held_out.txt").write_text(clean(jargon_paragraphs(folder)), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
