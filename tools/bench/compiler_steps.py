"""What the suite ``compiler`` times: the steps, ours and PyTorch's, on one model."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ...ir.errors import GraphlatheError
from ...ir.from_exported import from_exported
from ...ir.program import Program
from ...passes.base import Context
from ...passes.registry import get
from ..smollm2 import smollm2_file
from .measure import peak_memory, rss_bytes

DYNAMIC = {"input_ids": {0: "B", 1: "S"}}
_DROPPED = (1, 3)


def build(case: str) -> torch.nn.Module:
    """The model of a case: ``llama-N`` (N layers, tiny width), ``wide-N`` (N layers, real width), ``smollm2-135m``.

    Raises:
        GraphlatheError: a package that it needs is missing.
    """
    try:
        import transformers
    except ImportError as error:
        raise GraphlatheError(
            "this suite needs transformers",
            remedy="pip install 'graphlathe[hub,bench]'",
        ) from error
    if case == "smollm2-135m":
        return _smollm2()
    kind, _, layers = case.partition("-")
    width = {"llama": 32, "wide": 1024}[kind]
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=int(layers),
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def _smollm2() -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    file = smollm2_file()
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    model.config.use_cache = False
    return model.eval()


class Workpiece:
    """One model in every form that some step starts from."""

    def __init__(self, case: str, folder: Path) -> None:
        self.case = case
        self.folder = folder
        self.model = build(case)
        self.example = {"input_ids": torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(0))}

    @cached_property
    def exported(self) -> torch.export.ExportedProgram:
        """What `torch.export` gives."""
        return torch_export(self)

    @cached_property
    def program(self) -> Program:
        """Our program, made from `exported`."""
        return from_exported(self.exported)

    @cached_property
    def canonical(self) -> Program:
        """The program in canonical form."""
        program = self.program.clone()
        get("canonicalize")().run(program, Context())
        return program

    @cached_property
    def text(self) -> str:
        """The canonical program's text."""
        return self.canonical.to_text()

    def errors(self, *, stock: bool) -> dict[str, float]:
        """Largest differences, relative to the largest value (ONNX Runtime's own optimizer off).

        The program, the canonical program and our ONNX file are compared with the module; with ``stock``, our ONNX file
        also with the stock exporter's.
        """
        from ...ir.verify import relative_error

        with torch.no_grad():
            expected = {"logits": self.model(**self.example).logits}
        ours = run_onnx(export_ours(self, self.canonical), self.example)
        errors = {
            "the program": relative_error(self.program.run(self.example), expected),
            "the canonical program": relative_error(self.canonical.run(self.example), expected),
            "our ONNX file": relative_error({"logits": ours[0]}, expected),
        }
        if stock:
            theirs = run_onnx(export_stock(self), self.example)
            errors["our ONNX file against the stock exporter's"] = relative_error(
                {"logits": ours[0]}, {"logits": theirs[0]}
            )
        return errors


def run_onnx(path: Path, feeds: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Outputs of an ONNX file in ONNX Runtime, its optimizer off."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [
        torch.from_numpy(value) for value in session.run(None, {name: value.numpy() for name, value in feeds.items()})
    ]


def torch_export(piece: Workpiece) -> torch.export.ExportedProgram:
    """`torch.export`, as everybody calls it."""
    dynamic = {"input_ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(piece.model, (), piece.example, dynamic_shapes=dynamic, strict=False)


def decompose(piece: Workpiece) -> Any:
    """PyTorch's own way to functional operators: a second trace of the whole program."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return piece.exported.run_decompositions({})


def export_stock(piece: Workpiece) -> Path:
    """PyTorch's own ONNX exporter, with its defaults."""
    path = piece.folder / "stock.onnx"
    logging.disable(logging.WARNING)  # what is not installed is not what is measured
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(piece.exported, (), str(path), dynamo=True, verbose=False)
    finally:
        logging.disable(logging.NOTSET)
    return path


def export_ours(piece: Workpiece, program: Program) -> Path:
    """Our ONNX export of a built program."""
    return program.export_onnx(piece.folder / "ours.onnx", fallback=False)


@dataclass(frozen=True)
class Step:
    """A step of ours: what it starts from (made fresh for each call, untimed), and the call."""

    prepare: Callable[[Workpiece], Any]
    call: Callable[[Workpiece, Any], Any]


def _structure(piece: Workpiece, program: Program) -> Any:
    from ...ir.structure import structure

    return structure(program)


def _verify(level: int) -> Callable[[Workpiece, Program], None]:
    def call(piece: Workpiece, program: Program) -> None:
        from ...ir.verify import verify

        verify(program, level)

    return call


def _parse(piece: Workpiece, text: str) -> Any:
    from ...ir.text import parse_program

    return parse_program(text, piece.canonical.weights)


def _drop(piece: Workpiece, program: Program) -> Any:
    from ...passes.layers.drop_layers import DropLayers

    config: Any = piece.model.config
    count = int(config.num_hidden_layers)
    return DropLayers(indices=tuple(i for i in _DROPPED if i < count)).run(program, Context())


def _fresh(piece: Workpiece) -> Program:
    return piece.canonical.clone()


STOCK: dict[str, Callable[[Workpiece], Any]] = {
    "torch.export": torch_export,
    "run_decompositions": decompose,
    "torch.onnx.export": export_stock,
}
OURS: dict[str, Step] = {
    "from exported": Step(lambda piece: piece.exported, lambda piece, exported: from_exported(exported)),
    "canonicalize": Step(
        lambda piece: piece.program.clone(),
        lambda piece, program: get("canonicalize")().run(program, Context()),
    ),
    "structure": Step(_fresh, _structure),
    "verify 1": Step(_fresh, _verify(1)),
    "verify 2": Step(_fresh, _verify(2)),
    "print text": Step(_fresh, lambda piece, program: program.to_text()),
    "parse text": Step(lambda piece: piece.text, _parse),
    "drop-layers": Step(_fresh, _drop),
    "export ONNX": Step(_fresh, export_ours),
}


def memory_of_steps(case: str, stock: bool = True) -> dict[str, dict[str, int]]:
    """Growth and peak of resident memory, by step; to be called in a process of its own.

    Args:
        case: see `build`.
        stock: whether to measure PyTorch's own steps too, beside `torch.export`.
    """
    import tempfile

    torch.set_num_threads(1)
    found: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory(prefix="graphlathe-bench-") as folder:
        warm = Workpiece("llama-1", Path(folder))
        _run_all(warm, lambda name, call: call(), stock)  # imports and caches belong to nobody
        piece = Workpiece(case, Path(folder))
        piece.text  # noqa: B018 (builds every form)

        def record(name: str, call: Callable[[], Any]) -> None:
            with peak_memory() as memory:
                call()
            found[name] = {"growth": memory.peak - memory.before, "peak": memory.peak}

        _run_all(piece, record, stock)
    return found


def _run_all(piece: Workpiece, around: Callable[[str, Callable[[], Any]], None], stock: bool) -> None:
    for name, step in STOCK.items() if stock else [("torch.export", torch_export)]:
        around(name, lambda step=step: step(piece))  # type: ignore[misc]
    for name, ours in OURS.items():
        given = ours.prepare(piece)
        around(name, lambda ours=ours, given=given: ours.call(piece, given))  # type: ignore[misc]


def memory_of_pipeline(case: str) -> dict[str, int]:
    """Resident memory around a pipeline that drops layers; to be called in a process of its own.

    Returns:
        ``baseline``: before the model was loaded, after a warm-up on a tiny one; ``before``: with the program built;
        ``peak``: the highest during the pipeline; ``weights``: the model's weight bytes; ``nodes``.
    """
    from ...ir.from_torch import trace
    from ...passes.optimize import optimize

    torch.set_num_threads(1)
    passes = "canonicalize,drop-layers{indices=0,2}"

    def built(name: str) -> Program:
        model = build(name)
        example = {"input_ids": torch.randint(0, 128, (2, 12))}
        return trace(model, example, dynamic=DYNAMIC)

    optimize(built("llama-4"), passes=passes, progress=False)
    gc.collect()
    with peak_memory():
        baseline = rss_bytes()
    program = built(case)
    weights, nodes = program.weight_nbytes, len(program.graph.nodes)
    with peak_memory() as memory:
        optimize(program, passes=passes, progress=False)
    return {
        "baseline": baseline,
        "before": memory.before,
        "peak": memory.peak,
        "weights": weights,
        "nodes": nodes,
    }
