"""The journal: exact scores, torn lines, journals of something else, and a search that Ctrl-C interrupts."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphlathe.ir.errors import ExportError, InputError
from graphlathe.passes.search.executors import Evaluations
from graphlathe.passes.search.journal import Journal
from tests.passes.search import planted_search

ENTRIES = [((0, 1, 2), 0, 0.1), ((0, 1, 2), 1, -1e-300), ((), 3, 2.0), ((5,), 0, math.inf)]


def filled(path: Path) -> Path:
    with Journal.open(path, "abc") as journal:
        for entry in ENTRIES:
            journal.record(*entry)
    return path


def known(count: int) -> dict[tuple[tuple[int, ...], int], float]:
    return {(state, batch): score for state, batch, score in ENTRIES[:count]}


def test_what_is_recorded_is_read_again(tmp_path: Path) -> None:
    path = filled(tmp_path / "journal")
    with Journal.open(path, "abc") as journal:
        assert journal.scores == known(4)
        journal.record((9, 9), 7, 3.5)
        assert json.loads(path.read_text().splitlines()[-1]) == {"state": [9, 9], "batch": 7, "score": 3.5}
    with Journal.open(path, "abc") as journal:
        assert journal.scores == known(4) | {((9, 9), 7): 3.5}
    assert len(path.read_text().splitlines()) == 6
    assert [p.name for p in tmp_path.iterdir()] == ["journal"]
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@given(score=st.floats(allow_nan=False))
def test_scores_are_exact(tmp_path_factory: pytest.TempPathFactory, score: float) -> None:
    path = tmp_path_factory.mktemp("exact") / "journal"
    with Journal.open(path, "abc") as journal:
        journal.record((1,), 0, score)
    with Journal.open(path, "abc") as journal:
        assert journal.scores == {((1,), 0): score}


def test_a_line_is_in_the_file_when_record_returns(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with Journal.open(path, "abc") as journal:
        for number in range(3):
            journal.record((number,), 0, 1.0)
            assert len(path.read_text().splitlines()) == number + 2


def test_torn_at_any_byte(tmp_path: Path) -> None:
    """Whole lines are kept, half a line is cut off, and what is recorded next starts a line of its own."""
    content = filled(tmp_path / "journal").read_bytes()
    ends = [n + 1 for n, byte in enumerate(content) if byte == ord("\n")]
    torn = tmp_path / "torn"
    for cut in range(ends[0], len(content) + 1):
        torn.write_bytes(content[:cut])
        whole = sum(end <= cut for end in ends) - 1
        with Journal.open(torn, "abc") as journal:
            assert journal.scores == known(whole), cut
            journal.record((7,), 0, 0.5)
        with Journal.open(torn, "abc") as journal:
            assert journal.scores == known(whole) | {((7,), 0): 0.5}, cut


def test_of_two_lines_about_the_same_the_first_counts(tmp_path: Path) -> None:
    with Journal.open(tmp_path / "journal", "abc") as journal:
        journal.record((1,), 0, 1.0)
        journal.record((1,), 0, 2.0)
        assert journal.scores == {((1,), 0): 1.0}
    with Journal.open(tmp_path / "journal", "abc") as journal:
        assert journal.scores == {((1,), 0): 1.0}


def test_a_journal_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = filled(tmp_path / "journal")
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"of something else: fingerprint is 'abc' there and 'abd' here"):
        Journal.open(path, "abd")
    named = tmp_path / "named"
    Journal.open(named, {"program": "p1", "data": "d1", "objective": "kl"}).close()
    with pytest.raises(InputError, match=r"else: data is 'd1' there and 'd2' here\n"):
        Journal.open(named, {"program": "p1", "data": "d2", "objective": "kl"})
    with pytest.raises(InputError, match=r"seed is None there and '1' here, objective is 'kl' there and None here"):
        Journal.open(named, {"program": "p1", "data": "d1", "seed": "1"})
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content", ["", "x", "hello\n", "[]\n", '{"graphlathe": "something"}\n', '{"graphlathe": "eval']
)
def test_what_is_no_journal_is_refused_and_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "file"
    path.write_text(content)
    with pytest.raises(InputError, match="no journal of evaluations"):
        Journal.open(path, "abc")
    assert path.read_text() == content


def test_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_text('{"graphlathe": "evaluations", "version": 9, "of": {"fingerprint": "abc"}}\n')
    with pytest.raises(InputError, match=r"(?s)has version 9.*expected: version 1"):
        Journal.open(path, "abc")


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"state": [0]}', '{"state": 1, "batch": 0, "score": 1}', '{"state": [1], "batch": 0, "score": "x"}'],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = filled(tmp_path / "journal")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    with pytest.raises(InputError, match="line 3 of the journal"):
        Journal.open(path, "abc")


def test_a_journal_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot write the journal"):
        Journal.open(tmp_path / "nowhere" / "journal", "abc")
    with pytest.raises(ExportError, match="cannot write the journal"):
        Journal.open(tmp_path, "abc")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_search_goes_on_where_it_was(tmp_path: Path) -> None:
    """A process of its own gets Ctrl-C in the middle of an evaluation; then the search is started again."""
    evaluations = Evaluations(planted_search.score)
    undisturbed = planted_search.search(evaluations)
    total = evaluations.evaluated
    assert total > planted_search.MIDDLE + 10

    command = [sys.executable, planted_search.__file__]
    process = subprocess.Popen([*command, "interrupted", str(tmp_path)], stdout=-1, stderr=-1, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "middle").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode != 0 and "KeyboardInterrupt" in errors, errors
    calls = tmp_path / "calls"
    assert len(calls.read_text().splitlines()) == planted_search.MIDDLE
    with Journal.open(tmp_path / "journal.jsonl", "planted") as journal:
        assert len(journal.scores) == planted_search.MIDDLE, "all that was evaluated is in the journal"

    done = subprocess.run([*command, "plain", str(tmp_path)], capture_output=True, text=True, timeout=120, check=True)
    resumed = json.loads(done.stdout)
    assert resumed["evaluated"] == total - planted_search.MIDDLE
    assert len(calls.read_text().splitlines()) == total, "nothing was evaluated twice"
    assert resumed["outcome"].pop("reused") == planted_search.MIDDLE
    expected = json.loads(json.dumps(undisturbed.to_json()))
    assert expected.pop("reused") == 0
    assert resumed["outcome"] == expected
