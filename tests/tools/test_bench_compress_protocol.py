"""The compression suites: what is run and kept, and the goals that follow from the rows."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from graphlathe.ir.errors import GraphlatheError
from graphlathe.ir.load import load
from graphlathe.passes.search import milliseconds
from graphlathe.passes.search.paired_timing import paired_rounds
from graphlathe.passes.search.plan import FORMAT
from graphlathe.runtime.session import ProgramSession
from graphlathe.tools.bench import base as bench_base
from graphlathe.tools.bench import compress_run
from graphlathe.tools.bench.base import Goal, Record, Result, Row, Run, Suite, known_rows, run_suite
from graphlathe.tools.bench.compress_goals import cost_of, goals_of, latency_over_macs
from graphlathe.tools.bench.compress_methods import Level, Method, _Kept, run_pipeline
from graphlathe.tools.bench.compress_ours import OURS
from graphlathe.tools.bench.compress_peers import PEERS
from graphlathe.tools.bench.compress_run import Part, run_method, run_parts
from graphlathe.tools.bench.compress_subject import Case
from graphlathe.tools.bench.markdown import records
from graphlathe.tools.bench.measure import Measured
from graphlathe.tools.bench.show import bench
from tests.compress_toy import BASE, LEVEL, TOY, Toy, measured, row


def goals(*rows: tuple[Method, Level, Row]) -> dict[str, Goal]:
    return {goal.name: goal for goal in goals_of("smollm2-135m", BASE, rows)}


def only_value(found: Mapping[str, Goal], word: str) -> float:
    return next(goal.value for name, goal in found.items() if word in name)


class TestGoals:
    def test_our_best_against_their_best(self) -> None:
        found = goals(
            measured("ours", "a", row(30.0, 100)),
            measured("ours", "b", row(20.0, 100)),
            measured("x", "c", row(25.0, 100)),
            measured("y", "d", row(40.0, 101)),
        )
        assert len(found) == 2, "one for each score"
        assert all(goal.value == pytest.approx(20 / 25) and goal.met for goal in found.values())
        assert "(b; c)" in next(iter(found))

    def test_a_method_that_keeps_more_is_no_rival_and_one_that_keeps_less_is(self) -> None:
        ours = measured("ours", "a", row(20.0, 100))
        assert math.isnan(only_value(goals(ours, measured("x", "c", row(1.0, 110))), "ppl_faq"))
        lost = goals(ours, measured("x", "c", row(10.0, 50)))
        assert only_value(lost, "ppl_faq") == 2 and not any(goal.met for goal in lost.values())

    def test_ours_over_the_budget_does_not_count(self) -> None:
        assert math.isnan(
            only_value(goals(measured("ours", "a", row(5.0, 110)), measured("x", "c", row(9.0, 100))), "ppl")
        )

    def test_failed_rows_and_training_stay_out(self) -> None:
        found = goals(
            measured("ours", "a", row(20.0, 100)),
            measured("ours", "t", row(5.0, 100), trained=True, restores="a"),
            measured("x", "c", {"state": "failed: no"}),
            measured("y", "d", row(25.0, 100)),
        )
        assert only_value(found, "ppl_faq over") == pytest.approx(20 / 25)
        # Of 20 - 10 lost on the domain that training did not see, 15 came back.
        assert only_value(found, "brings back") == pytest.approx(1.5)
        plain, trained = (
            measured("ours", label, row(9.0, 100), trained=label == "t", restores="a" if label == "t" else None)
            for label in "at"
        )
        assert not any("brings back" in name for name in goals(plain, trained)), "nothing was lost"

    def test_zeros_are_compared_by_what_is_not_zero(self) -> None:
        method, level, values = measured("x", "c", row(9.0, 120, nonzeros=100), sparse=True)
        assert cost_of(method, level, values) == 100
        assert only_value(goals(measured("ours", "a", row(18.0, 100)), (method, level, values)), "ppl_faq") == 2

    def test_budgets_of_time_compare_times(self) -> None:
        level = Level("ms", 0.0, macs=800, ms=80.0)
        seconds = {"T256_seconds": 0.08, "dense_T256_seconds": 0.1}
        method, _, values = measured("ours", "a", row(9.0, 500, **seconds), level)
        assert cost_of(method, level, values) == 0.08

    def test_latency(self) -> None:
        seconds = {"T1_seconds": 1.0, "dense_T1_seconds": 1.0, "T256_seconds": 0.82, "dense_T256_seconds": 1.0}
        values = row(9.0, 100, **seconds) | {"macs": 800}
        assert latency_over_macs(values, BASE) == pytest.approx(0.18 / 0.2)
        goal = next(g for name, g in goals(measured("ours", "a", values)).items() if "latency" in name)
        assert goal.value == pytest.approx(0.9) and goal.at_least
        assert math.isnan(latency_over_macs(values | {"macs": 1000}, BASE)), "nothing was removed"
        assert math.isnan(latency_over_macs(values | {"T256_seconds": None}, BASE))

    def test_speed_at_the_extreme_level(self) -> None:
        level = Level("tiny", 0.0, macs=150, peers=False)
        seconds = {"T256_seconds": 0.2, "dense_T256_seconds": 1.0}
        found = goals(measured("ours", "s", row(99.0, 9, **seconds) | {"macs": 100}, level, trained=True))
        assert only_value(found, "throughput") == pytest.approx(5)
        assert only_value(found, "share of the MACs") == pytest.approx(0.1)
        assert not Method("c", "x", "m:f").fits("minilm-l6", level), "the other tools are not asked"

    def test_zeros_in_place_are_a_league_of_their_own_too(self) -> None:
        """Ours with zeros counts against all; without, against those whose matrices get smaller."""
        found = goals(
            measured("ours", "cut", row(30.0, 100)),
            measured("ours", "zeros", row(10.0, 120, nonzeros=100), sparse=True),
            measured("x", "cut", row(40.0, 100)),
            measured("y", "zeros", row(12.0, 120, nonzeros=100), sparse=True),
        )
        assert only_value(found, "20%: ppl_faq over the best of the others (zeros; zeros)") == pytest.approx(10 / 12)
        assert only_value(found, "smaller matrices only: ppl_faq over") == pytest.approx(30 / 40)

    def test_half_of_the_blocks(self) -> None:
        """Narrower blocks, as a share of the dense model's quality, and against whole ones that were dropped."""
        level = Level("half", 0.0, count=3, params=100, peers=False)
        rows = [
            measured(
                "ours", label, {**row(None, 99), "macs": macs, "retrieval_at_1": value}, level, whole=label == "whole"
            )
            for label, value, macs in (("narrow", 0.46, 515), ("whole", 0.4, 500), ("slow", 0.47, 600))
        ]
        base = {**BASE, "model": "minilm-l6", "retrieval_at_1": 0.5}
        kept, more = goals_of("minilm-l6", base, rows)[:2]
        assert kept.value == pytest.approx(0.94) and kept.met
        assert more.value == pytest.approx(0.12) and more.met, "the slow one has more work to do than whole blocks"
        alone, none = goals_of("minilm-l6", base, rows[1:2])[:2]
        assert not alone.met and not none.met, "nothing was measured"


PARTS = [
    Part(
        Case("smollm2-135m"),
        Case("smollm2-135m"),
        lambda facts, base: [Level("one", 0.5, params=100), Level("two", 0.6, params=90)],
    )
]


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One method of ours and one of another tool, which fails; what would run in processes of its own, in order."""
    calls: list[str] = []

    def answer(function: str, arguments: Mapping[str, Any], timeout: float) -> Measured:
        name = function.rpartition(":")[2]
        calls.append(name)
        if name == "write_dense":
            return Measured(1.0, 1, {"source": "books", "parameters": 120})
        if name == "broken":
            raise GraphlatheError("m:broken failed in a process of its own: ValueError: because")
        if name == "evaluate":
            dense = arguments["changed"] == arguments["dense"]
            times = {"T2_seconds": 1.0 if dense else 0.5, "dense_T2_seconds": 1.0}
            found = row(10.0 if dense else 15.0, 120 if dense else 100, **times)
            return Measured(1.0, 1, found | {"macs": 1000 if dense else 500})
        return Measured(1.0, 77, {"search_units": 5, "pipeline": "p", "plan": {"long": "plan"}})

    monkeypatch.setattr(compress_run, "measure_in_subprocess", answer)
    monkeypatch.setattr(compress_run, "install", lambda given: (tmp_path, {"onnxsim": "not installed: why"}))
    monkeypatch.setitem(OURS, "compress-depth", (Method("mine", "ours", "m:made"),))
    monkeypatch.setattr(compress_run, "peers_of", lambda suite: (Method("theirs", "x", "m:broken"),))
    return calls


class TestProtocol:
    def test_a_failure_is_a_row_with_its_reason(self, tmp_path: Path) -> None:
        """The real way: a step in a process of its own, whose tool is not there."""
        method = PEERS["compress-vision"][0]
        found = run_method(
            method, Level("l", 0.0, params=1), Case("efficientnet-lite0", peers=str(tmp_path)), tmp_path, tmp_path
        )
        assert found["state"].startswith("failed: GraphlatheError: 'torch_pruning' cannot be imported")
        assert found["by"] == method.by and "parameters" not in found
        assert not list(tmp_path.iterdir()), "nothing is left behind"

    def test_rows_goals_and_notes(self, asked: list[str]) -> None:
        """With every process replaced by its answer: dense first, then each method, all judged against it."""
        result = run_parts("compress-depth", PARTS, Run(quick=True))
        assert asked == ["write_dense", "evaluate", "made", "evaluate", "broken"], "a quick run has one level"
        assert [(r["level"], r["method"], r["state"]) for r in result.rows] == [
            ("dense", "-", "ok"),
            ("one", "mine", "ok"),
            ("one", "theirs", "failed: ValueError: because"),
        ]
        mine = result.rows[1]
        assert mine["peak_bytes"] == 77 and mine["search_units"] == 5 and "plan" not in mine
        assert mine["latency_over_macs"] == pytest.approx(1)
        assert {"dense_T2_seconds", "pipeline", "recipe", "commit"} <= result.hidden & mine.keys()
        assert "latency_over_macs" not in result.hidden
        assert "smollm2-135m: text from books" in result.notes and "onnxsim: not installed: why" in result.notes
        assert "smollm2-135m, one, ours: mine = p" in result.notes
        assert any("not measured" in goal.margin for goal in result.goals), "no rival, no victory"

    def test_a_record_is_continued(self, asked: list[str]) -> None:
        """What was measured is taken from the record; what failed, or is made in another way now, is run."""
        saved: list[list[Row]] = []
        first = run_parts("compress-depth", PARTS, Run(save=lambda result: saved.append(list(result.rows))))
        assert [len(rows) for rows in saved] == [2, 3, 4, 5], "after every row"
        asked.clear()
        rows = json.loads(json.dumps(first.rows))
        again = run_parts("compress-depth", PARTS, Run(known=rows))
        assert asked == ["write_dense", "broken", "broken"]
        assert again.rows == first.rows and again.goals == first.goals
        asked.clear()
        rows[1]["T2_seconds"] = None
        run_parts("compress-depth", PARTS, Run(known=rows, only="one, ours: mine"))
        assert asked == ["write_dense", "made", "evaluate"], "a time that was disturbed is taken again"
        other = [Part(Case("smollm2-135m", seed=1), Case("smollm2-135m"), PARTS[0].levels)]
        asked.clear()
        run_parts("compress-depth", other, Run(known=rows))
        assert asked.count("evaluate") == 3, "another seed is another measurement"

    def test_more_text_for_training_is_another_measurement_of_what_trains(
        self, asked: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(
            OURS, "compress-depth", (Method("mine", "ours", "m:made"), Method("taught", "ours", "m:made", trained=True))
        )
        rows = run_parts("compress-depth", PARTS, Run(quick=True)).rows
        more = [replace(PARTS[0], quick=replace(PARTS[0].quick, training=9))]
        asked.clear()
        run_parts("compress-depth", more, Run(quick=True, known=rows))
        assert asked == ["write_dense", "made", "evaluate", "broken"]

    def test_nothing_is_lost_where_only_some_is_measured(self, asked: list[str]) -> None:
        """Rows that are not chosen stay, those of other models and failed ones too, and are in every saved record."""
        first = run_parts("compress-depth", PARTS, Run())
        saved: list[list[str]] = []

        def save(result: Result) -> None:
            saved.append([r["recipe"] for r in result.rows])

        everything = [r["recipe"] for r in first.rows]
        asked.clear()
        other = run_parts("compress-depth", PARTS, Run(only="minilm-l6, 1", known=first.rows, save=save))
        assert other.rows == first.rows and other.goals == first.goals and asked == ["write_dense"]
        again = run_parts("compress-depth", PARTS, Run(only="two, x: theirs", known=first.rows, save=save))
        assert again.rows == first.rows and asked == ["write_dense", "write_dense", "broken"]
        assert len(saved) == 8 and all(set(each) == set(everything) for each in saved)

    def test_several_machines_share_a_record(self, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        """Only what another processor measured in milliseconds, and the dense model itself, are measured again here."""
        levels = [Level("one", 0.1, params=100), Level("fast", 0.1, ms=1.0)]
        parts = [replace(PARTS[0], levels=lambda facts, base: levels)]
        monkeypatch.setattr(compress_run, "cpu_model", lambda: "first")
        there = run_parts("compress-depth", parts, Run())
        assert "cpu" in there.hidden
        monkeypatch.setattr(compress_run, "cpu_model", lambda: "second")
        asked.clear()
        here = run_parts("compress-depth", parts, Run(known=there.rows))
        assert asked == ["write_dense", "evaluate", "broken", "made", "evaluate", "broken"]
        assert [(r["level"], r["by"], r["cpu"]) for r in here.rows if r["state"] == "ok"] == [
            ("dense", "-", "first"),
            ("dense", "-", "second"),
            ("one", "ours", "first"),
            ("fast", "ours", "second"),
        ]
        assert "cpu" not in here.hidden, "readers must see which times may be compared"
        asked.clear()
        assert run_parts("compress-depth", parts, Run(known=here.rows)).rows == here.rows
        asked.clear()
        here.rows[1]["T2_seconds"] = None
        again = run_parts("compress-depth", parts, Run(known=here.rows))
        assert asked[:2] == ["write_dense", "evaluate"], "limits in milliseconds are shares of the dense model's time"
        assert again.rows[1]["T2_seconds"] == 1.0

    def test_a_part_is_skipped_only_for_another_model(self, asked: list[str]) -> None:
        assert not run_parts("compress-depth", PARTS, Run(only="minilm-l6, 1 of 6 blocks")).rows and not asked
        assert len(run_parts("compress-depth", PARTS, Run(only="smollm2-135m, two")).rows) == 3
        assert [r["level"] for r in run_parts("compress-depth", PARTS, Run(only="mine")).rows] == [
            "dense",
            "one",
            "two",
        ]

    def test_only(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(compress_run, "install", lambda given: (tmp_path, {}))
        monkeypatch.setattr(
            compress_run,
            "measure_in_subprocess",
            lambda function, arguments, timeout: Measured(1.0, 1, {**BASE, "source": "", "blocks": 4}),
        )
        case = Case("smollm2-135m")
        parts = [Part(case, case, lambda facts, base: [Level("one", 0.5, params=100)])]
        result = run_parts("compress-depth", parts, Run(only="best window"))
        assert [r["method"] for r in result.rows] == ["-", "passthrough, best window"]

    def test_our_step(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The pipeline runs on the subject's program, and the file is there afterwards."""
        monkeypatch.setattr("graphlathe.tools.bench.compress_methods.subject_of", Toy)
        found = run_pipeline(TOY.to_json(), LEVEL, str(tmp_path / "out.onnx"), "canonicalize")
        assert found["pipeline"] == "canonicalize" and (tmp_path / "out.onnx").is_file()
        assert found["search_units"] == 0, "nothing was run to decide anything"

    def test_training_starts_from_the_plan_of_the_same_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Equal results whether the plan is there or not, and the search counts in both."""
        monkeypatch.setattr("graphlathe.tools.bench.compress_methods.subject_of", Toy)
        text, then = "canonicalize,compress{sites=channels ratio=$ratio rank=$rank}", "distill{steps=2 hold_out=0}"
        shared, alone = (replace(TOY, work=str(tmp_path / name)) for name in ("shared", "alone"))
        for case in (shared, alone):
            Path(case.work).mkdir()
        plain = run_pipeline(shared.to_json(), LEVEL, str(tmp_path / "plain.onnx"), text)
        rows = [
            run_pipeline(case.to_json(), LEVEL, str(tmp_path / f"{Path(case.work).name}.onnx"), text, then=then)
            for case in (shared, alone)
        ]
        assert rows[0]["pipeline"] == rows[1]["pipeline"] == plain["pipeline"] + "," + then
        first, second = (next(iter(found["plan"])) for found in rows)
        assert first.startswith("apply-plan") and second.startswith("compress")
        assert all(found["search_units"] > plain["search_units"] > 0 for found in rows)
        outputs = [load(tmp_path / f"{name}.onnx").run(Toy(TOY).example())["logits"] for name in ("shared", "alone")]
        torch.testing.assert_close(*outputs)

    @pytest.mark.parametrize(("asked", "found"), [("rank=64", [64, 0]), ("rank=$rank", [16, 16])])
    def test_plans_keep_the_rank_that_the_pipeline_says_itself(
        self, asked: str, found: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What is made again from plans is what was made: only ``$rank`` is another one for another method."""
        made = {"a": {"format": FORMAT, "rank": 64}, "b": {"format": FORMAT, "rank": 0}}
        case, text = (
            replace(TOY, work=str(tmp_path)),
            f"canonicalize,shortgpt{{blocks=1 {asked}}},compress{{ratio=0.5}}",
        )
        _Kept(case, text.replace("$rank", "0")).save(made, {"search_units": 1})
        seen: list[int] = []

        def optimized(program: Any, passes: str, **more: Any) -> Any:
            paths = re.findall(r'path="([^"]+)"', passes)
            seen.extend(json.loads(Path(path).read_text())["rank"] for path in paths)
            raise GraphlatheError("seen enough")

        monkeypatch.setattr("graphlathe.tools.bench.compress_methods.subject_of", Toy)
        monkeypatch.setattr("graphlathe.tools.bench.compress_methods.optimize", optimized)
        with pytest.raises(GraphlatheError, match="seen enough"):
            run_pipeline(case.to_json(), LEVEL, str(tmp_path / "a.onnx"), text, rank=16)
        assert seen == found

    def test_what_is_timed_to_search_counts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every run of a session is one of the whole batch, also where the plan is taken over, and then once."""
        ran: list[float] = []
        plain = ProgramSession.run

        def run(session: ProgramSession, feeds: Any) -> Any:
            ran.append(session.program.parameter_count / 1000)
            return plain(session, feeds)

        monkeypatch.setattr("graphlathe.tools.bench.compress_methods.subject_of", Toy)
        monkeypatch.setattr(ProgramSession, "run", run)
        monkeypatch.setattr(milliseconds, "paired_rounds", partial(paired_rounds, clock=lambda: (sum(ran), sum(ran))))
        made = "compress{sites=channels ratio=0.5 budget=ms steps=2 score=magnitude compensation=none}"
        case, text = replace(TOY, work=str(tmp_path)), f"canonicalize,{made}"
        first = run_pipeline(case.to_json(), LEVEL, str(tmp_path / "a.onnx"), text)
        assert first["search_units"] >= len(ran) * 6 >= 2 * 11 * 6
        again = run_pipeline(case.to_json(), LEVEL, str(tmp_path / "b.onnx"), text, then="distill{steps=2 hold_out=0}")
        assert first["search_units"] < again["search_units"] < 1.5 * first["search_units"]


class TestRecords:
    SUITE = Suite("told", "rows that are given", (), lambda run: Result([{"a": 1, "b_": 2}], hidden=frozenset({"b_"})))

    def test_unfinished_records_are_kept(self, tmp_path: Path) -> None:
        """What the suite has so far is a record of its own."""

        def measure(run: Run) -> Result:
            result = Result([{"a": 1}])
            run.save(result)
            result.rows.append({"a": 2})
            return result

        kept: list[int] = []
        record = run_suite(Suite("s", "", (), measure), Run(), lambda record: kept.append(len(record.result.rows)))
        assert kept == [1] and len(record.result.rows) == 2

    def test_hidden_columns_are_in_the_file_only(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with bench_base.registered(self.SUITE):
            bench("told", tmp_path / "r.json", False, False)
        assert "b_" not in capsys.readouterr().out
        assert json.loads((tmp_path / "r.json").read_text())["rows"] == [{"a": 1, "b_": 2}]

    def test_only_the_same_can_be_continued(self, tmp_path: Path) -> None:
        path = tmp_path / "r.json"
        assert known_rows(path, self.SUITE, False) == [], "nothing yet"
        record: Record = run_suite(self.SUITE, Run())
        record.write(path)
        assert known_rows(path, self.SUITE, False) == record.result.rows
        with pytest.raises(GraphlatheError, match="its quick is False"):
            known_rows(path, self.SUITE, True)
        path.write_text(path.read_text().replace('"torch": "', '"torch": "0'))
        with pytest.raises(GraphlatheError, match="its versions is"):
            known_rows(path, self.SUITE, False)
        path.write_text("{}")
        with pytest.raises(GraphlatheError, match="no record of a benchmark"):
            known_rows(path, self.SUITE, False)
        with pytest.raises(GraphlatheError, match="name its file with --json"), bench_base.registered(self.SUITE):
            bench("told", None, False, False, resume=True)

    def test_markdown(self, tmp_path: Path, asked: list[str]) -> None:
        """One table for each level, without what only the file has; missed goals stand out."""
        path = tmp_path / "r.json"
        suite = Suite("compress-depth", "", (), lambda run: run_parts("compress-depth", PARTS, run))
        run_suite(suite, Run(quick=True)).write(path)
        text = records([path])
        assert text.startswith("## compress-depth\n") and "`graphlathe bench compress-depth --quick` on " in text
        assert text.count("\n### ") == 3 and "### smollm2-135m, one\n" in text
        (mine,) = (line for line in text.splitlines() if line.startswith("| mine |"))
        assert mine.startswith("| mine | ours | ok | 5 | 77 B | 15 | 15 | 100 | 500 |") and "recipe" not in text
        assert "| theirs | x | failed: ValueError: because | " in text
        assert "**not measured**" in text and "- onnxsim: not installed: why" in text
        path.write_text("[]")
        with pytest.raises(GraphlatheError, match="no record of a benchmark"):
            records([path])
