"""Compression from the command line: plans, pictures, pages, searches that are interrupted, checkpoint folders."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graphlathe.ir.errors import GraphlatheError, InputError
from graphlathe.ir.load import load
from graphlathe.ir.program import Program
from graphlathe.passes.search.candidates import Candidates
from graphlathe.passes.search.plan import Plan
from graphlathe.tools.cli import execute
from graphlathe.tools.html import pictures
from graphlathe.tools.html.page import PageOptions, html_page
from graphlathe.tools.workers import Processes, executor_for
from tests.browser import Browser, find_chromium
from tests.zoo_programs import traced

MODEL = "llama"
FLAP = "flap{sites=mlp ratio=0.25}"
SEARCH = "evopress{ratio=0.3 generations=4 offspring=4}"
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model as a saved program and as ONNX, and two batches."""
    folder = tmp_path_factory.mktemp("files")
    traced(MODEL).save(folder / "saved")
    traced(MODEL).export_onnx(folder / "model.onnx")
    for number in range(2):
        ids = np.random.default_rng(number).integers(0, 50, (2, 9))
        np.savez(folder / f"batch{number}.npz", input_ids=ids)
    return folder


@pytest.fixture
def command(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """``command(pipeline, "--plan x")`` -> (exit code, stdout, stderr) of optimize, run in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(pipeline: str, line: str = "", model: str = "saved") -> tuple[int, str, str]:
        code = execute(arguments(files, pipeline, line, model))
        out, err = capsys.readouterr()
        return code, out, err

    return run


def arguments(files: Path, pipeline: str, line: str, model: str = "saved") -> list[str]:
    data = [word for number in range(2) for word in ("-c", str(files / f"batch{number}.npz"))]
    return ["optimize", str(files / model), "-p", pipeline, *data, *line.split()]


def outputs(path: Path) -> torch.Tensor:
    (value,) = load(path).run({"input_ids": torch.arange(22).reshape(2, 11)}).values()
    return value


def lines(journal: Path) -> int:
    return sum(file.read_bytes().count(b"\n") - 1 for file in journal.glob("*.jsonl"))


def test_a_teacher_is_a_path(command: Command, files: Path, tmp_path: Path) -> None:
    """What was made smaller before learns from the original as it does in one pipeline; without it, from itself."""
    short, distill = "shortgpt{blocks=1}", "distill{steps=2 hold_out=0}"
    assert command(f"{short},{distill}", "-o whole")[0] == command(short, "-o short")[0] == 0
    given = str(tmp_path / "short")
    code, _, err = command(distill, f"--teacher {files / 'saved'} -o later", given)
    assert code == 0, err
    assert command(distill, "-o alone", given)[0] == 0
    assert torch.equal(outputs(tmp_path / "later"), outputs(tmp_path / "whole"))
    assert not torch.equal(outputs(tmp_path / "alone"), outputs(tmp_path / "whole"))
    code, _, err = command(distill, "--teacher nowhere -o never", given)
    assert code != 0 and "nowhere" in err and not (tmp_path / "never").exists()


class TestPlans:
    def test_a_plan_that_is_applied_again_gives_the_same_program(self, command: Command, tmp_path: Path) -> None:
        code, out, err = command(f"raise,{FLAP}", "--plan plan.json -o small", "model.onnx")
        assert code == 0, err
        assert "written: plan.json" in out
        plan = Plan.load(tmp_path / "plan.json")
        assert plan.made_by == FLAP and plan.compensation == "bias" and plan.changes
        again = "apply-plan{path=plan.json sequential=false}"
        code, _, err = command(f"raise,{again}", "--plan again.json -o again", "model.onnx")
        assert code == 0, err
        assert (tmp_path / "again.json").read_text() == (tmp_path / "plan.json").read_text()
        assert torch.equal(outputs(tmp_path / "again"), outputs(tmp_path / "small"))
        assert load(tmp_path / "again").parameter_count < traced(MODEL).parameter_count
        # The same model from elsewhere has the same places, once both are raised.
        code, _, err = command(f"raise,{again}", "-o elsewhere", "saved")
        assert code == 0, err
        torch.testing.assert_close(outputs(tmp_path / "elsewhere"), outputs(tmp_path / "small"))

    def test_several_plans_are_numbered(self, command: Command, tmp_path: Path) -> None:
        cheap = "compress{sites=mlp ratio=0.2 score=magnitude compensation=none}"
        pipeline = f"shortgpt{{blocks=1}},canonicalize,{cheap}"
        code, out, err = command(pipeline, "--plan plan.json --plot pictures -o small")
        assert code == 0, err
        assert "written: plan-1.json" in out and "by shortgpt{blocks=1}" in out
        assert not (tmp_path / "plan.json").exists()
        assert [p.name for p in sorted((tmp_path / "pictures").iterdir())] == ["1-shortgpt", "2-compress"]
        again = "apply-plan{path=plan-1.json},canonicalize,apply-plan{path=plan-2.json}"
        assert command(again, "-o again")[0] == 0
        assert torch.equal(outputs(tmp_path / "again"), outputs(tmp_path / "small"))

    def test_heads_that_went_are_saved_drawn_and_cut_again(self, command: Command, tmp_path: Path) -> None:
        code, _, err = command("shrp{share=0.5}", "--plan plan.json --plot pictures -o small")
        assert code == 0, err
        assert (tmp_path / "pictures" / "keep-ratios.png").exists()
        assert command("apply-plan{path=plan.json}", "-o again")[0] == 0
        assert torch.equal(outputs(tmp_path / "again"), outputs(tmp_path / "small"))

    def test_a_plan_without_its_expanders_is_refused(self, command: Command, tmp_path: Path) -> None:
        expand = "shrp{stage=expand heads=1 router_steps=0 steps=0}"
        assert command(expand, "--plan plan.json --plot pictures")[0] == 0
        assert (tmp_path / "pictures" / "keep-ratios.png").exists()
        code, _, err = command("apply-plan{path=plan.json}", "-o again")
        assert code == 2 and f"only what '{expand}' removed" in " ".join(err.split())
        assert not (tmp_path / "again").exists()

    def test_none_is_an_error_after_everything_else_is_written(self, command: Command, tmp_path: Path) -> None:
        code, out, err = command("distill{steps=1}", "--plan plan.json --workers 2 -o small")
        assert code == 2 and "no pass of the pipeline made a plan" in err
        assert "no pass searched, so --workers had nothing to do" in out
        assert outputs(tmp_path / "small").isfinite().all()
        assert not (tmp_path / "plan.json").exists()


class TestPictures:
    def test_files_and_the_page_hold_the_same(self, command: Command, tmp_path: Path) -> None:
        code, out, err = command(SEARCH, "--plot pictures --html page.html --plan plan.json")
        assert code == 0, err
        written = {p.stem.replace("-", " "): p.read_bytes() for p in (tmp_path / "pictures").iterdir()}
        assert {"keep ratios", "search front", "search progress"} <= set(written)
        assert f"written: {len(written)} pictures" in out
        (shown,) = page_data(tmp_path / "page.html")["compression"]
        assert shown["pass"] == SEARCH
        found = {picture["name"]: base64.b64decode(picture["src"].partition(",")[2]) for picture in shown["pictures"]}
        assert found == written
        search = Plan.load(tmp_path / "plan.json").search
        assert search is not None
        assert f"search: {search['evaluations']} evaluations, ended by {search['stopped']}" in shown["facts"]

    def test_sizes_are_those_of_the_pictures(self, command: Command, tmp_path: Path) -> None:
        import matplotlib.image

        assert command("drop-layers{indices=0}", "--plot pictures --html page.html")[0] == 0
        (shown,) = page_data(tmp_path / "page.html")["compression"]
        for picture in shown["pictures"]:
            name = picture["name"].replace(" ", "-")
            height, width = matplotlib.image.imread(tmp_path / "pictures" / f"{name}.png").shape[:2]
            assert (picture["width"], picture["height"]) == (width, height)

    def test_the_page_says_when_they_cannot_be_drawn(
        self, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pictures, "find_spec", lambda name: None)
        assert command("drop-layers{indices=0}", "--html page.html")[0] == 0
        data = page_data(tmp_path / "page.html")
        assert data["compression"] == [] and any("graphlathe[plot]" in note for note in data["notes"])

    def test_without_matplotlib_plot_fails_before_the_work(
        self, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        code, _, err = command(FLAP, "--plot pictures -o small")
        assert code == 2 and "graphlathe[plot]" in err
        assert list(tmp_path.iterdir()) == []


def page_data(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


@pytest.mark.parametrize(
    ("pipeline", "line", "message"),
    [
        (SEARCH, "--workers 2 --scheduler tcp://127.0.0.1:1", "--workers and --scheduler both say"),
        (SEARCH, "--scheduler tcp://127.0.0.1:1", "--workspace DIR"),
        (SEARCH, "--workers 0", "--workers"),
        (SEARCH, "--journal {files}/model.onnx", "is a file"),
        (SEARCH, "--journal missing/journal", "there is no folder"),
        (SEARCH, "--plan missing/plan.json", "there is no folder"),
        (SEARCH, "--plan {files}/saved", "it is a folder"),
        (SEARCH, "--plot {files}/model.onnx", "is a file"),
        (SEARCH, "--plan a.json --report ./a.json", "are both"),
        ("canonicalize", "--plan a.json", "the pipeline has none"),
        ("canonicalize", "--workers 2", "the pipeline has none"),
        (SEARCH, "--format hf", "say where with -o"),
        (SEARCH, "--format hf -o new", "has no config.json"),
        (SEARCH, "--format hf -o new.onnx", "contradict each other"),
        (SEARCH, "--format onnx -o new", "contradict each other"),
        (SEARCH, "--format gguf -o new", "--format"),
        (SEARCH, "--opset 18", "--opset is for ONNX files"),
    ],
)
def test_bad_options_are_one_message_before_any_work(
    command: Command, files: Path, tmp_path: Path, pipeline: str, line: str, message: str
) -> None:
    code, out, err = command(pipeline, line.format(files=files), "no-such-model")
    assert code == 2 and out == ""
    assert message in err and err.startswith("error: ") and err.count("error:") == 1
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


class TestInterrupts:
    def test_what_was_evaluated_is_kept_and_used(
        self, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert command(SEARCH, "--plan whole.json --journal other")[0] == 0
        evaluate, calls = Candidates.__call__, count()

        def interrupted(candidates: Candidates, *evaluation: Any) -> float:
            if next(calls) == 5:
                raise KeyboardInterrupt
            return evaluate(candidates, *evaluation)

        with monkeypatch.context() as patched:
            patched.setattr(Candidates, "__call__", interrupted)
            code, _, err = command(SEARCH, "--plan plan.json --journal journal -o small")
        assert code == 130
        assert err == (
            "graphlathe: interrupted; 'journal' keeps 5 evaluations, and the same command goes on from there\n"
        )
        assert [p.name for p in sorted(tmp_path.iterdir())] == ["journal", "other", "whole.json"]
        (kept,) = (tmp_path / "journal").iterdir()
        before = kept.read_bytes()
        assert command(SEARCH, "--plan plan.json --journal journal")[0] == 0
        plan, whole = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("plan", "whole"))
        assert plan["search"].pop("tokens") < whole["search"].pop("tokens")  # those that were run here
        assert plan == whole
        assert kept.read_bytes().startswith(before) and lines(tmp_path / "journal") == lines(tmp_path / "other")

    def test_without_a_journal_it_is_as_ever(self, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(*unused: Any, **options: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("graphlathe.passes.optimize.optimize", interrupted)
        assert command(SEARCH) == (130, "", "graphlathe: interrupted\n")

    @pytest.mark.slow
    @pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups, as a terminal has them")
    def test_processes_end_without_a_word_and_the_search_goes_on(self, files: Path, tmp_path: Path) -> None:
        """Ctrl-C reaches all processes of a terminal; the plan is that of a search in one process in the end."""
        line = "--plan plan.json --journal journal --workers 2"
        endless = arguments(files, "evopress{ratio=0.3 generations=1000 offspring=2}", line)
        start = [sys.executable, "-m", "graphlathe"]
        with subprocess.Popen(
            [*start, *endless], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        ) as running:
            while lines(tmp_path / "journal") < 5:
                assert running.poll() is None
                time.sleep(0.02)
            os.killpg(running.pid, signal.SIGINT)
            said = running.communicate(timeout=60)[0].decode()
        assert running.returncode == 130
        assert re.fullmatch(r"graphlathe: interrupted; 'journal' keeps \d+ evaluations, and .*\n", said)
        kept = lines(tmp_path / "journal")
        for name, more in (("plan", "--journal journal --workers 2"), ("alone", "")):
            again = arguments(files, SEARCH, f"--plan {name}.json {more}")
            subprocess.run([*start, *again], cwd=tmp_path, check=True, capture_output=True, timeout=200)
        assert lines(tmp_path / "journal") >= kept
        found, alone = (Plan.load(tmp_path / f"{name}.json") for name in ("plan", "alone"))
        assert found.decisions == alone.decisions


class TestProcesses:
    @pytest.fixture
    def pool(self) -> Iterator[Processes]:
        pool = Processes(1)
        yield pool
        pool.stop()

    def test_calls_errors_and_a_process_that_dies(self, pool: Processes) -> None:
        assert pool.submit(torch.get_num_threads).result(60) == 1
        assert pool.submit(os.getpid).result(60) != os.getpid()
        with pytest.raises(ValueError, match="invalid literal"):
            pool.submit(int, "x").result(60)
        lost = pool.submit(os._exit, 1)
        with pytest.raises(BrokenExecutor):
            lost.result(60)
        assert pool.submit(abs, -3).result(60) == 3

    def test_stop_does_not_wait_for_what_runs(self, pool: Processes) -> None:
        pool.submit(abs, -1).result(60)
        running = [pool.submit(time.sleep, 600) for _ in range(3)]
        running[1].cancel()
        pool.stop()
        assert not any(future.done() and not future.cancelled() and not future.exception() for future in running)
        assert pool.submit(abs, -2).result(60) == 2

    def test_none_asked_for(self) -> None:
        with executor_for(None, None) as executor:
            assert executor is None

    def test_dask_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "distributed", None)
        with pytest.raises(GraphlatheError, match="graphlathe\\[distributed\\]"), executor_for(None, "tcp://a:1"):
            pass

    def test_no_scheduler_answers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Silent:
            @staticmethod
            def Client(address: str, timeout: str) -> None:
                raise OSError(f"{address}: timed out after {timeout}")

        monkeypatch.setitem(sys.modules, "distributed", Silent)
        with (
            pytest.raises(InputError, match="no Dask scheduler answers at 'tcp://a:1'"),
            executor_for(None, "tcp://a:1"),
        ):
            pass


def test_a_checkpoint_folder_comes_out_of_one(
    tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=64, num_key_value_heads=1, max_position_embeddings=32, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "whole")
    monkeypatch.chdir(tmp_path)
    line = ["--plan", "plan.json", "-o", "shorter", "--format", "hf"]
    data = ["-c", str(files / "batch0.npz")]
    code = execute(["optimize", "whole", "-p", "shortgpt{blocks=1}", *data, *line])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "written: shorter (" in out
    shorter = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "shorter")
    assert shorter.config.num_hidden_layers == 2
    code = execute(["optimize", "whole", "-p", "shortgpt{blocks=1}", *data, *line])
    assert code == 2 and "it exists and is not empty" in capsys.readouterr().err
    # What fails with the result at hand leaves the plan.
    (tmp_path / "plan.json").unlink()
    uneven = "apply-plan{path=uneven.json}"
    places = [("mlp", number) for number in plan_indices(tmp_path / "whole")]
    sites = [
        {"kind": kind, "index": index, "units": 24, "removed": list(range(4 * n))}
        for n, (kind, index) in enumerate(places)
    ]
    (tmp_path / "uneven.json").write_text(json.dumps({"format": "graphlathe-plan", "version": 1, "sites": sites}))
    code = execute(["optimize", "whole", "-p", uneven, *data, "--plan", "plan.json", "-o", "uneven", "--format", "hf"])
    assert code == 2 and "different widths" in capsys.readouterr().err
    assert (tmp_path / "plan.json").exists() and not (tmp_path / "uneven").exists()


def plan_indices(model: Path) -> list[int]:
    """The numbers of the MLPs in plans of a model."""
    from graphlathe.ir.structure import structure
    from graphlathe.passes.search.sites import channel_sites

    program: Program = load(model)
    return [site.index for site in channel_sites(program, structure(program), ["mlp"])[0]]


CHROMIUM = find_chromium()


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")
@pytest.mark.xdist_group("browser")
def test_the_page_shows_the_pictures(command: Command, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    assert command("drop-layers{indices=0}", "--html page.html")[0] == 0
    (tmp_path / "plain.html").write_text(html_page(traced(MODEL), PageOptions("plain")))
    with Browser(CHROMIUM, tmp_path / "profile") as browser:
        browser.open(tmp_path / "page.html")
        button, dialog = "document.getElementById('compression')", "document.getElementById('pictures')"
        assert browser.evaluate(f"{button}.hidden") is False
        assert browser.evaluate("document.querySelectorAll('#plans img').length") == 0
        browser.click("#compression")
        images = "[...document.querySelectorAll('#plans img')]"
        browser.wait(f"{images}.length > 0 && {images}.every((i) => i.complete)")
        sizes = browser.evaluate(f"{images}.map((i) => [i.naturalWidth, i.naturalHeight])")
        (shown,) = page_data(tmp_path / "page.html")["compression"]
        assert sizes == [[picture["width"], picture["height"]] for picture in shown["pictures"]]
        assert browser.evaluate("document.querySelector('#plans h3').textContent") == "drop-layers{indices=0}"
        browser.press("c", "c")  # the page's keys sleep meanwhile
        browser.click("#pictures button")
        assert browser.evaluate(f"{dialog}.open") is False
        browser.press("p", "p")
        assert browser.evaluate(f"{dialog}.open") is True
        assert browser.evaluate(f"{images}.length") == len(sizes)
        assert browser.problems == []
        browser.open(tmp_path / "plain.html")
        assert browser.evaluate(f"{button}.hidden") is True
        browser.press("p", "p")
        assert browser.evaluate(f"{dialog}.open") is False
