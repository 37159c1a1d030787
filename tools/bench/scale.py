"""Suite ``scale``: models larger than memory, in structure, in surgery, and on disk.

An 8B-parameter Llama configuration in a sharded safetensors folder, written sparsely (the file system stores holes, a
reader sees zeros), is traced and analysed, then four blocks are dropped and the rest goes to ONNX with external data.
A 70B configuration has shapes only. Every step runs in a process of its own, whose peak resident memory is reported.

Correctness comes first: the same path (folder, ``drop-layers``, ONNX, ONNX Runtime) at a small size, against the
module without these layers.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from ...ir.errors import GraphlatheError
from .base import Goal, Result, Row, Run, Suite
from .measure import Measured, measure_in_subprocess

STRUCTURE_SECONDS = 60.0
STRUCTURE_BYTES = 2e9
SURGERY_BYTES = 6e9
_DROPPED = (20, 21, 22, 23)
_STEPS = f"{__package__}.scale_steps"
_TOLERANCE = 1e-4  # ONNX Runtime against PyTorch, float32
_SPARE_BYTES = 1 << 30
_TIMEOUT = 1800.0


def run(context: Run) -> Result:
    """Check at a small size, then measure 8B and 70B (with ``quick``: an eighth of the layers).

    Raises:
        GraphlatheError: the small check failed, or the disk has too little room.
    """
    from .scale_steps import checkpoint_bytes, write_checkpoint

    result = Result()
    with tempfile.TemporaryDirectory(prefix="graphlathe-scale-") as name:
        folder = Path(name)
        context.say("the same path at a small size, against the module without the dropped layers")
        small = measure_in_subprocess(f"{_STEPS}:check_small", {"folder": str(folder / "small")})
        result.rows.append(_row("llama-tiny", "correct: largest difference", small, error=small.result["error"]))
        if not small.result["error"] <= _TOLERANCE:
            raise GraphlatheError(
                f"the cut model differs from the reference by {small.result['error']:.2e}",
                expected=f"at most {_TOLERANCE:g}",
            )
        layers = 4 if context.quick else 32
        dropped = [1, 2] if context.quick else list(_DROPPED)
        model = f"llama-8b, {layers} layers"
        needed = int(checkpoint_bytes(layers) * (layers - len(dropped)) / layers) + _SPARE_BYTES
        _check_disk(folder, needed)
        write_checkpoint(folder / "8b", layers)
        context.say(f"{model}: trace and structure")
        found = measure_in_subprocess(f"{_STEPS}:structure_of", {"folder": str(folder / "8b")}, timeout=_TIMEOUT)
        _check_blocks(found, layers, model)
        result.rows += _phases(model, found)
        context.say(f"{model}: drop {len(dropped)} blocks, from folder to ONNX")
        target = folder / "onnx" / "cut.onnx"
        target.parent.mkdir()
        surgery = measure_in_subprocess(
            f"{_STEPS}:surgery",
            {"folder": str(folder / "8b"), "indices": dropped, "target": str(target)},
            timeout=_TIMEOUT,
        )
        result.rows += _phases(model, surgery)
        shutil.rmtree(target.parent)
    result.goals += [
        Goal(f"{model}: seconds of trace + structure", found.seconds, STRUCTURE_SECONDS),
        Goal(f"{model}: peak bytes of trace + structure", found.peak_rss_bytes, STRUCTURE_BYTES),
        Goal(f"{model}: peak bytes of drop-layers, folder to ONNX", surgery.peak_rss_bytes, SURGERY_BYTES),
    ]
    layers = 10 if context.quick else 80
    model = f"llama-70b, {layers} layers, meta"
    context.say(f"{model}: trace, structure, cost")
    measured = measure_in_subprocess(f"{_STEPS}:meta_70b", {"layers": layers}, timeout=_TIMEOUT)
    _check_blocks(measured, layers, model)
    result.rows += _phases(model, measured)
    result.notes.append("peak bytes: highest resident memory of the process that ran the step, imports included")
    result.notes.append("weights are zeros in sparse files: reading them costs memory traffic, but no disk reads")
    return result


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise GraphlatheError(
            f"the suite 'scale' writes {needed / 1e9:.1f} GB to '{folder.parent}', which has {free / 1e9:.1f} GB free",
            remedy="free some space, or set TMPDIR to a folder on a larger disk",
        )


def _check_blocks(measured: Measured, layers: int, model: str) -> None:
    if measured.result["blocks"] != layers:
        raise GraphlatheError(f"{model}: {measured.result['blocks']} blocks found", expected=str(layers))


def _row(model: str, step: str, measured: Measured, **more: object) -> Row:
    return {"model": model, "step": step, "seconds": measured.seconds, "peak_bytes": measured.peak_rss_bytes, **more}


def _phases(model: str, measured: Measured) -> list[Row]:
    """One row per phase inside the process, and one for all of it, with what it found."""
    phases: dict[str, tuple[float, float]] = measured.result["phases"]
    facts = {key: value for key, value in measured.result.items() if key != "phases"}
    rows: list[Row] = [
        {"model": model, "step": step, "seconds": wall, "cpu_seconds": cpu} for step, (wall, cpu) in phases.items()
    ]
    facts["cpu_seconds"] = sum(cpu for _, cpu in phases.values())
    return [*rows, _row(model, "all of: " + ", ".join(phases), measured, **facts)]


SUITE = Suite(
    name="scale",
    summary="an 8B Llama from a sparse checkpoint folder: structure, drop-layers to ONNX; a 70B one by shapes only",
    goals=(
        f"8B: trace and structure in at most {STRUCTURE_SECONDS:.0f} s and {STRUCTURE_BYTES / 1e9:.0f} GB",
        f"8B: drop-layers from folder to ONNX with external data in at most {SURGERY_BYTES / 1e9:.0f} GB of memory",
        "70B on the meta device: trace, structure, cost (time and memory printed, no bound)",
    ),
    run=run,
)
