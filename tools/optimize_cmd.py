"""``graphlathe optimize``: a model file, a pipeline, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ir.errors import ExportError, InputError
from ..ir.program import Program
from .console import console, size
from .examples import example_feeds
from .files import check_writable, write_atomically
from .sizes import parse_sizes
from .tokens import calibration_feeds, check_calibration

if TYPE_CHECKING:
    from ..passes.optimize import Optimized


@dataclass(frozen=True)
class OptimizeOptions:
    """What to do; see the command's help."""

    pipeline: str
    output: Path | None = None
    calibration: tuple[Path, ...] = ()
    tokenizer: Path | None = None
    window: int = 128
    windows: int = 32
    example: str | None = None
    opset: int | None = None
    report: Path | None = None
    html: Path | None = None
    verify: int = 1
    dump_dir: Path | None = None
    stop_after: str | None = None
    disable: tuple[str, ...] = ()
    why_not: str | None = None
    budget: tuple[str, ...] = ()
    reproduce: Path | None = None


def optimize_file(path: Path, options: OptimizeOptions) -> None:
    """Check everything that can be checked without the model, then load, optimize, print and write."""
    from ..ir.load import load
    from ..passes.contract import checked_budget
    from ..passes.optimize import optimize
    from ..passes.pipeline import parse_pipeline
    from .why_not import answer, parse_question

    pipeline = parse_pipeline(options.pipeline)
    budget = checked_budget(_budget(options.budget))
    question = None if options.why_not is None else parse_question(options.why_not, pipeline)
    _check_outputs(path, options)
    check_calibration(options.calibration, options.tokenizer, path)
    program = load(path)
    calibration = calibration_feeds(
        options.calibration,
        program,
        tokenizer=options.tokenizer,
        model=path,
        window=options.window,
        windows=options.windows,
    )
    optimized = optimize(
        program,
        _example(program, options.example),
        passes=pipeline,
        calibration=calibration or None,
        budget=budget,
        verify=options.verify,
        progress=True,
        dump_dir=options.dump_dir,
        stop_after=options.stop_after,
        disable=options.disable,
        reproduce=options.reproduce,
    )
    out = console()
    out.print(optimized.report)
    if options.html is not None:
        write_atomically(options.html, _page(path, program, optimized, options))
    _write(optimized, options, out)
    if question is not None:
        for line in answer(question, optimized.report, program, optimized):
            out.print(line, markup=False)


def _page(path: Path, program: Program, optimized: Optimized, options: OptimizeOptions) -> str:
    """The model before and after, with what every pass did, as a page of HTML."""
    from .html.page import PageOptions, html_page

    notes = tuple(f"{row.text}: {row.verdict}" for row in optimized.report.rows)
    after = options.output.name if options.output is not None else "optimized"
    return html_page(program, PageOptions(path.name, after, optimized.report.sizes, notes=notes), optimized)


def _example(program: Program, text: str | None) -> dict[str, Any] | None:
    if text == "none":
        return None
    return example_feeds(program, parse_sizes([text] if text else [], program))


def _budget(items: tuple[str, ...]) -> dict[str, float] | None:
    """``NAME=LIMIT`` texts as a budget.

    Raises:
        InputError: one is something else.
    """
    budget: dict[str, float] = {}
    for item in items:
        name, _, limit = item.partition("=")
        try:
            budget[name] = float(limit)
        except ValueError:
            raise InputError(f"'{item}' is no bound", expected="NAME=LIMIT, such as drift=0.1") from None
    return budget or None


def _check_outputs(path: Path, options: OptimizeOptions) -> None:
    """Outputs must be possible before hours are spent on them.

    Raises:
        ExportError: one is not.
    """
    output = options.output
    if output is not None:
        onnx = output.suffix == ".onnx"
        check_writable(output, folder=not onnx)
        if output.suffix and not onnx and not output.is_dir():
            raise ExportError(
                f"cannot write a '{output.suffix}' file", expected="a path that ends in .onnx, or a folder"
            )
        if not onnx:
            from ..ir.serialize import check_target

            check_target(output)
            if path.is_dir() and output.is_dir() and output.samefile(path):
                raise ExportError(f"'{output}' is the model that is read", remedy="name another folder, then move it")
    if options.opset is not None:
        if output is None or output.suffix != ".onnx":
            raise ExportError("--opset is for ONNX files", remedy="give -o FILE.onnx")
        from ..ir.to_onnx import OPSETS

        if options.opset not in OPSETS:
            raise ExportError(f"opset {options.opset} is not supported", expected=f"{OPSETS[0]} to {OPSETS[-1]}")
    for file in (options.report, options.html):
        if file is not None:
            check_writable(file)
    if options.dump_dir is not None:
        check_writable(options.dump_dir, folder=True)


def _write(optimized: Any, options: OptimizeOptions, out: Any) -> None:
    output = options.output
    if output is not None and output.suffix == ".onnx":
        optimized.export(output, **({} if options.opset is None else {"opset": options.opset}))
    elif output is not None:
        optimized.save(output)
    if options.report is not None:
        write_atomically(options.report, optimized.report.to_json() + "\n")
    for path in (output, options.report, options.html):
        if path is not None:
            total = (
                sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size
            )
            out.print(f"written: {path} ({size(total)})")
