"""``graphlathe optimize``: a model file, a pipeline, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ir.errors import InputError
from ..ir.program import Program
from .console import console
from .examples import example_feeds
from .interrupted import Interrupted
from .optimize_outputs import check_outputs, check_plans, write_outputs
from .plans import MadePlan, made_plans
from .sizes import parse_sizes
from .tokens import calibration_feeds, check_calibration
from .workers import executor_for

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
    format: str | None = None
    plan: Path | None = None
    plot: Path | None = None
    journal: Path | None = None
    workers: int | None = None
    scheduler: str | None = None
    workspace: Path | None = None
    teacher: Path | None = None


def optimize_file(path: Path, options: OptimizeOptions) -> None:
    """Check everything that can be checked without the model, then load, optimize, print and write.

    Raises:
        Interrupted: Ctrl-C, where a journal keeps what searches have evaluated.
        GraphlatheError: anything else that goes wrong.
    """
    from ..ir.load import load
    from ..passes.contract import checked_budget
    from ..passes.optimize import optimize
    from ..passes.pipeline import parse_pipeline
    from .why_not import answer, parse_question

    pipeline = parse_pipeline(options.pipeline)
    budget = checked_budget(_budget(options.budget))
    question = None if options.why_not is None else parse_question(options.why_not, pipeline)
    check_outputs(path, options)
    check_plans(pipeline, options)
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
    try:
        with executor_for(options.workers, options.scheduler) as executor:
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
                executor=executor,
                journal=options.journal,
                workspace=options.workspace,
                teacher=options.teacher,
            )
    except KeyboardInterrupt:
        if options.journal is None:
            raise
        raise Interrupted(_kept(options.journal)) from None
    out = console()
    out.print(optimized.report)
    plans = made_plans(optimized.report)
    page = None if options.html is None else _page(path, program, optimized, options, plans)
    write_outputs(path, optimized, plans, page, options, out)
    if question is not None:
        for line in answer(question, optimized.report, program, optimized):
            out.print(line, markup=False)


def _page(path: Path, program: Program, optimized: Optimized, options: OptimizeOptions, plans: list[MadePlan]) -> str:
    """The model before and after, with what every pass did and what the plans look like, as a page of HTML."""
    from .html.page import PageOptions, html_page
    from .html.pictures import compression

    notes = tuple(f"{row.text}: {row.verdict}" for row in optimized.report.rows)
    shown, missing = compression(plans)
    after = options.output.name if options.output is not None else "optimized"
    return html_page(
        program,
        PageOptions(path.name, after, optimized.report.sizes, notes=notes + missing, compression=shown),
        optimized,
    )


def _kept(journal: Path) -> str:
    """What to say of a journal when its search was interrupted."""
    lines = sum(max(file.read_bytes().count(b"\n") - 1, 0) for file in journal.glob("*.jsonl"))
    return f"interrupted; '{journal}' keeps {lines:,} evaluations, and the same command goes on from there"


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
