"""What ``graphlathe optimize`` writes: checked before the work, written after it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ir.errors import ExportError, InputError
from ..ir.files import check_writable, write_atomically
from .console import size
from .plans import MadePlan, picture_folders, plan_files

if TYPE_CHECKING:
    from ..passes.optimize import Optimized
    from ..passes.pipeline import Pipeline
    from .optimize_cmd import OptimizeOptions


def check_outputs(path: Path, options: OptimizeOptions) -> None:
    """Outputs must be possible before hours are spent on them.

    Raises:
        ExportError: one is not.
        InputError: options contradict each other.
    """
    _check_program(path, options)
    files = {"--report": options.report, "--html": options.html, "--plan": options.plan}
    folders = {
        "--dump-dir": options.dump_dir,
        "--plot": options.plot,
        "--journal": options.journal,
        "--workspace": options.workspace,
    }
    _check_distinct({"-o": options.output, **files, **folders})
    for file in files.values():
        if file is not None:
            check_writable(file)
    for folder in folders.values():
        if folder is not None:
            _check_folder(folder)
    if options.workers is not None and options.scheduler is not None:
        raise InputError("--workers and --scheduler both say where to search", remedy="leave out one of them")
    if options.scheduler is not None and options.workspace is None:
        raise InputError(
            "--scheduler needs a folder that all workers see under the same path", remedy="name it with --workspace DIR"
        )


def check_plans(pipeline: Pipeline, options: OptimizeOptions) -> None:
    """Plans are asked for of pipelines that may make some, and pictures where they can be drawn.

    Raises:
        InputError: no pass of the pipeline compresses.
        GraphlatheError: matplotlib is not installed.
    """
    from ..passes.base import Effect

    asked = [
        name
        for name in ("plan", "plot", "journal", "workers", "scheduler", "workspace")
        if getattr(options, name) is not None
    ]
    if asked and not any(item.effect is Effect.APPROXIMATE for item in pipeline.passes()):
        raise InputError(
            f"--{asked[0]} is for passes that compress, and the pipeline has none",
            remedy="add one, such as flap{ratio=0.2}: `graphlathe passes` lists them",
        )
    if options.plot is not None:
        from .plot_style import load_matplotlib

        load_matplotlib()


def write_outputs(
    path: Path, optimized: Optimized, plans: list[MadePlan], page: str | None, options: OptimizeOptions, out: Any
) -> None:
    """Write everything that was asked for, and say what was written.

    The program comes last: it may fail for a reason that only the result shows (a folder for transformers does), and
    then the rest is there, with a plan that gives the program again.

    Raises:
        ExportError: something cannot be written.
        InputError: a plan was asked for, and no pass made one.
    """
    if options.report is not None:
        write_atomically(options.report, optimized.report.to_json() + "\n")
        _written(options.report, out)
    if page is not None and options.html is not None:
        write_atomically(options.html, page)
        _written(options.html, out)
    if plans and options.plan is not None:
        for made, file in zip(plans, plan_files(options.plan, plans), strict=True):
            made.plan.save(file)
            _written(file, out, f" by {made.text}" if len(plans) > 1 else "")
    if plans and options.plot is not None:
        from .plots import plot_plan

        for made, folder in zip(plans, picture_folders(options.plot, plans), strict=True):
            pictures = plot_plan(made.drawable(), folder)
            out.print(f"written: {len(pictures)} pictures in {folder}")
    _write_program(path, optimized, options, out)
    unused = _unused(plans, options)
    if unused:
        out.print(f"no pass searched, so {' and '.join(unused)} had nothing to do")
    if not plans and (options.plan is not None or options.plot is not None):
        raise InputError(
            "no pass of the pipeline made a plan, so there is none to write or draw",
            remedy="leave out --plan and --plot; what the passes decided is in the report (--report FILE)",
        )


def _check_program(path: Path, options: OptimizeOptions) -> None:
    output, form = options.output, options.format
    if output is None:
        if form is not None:
            raise ExportError(f"--format {form} says how to write the result", remedy="say where with -o")
        if options.opset is not None:
            raise ExportError("--opset is for ONNX files", remedy="give -o FILE.onnx")
        return
    onnx = output.suffix == ".onnx"
    if form is not None and onnx != (form == "onnx"):
        raise ExportError(
            f"--format {form} and -o {output} contradict each other",
            expected="a path that ends in .onnx for onnx, and a folder for program and hf",
        )
    check_writable(output, folder=not onnx)
    if output.suffix and not onnx and not output.is_dir():
        raise ExportError(f"cannot write a '{output.suffix}' file", expected="a path that ends in .onnx, or a folder")
    if not onnx and path.is_dir() and output.is_dir() and output.samefile(path):
        raise ExportError(f"'{output}' is the model that is read", remedy="name another folder, then move it")
    if form == "hf":
        _check_hub(path, output)
    elif not onnx:
        from ..ir.serialize import check_target

        check_target(output)
    if options.opset is not None:
        if not onnx:
            raise ExportError("--opset is for ONNX files", remedy="give -o FILE.onnx")
        from ..ir.to_onnx import OPSETS

        if options.opset not in OPSETS:
            raise ExportError(f"opset {options.opset} is not supported", expected=f"{OPSETS[0]} to {OPSETS[-1]}")


def _check_hub(path: Path, output: Path) -> None:
    from ..ir.hub_model import import_transformers

    import_transformers()
    if not (path / "config.json").is_file():
        raise ExportError(
            f"--format hf needs the checkpoint folder that the model came from, and '{path}' has no config.json",
            remedy="optimize the checkpoint folder itself, or write ONNX",
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ExportError(f"cannot write '{output}': it exists and is not empty", remedy="name a new folder")


def _check_distinct(outputs: dict[str, Path | None]) -> None:
    taken: dict[Path, str] = {}
    for name, path in outputs.items():
        if path is None:
            continue
        other = taken.setdefault(path.absolute(), name)
        if other != name:
            raise InputError(f"{other} and {name} are both '{path}'", remedy="give each a path of its own")


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"'{folder}' is a file", expected="a folder, or a path where there is nothing yet")
    if not folder.exists():
        check_writable(folder, folder=True)
    elif not os.access(folder, os.W_OK):
        raise ExportError(f"the folder '{folder}' is read-only", remedy="choose another one")


def _write_program(path: Path, optimized: Optimized, options: OptimizeOptions, out: Any) -> None:
    output = options.output
    if output is None:
        return
    if options.format == "hf":
        from ..ir.to_hub import to_hub

        to_hub(optimized, output, config=path)
    elif output.suffix == ".onnx":
        optimized.export(output, **({} if options.opset is None else {"opset": options.opset}))
    else:
        optimized.save(output)
    _written(output, out)


def _unused(plans: Iterable[MadePlan], options: OptimizeOptions) -> list[str]:
    """Options for searches that had no search to serve."""
    if any(made.plan.search is not None for made in plans):
        return []
    names = ("journal", "workers", "scheduler")
    return [f"--{name}" for name in names if getattr(options, name) is not None]


def _written(path: Path, out: Any, more: str = "") -> None:
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    out.print(f"written: {path} ({size(sum(p.stat().st_size for p in files))}){more}")
