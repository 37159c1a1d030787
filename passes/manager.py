"""The pass manager: runs a pipeline on a copy of a program, checks every pass, and reports.

For each pass: what it needs is made or asked for, `check`, `run`, clean-up of weights that nothing reads any more,
verification, `ensure`, and the check of its effect (see `passes.contract`). An error names the pass, and leaves the
given program as it was.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from torch import fx

from ..ir.errors import GraphlatheError, InputError, PreconditionError
from ..ir.program import Program
from .base import Batch, Context, Effect, Pass, Prop, Stats
from .contract import Contract
from .fidelity import counts
from .instruments import Event, Instrument
from .pipeline import Pipeline, Repeat, parse_pipeline
from .progress import Progress, progress_for
from .registry import get
from .report import Report, Row, Size

CANONICALIZE = "canonicalize"


class PassManager:
    """Runs pipelines.

    Args:
        passes: what `parse_pipeline` takes.
        feeds: named example inputs, for the differential run around exact passes (None: not done, and reported so).
        calibration: batches of named inputs, for passes that look at data and for measuring drift.
        verify: level of `ir.verify.verify` after each pass; 0 switches it off.
        differential: whether exact passes are run against the graph before.
        budget: bounds on the drift, see `passes.contract.Contract`.
        costs: whether to compute MACs and peak activation bytes for the report.
        drift_batches: on how many calibration batches drift is measured; None: on all.
        progress: whether slow loops show a bar (on a terminal only).
        instruments: watch or steer the run.
        executor: a `concurrent.futures.Executor` that evaluates the candidates of searches; None: this process.
        journal: a folder that keeps what searches evaluated, so that one that was stopped goes on.
        workspace: a folder that the executor's workers can read, where they are on other machines.
        teacher: what a distillation learns from; None: the program that is given to `run`.
    """

    def __init__(
        self,
        passes: Any,
        *,
        feeds: Batch | None = None,
        calibration: Sequence[Batch] | None = None,
        verify: int = 1,
        differential: bool = True,
        budget: Mapping[str, float] | None = None,
        costs: bool = True,
        drift_batches: int | None = None,
        progress: bool = False,
        instruments: Sequence[Instrument] = (),
        executor: Executor | None = None,
        journal: Path | None = None,
        workspace: Path | None = None,
        teacher: Program | None = None,
    ) -> None:
        self.pipeline = parse_pipeline(passes)
        self.feeds = feeds
        self.calibration = calibration
        if verify not in range(4):
            raise InputError(f"there is no verification level {verify!r}", expected="0, 1, 2 or 3")
        self.verify = verify
        self.differential = differential
        self.budget = budget
        self.costs = costs
        self.drift_batches = drift_batches
        self.progress: Progress = progress_for(progress)
        self.instruments = tuple(instruments)
        self.executor, self.journal, self.workspace = executor, journal, workspace
        self.teacher = teacher

    def run(self, program: Program) -> tuple[Program, Report]:
        """Run the pipeline.

        Args:
            program: stays as it is.

        Returns:
            The changed program, and the report.

        Raises:
            PreconditionError: a pass makes no sense for this program, or lacks something.
            PostconditionError: a pass broke its promise, or the drift is over budget.
            VerifyError: a pass left a malformed program.
            GraphlatheError: a pass failed.
        """
        start = time.perf_counter()
        run = _Run(self, program)
        run.pipeline(self.pipeline, "")
        run.report.seconds = time.perf_counter() - start
        return run.program, run.report


class _Stopped(Exception):
    """An instrument ended the pipeline."""


class _Run:
    """One run of a pipeline over one program."""

    def __init__(self, manager: PassManager, original: Program) -> None:
        self.manager = manager
        self.program = original.clone()
        self.program.listeners = [*original.listeners, self._on_rewrite]
        self.context = Context(
            calibration=manager.calibration,
            progress=manager.progress,
            original=manager.teacher or original,
            executor=manager.executor,
            journal=manager.journal,
            workspace=manager.workspace,
        )
        self.contract = Contract(
            original,
            manager.feeds,
            manager.calibration,
            budget=manager.budget,
            differential=manager.differential,
            progress=manager.progress,
            drift_batches=manager.drift_batches,
        )
        self.sizes = _example_sizes(original, manager.feeds)
        self.holds: set[Prop] = {Prop.CANONICAL} if _is_canonical(original) else set()
        self.size = self._measure()
        self.report = Report(pipeline=manager.pipeline.to_text(), before=self.size, after=self.size)
        self.report.sizes = self.sizes if manager.costs else {}

    def pipeline(self, pipeline: Pipeline, after: str) -> None:
        """Run everything; an instrument may stop it."""
        try:
            self._items(pipeline.items, after)
        except _Stopped as stopped:
            self.report.notes.append(str(stopped))
        self.program.listeners.remove(self._on_rewrite)
        self.report.after = self.size

    def _items(self, items: Sequence[Pass | Repeat], after: str) -> None:
        for position, item in enumerate(items):
            following = _join(*(i.to_text() for i in items[position + 1 :]), after)
            if isinstance(item, Pass):
                self._pass(item, following)
            else:
                self._repeat(item, following)

    def _repeat(self, group: Repeat, after: str) -> None:
        for left in reversed(range(group.max)):
            start = self.program.mutations
            again = Repeat(group.body, left).to_text() if left else ""
            self._items(group.body.items, _join(again, after))
            if self.program.mutations == start:
                return

    def _pass(self, pass_: Pass, after: str, wanted_by: str | None = None) -> None:
        """Run one pass with everything around it."""
        if Prop.CANONICAL in pass_.needs and Prop.CANONICAL not in self.holds:
            self._pass(get(CANONICALIZE)(), _join(pass_.to_text(), after), wanted_by=pass_.name)
        nodes = _count(self.program)
        row = Row(
            len(self.report.rows) + 1, pass_.to_text(), pass_.effect, wanted_by, nodes_before=nodes, before=self.size
        )
        event = Event(row.index, pass_, self.program, _join(row.text, after), row, manager=self.manager)
        if not all([i.before_pass(event) for i in self.manager.instruments]):
            self.report.notes.append(f"{pass_.name} was skipped by an instrument")
            return
        before = event.before = self.program.clone()
        try:
            self._checked(pass_, before, row)
        except GraphlatheError as error:
            error.pass_name = error.pass_name or pass_.name
            self._failed(event, error)
            raise
        except Exception as error:
            wrapped = GraphlatheError(
                f"it failed with {type(error).__name__}: {error}",
                pass_name=pass_.name,
                remedy="this is a bug in the pass: leave it out, and report it with a reproducer folder",
            )
            self._failed(event, wrapped)
            raise wrapped from error
        self.report.rows.append(row)
        if row.total_drift is not None:
            self.report.drift = row.total_drift
        if not all([i.after_pass(event) for i in self.manager.instruments]):
            raise _Stopped(f"stopped after {pass_.name}")

    def _checked(self, pass_: Pass, before: Program, row: Row) -> None:
        program = self.program
        self._needs(pass_)
        noted = self.contract.before(pass_, program)
        counted, start = program.mutations, time.perf_counter()
        pass_.check(program, self.context)
        stats = pass_.run(program, self.context)
        row.seconds = time.perf_counter() - start
        if program.mutations == counted:
            program.mutations += _uncounted(before, program)
        row.mutations = program.mutations - counted
        if row.mutations:
            _drop_unread(program)
            self.holds -= pass_.breaks
        start = time.perf_counter()
        self._verify(pass_, row)
        pass_.ensure(before, program, stats)
        self.contract.after(pass_, before, program, noted, row)
        row.check_seconds = time.perf_counter() - start
        if pass_.effect is not Effect.ANALYSIS:
            program.history.append(row.text)
        if pass_.name == CANONICALIZE:
            self.holds.add(Prop.CANONICAL)
        self.size = self._measure() if row.mutations else self.size
        _fill(row, stats, _count(program), self.size)

    def _needs(self, pass_: Pass) -> None:
        if Prop.SITES in pass_.needs and not self.context.structure(self.program).streams:
            raise PreconditionError(
                "the model has no residual stream, so it has no blocks",
                pass_name=pass_.name,
                remedy="`graphlathe dump --format tree MODEL` shows what was recognised",
            )
        if Prop.CALIBRATION in pass_.needs and not self.context.calibration:
            raise PreconditionError(
                "it needs calibration data", pass_name=pass_.name, remedy="pass calibration= (or --calibration FILE)"
            )
        data = self.context.calibration
        if data and pass_.effect is Effect.APPROXIMATE and not any(map(counts, data)):
            raise PreconditionError(
                "no position of the calibration data counts",
                pass_name=pass_.name,
                remedy="check the attention_mask of the calibration data",
            )

    def _verify(self, pass_: Pass, row: Row) -> None:
        level = self.manager.verify
        if level:
            from ..ir.verify import verify

            # Level 3 is level 2 and a differential run, which the contract does with the right reference.
            verify(self.program, min(level, 2), pass_name=pass_.name)

    def _failed(self, event: Event, error: GraphlatheError) -> None:
        for instrument in self.manager.instruments:
            instrument.on_error(event, error)

    def _on_rewrite(self, pass_name: str, kind: str, node: fx.Node) -> None:
        for instrument in self.manager.instruments:
            instrument.on_rewrite(pass_name, kind, node)

    def _measure(self) -> Size:
        program = self.program
        nodes, params, weight_bytes = _count(program), program.parameter_count, program.weight_nbytes
        if not self.manager.costs:
            return Size(nodes, params, weight_bytes)
        cost = program.cost(self.sizes)
        return Size(nodes, params, weight_bytes, int(cost.macs), int(cost.peak_activation_bytes))


def _fill(row: Row, stats: Stats, nodes: int, size: Size) -> None:
    row.nodes_after, row.after = nodes, size
    row.hits, row.attempts, row.misses = stats.hits, stats.attempts, stats.misses
    row.missed, row.plan, row.notes = stats.missed, stats.plan, stats.notes


def _join(*parts: str) -> str:
    return ",".join(part for part in parts if part)


def _count(program: Program) -> int:
    """Operators over all graphs."""
    return sum(node.op == "call_function" for graph in program.graphs.values() for node in graph.nodes)


def _is_canonical(program: Program) -> bool:
    return bool(program.history) and program.history[-1].partition("{")[0] == CANONICALIZE


def _example_sizes(program: Program, feeds: Batch | None) -> dict[str, int]:
    """Sizes of the named dimensions in the example, else those that the model was traced with."""
    traced = {name: dim.hint for name, dim in program.main.dims.by_name.items()}
    return traced | (program.check_feeds(feeds) if feeds is not None else {})


def _uncounted(before: Program, program: Program) -> int:
    """Changes that went around the rewriter: nodes, weights and signatures set directly."""
    weights = sum(before.weights.get(name) is not weight for name, weight in program.weights.items())
    ports = sum(
        (before.entries[n].inputs, before.entries[n].outputs) != (e.inputs, e.outputs) if n in before.entries else True
        for n, e in program.entries.items()
    )
    nodes = sum(_differing(before.graphs.get(name), graph) for name, graph in program.graphs.items())
    return nodes + weights + ports + len(before.weights.keys() - program.weights.keys())


def _differing(before: fx.Graph | None, graph: fx.Graph) -> int:
    """How many nodes are not what they were in the copy of the graph (names survive copying)."""
    old = [_shape_of(n) for n in before.nodes] if before is not None else []
    new = [_shape_of(n) for n in graph.nodes]
    return sum(a != b for a, b in zip(old, new, strict=False)) + abs(len(old) - len(new))


def _shape_of(node: fx.Node) -> tuple[Any, ...]:
    return node.op, node.target, str(node.args), str(node.kwargs)


def _drop_unread(program: Program) -> None:
    """Forget nested graphs and weights that no graph reads."""
    while True:
        read = {str(n.target) for g in program.graphs.values() for n in g.find_nodes(op="get_attr")}
        unread = program.subgraphs.keys() - read
        if not unread:
            break
        program.subgraphs = {name: graph for name, graph in program.subgraphs.items() if name not in unread}
    used = program.used_weights()
    program.weights = {name: weight for name, weight in program.weights.items() if name in used}
    program.tied = {name: kept for name, kept in program.tied.items() if kept in used}
