"""The command line: every command on a tiny model; bad input gets exit 2, one message, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graphlathe.ir.errors import GraphlatheError
from graphlathe.ir.load import load
from graphlathe.ir.program import Program
from graphlathe.passes import registry
from graphlathe.tools import cli
from graphlathe.tools.cli import execute
from graphlathe.tools.examples import example_feeds, index_bound, token_input
from tests.zoo_programs import traced

MODEL = "plain_transformer_prenorm"
WORDS = ["the", "lathe", "takes", "a", "pass", "over", "graph", "and", "leaves", "it", "smaller", "."]
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model as a saved program and as ONNX, a tokenizer, texts, arrays, and broken files."""
    folder = tmp_path_factory.mktemp("files")
    program = traced(MODEL)
    program.save(folder / "saved")
    program.export_onnx(folder / "model.onnx")
    whole = (folder / "model.onnx").read_bytes()
    (folder / "truncated.onnx").write_bytes(whole[: len(whole) // 2])
    (folder / "model.pt2").write_bytes(b"PK\x03\x04 not a program")
    (folder / "weights.safetensors").write_bytes(b"")
    (folder / "notes.md").write_text("no model")
    (folder / "text.txt").write_text(" ".join(WORDS * 40))
    (folder / "empty.txt").write_text(" \n")
    np.savez(folder / "batch.npz", input_ids=np.arange(24).reshape(2, 12) % 50)
    np.savez(folder / "misnamed.npz", ids=np.arange(24).reshape(2, 12))
    np.savez(folder / "floats.npz", input_ids=np.zeros((2, 12), dtype=np.float32))
    np.save(folder / "ids.npy", np.arange(20).reshape(2, 10))
    (folder / "broken.npz").write_bytes((folder / "batch.npz").read_bytes()[:60])
    _tokenizer(folder / "tokenizer")
    return folder


def _tokenizer(folder: Path) -> None:
    folder.mkdir()
    vocabulary = {word: i + 3 for i, word in enumerate(WORDS)} | {"[UNK]": 0}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    split = {"type": "Whitespace"}
    empty: dict[str, Any] = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    whole = {"version": "1.0", "added_tokens": [], **empty, "pre_tokenizer": split, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture
def command(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> Callable[..., Any]:
    """``command("dump {files}/saved")`` -> (exit code, stdout, stderr), run in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(line: str, *more: str) -> tuple[int, str, str]:
        code = execute([word.format(files=files) for word in line.split()] + list(more))
        out, err = capsys.readouterr()
        return code, out, err

    return run


class TestDump:
    @pytest.mark.parametrize("format", ["text", "tree", "sites", "table", "dot"])
    def test_prints_and_writes_the_same(self, command: Callable[..., Any], tmp_path: Path, format: str) -> None:
        code, out, err = command(f"dump {{files}}/saved --format {format}")
        assert code == 0 and err == ""
        assert command(f"dump {{files}}/saved --format {format} -o out.txt")[0] == 0
        written = (tmp_path / "out.txt").read_text()
        assert [line.rstrip() for line in written.splitlines()] == [line.rstrip() for line in out.splitlines()]
        assert len(written) > 200

    def test_of_an_onnx_file_finds_the_same_blocks(self, command: Callable[..., Any]) -> None:
        blocks = [
            re.findall(r"(\d+) x block", command(f"dump {{files}}/{name}")[1]) for name in ("saved", "model.onnx")
        ]
        assert blocks[0] == blocks[1] != []

    def test_passes_run_first(self, command: Callable[..., Any]) -> None:
        line = "dump {files}/model.onnx --format sites"
        assert "no attention site" in command(line)[1]
        code, out, err = command(f"{line} --passes raise")
        assert code == 0 and err == ""
        assert "no attention site" not in out
        assert re.search(r"attention %\w+ \(self, \S+\): \d+ heads of \d+, .*; scaled_dot_product_attention", out)

    def test_a_page_of_one_model_and_of_two(self, command: Callable[..., Any], tmp_path: Path) -> None:
        assert command("dump {files}/saved --format html -o one.html")[0] == 0
        code, out, err = command("dump {files}/saved --format html --against {files}/model.onnx --statistics 1000")
        assert code == 0, err
        sides = [page_sides(text) for text in ((tmp_path / "one.html").read_text(), out)]
        assert [[side["title"] for side in page] for page in sides] == [["saved"], ["saved", "model.onnx"]]
        assert all(side["totals"]["params"] == traced(MODEL).parameter_count for page in sides for side in page)
        read = sum(weight["stats"]["read"] for side in sides[1] for weight in side["weights"] if "stats" in weight)
        assert 0 < read <= 1000


def page_sides(page: str) -> list[dict[str, Any]]:
    """The programs in a page of HTML."""
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    return json.loads(data.group(1))["sides"]


class TestOptimize:
    LINE = "optimize {files}/saved -p canonicalize,drop-layers{{indices=0}}"

    def test_writes_onnx_and_report(self, command: Callable[..., Any], tmp_path: Path) -> None:
        code, out, err = command(f"{self.LINE} -o small.onnx --report report.json")
        assert code == 0, err
        assert "drop-layers" in out and "small.onnx" in out
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["passes"][-1]["plan"]["removed"] == [0]
        small, large = load(tmp_path / "small.onnx"), traced(MODEL)
        assert small.parameter_count < large.parameter_count

    def test_writes_a_saved_program_that_runs_like_the_report_says(
        self, command: Callable[..., Any], tmp_path: Path
    ) -> None:
        assert command(f"{self.LINE} -o small")[0] == 0
        small = Program.load(tmp_path / "small")
        assert any(text.startswith("drop-layers") for text in small.history)
        feeds = example_feeds(small, {"B": 1, "S": 5})
        assert all(torch.isfinite(value).all() for value in small.run(feeds).values())

    @pytest.mark.parametrize(
        "data", ["{files}/text.txt --tokenizer {files}/tokenizer --window 12", "{files}/batch.npz"]
    )
    def test_calibration_decides_which_layer_goes(self, command: Callable[..., Any], tmp_path: Path, data: str) -> None:
        code, _, err = command(
            f"optimize {{files}}/saved -p drop-layers{{{{ratio=0.34}}}} --calibration {data} --report r.json"
        )
        assert code == 0, err
        plan = json.loads((tmp_path / "r.json").read_text())["passes"][-1]["plan"]
        assert plan["scores"] and len(plan["removed"]) >= 1

    def test_stop_after_and_disable(self, command: Callable[..., Any], tmp_path: Path) -> None:
        assert command(f"{self.LINE} --stop-after canonicalize --report a.json")[0] == 0
        assert command(f"{self.LINE} --disable-pass drop-layers --report b.json")[0] == 0
        for name in ("a.json", "b.json"):
            rows = json.loads((tmp_path / name).read_text())["passes"]
            assert not any(row["pass"].startswith("drop-layers") and row["mutations"] for row in rows)

    def test_html_shows_before_and_after(self, command: Callable[..., Any], tmp_path: Path) -> None:
        code, _, err = command(f"{self.LINE} -o small.onnx --html page.html")
        assert code == 0, err
        page = (tmp_path / "page.html").read_text()
        a, b = page_sides(page)
        assert (a["title"], b["title"]) == ("saved", "small.onnx")
        assert a["totals"]["params"] > b["totals"]["params"] and b["history"][-1].startswith("drop-layers")
        assert '"notes":["canonicalize: ' in page

    def test_dump_dir(self, command: Callable[..., Any], tmp_path: Path) -> None:
        assert command(f"{self.LINE} --dump-dir dumps")[0] == 0
        assert len(list((tmp_path / "dumps").rglob("*"))) >= 2

    def test_why_not(self, command: Callable[..., Any]) -> None:
        code, out, _ = command(f"{self.LINE} --why-not all")
        assert code == 0 and "places rewritten" in out


class TestRun:
    def test_two_backends_agree(self, command: Callable[..., Any], tmp_path: Path) -> None:
        for backend in ("onnxruntime", "torch"):
            code, out, err = command(f"run {{files}}/saved --backend {backend} --size S=6,B=1 -o {backend}.npz")
            assert code == 0, err
            assert "[1, 6" in out and "median" in out
        a, b = (np.load(tmp_path / f"{name}.npz") for name in ("onnxruntime", "torch"))
        assert a.files == b.files and a.files
        for name in a.files:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-5)

    def test_runs_on_given_arrays(self, command: Callable[..., Any], files: Path, tmp_path: Path) -> None:
        assert command("run {files}/saved --backend torch -i input_ids={files}/ids.npy -o out.npz")[0] == 0
        expected = traced(MODEL).run({"input_ids": torch.from_numpy(np.load(files / "ids.npy"))})
        got = np.load(tmp_path / "out.npz")
        for name, value in expected.items():
            np.testing.assert_allclose(got[name], value.numpy(), rtol=1e-5, atol=1e-6)

    def test_seeds(self, command: Callable[..., Any], tmp_path: Path) -> None:
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            assert command(f"run {{files}}/saved --backend torch --seed {seed} -o {name}.npz")[0] == 0
        first, again, other = (np.load(tmp_path / f"{name}.npz") for name in "abc")
        key = first.files[0]
        assert np.array_equal(first[key], again[key]) and not np.array_equal(first[key], other[key])

    def test_text(self, command: Callable[..., Any]) -> None:
        code, out, err = command(
            "run {files}/saved --backend torch --tokenizer {files}/tokenizer --text", "the lathe takes a pass"
        )
        assert code == 0, err
        assert "[1, 5]" in out


class TestCatalogue:
    def test_lists_every_pass(self, command: Callable[..., Any]) -> None:
        code, out, _ = command("passes")
        assert code == 0
        assert all(name in out for name in registry.names())

    @pytest.mark.parametrize("extra", ["", " --markdown"])
    def test_shows_every_option(self, command: Callable[..., Any], extra: str) -> None:
        from graphlathe.passes.base import options_of

        for name in registry.names():
            code, out, _ = command(f"passes {name}{extra}")
            assert code == 0
            for option in options_of(registry.get(name)):
                assert option.name in out and option.metadata["help"].split()[0] in out

    def test_markdown_of_all(self, command: Callable[..., Any]) -> None:
        text = command("passes --markdown")[1]
        assert [name for name in registry.BUILTIN if f"\n## `{name}`" not in text] == []


class TestDoctor:
    def test_json(self, command: Callable[..., Any]) -> None:
        code, out, _ = command("doctor --json")
        report = json.loads(out)
        assert code == 0 and report["versions"]["torch"] == torch.__version__
        assert report["machine"]["cores"] >= 1 and isinstance(report["problems"], list)

    def test_text(self, command: Callable[..., Any]) -> None:
        code, out, _ = command("doctor")
        assert code == 0 and "problems" in out


# Command line, and what the message must say (the mistake, or the remedy).
BAD = [
    ("dump nowhere.onnx", "does not exist"),
    ("dump {files}/saved -p rise", "did you mean 'raise'"),
    ("dump {files}/truncated.onnx", "truncated.onnx"),
    ("dump {files}/model.pt2", "cannot read"),
    ("dump {files}/notes.md", "unknown kind"),
    ("dump {files}/weights.safetensors", "config.json"),
    ("dump {files}/tokenizer", "no model"),
    ("dump {files}/saved --format xml", "not one of"),
    ("dump {files}/saved -o missing/out.txt", "create it"),
    ("dump {files}/saved -o {files}", "folder"),
    ("dump {files}/saved --size X=3", "no dynamic dimension 'X'"),
    ("dump {files}/saved --size S", "NAME=N"),
    ("dump {files}/saved --limit -1", "--limit"),
    ("dump", "Missing argument"),
    ("dmp {files}/saved", "dump"),
    ("dump {files}/saved --orgins", "--origins"),
    ("dump {files}/saved --against {files}/model.onnx", "--format html"),
    ("dump {files}/saved --format html --against none.onnx", "none.onnx"),
    ("dump {files}/saved --format html -o missing/page.html", "create it"),
    ("optimize {files}/saved", "--passes"),
    ("optimize {files}/saved -p cse --html missing/page.html", "create it"),
    ("optimize {files}/saved -p drop-layer", "did you mean 'drop-layers'?"),
    ("optimize {files}/saved -p drop-layers{{ratoi=0.2}}", "did you mean 'ratio'?"),
    ("optimize {files}/saved -p drop-layers{{ratio=1.5}}", "ratio"),
    ("optimize {files}/saved -p drop-layers{{ratio=0.2", "}"),
    ("optimize {files}/saved -p drop-layers{{ratio=0.34}}", "--calibration"),
    ("optimize {files}/saved -p cse -o out.pt2", ".onnx"),
    ("optimize {files}/saved -p cse -o missing/out.onnx", "create it"),
    ("optimize {files}/saved -p cse --report missing/r.json -o out.onnx", "create it"),
    ("optimize {files}/saved -p cse -o {files}/tokenizer", "no saved program"),
    ("optimize {files}/saved -p cse -o {files}/saved", "the model that is read"),
    ("optimize {files}/saved -p cse --report {files}", "it is a folder"),
    ("optimize {files}/saved -p cse --budget drift", "NAME=LIMIT"),
    ("optimize {files}/saved -p cse --budget drft=0.1", "did you mean 'drift'?"),
    ("optimize {files}/saved -p cse --opset 18", "-o FILE.onnx"),
    ("optimize {files}/saved -p cse --opset 3 -o out.onnx", "opset"),
    ("optimize {files}/saved -p cse --stop-after dce -o out.onnx", "not in the pipeline"),
    ("optimize {files}/saved -p cse --disable-pass csee", "did you mean 'cse'?"),
    ("optimize {files}/saved -p cse --example S=x", "NAME=N"),
    ("optimize {files}/saved -p cse --calibration {files}/text.txt -o out.onnx", "--tokenizer"),
    ("optimize {files}/saved -p cse --calibration {files}/text.txt -o out.onnx", "arrays (.npz, .npy)"),
    ("optimize {files}/saved -p cse --calibration {files}/text.txt --tokenizer {files}/none", "no tokenizer"),
    ("optimize {files}/saved -p cse --calibration {files}/empty.txt --tokenizer {files}/tokenizer", "empty"),
    ("optimize {files}/saved -p cse --calibration none.txt --tokenizer {files}/tokenizer", "none.txt"),
    ("optimize {files}/saved -p cse --calibration {files}/broken.npz", "broken.npz"),
    ("optimize {files}/saved -p cse --calibration {files}/misnamed.npz", "input_ids"),
    ("optimize {files}/saved -p cse --calibration {files}/floats.npz", "dtype"),
    (
        "optimize {files}/saved -p cse --calibration {files}/text.txt --tokenizer {files}/tokenizer --window 9999",
        "--window",
    ),
    ("run {files}/saved --backend tpu", "not one of"),
    ("run {files}/saved --input input_id={files}/ids.npy", "did you mean 'input_ids'?"),
    ("run {files}/saved --input input_ids", "NAME=FILE.npy"),
    ("run {files}/saved --input input_ids=none.npy", "none.npy"),
    ("run {files}/saved --input input_ids={files}/floats.npz", "dtype"),
    ("run {files}/saved --text hello", "--tokenizer"),
    ("run {files}/saved --text hello --tokenizer {files}/tokenizer --size S=3", "contradict"),
    ("run {files}/saved --tokenizer {files}/tokenizer", "--tokenizer is for --text"),
    ("run {files}/saved -o missing/out.npz", "create it"),
    ("passes drop-leyers", "did you mean 'drop-layers'?"),
    ("bench compilr", "did you mean 'compiler'?"),
]


@pytest.mark.parametrize(("line", "message"), BAD, ids=[line for line, _ in BAD])
def test_bad_input(command: Callable[..., Any], tmp_path: Path, line: str, message: str) -> None:
    code, out, err = command(line)
    assert code == 2, err
    assert err.startswith("error: ") and message in err
    assert "Traceback" not in err and "bug" not in err
    assert out == ""
    assert list(tmp_path.iterdir()) == [], "no partial output"


def test_a_full_disk_is_told_and_leaves_nothing(
    command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    code, _, err = command("dump {files}/saved --format text -o out.txt")
    assert code == 2 and "No space left on device" in err and "free space" in err
    assert list(tmp_path.iterdir()) == []


def test_links_and_pipes_stay_what_they_are(command: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "link.txt").symlink_to("target.txt")
    (tmp_path / "target.txt").write_text("old")
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", "pipe"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    for output in ("link.txt", "pipe"):
        assert command(f"dump {{files}}/saved --format text -o {output}")[0] == 0
    text, _ = reader.communicate(timeout=60)
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "pipe").is_fifo()
    assert text == (tmp_path / "target.txt").read_text() and text.startswith("program @main")


class TestErrors:
    @pytest.fixture
    def broken(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
        def install(error: BaseException) -> None:
            def fail(*_: Any) -> None:
                raise error

            monkeypatch.setattr("graphlathe.tools.doctor.show_doctor", fail)

        return install

    def test_a_bug_is_one_line_and_exit_1(self, command: Callable[..., Any], broken: Callable[..., None]) -> None:
        broken(RuntimeError("surprise\nwith a second line"))
        code, _, err = command("doctor")
        assert code == 1
        assert err == (
            "error: RuntimeError: surprise with a second line\n  this is a bug; rerun with --debug and report it\n"
        )

    def test_debug_raises_bugs(self, command: Callable[..., Any], broken: Callable[..., None]) -> None:
        broken(RuntimeError("surprise"))
        with pytest.raises(RuntimeError, match="surprise"):
            command("doctor --debug")

    @pytest.mark.parametrize("line", ["doctor --debug", "--debug doctor"])
    def test_debug_shows_the_traceback(
        self, command: Callable[..., Any], broken: Callable[..., None], line: str
    ) -> None:
        broken(GraphlatheError("on purpose", remedy="nothing"))
        code, _, err = command(line)
        assert code == 2 and "Traceback" in err and err.endswith("error: on purpose\n  what to do: nothing\n")

    def test_without_debug_there_is_none(self, command: Callable[..., Any], broken: Callable[..., None]) -> None:
        broken(GraphlatheError("on purpose"))
        assert command("doctor") == (2, "", "error: on purpose\n")

    def test_interrupted(self, command: Callable[..., Any], broken: Callable[..., None]) -> None:
        broken(KeyboardInterrupt())
        code, _, err = command("doctor")
        assert code == 130 and err == "graphlathe: interrupted\n"

    def test_out_of_memory(self, command: Callable[..., Any], broken: Callable[..., None]) -> None:
        broken(MemoryError())
        code, _, err = command("doctor")
        assert code == 2 and "out of memory" in err


class TestStart:
    def test_help_names_every_command(self, command: Callable[..., Any]) -> None:
        code, out, _ = command("--help")
        assert code == 0
        for name in ("dump", "optimize", "run", "passes", "bench", "doctor", "demo"):
            assert name in out
            assert command(f"{name} --help")[0] == 0

    def test_no_arguments_shows_help(self, command: Callable[..., Any]) -> None:
        code, out, err = command("")
        assert code == 2 or code == 0
        assert "Usage" in out + err

    def test_help_loads_nothing_heavy(self) -> None:
        code = (
            "import sys; from graphlathe.tools.cli import execute; execute(['--help']);"
            "heavy = ('torch.onnx', 'transformers', 'onnxruntime', 'onnx', 'onnxscript');"
            "print([name for name in heavy if name in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip().endswith("[]"), done.stdout[-200:]

    def test_module_runs_too(self) -> None:
        done = subprocess.run([sys.executable, "-m", "graphlathe", "dump", "nowhere"], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr

    def test_a_reader_that_leaves_is_no_error(self) -> None:
        line = f"{sys.executable} -m graphlathe passes --markdown | head -c 1"
        done = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
        assert done.stderr == ""


class TestExamples:
    def test_token_ids_stay_below_the_vocabulary(self) -> None:
        program = traced(MODEL)
        name = token_input(program)
        assert name == "input_ids"
        bound = index_bound(program.main.input_node(name))
        assert bound == 100
        ids = example_feeds(program, {"B": 50, "S": 16})[name]
        assert int(ids.min()) >= 0 and 90 < int(ids.max()) < 100, "the whole vocabulary is used"

    def test_a_mask_is_ones_and_types_stay_below_their_table(self) -> None:
        feeds = example_feeds(traced("bert"), {"B": 2, "S": 9})
        assert feeds["attention_mask"].unique().tolist() == [1]
        assert set(feeds["token_type_ids"].unique().tolist()) <= {0, 1}

    def test_an_image_model_has_no_token_input(self) -> None:
        program = traced("resnet")
        assert token_input(program) is None
        assert example_feeds(program, {"B": 1, "H": 40, "W": 48})["pixel_values"].shape == (1, 3, 40, 48)

    def test_differences_of_indices_get_zeros(self) -> None:
        class Boxes(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.table = torch.nn.Embedding(10, 4)

            def forward(self, box: torch.Tensor) -> torch.Tensor:
                return self.table(box[:, 1] - box[:, 0])

        from graphlathe.ir.from_torch import trace

        program = trace(Boxes(), (torch.tensor([[1, 4]]),))
        feeds = example_feeds(program)
        assert feeds["box"].tolist() == [[0, 0]]
        program.run(feeds)


def test_the_demo_is_loaded_only_when_used() -> None:
    assert "demo" in {name.name or name.callback.__name__ for name in cli.app.registered_commands if name.callback}
