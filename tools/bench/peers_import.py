"""Suite ``peers-import``: our import of ONNX against other importers, on the same tests and models.

Each importer gets the same models, and its outputs are compared in the same way; nothing is exported. The others'
packages are installed into a folder of their own, beside the torch and onnx of this environment: nothing here depends
on them.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch

from ...ir.errors import GraphlatheError
from .base import Goal, Result, Run, Suite
from .onnx_cases import KINDS
from .onnx_coverage import choose, run_all
from .peers_import_steps import PEERS, STATES

FOLDER = Path("build") / "peers"
_STEPS = f"{__package__}.peers_import_steps:run_peer"
_SERIES_BEHIND = 15
"""torchvision 0.(n + 15) belongs to torch 2.n."""


def packages() -> list[str]:
    """What is installed for the others; they only need torchvision where they import it."""
    series = int(torch.__version__.split(".")[1]) + _SERIES_BEHIND
    return [*(f"{peer.package}=={peer.version}" for peer in PEERS), f"torchvision==0.{series}.*", "pillow"]


def install(folder: Path) -> None:
    """Install the others' packages into a folder, unless they are there.

    Raises:
        GraphlatheError: pip fails.
    """
    if all((folder / peer.module).is_dir() for peer in PEERS):
        return
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *packages()]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise GraphlatheError(
            f"the other importers cannot be installed: {(done.stderr.strip().splitlines() or ['pip failed'])[-1]}",
            remedy=f"install them yourself: {' '.join(command[1:])}",
        )


def run(context: Run) -> Result:
    """Run all cases (``quick``: the fixed tenth; ``only``: those whose name contains a text) with each importer."""
    folder = (context.peers or FOLDER).absolute()
    install(folder)
    chosen = choose(context)
    result = Result()
    passed: dict[str, int] = {}
    for name in ("graphlathe", *(peer.module for peer in PEERS)):
        context.say(f"{name}: {len(chosen)} tests")
        outcomes = run_all(list(chosen), context, _STEPS, {"peer": name, "folder": str(folder)})
        for title, kinds in (("node tests", KINDS[:1]), ("models", KINDS[1:])):
            group = [outcomes[key] for key, case in chosen.items() if case.kind in kinds]
            if not group:
                continue
            states = Counter(outcome.state for outcome in group)
            row = {"importer": name, "on": title, "tests": len(group)}
            counts = {state: states[state] or None for state in STATES}
            result.rows.append({**row, **counts, "total_seconds": sum(outcome.seconds for outcome in group)})
        passed[name] = sum(outcome.state in STATES[:2] for outcome in outcomes.values())
    best = max(count for name, count in passed.items() if name != "graphlathe")
    result.goals.append(
        Goal("tests that pass, less those of the best of the others", passed["graphlathe"] - best, 0, True)
    )
    result.notes += [
        "passed: shapes, element types and numbers are those that onnx expects",
        "specialised: passes only with an input that holds a shape, an axis or a count fixed to the example's value",
        "refused: the import says no; failed: it ends in another error, or its result does when it runs",
        f"the others: {', '.join(packages())}",
    ]
    return result


SUITE = Suite(
    name="peers-import",
    summary="import of ONNX against onnx2torch and onnx2pytorch, on onnx's own backend tests",
    goals=("as many tests pass as with the best of the others",),
    run=run,
)
