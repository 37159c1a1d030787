"""The main job on a real model: SmolLM2-135M goes in, a smaller model comes out, and both are measured.

Traces the model, removes a fifth of its layers, exports both to ONNX, runs both in ONNX Runtime, and prints what
changed: size, work, memory, perplexity on held-out text, time, drift.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..ir.errors import ImportModelError
from ..ir.files import write_atomically
from ..ir.from_hub import from_hub, load_tokenizer
from ..ir.program import Program
from ..passes.fidelity import Drift, DriftMeter
from ..passes.optimize import Optimized, optimize
from .bench.machine import commit, describe_machine, versions
from .smollm2 import smollm2_file
from .text_data import calibration_text, held_out_text

if TYPE_CHECKING:
    from ..runtime.session import Session

PIPELINE = "canonicalize,drop-layers{ratio=0.2}"
WINDOW = 512
CALIBRATION_WINDOWS = 8
CALIBRATION_LENGTH = 128
HELD_OUT_WINDOWS = 8
TIMED_RUNS = 5
PROMPT = "The lathe is one of the oldest machine tools. It"
NEW_TOKENS = 24


@dataclass
class Measured:
    """What was measured of one model; bytes, milliseconds and nats as the names say."""

    parameters: int
    weight_bytes: int
    macs_per_token: float
    peak_activation_bytes: int
    nll: float = 0.0
    tokens: int = 0
    forward_ms: list[float] = field(default_factory=list)
    continuation: str = ""

    @property
    def perplexity(self) -> float:
        """Exp of the mean negative log-likelihood per predicted token."""
        return math.exp(self.nll / self.tokens)


def windows(tokenizer: Any, text: str, length: int, count: int) -> list[torch.Tensor]:
    """``count`` windows of token ids, each [1, length], evenly spread over the text.

    Raises:
        ImportModelError: the text is too short.
    """
    ids = torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int64)
    available = len(ids) // length
    if available < count:
        raise ImportModelError(f"the text has {len(ids)} tokens", expected=f"at least {length * count}")
    starts = [index * available // count * length for index in range(count)]
    return [ids[start : start + length][None] for start in starts]


def static_figures(program: Program) -> Measured:
    """Size and work of one 512-token forward pass, from the graph."""
    cost = program.cost({"B": 1, "S": WINDOW})
    return Measured(
        program.parameter_count,
        program.weight_nbytes,
        cost.macs / WINDOW,
        int(cost.peak_activation_bytes),
    )


def compare_on_text(
    sessions: Sequence[Session],
    measured: Sequence[Measured],
    batches: Sequence[torch.Tensor],
    advance: Callable[[], None],
) -> Drift:
    """Negative log-likelihood of both models on held-out windows, and the drift of the second from the first."""
    meter = DriftMeter("held-out text")
    for ids in batches:
        logits = [session.run({"input_ids": ids})["logits"] for session in sessions]
        for each, result in zip(logits, measured, strict=True):
            nll = torch.nn.functional.cross_entropy(each[0, :-1].float(), ids[0, 1:], reduction="sum")
            result.nll += float(nll)
            result.tokens += ids.shape[1] - 1
        meter.add({"logits": logits[1]}, {"logits": logits[0]})
        advance()
    return meter.result()


def time_in_turn(
    sessions: Sequence[Session],
    measured: Sequence[Measured],
    ids: torch.Tensor,
    advance: Callable[[], None],
) -> None:
    """Milliseconds of a forward pass: one warm-up each, then A, B, A, B..."""
    for session in sessions:
        session.run({"input_ids": ids})
    for _ in range(TIMED_RUNS):
        for session, result in zip(sessions, measured, strict=True):
            start = time.perf_counter()
            session.run({"input_ids": ids})
            result.forward_ms.append(1e3 * (time.perf_counter() - start))
        advance()


def continue_prompt(session: Session, tokenizer: Any, new_tokens: int, advance: Callable[[], None]) -> str:
    """Greedy continuation by whole forward passes (a step program with a cache is another pass)."""
    ids = torch.tensor(tokenizer(PROMPT)["input_ids"], dtype=torch.int64)[None]
    start = ids.shape[1]
    for _ in range(new_tokens):
        logits = session.run({"input_ids": ids})["logits"]
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        advance()
    return tokenizer.decode(ids[0, start:])


def rows(before: Measured, after: Measured) -> list[tuple[str, str, str, str]]:
    """The comparison table: what, original, optimised, change."""

    def row(label: str, a: float, b: float, form: Callable[[float], str]) -> tuple[str, str, str, str]:
        return label, form(a), form(b), f"{100 * (b / a - 1):+.1f} %"

    ms = [statistics.median(m.forward_ms) for m in (before, after)]
    return [
        row(
            "parameters",
            before.parameters,
            after.parameters,
            lambda v: f"{v / 1e6:.1f} M",
        ),
        row(
            "weights",
            before.weight_bytes,
            after.weight_bytes,
            lambda v: f"{v / 2**20:.0f} MiB",
        ),
        row(
            "MACs per token",
            before.macs_per_token,
            after.macs_per_token,
            lambda v: f"{v / 1e6:.1f} M",
        ),
        row(
            "peak activations",
            before.peak_activation_bytes,
            after.peak_activation_bytes,
            lambda v: f"{v / 2**20:.1f} MiB",
        ),
        row(
            "perplexity, held-out text",
            before.perplexity,
            after.perplexity,
            lambda v: f"{v:.2f}",
        ),
        row(f"{WINDOW}-token forward", ms[0], ms[1], lambda v: f"{v:.0f} ms"),
    ]


def print_comparison(console: Console, table_rows: Sequence[tuple[str, str, str, str]], drift: Drift) -> None:
    """The one table, and the drift below it."""
    table = Table(title=f"SmolLM2-135M, {PIPELINE}, in ONNX Runtime")
    for name, justify in (
        ("", "left"),
        ("original", "right"),
        ("optimised", "right"),
        ("change", "right"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for line in table_rows:
        table.add_row(*line)
    table.add_section()
    table.add_row("KL of the next-token distribution", "", f"{drift.kl:.3f} nats", "")
    table.add_row("top-1 agreement", "", f"{100 * (drift.top1 or 0):.1f} %", "")
    console.print(table)


class Stages:
    """Says what is being done: a bar while it lasts (on a terminal), then a line with the seconds it took."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def __call__(self, label: str, total: int | None = None) -> Generator[Callable[[], None]]:
        """A stage of ``total`` steps (None: unknown, 0: no bar); yields what is to be called after each step."""
        start = time.perf_counter()
        columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        hidden = total == 0 or not self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=hidden) as progress:
            task = progress.add_task(label, total=total)
            yield lambda: progress.advance(task)
        self.console.print(f"{label:<56}{time.perf_counter() - start:7.1f} s", highlight=False)


def run_demo(output: Path, quick: bool = False) -> None:
    """Run the main job and leave ``original.onnx``, ``optimised.onnx`` and ``report.json`` in ``output``.

    Args:
        output: a folder, made if missing.
        quick: fewer and shorter windows, for tests of the flow; the figures mean little then.

    Raises:
        ImportModelError: the packaged model is missing.
    """
    from ..runtime.onnxruntime_backend import open_onnx

    console = Console()
    stage = Stages(console)
    output.mkdir(parents=True, exist_ok=True)
    held_out_windows = 1 if quick else HELD_OUT_WINDOWS
    calibration_windows = 1 if quick else CALIBRATION_WINDOWS
    new_tokens = 2 if quick else NEW_TOKENS
    path = smollm2_file()
    with stage("load and trace SmolLM2-135M"):
        tokenizer = load_tokenizer(path)
        program = from_hub(path)
    calibration = [
        {"input_ids": ids} for ids in windows(tokenizer, calibration_text(), CALIBRATION_LENGTH, calibration_windows)
    ]
    with stage(f"optimise: {PIPELINE}", 0):
        # Its loops draw bars of their own on a terminal.
        optimised = optimize(program, calibration[0], passes=PIPELINE, calibration=calibration)
    files = [output / "original.onnx", output / "optimised.onnx"]
    with stage("export both to ONNX", 2) as done:
        for each, file in zip((program, optimised), files, strict=True):
            each.export_onnx(file)
            done()
    measured = [static_figures(program), static_figures(optimised)]
    sessions: list[Session] = []
    with stage("open both in ONNX Runtime", 2) as done:
        for file in files:
            sessions.append(open_onnx(file))
            done()
    held_out = windows(tokenizer, held_out_text(), WINDOW, held_out_windows)
    with stage("perplexity and drift on held-out text", held_out_windows) as done:
        drift = compare_on_text(sessions, measured, held_out, done)
    with stage(f"time {WINDOW}-token forward passes in turn", TIMED_RUNS) as done:
        time_in_turn(sessions, measured, held_out[0], done)
    with stage("continue a prompt with both", 2 * new_tokens) as done:
        for session, result in zip(sessions, measured, strict=True):
            result.continuation = continue_prompt(session, tokenizer, new_tokens, done)

    comparison = rows(*measured)
    print_comparison(console, comparison, drift)
    console.print(f"[bold]{PROMPT}[/bold]", highlight=False)
    for label, result in zip(("original ", "optimised"), measured, strict=True):
        text = " ".join(result.continuation.split())
        console.print(f"  {label}: …{text}", markup=False, highlight=False)
    report = _report(optimised, measured, comparison, drift, held_out_windows)
    write_atomically(output / "report.json", json.dumps(report, indent=2))
    console.print("Removed blocks: " + ", ".join(map(str, _removed(optimised))), highlight=False)
    console.print(f"Written: {files[0]}, {files[1]}, {output / 'report.json'}", highlight=False, soft_wrap=True)


def _removed(optimised: Optimized) -> list[int]:
    for plan in optimised.plan.values():
        if "removed" in plan:
            return sorted(plan["removed"])
    return []


def _report(
    optimised: Optimized,
    measured: Sequence[Measured],
    comparison: Sequence[tuple[str, str, str, str]],
    drift: Drift,
    windows_used: int,
) -> Mapping[str, Any]:
    def figures(result: Measured) -> dict[str, Any]:
        return {**result.__dict__, "perplexity": result.perplexity}

    return {
        "model": "SmolLM2-135M-Instruct (GGUF Q4_1, dequantised to float32)",
        "pipeline": PIPELINE,
        "window": WINDOW,
        "held_out_windows": windows_used,
        "original": figures(measured[0]),
        "optimised": figures(measured[1]),
        "drift": asdict(drift),
        "table": [list(row) for row in comparison],
        "plan": optimised.plan,
        "passes": json.loads(optimised.report.to_json()),
        "machine": describe_machine(),
        "commit": commit(),
        "versions": versions(),
    }
