"""The ``graphlathe`` command: its arguments, and what an error looks like.

Commands are thin: each calls one function of its own module, imported when used, so that ``--help`` is quick. The file
is long because every option of every command stands in it. Errors that we raise on purpose, and wrong arguments, are
one message on stderr and exit code 2; anything else is a bug: one line and exit code 1. ``--debug``, anywhere on the
line, shows the traceback.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, cast

import typer

from ..ir.errors import GraphlatheError
from .interrupted import Interrupted

app = typer.Typer(
    name="graphlathe",
    help="Composable passes over neural-network graphs: a model goes in, a smaller or faster one comes out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# The command line's own library is vendored by newer versions of Typer: reach its classes through a name that stays.
_UsageError = cast("type[Exception]", typer.BadParameter.__mro__[1])
_ClickException = cast("type[Exception]", typer.BadParameter.__mro__[2])
_INTERRUPTED = 130


class Format(StrEnum):
    """How `dump` prints."""

    text = "text"
    tree = "tree"
    sites = "sites"
    table = "table"
    dot = "dot"
    html = "html"


class Output(StrEnum):
    """What `optimize` writes."""

    onnx = "onnx"
    program = "program"
    hf = "hf"


class Sort(StrEnum):
    """How the rows of a cost table are sorted."""

    order = "order"
    macs = "macs"
    bytes = "bytes"
    params = "params"


class By(StrEnum):
    """What a row of a cost table is."""

    node = "node"
    site = "site"
    origin = "origin"


class Backend(StrEnum):
    """What runs a model."""

    onnxruntime = "onnxruntime"
    torch = "torch"
    null = "null"


ModelPath = Annotated[
    Path,
    typer.Argument(
        metavar="PATH",
        help="an .onnx, .pt2 or .gguf file, a saved program, or a checkpoint folder",
    ),
]
Sizes = Annotated[
    list[str] | None,
    typer.Option(
        "--size",
        metavar="NAME=N",
        help="size of a dynamic dimension, such as S=512 (repeatable)",
    ),
]
Tokenizer = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="folder or GGUF file with the tokenizer [default: the model's own]",
    ),
]


@app.callback()
def _root(
    debug: Annotated[
        bool,
        typer.Option(
            "--debug",
            help="show the traceback of an error (may stand anywhere on the line)",
        ),
    ] = False,
) -> None:
    """Composable passes over neural-network graphs: a model goes in, a smaller or faster one comes out."""


@app.command()
def dump(
    path: ModelPath,
    format: Annotated[Format, typer.Option("--format", "-f", help="what to print")] = Format.tree,
    origins: Annotated[
        bool,
        typer.Option("--origins", help="text: where each node came from, and which pass made it"),
    ] = False,
    sort: Annotated[Sort, typer.Option(help="table: largest first, or in the graph's order")] = Sort.order,
    by: Annotated[By, typer.Option(help="table: a row per node, per site, or per module")] = By.node,
    limit: Annotated[int, typer.Option(min=0, help="table: at most this many rows (0: all)")] = 0,
    sizes: Sizes = None,
    against: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="html: a second model, shown to the right with what differs"),
    ] = None,
    statistics: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="html: numbers of weights to read in all; beyond, weights are sampled"),
    ] = 1 << 28,
    passes: Annotated[
        str,
        typer.Option("--passes", "-p", metavar="PIPELINE", help="run these passes first, such as raise"),
    ] = "",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="write to a file")] = None,
) -> None:
    """Print a model's graph: a tree of its blocks, text, its sites, costs, Graphviz, or an HTML page to explore."""
    from .dump import DumpOptions, dump_to

    options = DumpOptions(
        format.value,
        origins=origins,
        sort=sort.value,
        by=by.value,
        limit=limit,
        sizes=sizes or (),
        against=against,
        statistics=statistics,
        passes=passes,
    )
    dump_to(path, options, output)


@app.command()
def optimize(
    path: ModelPath,
    pipeline: Annotated[
        str,
        typer.Option(
            "--passes",
            "-p",
            metavar="PIPELINE",
            help="such as 'canonicalize,drop-layers{ratio=0.2}'",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="an .onnx file, or a folder for a saved program"),
    ] = None,
    format: Annotated[
        Output | None,
        typer.Option(
            "--format",
            "-f",
            help="what to write; hf: a checkpoint folder for transformers, of a model that came from one; "
            "else the path given with -o says it",
        ),
    ] = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            "--calibration",
            "-c",
            help="a .txt file, or .npz/.safetensors files with one batch of named inputs each (repeatable)",
        ),
    ] = None,
    tokenizer: Tokenizer = None,
    window: Annotated[int, typer.Option(min=2, help="tokens in a window of calibration text")] = 128,
    windows: Annotated[int, typer.Option(min=1, help="at most this many windows of calibration text")] = 32,
    example: Annotated[
        str | None,
        typer.Option(
            metavar="SIZES",
            help="sizes of the example inputs for checks, such as B=2,S=16; 'none' for no example",
        ),
    ] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX operator set of the output")] = None,
    report: Annotated[Path | None, typer.Option(help="write the report as JSON")] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="write a page that shows the model before and after")
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="write what was chosen as JSON; apply-plan{path=FILE} does it again"),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="draw what was chosen and how the search went, as PNG files in this folder"),
    ] = None,
    journal: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="keep what searches evaluate in this folder; the same command goes on where it was stopped",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="search with so many processes, of one thread each")
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="search on the workers of a Dask cluster, such as tcp://10.0.0.1:8786"),
    ] = None,
    workspace: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="a folder that all workers of the search see under the same path"),
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(metavar="MODEL", help="what a distillation learns from; else MODEL as it was before the passes"),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=LIMIT", help="bound the drift: drift, kl, relative (at most), top1 (at least) (repeatable)"
        ),
    ] = None,
    verify: Annotated[int, typer.Option(min=0, max=3, help="how much to check after each pass")] = 1,
    dump_dir: Annotated[
        Path | None,
        typer.Option(help="write the program after every pass to this folder"),
    ] = None,
    stop_after: Annotated[
        str | None,
        typer.Option(metavar="PASS", help="end the pipeline after this pass"),
    ] = None,
    disable_pass: Annotated[
        list[str] | None,
        typer.Option(metavar="PASS", help="skip this pass (repeatable)"),
    ] = None,
    why_not: Annotated[
        str | None,
        typer.Option(
            metavar="PASS[:PLACE]",
            help="print why this pass (or all) left places as they were; PLACE: a node's name, its number in the text "
            "form of MODEL, or where it comes from",
        ),
    ] = None,
    reproduce: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="when a pass fails, write a folder from which it runs again"),
    ] = None,
) -> None:
    """Run passes over a model, print what each did, and write the result."""
    from .optimize_cmd import OptimizeOptions, optimize_file

    optimize_file(
        path,
        OptimizeOptions(
            pipeline=pipeline,
            output=output,
            calibration=tuple(calibration or ()),
            tokenizer=tokenizer,
            window=window,
            windows=windows,
            example=example,
            opset=opset,
            report=report,
            html=html,
            verify=verify,
            dump_dir=dump_dir,
            stop_after=stop_after,
            disable=tuple(disable_pass or ()),
            why_not=why_not,
            budget=tuple(budget or ()),
            reproduce=reproduce,
            format=None if format is None else format.value,
            plan=plan,
            plot=plot,
            journal=journal,
            workers=workers,
            scheduler=scheduler,
            workspace=workspace,
            teacher=teacher,
        ),
    )


@app.command()
def run(
    path: ModelPath,
    backend: Annotated[Backend, typer.Option(help="what runs it")] = Backend.onnxruntime,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            "-i",
            metavar="NAME=FILE.npy",
            help="an input from a file (repeatable)",
        ),
    ] = None,
    text: Annotated[str | None, typer.Option(help="text for the model's token input")] = None,
    tokenizer: Tokenizer = None,
    sizes: Sizes = None,
    seed: Annotated[int, typer.Option(help="seed of the random inputs that are not given")] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="timed runs")] = 5,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="save the outputs as .npz")] = None,
) -> None:
    """Run a model and print its outputs' shapes, ranges, and the time it took."""
    from .run import RunOptions, run_file

    run_file(
        path,
        RunOptions(
            backend=backend.value,
            inputs=tuple(inputs or ()),
            text=text,
            tokenizer=tokenizer,
            sizes=tuple(sizes or ()),
            seed=seed,
            repeats=repeats,
            output=output,
        ),
    )


@app.command()
def passes(
    name: Annotated[str | None, typer.Argument(help="show this pass with its options")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="as Markdown, for the documentation")] = False,
) -> None:
    """List the passes, or show one."""
    from .passes_cmd import show_passes

    show_passes(name, markdown)


@app.command()
def bench(
    suite: Annotated[str | None, typer.Argument(help="which suite")] = None,
    list_: Annotated[bool, typer.Option("--list", help="list the suites and their goals")] = False,
    json_: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="write everything as JSON"),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="exit with 1 when a goal is missed")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="smaller sizes, fewer repeats, or a sample")] = False,
    only: Annotated[
        str | None,
        typer.Option(
            "--only", metavar="TEXT", help="only the cases whose name contains this (onnx-..., peers-..., compress-...)"
        ),
    ] = None,
    peers: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="where other tools' packages are, or are put (peers-..., compress-...)"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with the record in --json FILE (compress-...)")
    ] = False,
    markdown: Annotated[
        list[Path] | None,
        typer.Option(
            "--markdown", metavar="FILE", help="measure nothing: print this record as Markdown; may be repeated"
        ),
    ] = None,
) -> None:
    """Measure: correctness first, then time and memory, against stated goals."""
    from .bench.show import bench as run_bench
    from .bench.show import list_suites

    if list_:
        list_suites()
        return
    if markdown:
        from .bench.markdown import records

        typer.echo(records(markdown), nl=False)
        return
    code = run_bench(suite, json_, check, quick, only, peers, resume)
    if code:
        raise typer.Exit(code)


@app.command()
def doctor(
    json_: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
) -> None:
    """Print versions, devices and what is missing, for bug reports."""
    from .doctor import show_doctor

    show_doctor(json_)


@app.command()
def demo(
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="folder for the models and the report"),
    ] = Path("demo-output"),
    quick: Annotated[bool, typer.Option("--quick", help="less text, fewer repeats")] = False,
) -> None:
    """Make a real language model smaller and compare the two in ONNX Runtime."""
    from .demo import run_demo

    run_demo(output, quick=quick)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code: 0, 1 (a bug, or a missed goal), 2 (bad input), 130 (interrupted)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--debug" not in given:
        # What other libraries have to say is no part of our message.
        logging.disable(logging.WARNING)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 gets question marks, not an error
    sys.exit(execute(given))


def execute(arguments: list[str]) -> int:
    """Run the command line; returns the exit code."""
    words = arguments[: arguments.index("--")] if "--" in arguments else arguments
    debug = "--debug" in words
    rest = [word for word in words if word != "--debug"] + arguments[len(words) :]
    with warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")
        try:
            code = int(app(args=rest, prog_name="graphlathe", standalone_mode=False) or 0)
            return _failed("interrupted", code, False) if code == _INTERRUPTED else code
        except Interrupted as interrupted:
            return _failed(str(interrupted), _INTERRUPTED, False)
        except GraphlatheError as error:
            return _failed("\n  ".join([str(error), *getattr(error, "__notes__", [])]), 2, debug)
        except _UsageError as error:
            return _failed(_usage_text(error), 2, debug)
        except _ClickException as error:
            return _failed(error.format_message(), 2, debug)  # type: ignore[attr-defined]
        except (KeyboardInterrupt, typer.Abort):
            return _failed("interrupted", _INTERRUPTED, False)
        except BrokenPipeError:
            # Whoever read our output is gone, as with `| head`; Python would complain once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except MemoryError:
            return _failed(
                "out of memory\n  what to do: use a smaller model, window or batch",
                2,
                debug,
            )
        except Exception as error:
            if debug:
                raise
            detail = " ".join(str(error).split())[:300]
            return _failed(
                f"{type(error).__name__}: {detail}\n  this is a bug; rerun with --debug and report it",
                1,
                False,
            )


def _usage_text(error: BaseException) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "graphlathe"
    return f"{error.format_message()}\n  what to do: see '{command} --help'"  # type: ignore[attr-defined]


def _failed(message: str, code: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    print(
        f"graphlathe: {message}" if code == _INTERRUPTED else f"error: {message}",
        file=sys.stderr,
    )
    return code


if __name__ == "__main__":
    main()
