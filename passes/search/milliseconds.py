"""What a change saves in milliseconds: measured in ONNX Runtime, not guessed from operation counts.

Programs are timed in turn in one process and compared round by round (`paired_timing`); with one thread, rounds that
other work disturbed are repeated.

A search needs the milliseconds of thousands of combinations. They are taken to add up: each class of equal sites is
measured once at each level, with all of its sites at that level, which is a large and therefore well measured change,
and divided by their number.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from ...ir.errors import GraphlatheError
from ...ir.program import Program
from ...runtime.compile import compile
from ...runtime.session import ProgramSession, as_tensor
from ..progress import Progress, silent
from .millisecond_table import MillisecondTable, Setting, key_text
from .paired_timing import DISTURBED, FEWEST, Call, paired_rounds

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Milliseconds(Generic[Key]):
    """What levels save.

    Attributes:
        baseline: milliseconds of the unchanged program.
        saved: milliseconds saved per site, by key: the median over the rounds of baseline minus variant, divided by the
            count. Negative where the change makes it slower.
        runs: how often a program was run for it here, warming up and disturbed rounds included.
    """

    baseline: float
    saved: Mapping[Key, float]
    runs: int


def measure_ms(
    programs: Mapping[str, Program],
    feeds: Mapping[str, Any],
    *,
    repeats: int = FEWEST,
    threads: int = 1,
    disturbed: float = DISTURBED,
) -> dict[str, float]:
    """Milliseconds of one call of each program in ONNX Runtime, on the CPU.

    All are in memory at once, each with its own packed copy of the weights: for large models, a few at a time.

    Args:
        programs: what to measure, by name.
        feeds: a tensor or array for each input; those that a program does not have are left out.
        repeats: undisturbed rounds, at least 9; the median counts.
        threads: threads within an operator. Disturbances can be told with one thread only.
        disturbed: wall time per CPU time beyond which a round is repeated.

    Returns:
        Milliseconds by name.

    Raises:
        GraphlatheError: onnxruntime is not installed, too few repeats, or the machine is too busy.
        ExportError: a program cannot be exported.
        InputError: the feeds do not fit.
    """
    with ExitStack() as stack:
        calls = {name: _call(stack.enter_context(_session(p, threads)), feeds) for name, p in programs.items()}
        rounds = paired_rounds(calls, repeats=repeats, disturbed=disturbed if threads == 1 else math.inf)
    return {name: 1000 * statistics.median(seconds) for name, seconds in rounds.items()}


def _session(program: Program, threads: int) -> ProgramSession:
    return compile(program, backend="onnxruntime", threads=threads)


def _call(session: ProgramSession, feeds: Mapping[str, Any]) -> Call:
    given = {name: as_tensor(feeds[name]) for name in session.inputs if name in feeds}

    def call() -> None:
        session.reset()  # a state that grows from call to call would make later rounds slower
        session.run(given)

    return call


def ms_table(
    baseline: Program,
    variants: Mapping[Key, Callable[[], Program]],
    counts: Mapping[Key, int],
    feeds: Mapping[str, Any],
    path: Path | None = None,
    *,
    repeats: int = FEWEST,
    threads: int = 1,
    at_once: int = 3,
    disturbed: float = DISTURBED,
    progress: Progress = silent,
) -> Milliseconds[Key]:
    """Milliseconds that each level of each class of sites saves, per site.

    Args:
        baseline: the unchanged program.
        variants: by key (class and level), what makes the program in which all sites of the class are at that level. It
            is called only when there is something to measure. The key must name the change: a file is asked by it.
        counts: by key, the sites that are changed in that program.
        feeds: the inputs to measure on.
        path: a file that keeps what was measured, for the same program, machine, version, threads and sizes only.
        repeats, threads, disturbed: see `measure_ms`.
        at_once: variants that are in memory at a time, beside the baseline.
        progress: shows a bar.

    Raises:
        GraphlatheError: as `measure_ms`; or a count is missing or not positive, a key cannot be written, or the file is
            no such table.
    """
    texts = _checked(variants, counts)
    if at_once < 1:
        raise GraphlatheError(f"at_once is {at_once}", expected="at least 1")
    table = MillisecondTable() if path is None else MillisecondTable.load(path)
    # Without a file nothing is looked up, and the weights need not be hashed.
    setting = Setting("", "", "", threads, ()) if path is None else Setting.here(baseline, feeds, threads)
    places = {key: (setting, texts[key], counts[key]) for key in variants}
    missing = [key for key in variants if places[key] not in table.saved]
    groups = [missing[i : i + at_once] for i in range(0, len(missing), at_once)]
    if not groups and setting not in table.baseline:
        groups = [[]]
    seconds: list[float] = []
    runs = 0

    def counted(session: ProgramSession) -> Call:
        call = _call(session, feeds)

        def run() -> Any:
            nonlocal runs
            runs += 1
            return call()

        return run

    with ExitStack() as whole:
        reference = counted(whole.enter_context(_session(baseline, threads))) if groups else None
        for group in progress(groups, len(groups), "milliseconds"):
            assert reference is not None
            with ExitStack() as stack:
                calls = {"": reference}
                for key in group:
                    calls[texts[key]] = counted(stack.enter_context(_session(variants[key](), threads)))
                rounds = paired_rounds(calls, repeats=repeats, disturbed=disturbed if threads == 1 else math.inf)
            seconds += rounds[""]
            table.baseline[setting] = 1000 * statistics.median(seconds)
            for key in group:
                table.saved[places[key]] = 1000 * _median_gain(rounds[""], rounds[texts[key]]) / counts[key]
            if path is not None:
                table.save(path)
    return Milliseconds(table.baseline[setting], {key: table.saved[places[key]] for key in variants}, runs)


def _median_gain(before: Sequence[float], after: Sequence[float]) -> float:
    return statistics.median(b - a for b, a in zip(before, after, strict=True))


def _checked(variants: Mapping[Key, Any], counts: Mapping[Key, int]) -> dict[Key, str]:
    """The keys' texts: JSON, so that none is that of the baseline, which is empty."""
    texts = {key: key_text(key) for key in variants}
    for key, text in texts.items():
        if counts.get(key, 0) < 1:
            raise GraphlatheError(f"the number of changed sites of {text} is {counts.get(key)}", expected="at least 1")
    return texts
