"""The compression suites: what they measure has closed forms, their goals follow from rows, and failures are rows."""

from __future__ import annotations

import importlib
import inspect
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

from graphlathe.ir.errors import GraphlatheError
from graphlathe.passes.pipeline import parse_pipeline
from graphlathe.tools.bench import compress_evaluate, compress_text
from graphlathe.tools.bench.compress_methods import Method, fill
from graphlathe.tools.bench.compress_metrics import (
    LanguageMeter,
    agreement,
    mean_kl,
    mean_pool,
    pairwise_cosines,
    ranks,
    retrieval_at_1,
    spearman,
)
from graphlathe.tools.bench.compress_ours import OURS
from graphlathe.tools.bench.compress_peers import PEERS, install, load_peer
from graphlathe.tools.bench.compress_photos import CALIBRATED, TESTED
from graphlathe.tools.bench.compress_reach import LARGEST, smallest_ratio
from graphlathe.tools.bench.compress_subject import SUBJECTS, Case, spread
from graphlathe.tools.bench.compress_timing import LONGEST_PAUSE, PATIENCE, time_paired
from graphlathe.tools.bench.compress_work import Search, WorkCounter, count_macs
from tests.compress_toy import LEVEL, TOY, Net, Toy

SUITES = ("compress-depth", "compress-width", "compress-heads", "compress-combined", "compress-vision")
CASE = Case("smollm2-135m").to_json()


def sentence(number: int) -> str:
    return f"Paragraph number {number} goes on {'and on ' * 15}until it counts as running prose, and then it ends."


class TestText:
    @given(st.lists(st.integers(0, 40), min_size=1, max_size=60))
    def test_slices_are_disjoint_and_complete(self, numbers: list[int]) -> None:
        paragraphs = [sentence(n) * (1 + n % 3) for n in numbers]
        parts = compress_text.cut(paragraphs)
        everything = [p for part in parts.values() for p in part]
        assert everything == list(dict.fromkeys(paragraphs)), "in order, each once"

    def test_slices_have_their_shares(self) -> None:
        parts = compress_text.cut([f"{n:010}" for n in range(1000)])
        assert {name: len(part) / 1000 for name, part in parts.items()} == pytest.approx(compress_text.SHARES)

    @pytest.mark.parametrize(
        ("text", "kept"),
        [
            (sentence(1), True),
            ("Too short.", False),
            (sentence(1)[:-1], False),
            (sentence(1).lower(), False),
            ('"' + sentence(1) + '"', True),
        ],
    )
    def test_prose(self, text: str, kept: bool) -> None:
        assert bool(list(compress_text.prose([text]))) is kept

    def test_page(self) -> None:
        html = (
            "<head><title>no</title></head><h2>4.1. <b>A</b> title</h2><p>One<br>two<p>three <pre>code</pre> four</p>"
            '<div class="para">five <em>six</em></div><div>none</div>'
        )
        found = [(kind, " ".join(text.split())) for kind, text in compress_text.read_page(html)]
        assert found == [
            ("heading", "4.1. A title"),
            ("paragraph", "One two"),
            ("paragraph", "three four"),
            ("paragraph", "five six"),
        ]

    def unpacked(self, folder: Path) -> Path:
        faq = folder / "usr/share/doc/anarchism/html"
        book = folder / "usr/share/doc/debian-handbook/html/en-US"
        for where, first in ((faq, 0), (book, 100)):
            where.mkdir(parents=True)
            for page in range(3):
                body = "".join(f"<h2>{n}.1. Title {n}</h2><p>{sentence(n)}</p>" for n in range(first, first + 10))
                (where / f"sec{page}.html").write_text(f"<html>{body}</html>")
                first += 10
        return folder

    def test_corpus_of_a_folder(self, tmp_path: Path) -> None:
        corpus = compress_text.corpus(self.unpacked(tmp_path))
        assert {name: len(p) for name, p in corpus.domains.items()} == {"faq": 30, "handbook": 30}
        assert len(corpus.sections) == 30
        assert corpus.sections[3].title == "Title 103" and corpus.sections[3].paragraph == sentence(103)
        seen, judged = (set(corpus.slice("faq", part).split("\n\n")) for part in ("calibration", "test"))
        assert len(seen) == 15 and len(judged) == 12 and not seen & judged

    def test_what_is_beyond_the_slices_is_for_training(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(compress_text, "LIMIT", 20 * len(sentence(1)))
        corpus = compress_text.corpus(self.unpacked(tmp_path))
        known = {text for name in compress_text.SHARES for text in corpus.slice("faq", name).split("\n\n")}
        assert len(known) + len(corpus.rest) == 30 and not known & {*corpus.rest} and 5 < len(corpus.rest) < 15

    def test_the_folder_of_the_variable_must_be_complete(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(compress_text.VARIABLE, str(tmp_path))
        with pytest.raises(GraphlatheError, match=r"no files of anarchism, debian-handbook[\s\S]*dpkg -x"):
            compress_text.corpus()

    def test_packaged_texts_where_nothing_can_be_fetched(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: Any, **kwargs: Any) -> None:
            raise OSError("no apt-get")

        monkeypatch.delenv(compress_text.VARIABLE, raising=False)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(subprocess, "run", fail)
        corpus = compress_text.corpus()
        assert list(corpus.domains) == ["python-docs", "jargon-essays"] and "packaged" in corpus.source
        assert not corpus.sections and min(len(p) for p in corpus.domains.values()) > 50


class TestMetrics:
    def test_perplexity_of_uniform_guesses_is_the_vocabulary(self) -> None:
        meter = LanguageMeter()
        meter.add(torch.arange(5)[None], torch.zeros(1, 5, 7), torch.zeros(1, 5, 7))
        assert meter.tokens == 4
        assert meter.perplexity == pytest.approx(7)
        assert meter.kl == pytest.approx(0) and meter.top1 == 1

    def test_perplexity_reads_the_next_token(self) -> None:
        ids = torch.tensor([[3, 1, 2, 0]])
        logits = torch.full((1, 4, 5), -50.0)
        for position, token in enumerate([1, 2, 0, 4]):
            logits[0, position, token] = 50.0
        meter = LanguageMeter()
        meter.add(ids, logits, logits)
        assert meter.perplexity == pytest.approx(1)

    def test_divergence_of_two_coins(self) -> None:
        p, q = (torch.tensor([[[a, 1 - a]]]).log() for a in (0.25, 0.5))
        expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
        meter = LanguageMeter()
        meter.add(torch.zeros(1, 1, dtype=torch.int64), q, p)
        assert meter.kl == pytest.approx(expected)
        assert mean_kl(q[0].numpy(), p[0].numpy()) == pytest.approx(expected)

    def test_ranks_share_ties(self) -> None:
        assert ranks(np.array([5.0, 1.0, 5.0, 7.0])).tolist() == [1.5, 0.0, 1.5, 3.0]

    @given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=3, max_size=30))
    def test_spearman_is_scipys(self, pairs: list[tuple[int, int]]) -> None:
        a, b = (np.array(each, dtype=float) for each in zip(*pairs, strict=True))
        if len(set(a)) == 1 or len(set(b)) == 1:
            assert math.isnan(spearman(a, b))
        else:
            assert spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic)

    def test_cosines_and_retrieval(self) -> None:
        rows = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
        assert pairwise_cosines(rows).tolist() == pytest.approx([0, math.sqrt(0.5), math.sqrt(0.5)])
        assert retrieval_at_1(rows, 3 * rows) == 1
        assert retrieval_at_1(rows, rows[[1, 0, 2]]) == pytest.approx(1 / 3)
        assert retrieval_at_1(rows, np.ones_like(rows)) == 0, "what cannot be told apart is not found"

    def test_pooling_and_agreement(self) -> None:
        states = torch.tensor([[[1.0], [3.0], [100.0]]])
        assert mean_pool(states, torch.tensor([[1, 1, 0]])).tolist() == [[2.0]]
        assert agreement(np.eye(4), np.eye(4)[[0, 1, 3, 2]]) == 0.5


class TestTiming:
    def paired(self, walls: list[float], rounds: int = 2) -> Any:
        """Every call takes 1 s of processor time, and the next of these wall times."""
        now = [0.0, 0.0]
        left = iter(walls)
        order: list[str] = []
        self.pauses: list[float] = []

        def call(name: str) -> None:
            order.append(name)
            now[0] += next(left)
            now[1] += 1.0

        calls = {name: lambda name=name: call(name) for name in "ab"}
        paired = time_paired(calls, rounds, warmup=0, clock=lambda: (now[0], now[1]), sleep=self.pauses.append)
        return paired, "".join(order)

    def test_disturbed_rounds_do_not_count(self) -> None:
        paired, order = self.paired([1.0, 1.0, 1.0, 5.0, 1.25, 1.25])
        assert order == "abbaab", "in turn"
        assert (paired.accepted, paired.rejected) == (2, 1)
        assert paired.seconds == {"a": 1.0, "b": 1.0}

    def test_too_few_rounds_are_no_time(self) -> None:
        paired, order = self.paired([1.4] * 100)
        assert len(order) == 2 * 2 * PATIENCE and paired.rejected == 2 * PATIENCE
        assert math.isnan(paired.seconds["a"])

    def test_what_goes_on_is_waited_for(self) -> None:
        self.paired([1.4, 1.0, 1.4, 1.0, 1.0, 1.0, 1.4, 1.0, 1.0, 1.0])
        assert len(self.pauses) == 3
        assert self.pauses[0] == self.pauses[2] < self.pauses[1], "longer after two in a row, and short again"
        self.paired([1.4] * 400, rounds=20)
        assert max(self.pauses) == LONGEST_PAUSE


class TestWork:
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    def test_of_a_linear_layer_and_a_product(self, mode: Any) -> None:
        layer, x = torch.nn.Linear(3, 5), torch.ones(2, 4, 3)
        with mode():
            assert count_macs(lambda: layer(x)) == 2 * 4 * 3 * 5
            assert count_macs(lambda: x @ x.mT) == 2 * 4 * 4 * 3

    def test_of_attention_and_convolution(self) -> None:
        x = torch.ones(1, 2, 7, 4)
        assert count_macs(lambda: torch.nn.functional.scaled_dot_product_attention(x, x, x)) == 2 * 2 * 7 * 7 * 4
        layer = torch.nn.Conv2d(4, 8, 3, groups=2)
        assert count_macs(lambda: layer(torch.ones(1, 4, 5, 5))) == 8 * 9 * 2 * 9

    def test_a_backward_pass_is_two_forward_passes(self) -> None:
        layer = torch.nn.Linear(3, 5)
        x = torch.ones(4, 3, requires_grad=True)
        assert count_macs(lambda: layer(x).sum().backward()) == 3 * 4 * 3 * 5

    def test_shape_inference_is_no_work(self) -> None:
        """A search that cuts a graph infers its shapes anew: nothing is multiplied there."""
        with FakeTensorMode() as fake, enable_python_dispatcher():
            x, w = fake.from_tensor(torch.randn(3, 4)), fake.from_tensor(torch.randn(5, 4))
        with WorkCounter() as counter:
            with fake, enable_python_dispatcher():
                assert torch.ops.aten.linear.default(x, w).shape == (3, 5)
            torch.empty(3, 4, device="meta") @ torch.empty(4, 5, device="meta")
        assert counter.macs == 0


class TestEvaluation:
    def test_columns(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Sizes and multiply-adds have closed forms; the dense file loses nothing to itself, an edited one does."""
        pytest.importorskip("onnxruntime", reason="files are measured in ONNX Runtime")
        monkeypatch.setattr(compress_evaluate, "subject_of", Toy)
        subject, dense, changed = Toy(TOY), tmp_path / "dense.onnx", tmp_path / "changed.onnx"
        subject.program().export_onnx(dense, fallback=False)
        edited = Net().eval()
        with torch.no_grad():
            edited.hidden.weight[:, :4] = 0
        subject.program(edited).export_onnx(changed, fallback=False)
        same = compress_evaluate.evaluate(TOY.to_json(), str(dense), str(dense))
        other = compress_evaluate.evaluate(TOY.to_json(), str(dense), str(changed))
        sizes = 20 * 8 + 8 * 16 + 16 * 20
        for row in (same, other):
            assert row["parameters"] == sizes
            assert row["macs"] == 10 * (8 * 16 + 16 * 20)
            assert row["reload"] == "yes"
            assert {"T2_seconds", "dense_T10_seconds", "rejected_rounds"} <= set(row)
        assert same["nonzeros"] == sizes and other["nonzeros"] == sizes - 16 * 4
        assert same["file_bytes"] == sum(f.stat().st_size for f in tmp_path.glob("dense.onnx*")) > 4 * sizes
        assert same["kl"] == 0 < other["kl"]

    def test_a_file_with_other_inputs_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("onnxruntime", reason="files are measured in ONNX Runtime")
        monkeypatch.setattr(compress_evaluate, "subject_of", Toy)
        Toy(TOY).program().export_onnx(tmp_path / "dense.onnx", fallback=False)
        other = importlib.import_module("graphlathe").trace(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
        other.export_onnx(tmp_path / "other.onnx", fallback=False)
        with pytest.raises(GraphlatheError, match="other inputs"):
            compress_evaluate.evaluate(TOY.to_json(), str(tmp_path / "dense.onnx"), str(tmp_path / "other.onnx"))

    def test_a_search_is_counted_in_tokens_of_the_dense_model(self) -> None:
        subject = Toy(TOY)
        module = subject.module()
        with Search(subject, module) as search:
            for _ in range(5):
                module(**subject.example())
        assert search.row(outside=7)["search_units"] == 5 * 6 + 7

    def test_what_processes_share_is_made_once(self, tmp_path: Path) -> None:
        subject = Toy(Case("toy", work=str(tmp_path)))
        made: list[int] = []
        assert [subject.stored("x", lambda: made.append(1) or {"a": 1}) for _ in range(2)] == [{"a": 1}] * 2
        assert made == [1]
        first, second = subject.module(), subject.module()
        assert first is not second and torch.equal(first.head.weight, second.head.weight)  # type: ignore[union-attr]

    def test_cases_survive_the_way_to_another_process(self) -> None:
        assert Case.from_json(TOY.to_json()) == TOY
        assert spread(range(10), 3, "items") == [0, 3, 6]
        with pytest.raises(GraphlatheError, match="2 items"):
            spread([1, 2], 3, "items")


def test_no_scene_is_calibrated_and_tested_on() -> None:
    """Two views of a scene, told by ``_left`` and ``_right``, are one scene."""
    calibrated, tested = (
        [re.sub(r"_(left|right)$", "", Path(name).stem) for name in names] for names in (CALIBRATED, TESTED)
    )
    assert not set(calibrated) & set(tested)
    assert len(set(tested)) == len(tested)


class TestMethods:
    @pytest.mark.parametrize("suite", SUITES)
    def test_every_method_can_be_called(self, suite: str) -> None:
        methods = [*OURS[suite], *PEERS[suite]]
        for model in SUBJECTS:
            here = [
                (m.by, m.label, levels) for m in methods if not m.models or model in m.models for levels in [m.levels]
            ]
            assert len(set(here)) == len(here), "a row has one method"
        for method in methods:
            module, _, name = method.step.partition(":")
            given = {"case": {}, "level": {}, "target": "", **method.arguments}
            inspect.signature(getattr(importlib.import_module(module), name)).bind(**given)
            assert method.restores is None or (method.trained and method.restores in {m.label for m in methods})
            if method.by == "ours":
                text = fill(method.arguments["pipeline"], {**LEVEL, "rank": method.arguments.get("rank", 0)})
                parse_pipeline(",".join([text, *filter(None, [method.arguments.get("then")])]))
        module = importlib.import_module(f"graphlathe.tools.bench.{suite.replace('-', '_')}")
        assert module.SUITE.name == suite and module.SUITE.goals

    def test_pipelines_are_filled(self) -> None:
        assert fill("a{x=$ratio n=$params}", LEVEL) == "a{x=0.5 n=100}"
        assert fill("$params", {"params": 113_274_432}) == "113285759", "a table of 32 constants is not over the budget"
        with pytest.raises(GraphlatheError, match="nothing"):
            fill("a{x=$nothing}", LEVEL)

    @pytest.mark.parametrize(
        "method", [m for m in PEERS["compress-combined"] if "passthrough" not in m.by], ids=lambda m: m.by
    )
    def test_a_tool_that_is_not_there_says_so(
        self, method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "path", list(sys.path))
        module, _, name = method.step.partition(":")
        step = getattr(importlib.import_module(module), name)
        case = {**CASE, "peers": str(tmp_path)}
        with pytest.raises(GraphlatheError, match="cannot be imported: ModuleNotFoundError"):
            step(case=case, level=LEVEL, target="", **method.arguments)

    def test_an_import_that_fails_is_an_error_of_ours(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "path", list(sys.path))
        (tmp_path / "broken_peer.py").write_text("raise RuntimeError('built for\\nanother torch')")
        with pytest.raises(GraphlatheError, match="RuntimeError: built for another torch"):
            load_peer(str(tmp_path), "broken_peer")

    def test_what_cannot_be_installed_is_reported(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "torch_pruning").mkdir()
        asked: list[str] = []

        def pip(command: list[str], **settings: Any) -> Any:
            asked.extend(word for word in command if "==" in word)
            return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: no such package\n")

        monkeypatch.setattr(subprocess, "run", pip)
        folder, failed = install(tmp_path)
        assert folder == tmp_path and "torch_pruning" not in failed
        assert failed["onnxsim"] == "not installed: ERROR: no such package"
        assert all("==" in word for word in asked) and not any("torch-pruning" in word for word in asked)

    def test_the_smallest_ratio(self) -> None:
        ratio, result = smallest_ratio(lambda r: 100 - 100 * r, lambda left: left <= 70)
        assert 0.3 <= ratio <= 0.31 and result <= 70
        with pytest.raises(GraphlatheError, match=str(LARGEST)):
            smallest_ratio(lambda r: 1, lambda left: False)
