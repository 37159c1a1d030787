"""The plans that a pipeline made: which there are, and where their files and pictures go."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..passes.report import Report
from ..passes.search.plan import FORMAT, Plan


@dataclass(frozen=True)
class MadePlan:
    """A plan, and the text of the pass in the pipeline that made it."""

    text: str
    plan: Plan

    @property
    def name(self) -> str:
        """The pass's name."""
        return self.text.partition("{")[0]

    def drawable(self) -> dict[str, Any]:
        """The plan as `plots` wants it: a search's picture shows the budget as well."""
        data = self.plan.to_json()
        if data["search"] is not None:
            budget = {"kind": self.plan.budget.get("unit"), "limit": self.plan.budget.get("limit")}
            data["search"] = {**data["search"], "budget": budget}
        return data

    def facts(self) -> list[str]:
        """What it says, in a few lines."""
        plan, budget = self.plan, self.plan.budget
        lines = [f"{len(plan.changes):,} of {len(plan.decisions):,} places changed; compensation: {plan.compensation}"]
        if "before" in budget and "after" in budget:
            limit = f", limit {budget['limit']:,.6g}" if "limit" in budget else ""
            lines.append(f"{budget.get('unit', 'cost')}: {budget['before']:,.6g} → {budget['after']:,.6g}{limit}")
        if plan.search is not None:
            lines.append(f"search: {plan.search['evaluations']:,} evaluations, ended by {plan.search['stopped']}")
        # Plans of single units have the reason for each unit here instead of a count.
        lines += [f"left as it is, {n}x: {reason}" for reason, n in plan.blocked.items() if isinstance(n, int)]  # type: ignore[redundant-expr]
        return lines


def made_plans(report: Report) -> list[MadePlan]:
    """All plans of a run in the order of their passes; what other passes decided has a form of its own."""
    found = [row for row in report.rows if row.plan.get("format") == FORMAT]
    # As a file would hold them: a plan is read from JSON, where there are no tuples.
    plain = [json.loads(json.dumps(row.plan)) for row in found]
    return [
        MadePlan(row.text, Plan.from_json(data, f"the plan of {row.text}"))
        for row, data in zip(found, plain, strict=True)
    ]


def plan_files(path: Path, plans: Sequence[MadePlan]) -> list[Path]:
    """Where they go: the only one to the path, several to ``plan-1.json``, ``plan-2.json``... beside it."""
    if len(plans) == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(1, len(plans) + 1)]


def picture_folders(folder: Path, plans: Sequence[MadePlan]) -> list[Path]:
    """Where their pictures go: of the only plan into the folder, of several into ``1-flap``, ``2-tyr``... in it."""
    if len(plans) == 1:
        return [folder]
    return [folder / f"{number}-{plan.name}" for number, plan in enumerate(plans, 1)]
