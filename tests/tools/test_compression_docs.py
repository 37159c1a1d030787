"""docs/compression.md says what the registries say: its tables list what there is, and its commands can be parsed."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import typer

from graphlathe.passes import registry
from graphlathe.passes.base import Effect
from graphlathe.passes.pipeline import parse_pipeline
from graphlathe.passes.search.apply import COMPENSATIONS
from graphlathe.passes.search.budget import UNITS
from graphlathe.passes.search.plan import Decision, Plan
from graphlathe.passes.search.recipe import ALLOCATORS
from graphlathe.passes.search.scores import CHANNEL_SCORES
from graphlathe.passes.search.sites import KINDS
from graphlathe.tools.bench.markdown import records
from graphlathe.tools.cli import app

TEXT = (Path(__file__).parents[2] / "docs" / "compression.md").read_text(encoding="utf-8")
COMMANDS = [line for line in TEXT.splitlines() if line.startswith("graphlathe optimize ")]


def table(first: str) -> dict[str, list[str]]:
    """The rows of the table with this heading of its first column, by the name in that column."""
    lines = TEXT.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows: dict[str, list[str]] = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[name.strip("`")] = cells
    return rows


def test_sites() -> None:
    rows = table("site")
    assert list(rows)[: len(KINDS)] == list(KINDS)
    assert {name: rows[name][0] for name in KINDS} == KINDS
    assert set(rows) - set(KINDS) == {"drop-block", "drop-attention", "drop-mlp"}


def test_scores() -> None:
    expected = {s.name: [s.about, s.paper, "yes" if s.calibration else "no"] for s in CHANNEL_SCORES.values()}
    assert table("score") == expected


@pytest.mark.parametrize(
    ("first", "names"), [("allocator", ALLOCATORS), ("compensation", COMPENSATIONS), ("budget", UNITS)]
)
def test_other_choices(first: str, names: tuple[str, ...]) -> None:
    assert sorted(table(first)) == sorted(names)


def test_every_compressing_pass_is_described() -> None:
    approximate = {name for name in registry.BUILTIN if registry.get(name).effect is Effect.APPROXIMATE}
    assert set(table("pass")) == approximate - {"compress", "apply-plan"}
    assert all(f"`{name}" in TEXT for name in approximate)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_have_options_that_exist(line: str) -> None:
    words = shlex.split(line)[2:]
    context = typer.main.get_command(app).commands["optimize"].make_context("optimize", words)  # type: ignore[attr-defined]
    assert len(parse_pipeline(context.params["pipeline"]).items) >= 1


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 6


def test_pipelines_in_the_text_can_be_parsed() -> None:
    found = re.findall(r"`((?:[a-z-]+\{[a-z_]+=[^`]*\},?)+)`", TEXT)
    assert len(found) >= 4
    names = [item.name for text in found for item in parse_pipeline(_complete(text)).passes()]
    assert "distill" in names and "apply-plan" in names


def _complete(text: str) -> str:
    """Passes that must be told how much to remove are told."""
    needy = r"(compress|evopress)\{(?![^}]*(ratio|target))"
    return re.sub(needy, r"\1{ratio=0.1 ", text)


def test_the_plan_has_the_fields_of_a_plan() -> None:
    shown = re.search(r"```json\n(.*?)```", TEXT, re.DOTALL)
    assert shown is not None
    data = json.loads(shown[1].replace(", ...]", "]"))
    data["sites"][0]["scores"] = [0.0] * 64
    plan = Plan.from_json(data)
    real = Plan((Decision("mlp", 4, "mlp of block 0", 0, 64, (3, 17)),)).to_json()
    assert set(data) == set(real)
    assert set(data["sites"][0]) == set(real["sites"][0])
    assert plan.decisions[0].removed == (3, 17)


def test_results_are_those_of_the_records() -> None:
    """docs/compression-results.md is what the command prints of the records in this repository."""
    folder = Path(__file__).parents[2]
    paths = sorted((folder / "benchmarks" / "results").glob("compress-*.json"))
    text = (folder / "docs" / "compression-results.md").read_text(encoding="utf-8")
    assert paths and text.endswith(records(paths)), (
        "append the output of `graphlathe bench --markdown` with each of benchmarks/results/compress-*.json"
    )
