"""The measuring instrument itself: what it times, how it judges goals, what it writes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from graphlathe.ir.errors import ExportError, GraphlatheError
from graphlathe.tools.bench import base
from graphlathe.tools.bench.base import Goal, Result, Run, Suite, registered, run_suite
from graphlathe.tools.bench.machine import commit, describe_machine
from graphlathe.tools.bench.measure import Timing, fit_exponent, interleave, measure_in_subprocess, peak_memory
from graphlathe.tools.cli import execute


def fake_suite(value: float, target: float = 1.0, at_least: bool = False) -> Suite:
    def run(context: Run) -> Result:
        rows = [
            {"model": "a", "seconds": 0.25, "growth_bytes": 1 << 20},
            {"model": "b", "error": math.nan, "nodes": 1234},
        ]
        return Result(rows, [Goal("ratio", value, target, at_least)], ["quick" if context.quick else "full"])

    return Suite("fake", "for tests", ("ratio at most 1",), run)


class TestGoal:
    @pytest.mark.parametrize(
        ("value", "target", "at_least", "met", "margin"),
        [
            (0.5, 1.0, False, True, "met by 50%"),
            (1.0, 1.0, False, True, "met by 0%"),
            (1.2, 1.0, False, False, "missed by 20%"),
            (3.0, 2.0, True, True, "met by 50%"),
            (1.0, 2.0, True, False, "missed by 50%"),
            (math.nan, 1.0, False, False, "not measured"),
            (math.nan, 1.0, True, False, "not measured"),
            (0.5, 0.0, False, False, "missed by 0.5"),
        ],
    )
    def test_judgement(self, value: float, target: float, at_least: bool, met: bool, margin: str) -> None:
        goal = Goal("g", value, target, at_least)
        assert goal.met is met
        assert goal.margin == margin


class TestRecord:
    def test_json_holds_everything_needed_to_judge_it(self, tmp_path: Path) -> None:
        path = tmp_path / "out.json"
        record = run_suite(fake_suite(2.0), Run(quick=True))
        record.write(path)
        data = json.loads(path.read_text())
        assert data["suite"] == "fake" and data["quick"] is True and data["notes"] == ["quick"]
        assert {"cpu", "cores", "memory_bytes", "system", "python", "load_average"} <= set(data["machine"])
        assert data["machine"]["cores"] >= 1
        assert {"torch", "onnx", "graphlathe"} <= set(data["versions"])
        assert data["goals"] == [
            {"name": "ratio", "value": 2.0, "target": 1.0, "at_least": False, "met": False, "margin": "missed by 100%"}
        ]
        assert data["rows"][1] == {"model": "b", "error": None, "nodes": 1234}, "JSON has no NaN"
        assert [p.name for p in tmp_path.iterdir()] == ["out.json"], "no partial file"

    def test_commit_is_a_hash_or_unknown(self) -> None:
        text = commit()
        assert text == "unknown" or len(text.removesuffix("-dirty")) == 12

    def test_machine_names_its_processor(self) -> None:
        assert describe_machine()["cpu"]


class TestCommand:
    def test_check_exits_with_1_when_a_goal_is_missed(self, capsys: pytest.CaptureFixture[str]) -> None:
        with registered(fake_suite(1.5)):
            assert execute(["bench", "fake"]) == 0
            assert execute(["bench", "fake", "--check"]) == 1
        assert "missed by 50%" in capsys.readouterr().out

    def test_check_exits_with_0_when_all_are_met(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "r.json"
        with registered(fake_suite(0.5)):
            assert execute(["bench", "fake", "--check", "--json", str(path), "--quick"]) == 0
        assert json.loads(path.read_text())["goals"][0]["met"] is True
        text = capsys.readouterr().out
        assert "250 ms" in text and "1 MiB" in text and "1,234" in text, (
            "values carry the units that their columns imply"
        )
        assert "commit:" in text and "machine:" in text

    def test_unwritable_json_fails_before_measuring(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        def run(context: Run) -> Result:
            raise AssertionError("must not be run")

        with registered(Suite("fake", "", (), run)):
            assert execute(["bench", "fake", "--json", str(tmp_path / "no" / "r.json")]) == 2
        assert "create it" in capsys.readouterr().err

    def test_unknown_suite_is_suggested(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert execute(["bench", "compilr"]) == 2
        assert "did you mean 'compiler'?" in capsys.readouterr().err

    def test_no_suite(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert execute(["bench"]) == 2
        assert "--list" in capsys.readouterr().err

    def test_every_registered_suite_is_listed_with_its_goals(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert execute(["bench", "--list"]) == 0
        text = capsys.readouterr().out
        for name in base.names():
            suite = base.get(name)
            assert suite.name == name and suite.goals, "a suite without a goal judges nothing"
            assert name in text


class TestTimes:
    def test_interleaves_and_rotates(self) -> None:
        order: list[str] = []
        calls = {name: lambda name=name: order.append(name) for name in "abc"}
        timings = interleave(calls, repeats=3, warmup=0)
        assert "".join(order) == "abcbcacab"
        assert all(len(t.wall) == 3 for t in timings.values())

    def test_warmup_is_not_counted_and_preparation_is_not_timed(self) -> None:
        made: list[int] = []

        def prepare() -> int:
            time.sleep(0.05)
            made.append(len(made))
            return made[-1]

        got: list[int] = []
        timings = interleave({"a": got.append}, repeats=2, warmup=1, prepare={"a": prepare})
        assert got == [0, 1, 2], "every call gets a fresh argument"
        assert len(timings["a"].wall) == 2
        assert timings["a"].best < 0.02

    def test_median_and_best(self) -> None:
        timing = Timing([3.0, 1.0, 2.0], [0.5, 0.25, 1.0])
        assert (timing.median, timing.best, timing.best_cpu) == (2.0, 1.0, 0.25)

    def test_wall_and_processor_time_differ_for_a_sleep(self) -> None:
        timing = interleave({"sleep": lambda: time.sleep(0.05)}, repeats=1, warmup=0)["sleep"]
        assert timing.best >= 0.05 > timing.best_cpu


class TestExponent:
    @pytest.mark.parametrize("exponent", [0.0, 1.0, 1.15, 2.0])
    def test_of_a_power_law(self, exponent: float) -> None:
        sizes = [10, 80, 300, 1000]
        assert fit_exponent(sizes, [3e-6 * n**exponent for n in sizes]) == pytest.approx(exponent, abs=1e-9)

    def test_n_log_n_is_a_little_above_linear(self) -> None:
        sizes = [1000, 3000, 9000]
        assert 1.1 < fit_exponent(sizes, [n * math.log(n) for n in sizes]) < 1.15

    @pytest.mark.parametrize(("sizes", "seconds"), [([5, 5], [1.0, 2.0]), ([1, 2], [0.0, 1.0])])
    def test_refuses_what_has_no_slope(self, sizes: list[int], seconds: list[float]) -> None:
        with pytest.raises(ValueError, match="exponent"):
            fit_exponent(sizes, seconds)


def allocate(megabytes: int) -> dict[str, Any]:
    """Runs in a process of its own: touches memory, gives it back, and takes a while."""
    block = bytearray(b"x" * (megabytes << 20))
    time.sleep(0.1)
    return {"length": len(block)}


def fail() -> None:
    raise RuntimeError("not today")


class TestMemory:
    def test_of_a_function_in_its_own_process(self) -> None:
        module = f"{__name__}:allocate"
        small, large = (measure_in_subprocess(module, {"megabytes": size}) for size in (1, 200))
        assert large.result == {"length": 200 << 20}
        assert large.seconds >= 0.1
        grown = large.peak_rss_bytes - small.peak_rss_bytes
        assert 190 << 20 < grown < 440 << 20, "the block and at most one copy of it"

    def test_the_parent_does_not_count(self) -> None:
        ballast = bytearray(b"x" * (300 << 20))
        small = measure_in_subprocess(f"{__name__}:allocate", {"megabytes": 1})
        baseline = measure_in_subprocess(f"{__name__}:allocate", {"megabytes": 1})
        assert len(ballast) and abs(small.peak_rss_bytes - baseline.peak_rss_bytes) < 64 << 20

    def test_a_failure_is_told(self) -> None:
        with pytest.raises(GraphlatheError, match="not today"):
            measure_in_subprocess(f"{__name__}:fail")

    def test_too_slow_is_told(self) -> None:
        with pytest.raises(GraphlatheError, match="took more than"):
            measure_in_subprocess(f"{__name__}:allocate", {"megabytes": 1}, timeout=0.01)

    def test_peak_of_a_phase_is_seen_after_it_is_freed(self) -> None:
        before_all = bytearray(b"x" * (150 << 20))
        del before_all
        with peak_memory() as memory:
            block = bytearray(b"x" * (100 << 20))
            del block
        assert 90 << 20 < memory.peak - memory.before < 250 << 20


def test_json_is_not_written_half(tmp_path: Path) -> None:
    record = run_suite(fake_suite(1.0), Run())
    with pytest.raises(ExportError, match="there is no folder"):
        record.write(tmp_path / "missing" / "out.json")
    assert not list(tmp_path.iterdir())


def test_listing_suites_by_name_loads_none_of_them() -> None:
    code = (
        "import sys; from graphlathe.tools.bench import base; base.names();"
        "print([name for name in base.MODULES if f'graphlathe.tools.bench.{name}' in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
