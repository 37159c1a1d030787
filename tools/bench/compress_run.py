"""The protocol of the compression suites: each method in a process of its own, all results measured by the same code.

For every subject: the dense model is written and measured once; then, at every level, each method writes a file, and
that file is measured beside the dense one. A method that fails is a row with its reason. Same seed, same data, same
exporter, one thread.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...ir.errors import GraphlatheError
from .base import Result, Row, Run
from .compress_goals import goals_of, latency_over_macs
from .compress_methods import PACKAGE, Level, Method
from .compress_ours import OURS
from .compress_peers import install, peers_of
from .compress_subject import SUBJECTS, Case
from .machine import commit, cpu_model
from .measure import measure_in_subprocess

STEP_TIMEOUT = 6 * 3600.0
_ONLY_RECORDED = ("recipe", "commit", "pipeline", "dense_", "rejected_rounds", "search_seconds")
"""Starts of the columns that the JSON has and the table has not: the paired times of the dense model serve ratios."""
_THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Part:
    """One subject of a suite.

    Attributes:
        case: what is measured, and how much.
        quick: the same, small.
        levels: the levels, from the dense model's facts (`compress_facts.facts`) and its measured row.
        quick_levels: how many of them a quick run has.
    """

    case: Case
    quick: Case
    levels: Callable[[Mapping[str, Any], Row], Sequence[Level]]
    quick_levels: int = 1


def run_parts(suite: str, parts: Sequence[Part], context: Run) -> Result:
    """Measure all parts of a suite."""
    folder, missing = install(context.peers)
    result = Result()
    result.notes += [f"{package}: {reason}" for package, reason in missing.items()]
    with _one_thread(), tempfile.TemporaryDirectory(prefix="graphlathe-compress-") as work:
        for part in parts:
            case = replace(part.quick if context.quick else part.case, peers=str(folder), work=work)
            _run_part(suite, part, case, Path(work), context, result)
    result.notes += [
        "one thread; times are medians of processor time over rounds that were undisturbed (wall / processor <= 1.3)",
        "search units: the work of the search over that of one token (or image) in the dense model; ours include the "
        "passes' own reports of drift",
        "latency over MACs: by how much of its share the time of the longest input fell, over that of multiply-adds",
    ]
    return result


@contextmanager
def _one_thread() -> Generator[None]:
    old = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(_THREADS)
    try:
        yield
    finally:
        for name, value in old.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _run_part(suite: str, part: Part, case: Case, work: Path, context: Run, result: Result) -> None:
    methods = [*OURS[suite], *peers_of(suite)]
    known = [row for row in context.known if row.get("recipe") and row.get("model") == case.model]
    earlier = {row["recipe"]: row for row in known if row["level"] != "dense"}
    made = {"commit": commit(), "cpu": cpu_model()}
    another = context.only is not None and _names_another(context.only, case.model)
    if another and not earlier:
        return
    context.say(f"{case.model}: the dense model")
    dense = work / f"{case.model}-dense.onnx"
    written = measure_in_subprocess(
        f"{PACKAGE}.compress_facts:write_dense", {"case": case.to_json(), "target": str(dense)}, timeout=STEP_TIMEOUT
    )
    facts: dict[str, Any] = written.result
    if facts["source"]:
        result.notes.append(f"{case.model}: text from {facts['source']}")
    recipe = _recipe(case)
    bases = {row.get("cpu"): row for row in known if row["recipe"] == recipe}
    base = bases.get(made["cpu"]) or (next(iter(bases.values()), None) if another else None)
    if base is None or not (another or _complete(base)):
        head = {"model": case.model, "level": "dense", "method": "-", "by": "-", "state": "ok"}
        base = head | _measured(case, dense, dense) | {"recipe": recipe} | made
    result.rows += (bases | {base.get("cpu"): base}).values()
    rows: list[tuple[Method, Level, Row]] = []
    levels = list(part.levels(facts, base))
    for level in levels[: part.quick_levels] if context.quick else levels:
        for method in methods:
            name = f"{case.model}, {level.name}, {method.by}: {method.label}"
            recipe = _recipe(case, method, level)
            if not method.fits(case.model, level):
                continue
            row, chosen = earlier.get(recipe), not context.only or context.only in name
            if row is None and not chosen:
                continue
            if row is None or (chosen and not _complete(row)):
                context.say(name)
                row = run_method(method, level, case, dense, work) | {"recipe": recipe} | made
                share = latency_over_macs(row, base)
                row |= {} if math.isnan(share) else {"latency_over_macs": share}
            rows.append((method, level, row))
            result.rows.append(row)
            result.hidden = _hidden(result.rows)
            context.save(_with_rest(result, context.known))
            if row.get("pipeline"):
                result.notes.append(f"{name} = {row['pipeline']}")
    result.goals += goals_of(case.model, base, rows)


def _hidden(rows: Sequence[Row]) -> frozenset[str]:
    """Columns that tables leave out; the processor, where there is one only."""
    one = ["cpu"] if len({row.get("cpu") for row in rows}) < 2 else []
    return frozenset([*one, *(key for each in rows for key in each if key.startswith(_ONLY_RECORDED))])


def _complete(row: Row) -> bool:
    """Whether there is nothing to measure again: it did not fail, and no time was too disturbed to count."""
    return row["state"] == "ok" and not any(value is None for key, value in row.items() if key.endswith("_seconds"))


def _with_rest(result: Result, known: Sequence[Row]) -> Result:
    """What there is so far, and the earlier rows that have not had their turn: a run that is stopped loses none."""
    seen = {row.get("recipe") for row in result.rows}
    return replace(result, rows=[*result.rows, *(row for row in known if row.get("recipe") not in seen)])


def _names_another(only: str, model: str) -> bool:
    """Whether a text that selects rows is about another subject than this one."""
    others = [name for name in SUBJECTS if name != model]
    return only not in model and any(only in name or only.startswith(name) for name in others)


def _recipe(case: Case, method: Method | None = None, level: Level | None = None) -> str:
    """What tells whether a row of an earlier record is the same measurement: a hash of all that it was made from."""
    others = ("peers", "work") if method is not None and method.trained else ("peers", "work", "training")
    sizes = {key: value for key, value in case.to_json().items() if key not in others}
    made = None if method is None else [method.by, method.label, method.step, dict(method.arguments)]
    # A limit in milliseconds is a share of what the dense model took on this machine; ``main`` says who else is asked.
    left_out = ("ms", "main")
    limits = None if level is None else {key: value for key, value in level.to_json().items() if key not in left_out}
    here = [cpu_model()] if level is not None and level.ms else []
    return hashlib.sha256(json.dumps([sizes, made, limits, *here], sort_keys=True).encode()).hexdigest()[:12]


def run_method(method: Method, level: Level, case: Case, dense: Path, work: Path) -> Row:
    """One method at one level: its row, or a row that says why there is nothing to measure."""
    row: Row = {"model": case.model, "level": level.name, "method": method.label, "by": method.by, "state": "ok"}
    arguments = {"case": case.to_json(), "level": level.to_json(), **method.arguments}
    with tempfile.TemporaryDirectory(dir=work) as folder:
        target = Path(folder) / "changed.onnx"
        try:
            made = measure_in_subprocess(method.step, {**arguments, "target": str(target)}, timeout=STEP_TIMEOUT)
            row |= {key: value for key, value in made.result.items() if key != "plan"}
            row["peak_bytes"] = made.peak_rss_bytes
            row |= _measured(case, dense, target)
        except GraphlatheError as error:
            return row | {"state": f"failed: {_reason(error)}"}
    return row


def _reason(error: GraphlatheError) -> str:
    text = " ".join(str(error).split())
    # Which function failed in which process is known from the row.
    return text.partition("failed in a process of its own: ")[2][:200] or text[:200]


def _measured(case: Case, dense: Path, changed: Path) -> Row:
    arguments = {"case": case.to_json(), "dense": str(dense), "changed": str(changed)}
    found: Row = measure_in_subprocess(f"{PACKAGE}.compress_evaluate:evaluate", arguments, timeout=STEP_TIMEOUT).result
    return found
