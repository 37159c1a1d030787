"""What a method of the compression suites is, at which levels it runs, and the step that makes one of our own results.

A method is a label, who made it, and a step: a function ``module:name`` that gets the case, a level and a file to
write, in a process of its own, and answers with what the search cost. Our methods (`compress_ours`) are pipeline
strings in which ``$ratio``, ``$count``, ``$params``, ``$macs`` and ``$ms`` stand for the level's numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from string import Template
from typing import Any

from ...ir.errors import GraphlatheError
from ...passes.optimize import optimize
from ...passes.search.plan import FORMAT
from .base import Row
from .compress_subject import Case, subject_of
from .compress_work import Search

PACKAGE = __package__


@dataclass(frozen=True)
class Level:
    """How much is to go.

    Attributes:
        name: in the tables.
        ratio: share of the units (blocks, neurons, heads) that are removed; or of what the suite says.
        count: how many blocks that is.
        params: parameters that may be left.
        macs: multiply-adds that may be left, at the subject's sizes.
        ms: milliseconds that may be left in ONNX Runtime, at the longest timed input.
        peers: whether the other tools are asked, too.
        main: whether methods run that are too slow for every level.
    """

    name: str
    ratio: float
    count: int = 0
    params: int = 0
    macs: int = 0
    ms: float = 0.0
    peers: bool = True
    main: bool = False

    def to_json(self) -> Row:
        """The level as JSON data."""
        return asdict(self)


@dataclass(frozen=True)
class Method:
    """A way to compress.

    Attributes:
        label: in the tables.
        by: ``ours``, or the package's name and version.
        step: ``module:function``; called with ``case``, ``level``, ``target`` and ``arguments``.
        arguments: more keyword arguments, JSON data.
        restores: the label of the same method without training, whose loss this one is to win back.
        trained: whether it trains; without training and with it are different leagues.
        sparse: its zeros stay in place: it is compared at equal numbers that are not zero.
        models: the subjects it is for; empty: all.
        levels: the levels it is for, by name; empty: all.
        main: only for the suite's main level.
        whole: leaves out whole blocks: what another shape of the same size is to beat.
    """

    label: str
    by: str
    step: str
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    restores: str | None = None
    trained: bool = False
    sparse: bool = False
    models: tuple[str, ...] = ()
    levels: tuple[str, ...] = ()
    main: bool = False
    whole: bool = False

    def fits(self, model: str, level: Level) -> bool:
        """Whether it is to be run there."""
        named = (not self.models or model in self.models) and (not self.levels or level.name in self.levels)
        return named and (level.peers or self.by == "ours") and (level.main or not self.main)


_ROUNDING = 1.0001
"""Parameters that ours may have, over the level's: tables of constants are counted by some, and not by others, and a
model without the blocks that the level is made of must not be over the budget."""


def fill(pipeline: str, level: Mapping[str, Any]) -> str:
    """The pipeline with the level's numbers in it.

    Raises:
        GraphlatheError: it names a number that levels do not have.
    """
    numbers = {key: f"{value:.6g}" if isinstance(value, float) else str(value) for key, value in level.items()}
    if "params" in level:
        numbers["params"] = str(int(_ROUNDING * level["params"]))
    try:
        return Template(pipeline).substitute(numbers)
    except (KeyError, ValueError) as error:
        raise GraphlatheError(f"in the pipeline '{pipeline}': {error}", expected=f"of {', '.join(numbers)}") from error


def run_pipeline(
    case: Mapping[str, Any],
    level: Mapping[str, Any],
    target: str,
    pipeline: str,
    rank: int = 0,
    then: str | None = None,
    trains: bool = False,
    training: int | None = None,
) -> Row:
    """Run one of our pipelines on the dense program and write the ONNX file.

    What differs from a pipeline that the same run has made before only in ``rank`` or ``then`` takes its plans instead
    of searching for them again; the search's cost counts all the same.

    Args:
        case, level, target: see the module's text.
        pipeline: with ``$`` numbers.
        rank: what ``$rank`` stands for: the rank of the maps in place of what is dropped whole.
        then: passes that train what came out, on more of the same text, to answer as the dense program does.
        trains: whether the pipeline trains by itself and gets as much.
        training: pieces of text to train on; None: as many as the case says.
    """
    chosen = Case.from_json(case)
    chosen = chosen if training is None else replace(chosen, training=training)
    subject = subject_of(chosen)
    module = subject.module()
    batches = subject.training() if trains else subject.calibration()
    program = subject.program(module)
    text = fill(pipeline, {**level, "rank": rank})
    own, plain = _Kept(chosen, text), _Kept(chosen, fill(pipeline, {**level, "rank": 0}))
    source = next((kept for kept in (own, plain) if kept.exists), None)
    steps = text if source is None else source.pipeline(rank if "$rank" in pipeline else None)
    with Search(subject, module) as search:
        # Quality is measured on the test data, for all methods alike.
        settings: dict[str, Any] = {"progress": False, "costs": False, "drift_batches": 0}
        result = optimize(program, passes=steps, calibration=batches, **settings)
        plan = result.plan
        if then is not None:
            result = optimize(result, passes=then, calibration=subject.training(), teacher=program, **settings)
    result.export_onnx(target, fallback=False)
    # What was timed in ONNX Runtime; a plan that is taken over holds its own, which are in its cost.
    runs = 0 if source is not None else sum(made.get("budget", {}).get("runs", 0) for made in plan.values())
    row = search.row(outside=runs * subject.units(batches[0]))
    if source is not None:
        row = {key: value + source.cost()[key] for key, value in row.items()}
    elif then is None:
        own.save(plan, row)
    return {"pipeline": text if then is None else f"{text},{then}", **row, "plan": {**plan, **result.plan}}


class _Kept:
    """The plans of a pipeline, and what they cost, in the folder of the run."""

    def __init__(self, case: Case, pipeline: str) -> None:
        name = hashlib.sha256(f"{case.model} {pipeline}".encode()).hexdigest()[:12]
        self._folder = Path(case.work) / name if case.work else None

    @property
    def exists(self) -> bool:
        return self._folder is not None and (self._folder / "cost.json").is_file()

    def pipeline(self, rank: int | None) -> str:
        """The plans as a pipeline, with maps of this rank in place of what they drop; None: of their own."""
        assert self._folder is not None
        plans = sorted(self._folder.glob("plan-*.json"))
        for plan in plans if rank is not None else ():
            plan.write_text(json.dumps({**json.loads(plan.read_text()), "rank": rank}))
        return ",".join(["canonicalize", *(f'apply-plan{{path="{plan}"}}' for plan in plans)])

    def cost(self) -> Row:
        assert self._folder is not None
        found: Row = json.loads((self._folder / "cost.json").read_text())
        return found

    def save(self, plans: Mapping[str, Mapping[str, Any]], cost: Row) -> None:
        """Keep them, unless a pass did something that no plan holds."""
        found = list(plans.values())
        if self._folder is None or not found or any(plan.get("format") != FORMAT for plan in found):
            return
        self._folder.mkdir(exist_ok=True)
        for index, plan in enumerate(found):
            (self._folder / f"plan-{index}.json").write_text(json.dumps(plan))
        (self._folder / "cost.json").write_text(json.dumps(cost))
