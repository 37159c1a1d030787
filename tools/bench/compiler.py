"""Suite ``compiler``: time and memory of everything between a module and an ONNX file.

Llama models of 1 to 96 layers of tiny width (the weights cost nothing, so the graph is what is measured), and
SmolLM2-135M. PyTorch's own steps are timed in the same rounds: `torch.export`, its decomposition of the whole program,
and its ONNX exporter, which starts from the same ``ExportedProgram`` that our program was made from.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ...ir.errors import VerifyError
from ..smollm2 import smollm2_file
from .base import Goal, Result, Row, Run, Suite
from .compiler_steps import OURS, STOCK, Workpiece
from .measure import Timing, fit_exponent, interleave, measure_in_subprocess

EXPONENT = 1.15
"""Growth of time over nodes that still counts as linear."""
SMOLLM2 = "smollm2-135m"
_AFTER_BUILD = ("canonicalize", "structure", "verify 1", "drop-layers")
_TOLERANCE = 1e-5
_FROM_LAYERS = 8  # exponents are fitted from here: below, constant costs hide the growth
_REPEATS = {1: 5, 8: 5, 32: 3, 96: 2}
_DEEP = 96
"""From here on PyTorch's own steps take minutes: they are timed once, without its ONNX exporter and without memory."""


@dataclass
class Measurement:
    """One model's timings, memory and node count."""

    case: str
    layers: int
    nodes: int
    times: dict[str, Timing]
    memory: dict[str, dict[str, int]] = field(default_factory=dict)


def run(context: Run) -> Result:
    """Measure all models, smallest first."""
    import torch

    result = Result()
    if not context.quick:
        smollm2_file()  # its absence must not be found out after an hour
    cases = [1, 8, 32] if context.quick else [1, 8, 32, 96]
    measured = [_measure(f"llama-{layers}", layers, context, result) for layers in cases]
    real: Measurement | None = None
    if not context.quick:
        real = _measure(SMOLLM2, 30, context, result)
    for each in [*measured, *([real] if real else [])]:
        result.rows.extend(_rows(each))
    result.goals.extend(_goals(measured, real))
    context.say("memory of a pipeline that drops layers, in a process of its own")
    result.goals.append(_memory_goal(result, context.quick))
    result.notes.append(
        f"threads: {torch.get_num_threads()}; times are wall medians, goals use the best of the rounds; growth is the "
        "highest resident memory during the step minus that before it, measured in a process of its own"
    )
    return result


def _measure(case: str, layers: int, context: Run, result: Result) -> Measurement:
    context.say(f"{case}: building, tracing, checking")
    with tempfile.TemporaryDirectory(prefix="graphlathe-bench-") as folder:
        piece = Workpiece(case, Path(folder))
        result.rows.append(_correctness(piece, stock=layers < _DEEP))
        calls: dict[str, Callable[..., Any]] = {
            name: partial(step, piece) for name, step in STOCK.items() if layers < _DEEP or name != "torch.onnx.export"
        }
        prepare: dict[str, Callable[[], Any]] = {}
        for name, step in OURS.items():
            calls[name] = partial(step.call, piece)
            prepare[name] = partial(step.prepare, piece)
        repeats = 2 if context.quick else _REPEATS.get(layers, 2)
        context.say(f"{case}: timing {len(calls)} steps in turn, {repeats} rounds")
        times = _times(calls, repeats, layers, prepare)
        nodes = len(piece.program.graph.nodes)
    context.say(f"{case}: memory")
    arguments = {"case": case, "stock": layers < _DEEP}
    memory = measure_in_subprocess(f"{__package__}.compiler_steps:memory_of_steps", arguments).result
    return Measurement(case, layers, nodes, times, memory)


def _times(
    calls: dict[str, Callable[..., Any]], repeats: int, layers: int, prepare: dict[str, Callable[[], Any]]
) -> dict[str, Timing]:
    if layers < _DEEP:
        return interleave(calls, repeats, warmup=1 if layers == 1 else 0, prepare=prepare)
    times = interleave(calls, 1, warmup=0, prepare=prepare)
    again = {name: call for name, call in calls.items() if name not in STOCK or name == "torch.export"}
    for name, more in interleave(again, repeats - 1, warmup=0, prepare=prepare).items():
        times[name].wall += more.wall
        times[name].cpu += more.cpu
    return times


def _correctness(piece: Workpiece, *, stock: bool) -> Row:
    """Compare before timing: the traced program with the module, and our ONNX file with the stock exporter's.

    Raises:
        GraphlatheError: they differ.
    """
    errors = piece.errors(stock=stock)
    for name, error in errors.items():
        if not error <= _TOLERANCE:
            raise VerifyError(
                f"{piece.case}: {name} differs by {error:.2e}",
                expected=f"at most {_TOLERANCE:g} of the largest value",
            )
    return {
        "model": piece.case,
        "step": "correct: largest difference",
        "error": max(errors.values()),
    }


def _rows(measured: Measurement) -> list[Row]:
    rows: list[Row] = []
    for name, timing in measured.times.items():
        memory = measured.memory.get(name, {})
        row: Row = {
            "model": measured.case,
            "step": name,
            "by": "torch" if name in STOCK else "ours",
            "nodes": measured.nodes,
        }
        row |= timing.row()
        row["microseconds_a_node"] = round(timing.best / measured.nodes * 1e6, 2)
        row |= {"growth_bytes": memory.get("growth"), "peak_bytes": memory.get("peak")}
        rows.append(row)
    return rows


def _goals(measured: list[Measurement], real: Measurement | None) -> list[Goal]:
    goals: list[Goal] = []
    grown = [m for m in measured if m.layers >= _FROM_LAYERS]
    for name in OURS:
        exponent = fit_exponent([m.nodes for m in grown], [m.times[name].best for m in grown])
        goals.append(Goal(f"{name}: exponent of time over nodes", exponent, EXPONENT))
    last = measured[-1]
    export = last.times["torch.export"].best
    after = sum(last.times[name].best for name in _AFTER_BUILD)
    goals.append(
        Goal(
            f"{' + '.join(_AFTER_BUILD)}, over torch.export, at {last.layers} layers",
            after / export,
            1.0,
        )
    )
    imported = last.times["from exported"].best
    goals.append(
        Goal(
            f"our part of trace (in place of the decomposition), over torch.export, at {last.layers} layers",
            imported / export,
            1.0,
        )
    )
    final = real or last
    ratio = final.times["export ONNX"].best / final.times["torch.onnx.export"].best
    goals.append(Goal(f"our ONNX export over the stock one, {final.case}", ratio, 1 / 3))
    return goals


def _memory_goal(result: Result, quick: bool) -> Goal:
    """Peak resident memory of ``canonicalize,drop-layers`` above that before the model was loaded, over its weights."""
    case = "wide-4" if quick else SMOLLM2
    measured = measure_in_subprocess(f"{__package__}.compiler_steps:memory_of_pipeline", {"case": case}).result
    growth = measured["peak"] - measured["baseline"]
    ratio = growth / measured["weights"] if measured["weights"] else math.nan
    result.rows.append(
        {
            "model": case,
            "step": "pipeline canonicalize,drop-layers",
            "by": "ours",
            "nodes": measured["nodes"],
            "growth_bytes": measured["peak"] - measured["before"],
            "peak_bytes": growth,
        }
    )
    return Goal(
        f"peak memory of a pipeline that drops layers, over the weights' size, {case}",
        ratio,
        1.3,
    )


SUITE = Suite(
    name="compiler",
    summary="time and memory of everything from a module to an ONNX file, 1 to 96 layers and SmolLM2-135M",
    goals=(
        f"each of ours grows with nodes**k, k <= {EXPONENT}",
        f"{' + '.join(_AFTER_BUILD)} take less time than torch.export at 96 layers",
        "our part of trace takes less time than torch.export at 96 layers",
        "our ONNX export takes at most 1/3 of the stock exporter's time on SmolLM2-135M",
        "peak memory of a pipeline that drops layers is at most 1.3 x the weights",
    ),
    run=run,
)
