"""English prose for the compression suites, from packages of Debian: two domains, each cut into disjoint slices.

A method sees the calibration slice of one domain. What it is measured on is the test slice of that domain, and that of
another one, by other authors about other things. A validation slice lies between the two, for methods that choose by
themselves when to stop.

Where the packages are: in the folder that the variable `VARIABLE` names (packages, unpacked with ``dpkg -x``), in
``build/text`` of the working directory, or from ``apt-get download`` into it. Without any of them the two short texts
that come with this package are used, and the suites say so.
"""

from __future__ import annotations

import gzip
import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from ...ir.errors import GraphlatheError
from ..text_data import calibration_text, held_out_text

VARIABLE = "GRAPHLATHE_TEXT"
"""Environment variable: a folder with the unpacked packages."""
FOLDER = Path("build") / "text"
SHARES = {"calibration": 0.5, "validation": 0.1, "test": 0.4}
"""The slices of a domain, in this order, by characters."""
SHORTEST = 120
"""Characters of a paragraph, at least: shorter ones are mostly captions and parts of lists."""
LIMIT = 2_000_000
"""Characters of a domain, at most."""


@dataclass(frozen=True)
class Source:
    """Where a domain's text is.

    Attributes:
        package: the package of Debian.
        files: a pattern of files inside it, read in the order of their names.
    """

    package: str
    files: str


SOURCES = {
    "faq": Source("anarchism", "usr/share/doc/anarchism/html/sec*.html"),
    "handbook": Source("debian-handbook", "usr/share/doc/debian-handbook/html/en-US/*.html"),
    "jargon": Source("jargon-text", "usr/share/doc/jargon-text/jargon.txt.gz"),
    "developers-reference": Source("developers-reference", "usr/share/doc/developers-reference/docs/*.html"),
}
DOMAINS = ("faq", "handbook")
"""Calibrated on (and tested on another slice of), and only tested on."""


@dataclass(frozen=True)
class Section:
    """A heading, and the first paragraph of prose below it."""

    title: str
    paragraph: str


@dataclass(frozen=True)
class Corpus:
    """The texts of a run.

    Attributes:
        domains: paragraphs of each domain; the first is the one to calibrate on.
        sections: titles with their paragraphs, for retrieval; of the last domain, or empty.
        source: where it all is from.
        rest: paragraphs of the first domain beyond its `LIMIT`, in no slice: for what trains on more text.
    """

    domains: dict[str, tuple[str, ...]]
    sections: tuple[Section, ...]
    source: str
    rest: tuple[str, ...] = ()

    def slice(self, domain: str, part: str) -> str:
        """One slice of a domain as text: whole paragraphs, a blank line between them (see `cut`)."""
        return "\n\n".join(cut(self.domains[domain])[part])


def cut(paragraphs: Iterable[str]) -> dict[str, list[str]]:
    """Paragraphs in the slices of `SHARES`, each paragraph in one; repeated ones are left out."""
    distinct = list(dict.fromkeys(paragraphs))
    total = sum(map(len, distinct))
    bounds, share = [], 0.0
    for each in SHARES.values():
        share += each
        bounds.append(share * total)
    parts: dict[str, list[str]] = {name: [] for name in SHARES}
    names, done = list(SHARES), 0
    for paragraph in distinct:
        middle = done + len(paragraph) / 2
        parts[next((n for n, bound in zip(names, bounds, strict=True) if middle < bound), names[-1])].append(paragraph)
        done += len(paragraph)
    return parts


def corpus(folder: Path | None = None, domains: tuple[str, ...] = DOMAINS) -> Corpus:
    """The texts, fetched if need be; the same on every machine for one version of the packages.

    Args:
        folder: unpacked packages; None: see the module's text.
        domains: which, of `SOURCES`.

    Raises:
        GraphlatheError: ``folder`` (or the variable's) lacks a package's files.
    """
    named = folder or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    base = named or _fetched(domains)
    if base is None:
        texts = {"python-docs": calibration_text(), "jargon-essays": held_out_text()}
        parts = {name: tuple(text.strip().split("\n\n")) for name, text in texts.items()}
        return Corpus(parts, (), "the packaged texts (apt-get download does not work here)")
    found = {name: _files(base, SOURCES[name]) for name in domains}
    missing = [SOURCES[name].package for name, files in found.items() if not files]
    if missing:
        raise GraphlatheError(
            f"'{base}' has no files of {', '.join(missing)}",
            remedy=f"apt-get download {' '.join(missing)}, and dpkg -x each into it",
        )
    everything = {name: tuple(prose(_paragraphs(files))) for name, files in found.items()}
    paragraphs = {name: tuple(_limited(texts)) for name, texts in everything.items()}
    first = everything[domains[0]][len(paragraphs[domains[0]]) :]
    known = {*paragraphs[domains[0]]}
    rest = tuple(text for text in dict.fromkeys(first) if text not in known)
    packages = ", ".join(SOURCES[name].package for name in domains)
    return Corpus(paragraphs, tuple(sections(found[domains[-1]])), f"Debian's {packages}", rest)


def _fetched(domains: tuple[str, ...]) -> Path | None:
    """The folder with all packages, downloaded where they are not there; None where that fails."""
    unpacked = FOLDER / "unpacked"
    for name in domains:
        source = SOURCES[name]
        if _files(unpacked, source):
            continue
        unpacked.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(
                ["apt-get", "download", source.package], cwd=FOLDER, check=True, capture_output=True, timeout=300
            )
            archive = sorted(FOLDER.glob(f"{source.package}_*.deb"))[-1]
            subprocess.run(["dpkg", "-x", str(archive), str(unpacked)], check=True, capture_output=True, timeout=300)
        except (OSError, subprocess.SubprocessError, IndexError):
            return None
    return unpacked


def _files(base: Path, source: Source) -> list[Path]:
    return sorted(base.glob(source.files))


def _limited(paragraphs: Iterable[str]) -> Iterator[str]:
    length = 0
    for paragraph in paragraphs:
        length += len(paragraph)
        if length > LIMIT:
            return
        yield paragraph


def prose(paragraphs: Iterable[str]) -> Iterator[str]:
    """Running prose: of `SHORTEST` characters, from a capital letter to the end of a sentence, on one line each."""
    for paragraph in paragraphs:
        text = " ".join(paragraph.replace("¶", "").split())
        text = re.sub(r"\{([^{}]+)\}", r"\1", text)  # the Jargon File's mark of a cross-reference
        text = text.translate(str.maketrans("‘’“”", "''\"\""))
        if len(text) >= SHORTEST and re.search(r"[.!?][\"')\]]*$", text) and re.match(r"[\"'(]*[A-Z]", text):
            yield text


class _Reader(HTMLParser):
    """Headings and paragraphs of a page, in order, as pairs of kind and text."""

    HEADINGS = frozenset({"h1", "h2", "h3", "h4"})
    SKIPPED = frozenset({"pre", "table", "nav", "script", "style", "head", "dl", "ul", "ol"})

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self._open: list[str] = []  # the tags that this text is in; void ones have no end and are not kept
        self._kind: str | None = None
        self._text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in {"br", "img", "hr", "meta", "link", "input"}:
            self._text.append(" ")
            return
        kind = "heading" if tag in self.HEADINGS else "paragraph" if tag == "p" else None
        if tag == "div" and ("class", "para") in attrs:
            kind = "paragraph"
        if kind is not None:
            self._end()
            self._kind = kind
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in {"p", "div"} or tag in self.HEADINGS:
            self._end()
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if self._kind is not None and not self.SKIPPED.intersection(self._open):
            self._text.append(data)

    def _end(self) -> None:
        if self._kind is not None:
            self.found.append((self._kind, "".join(self._text)))
        self._kind, self._text = None, []


def read_page(html: str) -> list[tuple[str, str]]:
    """The headings and paragraphs of a page: pairs of ``heading`` or ``paragraph``, and text."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    return reader.found


def _paragraphs(files: Iterable[Path]) -> Iterator[str]:
    for file in files:
        if file.suffix == ".gz":
            with gzip.open(file, "rt", encoding="utf-8") as opened:
                yield from re.split(r"\n\s*\n", opened.read().replace("\xa0", " "))
        else:
            yield from (text for kind, text in read_page(_text(file)) if kind == "paragraph")


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def sections(files: Iterable[Path]) -> Iterator[Section]:
    """Titles (without their numbers) with the first paragraph of prose below; both differ from all others."""
    titles: set[str] = set()
    paragraphs: set[str] = set()
    for file in files:
        title = None
        for kind, text in read_page(_text(file)) if file.suffix != ".gz" else ():
            if kind == "heading":
                title = re.sub(r"^(Chapter |Appendix )?[\dA-Z]+(\.[\d.]*)+\s*", "", " ".join(text.split()))
            elif title and title not in titles:
                first = next(prose([text]), None)
                if first is None or first in paragraphs:
                    continue
                titles.add(title)
                paragraphs.add(first)
                yield Section(title, first)
                title = None
