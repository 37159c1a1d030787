"""Instruments: dumps, diffs, timing, stopping, skipping, reproducers, bisection, progress bars."""

from __future__ import annotations

import io
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import graphlathe as gl
from graphlathe.ir.errors import GraphlatheError, InputError, PostconditionError
from graphlathe.ir.program import Program
from graphlathe.ir.text import parse_program
from graphlathe.passes import progress
from graphlathe.passes.bisection import bisect
from graphlathe.passes.instruments import Diff, Disable, Dump, Instrument, Reproducer, StopAfter, Timing
from graphlathe.passes.manager import PassManager
from graphlathe.passes.pipeline import parse_pipeline
from graphlathe.passes.progress import Bars, progress_for, silent
from graphlathe.passes.registry import get
from graphlathe.tools.cli import execute
from tests.passes.example_passes import Approximate, Crash, Liar

TEXT = """\
program @main(%x: f32[B, 4]) -> (%out) {
  dim B = 2 in [1, inf]
  %w0 = weight "w" : f32[4, 4] #00000000
  %0 = aten.clone(%x) : f32[B, 4]
  %1 = aten.linear(%0, %w0) : f32[B, 4]
  %2 = aten.relu(%1) : f32[B, 4]
  %3 = aten.relu(%1) : f32[B, 4]
  %4 = aten.mul.Tensor(%2, %3) : f32[B, 4]
  return (%4,)
}
"""
X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def program() -> Program:
    return parse_program(TEXT)


def run(program: Program, passes: Any, *instruments: Instrument, **options: Any) -> Any:
    return PassManager(passes, instruments=instruments, feeds={"x": X}, **options).run(program)


def test_dumps_are_numbered_and_parse(program: Program, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    after, _ = run(program, "remove-noops,cse", Dump(folder))
    assert sorted(p.name for p in folder.iterdir()) == ["000_input.txt", "001_remove-noops.txt", "002_cse.txt"]
    assert (folder / "000_input.txt").read_text() == program.to_text()
    assert (folder / "002_cse.txt").read_text() == after.to_text()


def test_a_dump_that_cannot_be_written_says_so(program: Program, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GraphlatheError, match="cannot write the dump"):
        run(program, "cse", Dump(tmp_path / "file"))


def test_diff_prints_only_what_changed(program: Program) -> None:
    lines: list[str] = []
    run(program, "dce,cse", Diff(lines.append, context=0))
    text = "".join(lines)
    assert "before dce" not in text
    assert "before cse" in text
    assert sum("aten.relu" in line for line in lines) == 1
    assert not any("linear" in line for line in lines)


def test_timing_adds_up(program: Program) -> None:
    timing = Timing()
    run(program, "cse,dce,cse", timing)
    assert timing.runs == {"cse": 2, "dce": 1}
    assert all(seconds > 0 for seconds in timing.seconds.values())
    assert "2 x  cse" in str(timing)


def test_stop_after_and_disable(program: Program) -> None:
    after, report = run(program, "remove-noops,cse,dce", StopAfter("cse"))
    assert [row.name for row in report.rows] == ["remove-noops", "cse"]
    assert report.notes == ["stopped after cse"]
    assert after.history == ["remove-noops", "cse"]
    after, report = run(program, "remove-noops,cse,dce", Disable(["cse"]))
    assert [row.name for row in report.rows] == ["remove-noops", "dce"]
    assert report.notes == ["cse was skipped by an instrument"]
    assert after.history == ["remove-noops", "dce"]


def test_every_rewrite_is_seen(program: Program) -> None:
    class Watch(Instrument):
        def __init__(self) -> None:
            self.seen: list[tuple[str, str]] = []

        def on_rewrite(self, pass_name: str, kind: str, node: Any) -> None:
            self.seen.append((pass_name, kind))

    watch = Watch()
    _, report = run(program, "cse", watch)
    assert watch.seen == [("cse", "replace"), ("cse", "erase")]
    assert report.rows[0].mutations == 2


def test_a_reproducer_runs_again(program: Program, tmp_path: Path) -> None:
    folder = tmp_path / "the bug"
    with pytest.raises(PostconditionError) as error:
        run(program, ["remove-noops", parse_pipeline("repeat{max=5}(cse,dce)"), Liar(), "dce"], Reproducer(folder))
    assert any("reproducer" in note for note in error.value.__notes__)
    rest = (folder / "pipeline.txt").read_text().strip()
    assert rest == "test-liar,dce"
    assert "test-liar: it promises" in (folder / "error.txt").read_text()
    command = shlex.split((folder / "command.txt").read_text())
    assert command[:2] == ["graphlathe", "optimize"]
    saved = Program.load(command[2])
    assert saved.history == ["remove-noops", "cse", "dce", "cse", "dce"]
    with pytest.raises(PostconditionError, match="test-liar"):
        run(saved, [Liar(), "dce"])


def test_a_reproducer_holds_data_and_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Over budget in Python, over budget again from its command."""
    case = get("drop-layers").planted()
    assert case is not None
    with pytest.raises(PostconditionError, match="over budget"):
        gl.optimize(
            case.program,
            case.calibration[0],
            passes="cse,drop-layers{ratio=0.5}",
            calibration=case.calibration,
            budget={"relative": 1e-9},
            reproduce=tmp_path / "bug",
        )
    command = shlex.split((tmp_path / "bug" / "command.txt").read_text())
    command.remove("--debug")
    assert execute(command[1:]) == 2
    assert "the drift is over budget: relative" in capsys.readouterr().err


def test_a_diff_starts_anew_with_every_run(program: Program) -> None:
    written: list[str] = []
    diff = Diff(written.append)
    for _ in range(2):
        written.clear()
        run(program, "cse", diff)
        assert written and not [line for line in written if line.startswith("-program")]
    written.clear()
    run(parse_program(TEXT.replace("mul.Tensor", "add.Tensor")), "dce", diff)
    assert written == []


def test_the_rest_of_a_repeated_group_is_kept(program: Program, tmp_path: Path) -> None:
    seen: list[str] = []

    class Rest(Instrument):
        def before_pass(self, event: Any) -> bool:
            seen.append(event.rest)
            return True

    run(program, "repeat{max=3}(cse,dce),remove-noops", Rest())
    assert seen == [
        "cse,dce,repeat{max=2}(cse,dce),remove-noops",
        "dce,repeat{max=2}(cse,dce),remove-noops",
        "cse,dce,repeat{max=1}(cse,dce),remove-noops",
        "dce,repeat{max=1}(cse,dce),remove-noops",
        "remove-noops",
    ]


def test_a_reproducer_that_cannot_be_written_does_not_hide_the_error(program: Program, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GraphlatheError, match="test-crash") as error:
        run(program, Crash(), Reproducer(tmp_path / "file"))
    assert any("no reproducer was written" in note for note in error.value.__notes__)


PIPELINE = [
    "remove-noops",
    "cse",
    Approximate(factor=1.0),
    Approximate(factor=2.0),
    "dce",
    Approximate(factor=3.0),
    "cse",
]


def test_bisect_finds_the_pass_with_few_questions(program: Program) -> None:
    questions = 0

    def is_good(candidate: Program) -> bool:
        nonlocal questions
        questions += 1
        return torch.allclose(candidate.run({"x": X})["out"], program.run({"x": X})["out"])

    culprit = bisect(program, PIPELINE, is_good)
    assert culprit is not None
    assert (culprit.index, culprit.text) == (4, "test-approximate{factor=2.0}")
    assert is_good(culprit.before)
    assert not is_good(culprit.after)
    assert questions <= 2 + 3 + 2


def test_bisect_compares_outputs_by_itself(program: Program) -> None:
    culprit = bisect(program, [Liar(), *PIPELINE], feeds={"x": X})
    assert culprit is not None
    assert culprit.index == 1
    assert bisect(program, "remove-noops,cse,dce", feeds={"x": X}) is None


def test_bisect_wants_to_know_what_is_good(program: Program) -> None:
    with pytest.raises(InputError, match="what is good"):
        bisect(program, "cse")
    with pytest.raises(InputError, match="bad before any pass"):
        bisect(program, "cse", lambda _: False)


def test_bars_show_only_for_slow_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0

    def ticking(seconds: float) -> Iterator[int]:
        nonlocal clock
        for i in range(5):
            clock += seconds
            yield i

    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock)
    for seconds, shown in ((0.1, False), (1.0, True)):
        text = io.StringIO()
        bars = Bars(Console(file=text, force_terminal=True, width=80))
        nested = [list(bars(range(2), 2, "inner")) for _ in bars(ticking(seconds), 5, "outer")]
        assert nested == [[0, 1]] * 5
        assert ("outer" in text.getvalue()) == shown


def test_no_terminal_no_bar() -> None:
    assert progress_for(True) is silent
    assert progress_for(False) is silent
