"""Suite ``onnx-coverage``: how much of ONNX can be imported, on onnx's own backend tests.

Each test's model is imported and run; then it is exported by us and run in ONNX Runtime. Both must give the outputs
that onnx expects, within onnx's tolerances. The tests are run in processes of their own, so that one that ends its
process is reported, and the others are run all the same.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ...ir.errors import GraphlatheError
from .base import Goal, Result, Row, Run, Suite
from .measure import measure_in_subprocess
from .onnx_cases import KINDS, Case, by_operator, cases, downloads
from .onnx_coverage_steps import STATES, Outcome

NODE_SHARE = 97.0
_STEPS = f"{__package__}.onnx_coverage_steps:run_cases"
_PASSED = ("passed", "specialised")


def run(context: Run) -> Result:
    """Run all cases (``quick``: the fixed tenth; ``only``: those whose name or operator contains a text)."""
    chosen = choose(context)
    outcomes = run_all(list(chosen), context)
    result = Result()
    nodes = [case for case in chosen.values() if case.kind == "node"]
    for operator, group in by_operator(nodes):
        result.rows.append(_row(operator, group, outcomes))
    for kind in KINDS:
        group = [case for case in chosen.values() if case.kind == kind]
        if group:
            result.rows.append(_row(f"all of {kind}", group, outcomes))
    passed = sum(outcomes[f"node/{case.name}"].state in _PASSED for case in nodes)
    if nodes:
        result.goals.append(
            Goal("node tests that pass (specialised ones included), %", 100 * passed / len(nodes), NODE_SHARE, True)
        )
    models = [key for key, case in chosen.items() if case.kind != "node"]
    if models:
        missed = sum(outcomes[key].state not in _PASSED for key in models)
        result.goals.append(Goal("models that do not pass", missed, 0))
    result.notes += [
        "specialised: passes only with an input that holds a shape, an axis or a count fixed to the example's value",
        "export: our import is right, our export of it is not; wrong: other numbers; error: no message of ours",
        f"run by onnx's reference evaluator, for want of a kernel in ONNX Runtime: "
        f"{sum(o.runtime == 'reference' for o in outcomes.values())} of our exports",
    ]
    if downloads():
        result.notes.append(f"not run, since onnx would download them: {', '.join(downloads())}")
    result.notes += [f"{key}: {o.state}: {o.reason}" for key, o in outcomes.items() if o.state not in _PASSED]
    return result


def choose(context: Run) -> dict[str, Case]:
    """The cases that a run takes.

    Raises:
        GraphlatheError: none.
    """
    chosen = {
        key: case
        for key, case in cases().items()
        if (case.in_sample or not context.quick)
        and (context.only is None or context.only in key or context.only == case.operator)
    }
    if not chosen:
        raise GraphlatheError(f"no test has '{context.only}' in its name", expected="part of a test's name")
    context.say(f"{len(chosen)} tests")
    return chosen


def run_all(
    names: list[str], context: Run, steps: str = _STEPS, arguments: Mapping[str, Any] | None = None
) -> dict[str, Outcome]:
    """Run cases in child processes, one per core (two at most).

    Args:
        names: of the cases.
        context: how the suite is run.
        steps: ``module:function`` that runs some of them, with the arguments of `onnx_coverage_steps.run_cases`.
        arguments: further ones.
    """
    workers = min(2, os.cpu_count() or 1)
    outcomes: dict[str, Outcome] = {}
    with ThreadPoolExecutor(workers) as pool:
        shards = [names[i::workers] for i in range(workers)]
        for part in pool.map(lambda shard: _run_shard(shard, context, steps, dict(arguments or {})), shards):
            outcomes |= part
    return {name: outcomes[name] for name in names}


def _run_shard(names: list[str], context: Run, steps: str, arguments: dict[str, Any]) -> dict[str, Outcome]:
    """Run cases in one child after the other: one that ends is followed by another, from the next case on."""
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory(prefix="graphlathe-coverage-") as folder:
        log = Path(folder) / "outcomes.jsonl"
        while waiting := [name for name in names if name not in outcomes]:
            log.write_text("")
            reason = "it ended the process"
            try:
                measure_in_subprocess(steps, {"names": waiting, "log": str(log), **arguments}, timeout=7200)
            except GraphlatheError as error:
                reason = error.message
            started = None
            for line in log.read_text().splitlines():
                entry = json.loads(line)
                started = entry.get("started", started)
                if "state" in entry:
                    outcomes[entry["name"]] = Outcome(**entry)
            if started is None:
                raise GraphlatheError(f"the process that runs the tests did not start: {reason}")
            if started not in outcomes:
                outcomes[started] = Outcome(started, "crashed", reason)
                context.say(f"{started}: {reason}")
    return outcomes


def _row(title: str, group: list[Case], outcomes: dict[str, Outcome]) -> Row:
    found = [outcomes[f"{case.kind}/{case.name}"] for case in group]
    states = Counter(outcome.state for outcome in found)
    counts = {state: states[state] or None for state in STATES}
    return {"operator": title, "tests": len(group), **counts, "seconds": sum(outcome.seconds for outcome in found)}


SUITE = Suite(
    name="onnx-coverage",
    summary="import of ONNX on onnx's own backend tests, each also exported again and run in ONNX Runtime",
    goals=(
        f"at least {NODE_SHARE:.0f} % of the node tests with plain tensors pass",
        "every model of " + ", ".join(KINDS[1:]) + " passes",
    ),
    run=run,
)
