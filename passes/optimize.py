"""`optimize`: the front door. A model and a pipeline go in, a program with a report comes out."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..ir.errors import ExportError, ImportModelError, InputError, PipelineError, suggest
from ..ir.program import Program
from .contract import checked_budget
from .data import calibration_batches, named_inputs
from .instruments import Disable, Dump, Instrument, Reproducer, StopAfter
from .manager import PassManager
from .pipeline import Pipeline, parse_pipeline
from .registry import names
from .report import Report

if TYPE_CHECKING:
    from ..runtime.session import Session


class Optimized(Program):
    """A program that went through a pipeline.

    Attributes:
        report: what every pass did, and what it cost in fidelity.
    """

    def __init__(self, program: Program, report: Report) -> None:
        super().__init__(
            program.entries,
            program.weights,
            subgraphs=program.subgraphs,
            fake_mode=program.fake_mode,
            tied=program.tied,
            history=program.history,
            metadata=program.metadata,
        )
        self.report = report

    @property
    def plan(self) -> dict[str, dict[str, Any]]:
        """What passes decided, by their text (``drop-layers{ratio=0.2}`` -> which blocks went)."""
        return self.report.plan

    def export(self, path: str | os.PathLike[str], **options: Any) -> Path:
        """Write an ONNX file (``.onnx``), or a saved program (a folder: any path without suffix).

        Args:
            path: where to.
            options: of `ir.to_onnx.export_onnx`; only for ONNX.

        Raises:
            ExportError: another suffix, or the file cannot be written.
        """
        target = Path(path)
        if target.suffix == ".onnx":
            return self.export_onnx(target, **options)
        if target.suffix and not target.is_dir():
            raise ExportError(
                f"cannot write a '{target.suffix}' file", expected="a path that ends in .onnx, or a folder's path"
            )
        if options:
            raise ExportError(f"a saved program has no option {', '.join(options)}", remedy="name an .onnx file")
        return self.save(target)

    def compile(self, backend: str = "onnxruntime", **options: Any) -> Session:
        """A session that runs it fast, see `runtime.compile.compile`."""
        from ..runtime.compile import compile

        return compile(self, backend=backend, **options)


def optimize(
    model_or_program: Any,
    example_inputs: Sequence[Any] | Mapping[str, Any] | torch.Tensor | None = None,
    *,
    passes: Any,
    calibration: Iterable[Any] | None = None,
    evaluate: Callable[[Program], float] | None = None,
    budget: Mapping[str, float] | None = None,
    verify: int = 1,
    progress: bool = True,
    dynamic: Any = None,
    instruments: Sequence[Instrument] = (),
    costs: bool = True,
    drift_batches: int | None = None,
    dump_dir: str | os.PathLike[str] | None = None,
    stop_after: str | None = None,
    disable: Collection[str] = (),
    reproduce: str | os.PathLike[str] | None = None,
    executor: Executor | None = None,
    journal: str | os.PathLike[str] | None = None,
    workspace: str | os.PathLike[str] | None = None,
    teacher: Any = None,
) -> Optimized:
    """Run passes over a model.

    Args:
        model_or_program: an ``nn.Module`` (traced with ``example_inputs``), a `Program`, an ``ExportedProgram``, or a
            path that `load` takes. It is not changed.
        example_inputs: a tuple (positional), a dict (keyword) or one tensor. With them, every exact pass is run
            against the graph before it; their sizes are those of the report's costs.
        passes: a pipeline string, a pass, or a sequence of both.
        calibration: any iterable of input tuples or dicts (read once); passes that look at data use it, and the drift
            of approximate passes is measured on it (else on ``example_inputs``).
        evaluate: a figure of merit; called with the program before and after, and reported.
        budget: bounds on the drift from the given model, checked after every approximate pass: ``kl`` and ``relative``
            (largest allowed), ``top1`` (smallest allowed agreement), ``drift`` (largest ``kl`` where outputs look like
            logits, largest ``relative`` elsewhere). Over budget, nothing is returned: `PostconditionError`.
        verify: what to check after each pass: 0 nothing, 1 structure, 2 shapes and text, 3 as well that passes which
            promise equal outputs keep it (needs example inputs; done at every level but 0 when they are given).
        progress: bars around loops of more than 2 seconds, on a terminal.
        dynamic: for tracing a module, see `trace`.
        instruments: watch or steer the run.
        costs: whether the report has MACs and peak activation bytes.
        drift_batches: on how many of the calibration batches drift is measured (evenly spread; 0: it is not, which
            leaves nothing for a ``budget`` to check). None: on all of them.
        dump_dir: write the program as text after every pass to this folder.
        stop_after: end the pipeline after the pass of this name.
        disable: names of passes to skip.
        reproduce: on failure, write a folder here from which the failing step can be run again.
        executor: a `concurrent.futures.Executor` that evaluates the candidates of searches: a pool of processes, or
            ``dask.distributed.Client.get_executor()`` for many machines. None: this process.
        journal: a folder that keeps what searches evaluated; the same call goes on where an earlier one was stopped.
        workspace: a folder that the executor's workers can read under the same path, where they are on other machines.
        teacher: the model that a distillation learns from, in any form that ``model_or_program`` may have; None: the
            given one, before the first pass. So a model that was made smaller earlier learns from the original.

    Returns:
        The result: a `Program` with ``.report``, ``.plan``, ``.export(path)`` and ``.compile(backend=...)``.

    Raises:
        PipelineError: the pipeline is wrong.
        ImportModelError: the model cannot be read or traced.
        InputError: example inputs, calibration or teacher do not fit the model.
        GraphlatheError: a pass failed, see `PassManager.run`.
    """
    pipeline = parse_pipeline(passes)  # what can be wrong with the call is said before anything slow
    check_steering(pipeline, stop_after, disable)
    checked_budget(budget)
    if drift_batches is not None and (drift_batches < 0 or (drift_batches == 0 and budget)):
        raise InputError(
            f"drift_batches is {drift_batches}", expected="at least 1 with a budget" if budget else "at least 0"
        )
    if verify == 3 and example_inputs is None:
        raise InputError("verification level 3 compares outputs", remedy="pass example_inputs=")
    program = _program(model_or_program, example_inputs, dynamic)
    feeds = None if example_inputs is None else named_inputs(program, example_inputs, "example_inputs")
    tools = list(instruments)
    tools += [Dump(Path(dump_dir))] if dump_dir is not None else []
    tools += [StopAfter(stop_after)] if stop_after is not None else []
    tools += [Disable(disable)] if disable else []
    tools += [Reproducer(Path(reproduce))] if reproduce is not None else []
    manager = PassManager(
        pipeline,
        feeds=feeds,
        calibration=calibration_batches(program, calibration),
        verify=verify,
        differential=verify > 0,
        budget=budget,
        costs=costs,
        drift_batches=drift_batches,
        progress=progress,
        instruments=tools,
        executor=executor,
        journal=None if journal is None else Path(journal),
        workspace=None if workspace is None else Path(workspace),
        teacher=None if teacher is None else _teacher(teacher, program, example_inputs, dynamic),
    )
    before = _merit(evaluate, program)
    result, report = manager.run(program)
    optimized = Optimized(result, report)
    report.metric_before = before
    report.metric_after = _merit(evaluate, optimized)
    return optimized


def _teacher(model: Any, program: Program, example_inputs: Any, dynamic: Any) -> Program:
    """The model that a distillation learns from.

    Raises:
        InputError: its inputs or outputs have other names.
    """
    teacher = _program(model, example_inputs, dynamic if isinstance(model, torch.nn.Module) else None)
    for what in ("inputs", "outputs"):
        theirs, own = getattr(teacher.main, what), getattr(program.main, what)
        if set(theirs) != set(own):
            raise InputError(
                f"the teacher's {what} are {', '.join(theirs)}; the model's are {', '.join(own)}",
                expected=f"a teacher with the same {what}",
            )
    return teacher


def check_steering(pipeline: Pipeline, stop_after: str | None, disable: Collection[str]) -> None:
    """Names that steer a run must be in the pipeline; disabled ones may be in the catalogue (some run on demand).

    Raises:
        PipelineError: one is not.
    """
    used = [item.name for item in pipeline.passes()]
    for what, name, known in (
        *([("stop after", stop_after, used)] if stop_after is not None else []),
        *(("disable", name, [*used, *(n for n in names() if n not in used)]) for name in disable),
    ):
        if name not in known:
            raise PipelineError(
                f"cannot {what} '{name}', which is not in the pipeline{suggest(name, known)}",
                expected=f"one of: {', '.join(used)}",
            )


def _merit(evaluate: Callable[[Program], float] | None, program: Program) -> float | None:
    if evaluate is None:
        return None
    value: Any = evaluate(program)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InputError(f"evaluate returned a {type(value).__name__}", expected="a number") from None


def _program(model: Any, example_inputs: Any, dynamic: Any) -> Program:
    """The model as a program."""
    if dynamic is not None and not isinstance(model, torch.nn.Module):
        raise InputError(
            f"dynamic= is for tracing a module; this is a {type(model).__name__}",
            remedy="leave it out: the dimensions that are dynamic were decided when the model was traced or exported",
        )
    if isinstance(model, Program):
        return model
    if isinstance(model, (str, os.PathLike)):
        from ..ir.load import load

        return load(Path(model))
    if isinstance(model, (torch.nn.Module, torch.export.ExportedProgram)):
        from ..ir.from_torch import trace

        return trace(model, example_inputs, dynamic=dynamic)
    raise ImportModelError(
        f"cannot optimize a {type(model).__name__}",
        expected="an nn.Module, a Program, an ExportedProgram, or the path of a model",
    )
