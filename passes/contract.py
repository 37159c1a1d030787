"""Checks that a pass kept what its effect promises.

| effect | check |
|---|---|
| analysis | fingerprint equal before and after |
| exact, extends, reforms | differential run on the example inputs against the graph before the pass |
| approximate | drift on calibration data, else on the example inputs; bounded by the budget |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..ir.errors import InputError, PostconditionError, suggest
from ..ir.program import Program
from ..ir.verify import TOLERANCE, output_error
from .base import Batch, Effect, Pass
from .fidelity import Drift, measure_drift, seeded
from .progress import Progress
from .report import Row

BUDGETS = ("drift", "kl", "relative", "top1")


class Contract:
    """Knows the data on which promises are checked, and the first program.

    Args:
        original: the program before the pipeline (must not change).
        feeds: named example inputs, for the differential run; None switches it off.
        calibration: batches for measuring drift.
        budget: bounds for the drift from ``original``: ``drift`` (KL where outputs look like logits, else the relative
            error), ``kl``, ``relative`` (largest allowed), ``top1`` (smallest allowed agreement).
        differential: whether to run exact passes against the graph before.
        progress: shows bars.
        drift_batches: on how many of the batches drift is measured, evenly spread; None: on all, 0: it is not.
    """

    def __init__(
        self,
        original: Program,
        feeds: Batch | None,
        calibration: Sequence[Batch] | None,
        *,
        budget: Mapping[str, float] | None = None,
        differential: bool = True,
        progress: Progress,
        drift_batches: int | None = None,
    ) -> None:
        self.original = original
        self.feeds = feeds
        every: Sequence[Batch] = calibration or ([feeds] if feeds is not None else [])
        count = len(every) if drift_batches is None else min(drift_batches, len(every))
        self.batches: Sequence[Batch] = [every[index * len(every) // count] for index in range(count)]
        self.switched_off = drift_batches == 0
        self.source = "calibration" if calibration else "example inputs"
        self.budget = checked_budget(budget)
        self.differential = differential
        self.progress = progress
        self.has_numbers = not any(original.weights[name].is_meta for name in original.used_weights())
        self.drifted = False
        self._outputs: dict[str, Any] | None = None  # of the current program, on the example inputs

    @property
    def _blocked(self) -> str | None:
        """Why nothing can be run, if so."""
        return None if self.has_numbers else "the weights have no numbers (meta device)"

    def before(self, pass_: Pass, program: Program) -> str | None:
        """Note what an analysis must leave equal."""
        return program.fingerprint() if pass_.effect is Effect.ANALYSIS else None

    def after(self, pass_: Pass, before: Program, program: Program, noted: str | None, row: Row) -> None:
        """Check the promise and fill in the row.

        Raises:
            PostconditionError: it was broken, or the drift is over budget.
        """
        if pass_.effect is Effect.ANALYSIS:
            if row.mutations or program.fingerprint() != noted:
                raise PostconditionError("an analysis changed the graph", pass_name=pass_.name, expected="no change")
            return
        if pass_.effect is Effect.APPROXIMATE:
            self._outputs = None if row.mutations else self._outputs
            self._drift(pass_, before, program, row)
            return
        self._equal(pass_, before, program, row)

    def _equal(self, pass_: Pass, before: Program, program: Program, row: Row) -> None:
        if not self.differential or self.feeds is None or self._blocked:
            row.unchecked = self._blocked or ("no example inputs" if self.differential else "switched off")
            self._outputs = None
            return
        if not row.mutations:
            row.error = 0.0
            return
        expected = self._outputs if self._outputs is not None else seeded(lambda: before.run(self._given()))
        actual = seeded(lambda: pass_.call_as_before(before, program, self._given()))
        row.error, row.tolerance = 0.0, 0.0
        for name, want in expected.items():
            if name not in actual:
                raise PostconditionError(f"the output '{name}' is gone", pass_name=pass_.name)
            error, tolerance = output_error(actual[name], want), _tolerance(want)
            row.error, row.tolerance = max(row.error, error), max(row.tolerance, tolerance)
            if not error <= tolerance:
                raise PostconditionError(
                    f"it promises equal outputs, but '{name}' differs by {error:.3g} (relative to its largest number)",
                    pass_name=pass_.name,
                    expected=f"at most {tolerance:g}",
                    remedy="this is a bug in the pass: leave it out, and report it with a reproducer folder",
                )
        # After a pass that adds outputs, or changes the interface, the next reference has to be run.
        self._outputs = actual if pass_.effect is Effect.EXACT else None
        if pass_.effect is Effect.REFORMS:
            self.feeds = None

    def _given(self) -> Batch:
        assert self.feeds is not None
        return self.feeds

    def _drift(self, pass_: Pass, before: Program, program: Program, row: Row) -> None:
        if not self.batches or self._blocked:
            missing = "switched off" if self.switched_off else "no calibration data or example inputs"
            row.unchecked = self._blocked or missing
            if self.budget:
                raise PostconditionError(
                    f"the budget cannot be checked: {row.unchecked}", pass_name=pass_.name, remedy="pass calibration="
                )
            return
        if not row.mutations:
            row.drift = Drift(0.0, batches=0, source=self.source)
            return

        def run(batch: Batch) -> Mapping[str, Any]:
            return pass_.call_as_before(before, program, batch)

        row.drift = measure_drift(run, before, self.batches, source=self.source, progress=self.progress)
        row.total_drift = row.drift
        if self.drifted:
            row.total_drift = measure_drift(
                run, self.original, self.batches, source=self.source, progress=self.progress
            )
        self.drifted = True
        self._within_budget(pass_, row.total_drift)

    def _within_budget(self, pass_: Pass, drift: Drift) -> None:
        for key, limit in self.budget.items():
            value = drift.headline if key == "drift" else getattr(drift, key)
            if value is None:
                raise PostconditionError(
                    f"the budget names '{key}', but no output looks like logits",
                    pass_name=pass_.name,
                    remedy="bound 'relative' instead",
                )
            kept = value >= limit if key == "top1" else value <= limit
            if not kept:
                word = "at least" if key == "top1" else "at most"
                raise PostconditionError(
                    f"the drift is over budget: {key} is {value:.4g} after this pass",
                    pass_name=pass_.name,
                    expected=f"{word} {limit:g}",
                    remedy="use milder settings, or a larger budget; the given model is unchanged",
                )


def checked_budget(budget: Mapping[str, float] | None) -> dict[str, float]:
    """A budget whose names and limits make sense.

    Raises:
        InputError: they do not.
    """
    if budget is not None and not isinstance(budget, Mapping):
        raise InputError(f"the budget is a {type(budget).__name__}", expected="a dict such as {'drift': 0.1}")
    for key, limit in (budget or {}).items():
        if key not in BUDGETS:
            raise InputError(f"unknown budget '{key}'{suggest(key, BUDGETS)}", expected=f"any of: {', '.join(BUDGETS)}")
        if not isinstance(limit, (int, float)) or math.isnan(limit) or limit < 0:
            raise InputError(f"the budget for '{key}' is {limit!r}", expected="a number of at least 0")
    return dict(budget or {})


def _tolerance(value: Any) -> float:
    return TOLERANCE.get(value.dtype, 0.0) if isinstance(value, torch.Tensor) else 0.0
