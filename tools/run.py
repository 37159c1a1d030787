"""``graphlathe run``: one model, once: its outputs' shapes and ranges, and the time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..ir.errors import InputError, suggest
from ..ir.files import check_writable, write_atomically
from ..ir.from_hub import load_tokenizer
from ..ir.program import Program
from .console import console, duration, new_table
from .describe import dtype_text
from .examples import example_feeds
from .sizes import parse_sizes
from .tokens import encode, find_tokenizer, load_arrays, token_feeds


@dataclass(frozen=True)
class RunOptions:
    """What to run it with; see the command's help."""

    backend: str = "onnxruntime"
    inputs: Sequence[str] = ()
    text: str | None = None
    tokenizer: Path | None = None
    sizes: Sequence[str] = ()
    seed: int = 0
    repeats: int = 5
    output: Path | None = None


def run_file(path: Path, options: RunOptions) -> None:
    """Load, compile, run, and print; optionally save the outputs as ``.npz``."""
    from ..ir.load import load
    from ..runtime.compile import compile as compile_program

    if options.output is not None:
        check_writable(_npz(options.output))
    if options.text is not None and options.sizes:
        raise InputError("--size and --text contradict each other", remedy="the text's tokens decide the sizes")
    if options.text is None and options.tokenizer is not None:
        raise InputError("--tokenizer is for --text", remedy="give --text, or leave it out")
    program = load(path)
    feeds = make_feeds(program, path, options)
    session = compile_program(program, backend=options.backend)
    outputs = session.run(feeds)
    times: list[float] = []
    for _ in range(options.repeats):
        start = time.perf_counter()
        session.run(feeds)
        times.append(time.perf_counter() - start)
    out = console()
    table = new_table(f"{path.name} on {options.backend}", ["", "name", "dtype", "shape"], ["min", "mean", "max"])
    for name, value in feeds.items():
        table.add_row("input", name, *_summary(value))
    for name, value in outputs.items():
        table.add_row("output", name, *_summary(value))
    out.print(table)
    best, middle = min(times), statistics.median(times)
    out.print(
        f"{duration(middle)} median, {duration(best)} best of {len(times)} runs after the first; "
        f"{torch.get_num_threads()} threads"
    )
    if options.output is not None:
        out.print(f"written: {_save(outputs, options.output)}")


def make_feeds(program: Program, path: Path, options: RunOptions) -> dict[str, Any]:
    """The inputs: text, then random ones for what is missing, then those from files, checked."""
    sizes = parse_sizes(options.sizes, program)
    if options.text is not None:
        tokenizer = load_tokenizer(find_tokenizer(options.tokenizer, path))
        ids = encode(tokenizer, options.text)
        if not ids:
            raise InputError("the text has no tokens", remedy="give a longer --text")
        feeds = token_feeds(program, torch.tensor([ids]))
    else:
        given = _read_inputs(program, options.inputs)
        feeds = example_feeds(program, {**_sizes_of(program, given), **sizes}, options.seed)
        feeds.update(given)
    if options.text is not None:
        feeds.update(_read_inputs(program, options.inputs))
    feeds = program.feeds(**feeds)
    program.check_feeds(feeds)
    return feeds


def _read_inputs(program: Program, items: Sequence[str]) -> dict[str, torch.Tensor]:
    given: dict[str, torch.Tensor] = {}
    for item in items:
        name, equals, file = item.partition("=")
        if not equals:
            raise InputError(f"'{item}' is not an input", expected="NAME=FILE.npy")
        if name not in program.main.inputs:
            known = program.main.inputs
            raise InputError(f"unknown input '{name}'{suggest(name, known)}", expected=f"inputs: {', '.join(known)}")
        arrays = load_arrays(Path(file))
        if name not in arrays and len(arrays) != 1:
            raise InputError(f"'{file}' holds {len(arrays)} arrays, none called '{name}'", expected=", ".join(arrays))
        given[name] = arrays.get(name, next(iter(arrays.values())))
    return given


def _sizes_of(program: Program, given: dict[str, torch.Tensor]) -> dict[str, int]:
    """The sizes of dynamic dimensions that given inputs imply."""
    sizes: dict[Any, int] = {}
    for name, value in given.items():
        declared = program.main.input_node(name).meta["val"]
        program.main.dims.bind(name, tuple(declared.shape), value.shape, sizes)
    return {dim.name: sizes[dim.symbol] for dim in program.main.dims.by_name.values() if dim.symbol in sizes}


def _summary(value: Any) -> tuple[str, str, str, str, str]:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__, "", str(value), "", ""
    shape = "[" + ", ".join(str(size) for size in value.shape) + "]"
    if not value.numel():
        return dtype_text(value.dtype), shape, "", "", ""
    numbers = value.double() if not value.is_complex() else value.abs().double()
    low, mean, high = (f"{float(f):.5g}" for f in (numbers.min(), numbers.mean(), numbers.max()))
    return dtype_text(value.dtype), shape, low, mean, high


def _save(outputs: dict[str, Any], path: Path) -> Path:
    import numpy as np

    arrays = {name: _array(value) for name, value in outputs.items()}
    target = _npz(path)
    write_atomically(target, lambda partial: np.savez(partial, **arrays))
    return target


def _npz(path: Path) -> Path:
    return path if path.suffix == ".npz" or (path.exists() and not path.is_file()) else Path(f"{path}.npz")


def _array(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        # NumPy has no bfloat16 and no 8-bit floats.
        return (
            (value.float() if value.dtype.is_floating_point and value.dtype.itemsize < 4 else value)
            .detach()
            .cpu()
            .numpy()
        )
    return value
