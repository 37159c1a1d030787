"""Bisection: which pass of a pipeline broke the output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..ir.errors import GraphlatheError, InputError
from ..ir.program import Program
from ..ir.verify import TOLERANCE, output_error
from .base import Batch
from .instruments import Instrument, Snapshots
from .manager import PassManager


@dataclass(frozen=True)
class Culprit:
    """The first pass after which a program is bad.

    Attributes:
        index: its number in the run, from 1.
        text: its canonical text.
        before, after: the program before and after it.
    """

    index: int
    text: str
    before: Program
    after: Program


def bisect(
    program: Program,
    passes: Any,
    is_good: Callable[[Program], bool] | None = None,
    *,
    feeds: Batch | None = None,
    calibration: Sequence[Batch] | None = None,
    tol: float | None = None,
    instruments: Sequence[Instrument] = (),
) -> Culprit | None:
    """Find the pass that broke the output.

    The pipeline runs once, its checks switched off, and the program after each pass is kept (weights are shared). Then
    ``is_good`` is asked about a logarithmic number of them; it should stay false once it is false.

    Args:
        program: the program before the pipeline.
        passes: what `parse_pipeline` takes.
        is_good: whether a program's behaviour is right; by default its outputs on ``feeds`` are compared with those of
            ``program``.
        feeds: named inputs for that comparison.
        calibration: for passes that look at data.
        tol: largest relative error of the comparison; by default design tolerances by dtype.
        instruments: watch the run.

    Returns:
        The culprit; None if the result of the whole pipeline is good.

    Raises:
        InputError: neither ``is_good`` nor ``feeds`` is given, or the program is bad before any pass.
    """
    if is_good is None:
        if feeds is None:
            raise InputError("bisect needs to know what is good", remedy="pass is_good=, or feeds= to compare on")
        is_good = _same_outputs(program, feeds, tol)
    if not is_good(program):
        raise InputError("the program is bad before any pass has run", remedy="check the predicate, or the model")
    snapshots = Snapshots()
    manager = PassManager(
        passes,
        calibration=calibration,
        verify=0,
        differential=False,
        costs=False,
        instruments=[snapshots, *instruments],
    )
    manager.run(program)
    kept = snapshots.programs
    if len(kept) < 2 or is_good(kept[-1][1]):
        return None
    good, bad = 0, len(kept) - 1
    while bad - good > 1:
        middle = (good + bad) // 2
        if is_good(kept[middle][1]):
            good = middle
        else:
            bad = middle
    return Culprit(bad, kept[bad][0], kept[good][1], kept[bad][1])


def _same_outputs(program: Program, feeds: Batch, tol: float | None) -> Callable[[Program], bool]:
    expected = program.run(program.feeds(**feeds))

    def is_good(candidate: Program) -> bool:
        try:
            actual = candidate.run(candidate.feeds(**feeds))
        except GraphlatheError:
            return False
        for name, want in expected.items():
            allowed = tol if tol is not None else TOLERANCE.get(getattr(want, "dtype", None), 0.0)  # type: ignore[arg-type]
            if name not in actual or not output_error(actual[name], want) <= allowed:
                return False
        return True

    return is_good
