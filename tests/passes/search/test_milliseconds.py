"""Milliseconds: what is measured, what is kept, what is measured again. No test asserts a time."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graphlathe.ir.errors import ExportError, GraphlatheError, InputError
from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.passes.search import millisecond_table, milliseconds
from graphlathe.passes.search.millisecond_table import MillisecondTable, Setting, key_text
from graphlathe.passes.search.milliseconds import measure_ms, ms_table
from graphlathe.runtime.session import ProgramSession

FEEDS = {"x": torch.ones(2, 8)}


def program(layers: int) -> Program:
    torch.manual_seed(layers)
    return trace(nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers))), {"input": torch.ones(2, 8)})


@pytest.fixture(scope="module")
def programs() -> dict[int, Program]:
    return {n: program(n) for n in (1, 2, 3, 4)}


@pytest.fixture
def feeds(programs: dict[int, Program]) -> dict[str, torch.Tensor]:
    return {programs[1].main.inputs[0]: torch.ones(2, 8)}


class Layers:
    """Stands for the timing: a program's milliseconds are its linear layers. Records what was measured together."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.groups: list[list[str]] = []

        def call(session: Any, feeds: Any) -> Callable[[], int]:
            return lambda: sum("linear" in str(n.target) for n in session.program.graph.nodes)

        def rounds(calls: dict[str, Callable[[], int]], *, repeats: int, disturbed: float) -> dict[str, list[float]]:
            self.groups.append(list(calls))
            drift = [0.0, 10.0, *([1.0] * (repeats - 2))]  # hits all calls of a round alike
            return {name: [made() / 1000 + d for d in drift] for name, made in calls.items()}

        monkeypatch.setattr(milliseconds, "_call", call)
        monkeypatch.setattr(milliseconds, "paired_rounds", rounds)


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> Layers:
    return Layers(monkeypatch)


def test_every_program_is_measured(programs: dict[int, Program], feeds: dict[str, torch.Tensor]) -> None:
    times = measure_ms({"one": programs[1], "four": programs[4]}, feeds, disturbed=math.inf)
    assert list(times) == ["one", "four"]
    assert all(0 < ms < 10_000 for ms in times.values())


def test_feeds_that_a_program_has_no_input_for_are_left_out(
    programs: dict[int, Program], feeds: dict[str, Any]
) -> None:
    assert measure_ms({"one": programs[1]}, {**feeds, "other": torch.ones(1)}, disturbed=math.inf)
    with pytest.raises(InputError, match="missing input"):
        measure_ms({"one": programs[1]}, {"other": torch.ones(1)}, disturbed=math.inf)


def test_disturbances_are_looked_for_with_one_thread_only(
    programs: dict[int, Program], feeds: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    def rounds(calls: Any, *, repeats: int, disturbed: float) -> dict[str, list[float]]:
        seen.append(disturbed)
        return {name: [1.0] for name in calls}

    monkeypatch.setattr(milliseconds, "paired_rounds", rounds)
    for threads in (1, 2):
        assert measure_ms({"one": programs[1]}, feeds, threads=threads, disturbed=1.5) == {"one": 1000.0}
    assert seen == [1.5, math.inf]


def test_carried_state_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Session:
        inputs = ("x",)

        def reset(self) -> None:
            events.append("reset")

        def run(self, feeds: dict[str, torch.Tensor]) -> None:
            events.append(",".join(feeds))

    call = milliseconds._call(Session(), FEEDS)  # type: ignore[arg-type]
    call()
    call()
    assert events == ["reset", "x"] * 2


def test_saved_per_site_and_baseline(
    programs: dict[int, Program], feeds: dict[str, torch.Tensor], layers: Layers
) -> None:
    variants = {("mlp", 1): lambda: programs[2], ("mlp", 2): lambda: programs[1], ("attention", 1): lambda: programs[3]}
    counts = {("mlp", 1): 2, ("mlp", 2): 2, ("attention", 1): 1}
    table = ms_table(programs[4], variants, counts, feeds, at_once=2)
    # The baseline has 4 ms and the drift of a typical round; in the differences the drift is gone.
    assert table.baseline == pytest.approx(1004.0)
    assert table.saved == pytest.approx({("mlp", 1): 1.0, ("mlp", 2): 1.5, ("attention", 1): 1.0})
    assert [len(group) for group in layers.groups] == [3, 2]
    assert all(group[0] == "" for group in layers.groups)


def test_slower_is_negative(programs: dict[int, Program], feeds: dict[str, torch.Tensor], layers: Layers) -> None:
    assert ms_table(programs[1], {"x": lambda: programs[3]}, {"x": 1}, feeds).saved["x"] == pytest.approx(-2.0)


def test_nothing_is_measured_twice(
    programs: dict[int, Program], feeds: dict[str, torch.Tensor], layers: Layers, tmp_path: Path
) -> None:
    path = tmp_path / "table.json"
    first = ms_table(programs[4], {("mlp", 1): lambda: programs[2]}, {("mlp", 1): 2}, feeds, path)
    built: list[str] = []

    def build() -> Program:
        built.append("other")
        return programs[3]

    def never() -> Program:
        raise AssertionError("it was measured already")

    again = ms_table(programs[4], {("mlp", 1): never}, {("mlp", 1): 2}, feeds, path)
    assert again == replace(first, runs=0) and first.runs > 0
    assert len(layers.groups) == 1
    more = ms_table(programs[4], {("mlp", 1): never, "other": build}, {("mlp", 1): 2, "other": 1}, feeds, path)
    assert more.saved == {**first.saved, "other": pytest.approx(1.0)}
    assert built == ["other"]
    assert layers.groups[1:] == [["", '"other"']]


@pytest.mark.parametrize("change", ["program", "sizes", "dtype", "threads", "count", "machine", "version"])
def test_another_setting_is_measured_again(
    change: str,
    programs: dict[int, Program],
    feeds: dict[str, torch.Tensor],
    layers: Layers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "table.json"
    variants, name = {"mlp": lambda: programs[2]}, next(iter(feeds))
    ms_table(programs[4], variants, {"mlp": 2}, feeds, path)
    assert len(layers.groups) == 1
    baseline, counts, threads = programs[4], {"mlp": 2}, 1
    match change:
        case "program":
            baseline = programs[3]
        case "sizes":
            feeds = {name: torch.ones(3, 8)}
        case "dtype":
            feeds = {name: torch.ones(2, 8).double()}
        case "threads":
            threads = 2
        case "count":
            counts = {"mlp": 1}
        case "machine":
            monkeypatch.setattr(millisecond_table, "cpu_model", lambda: "another")
        case _:
            import onnxruntime

            monkeypatch.setattr(onnxruntime, "__version__", "another")
    ms_table(baseline, variants, counts, feeds, path, threads=threads)
    assert len(layers.groups) == 2
    ms_table(baseline, variants, counts, feeds, path, threads=threads)
    assert len(layers.groups) == 2


def test_every_run_is_counted(
    programs: dict[int, Program], feeds: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the sessions, which are real: two runs to warm each of them up for each group, and what the rounds repeat."""
    ran: list[Program] = []
    plain = ProgramSession.run

    def run(session: ProgramSession, feeds: Any) -> Any:
        ran.append(session.program)
        return plain(session, feeds)

    monkeypatch.setattr(ProgramSession, "run", run)
    variants = {n: (lambda n=n: programs[n]) for n in (1, 2, 3)}
    table = ms_table(programs[4], variants, dict.fromkeys(variants, 1), feeds, at_once=2, disturbed=math.inf)
    assert table.runs == len(ran) >= (3 + 2) * (2 + 9)
    assert {id(program) for program in ran} == {id(program) for program in programs.values()}


def test_what_was_measured_before_a_failure_is_kept(
    programs: dict[int, Program], feeds: dict[str, torch.Tensor], layers: Layers, tmp_path: Path
) -> None:
    path = tmp_path / "table.json"

    def broken() -> Program:
        raise ExportError("no")

    variants = {"a": lambda: programs[2], "b": broken}
    with pytest.raises(ExportError):
        ms_table(programs[4], variants, {"a": 1, "b": 1}, feeds, path, at_once=1)
    table = MillisecondTable.load(path)
    assert {text for _, text, _ in table.saved} == {'"a"'}


def test_no_variants_measure_the_baseline(
    programs: dict[int, Program], feeds: dict[str, torch.Tensor], layers: Layers, tmp_path: Path
) -> None:
    path = tmp_path / "table.json"
    for _ in range(2):
        assert ms_table(programs[4], {}, {}, feeds, path).baseline == pytest.approx(1004.0)
    assert layers.groups == [[""]]


def test_a_real_measurement_and_its_file(
    programs: dict[int, Program], feeds: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "table.json"
    variants = {("mlp", n): (lambda n=n: programs[n]) for n in (1, 2)}
    table = ms_table(programs[4], variants, dict.fromkeys(variants, 2), feeds, path, at_once=1, disturbed=math.inf)
    assert table.saved.keys() == set(variants)
    assert table.baseline > 0
    assert all(math.isfinite(ms) for ms in table.saved.values())
    read = MillisecondTable.load(path)
    here = Setting.here(programs[4], feeds)
    assert read.baseline == {here: table.baseline}
    assert read.saved == {(here, key_text(key), 2): table.saved[key] for key in variants}
    (part,) = json.loads(path.read_text())["measured"]
    assert part["setting"]["program"] == programs[4].fingerprint()
    assert part["setting"]["feeds"] == {next(iter(feeds)): "float32[2, 8]"}
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"format": "other"}',
        '{"format": "graphlathe milliseconds 1", "measured": [{"setting": {}}]}',
        '{"format": "graphlathe milliseconds 1", "measured": [{"setting": {"program": 1, "feeds": []}}]}',
        '{"format": "graphlathe milliseconds 1", "measured": 3}',
    ],
)
def test_a_damaged_file_is_an_error(content: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(content)
    with pytest.raises(GraphlatheError, match="is no table of milliseconds"):
        MillisecondTable.load(path)
    assert path.read_text() == content


def test_wrong_arguments_are_errors(programs: dict[int, Program], feeds: dict[str, torch.Tensor]) -> None:
    variants = {"a": lambda: programs[1]}
    for counts in ({}, {"a": 0}):
        with pytest.raises(GraphlatheError, match='the number of changed sites of "a"'):
            ms_table(programs[4], variants, counts, feeds)
    with pytest.raises(GraphlatheError, match="cannot name a measurement"):
        ms_table(programs[4], {torch.float32: lambda: programs[1]}, {torch.float32: 1}, feeds)
    with pytest.raises(GraphlatheError, match="at_once is 0"):
        ms_table(programs[4], variants, {"a": 1}, feeds, at_once=0)
    with pytest.raises(GraphlatheError, match="repeats is 3"):
        measure_ms({"one": programs[1]}, feeds, repeats=3)


def test_without_onnxruntime_it_says_what_to_install(
    programs: dict[int, Program], feeds: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(GraphlatheError, match=r"needs the package onnxruntime\n.*graphlathe\[cpu\]"):
        measure_ms({"one": programs[1]}, feeds)
    for path in (None, tmp_path / "table.json"):
        with pytest.raises(GraphlatheError, match="needs the package onnxruntime"):
            ms_table(programs[4], {}, {}, feeds, path)


def test_importing_does_not_load_onnxruntime() -> None:
    code = "import sys, graphlathe.passes.search.milliseconds; print('onnxruntime' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
