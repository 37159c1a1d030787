"""The ``golden`` fixture itself: it compares exactly, says what to do, and writes only when asked."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

CONFTEST = Path(__file__).with_name("conftest.py")


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest(CONFTEST.read_text())
    pytester.makepyfile("def test_it(golden):\n    golden('folder/name', 'one\\ntwo')\n")
    return pytester


def test_a_missing_golden_says_how_to_write_it(project: pytest.Pytester) -> None:
    project.runpytest().stdout.fnmatch_lines(["*no golden 'folder/name'*make goldens*"])
    assert not (project.path / "goldens").exists()


def test_update_writes_what_is_then_compared(project: pytest.Pytester) -> None:
    project.runpytest("--update-goldens").assert_outcomes(passed=1)
    written = project.path / "goldens" / "folder" / "name.txt"
    assert written.read_bytes() == b"one\ntwo\n"
    project.runpytest().assert_outcomes(passed=1)
    written.write_text("one\ntwo \n")
    project.runpytest().assert_outcomes(failed=1)
