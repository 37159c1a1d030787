"""``apply-plan``: what a pass chose, saved and applied to a fresh program, gives what the pass gave."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graphlathe.ir.errors import InputError, PreconditionError
from graphlathe.ir.program import Program
from graphlathe.ir.verify import verify
from graphlathe.passes.base import Pass
from graphlathe.passes.channels.comp import Comp
from graphlathe.passes.channels.compress import Compress
from graphlathe.passes.channels.flap import Flap
from graphlathe.passes.channels.planted import constant_channels_case
from graphlathe.passes.channels.tyr import Tyr
from graphlathe.passes.heads.shrp import Shrp
from graphlathe.passes.layers.evopress import EvoPress
from graphlathe.passes.layers.shortgpt import ShortGpt
from graphlathe.passes.manager import PassManager
from graphlathe.passes.search.apply_plan import ApplyPlan
from graphlathe.passes.weights.rocket import Rocket
from tests.passes.channels.tiny import Attention, Mlp, data, program_of, refused, run, stack
from tests.passes.golden_text import golden_text

QUICK: dict[str, Any] = {"generations": 1, "offspring": 2}
PRESETS: dict[str, Pass] = {
    "flap": Flap(ratio=0.4),
    "comp": Comp(ratio=0.3),
    "comp with depth": Comp(depth=0.5, ratio=0.7),
    "tyr": Tyr(ratio=0.3, iterations=1, **QUICK),
    "shortgpt": ShortGpt(blocks=1),
    "shortgpt window": ShortGpt(blocks=1, window=True),
    "evopress depth": EvoPress(ratio=0.4, **QUICK),
    "evopress sparsity": EvoPress(mode="sparsity", ratio=0.4, levels=4, **QUICK),
    "evopress bits": EvoPress(mode="bits", ratio=0.5, **QUICK),
    "evopress sparsity with maps": EvoPress(mode="sparsity", ratio=0.3, levels=4, rank=1, **QUICK),
    "evopress bits with maps": EvoPress(mode="bits", ratio=0.3, rank=1, **QUICK),
    "shrp": Shrp(heads=1),
    "rocket": Rocket(ratio=0.3),
    "compress none": Compress(ratio=0.4, compensation="none"),
    "compress bias": Compress(ratio=0.4, compensation="bias"),
    "compress least-squares": Compress(ratio=0.4),
    "compress mask-tuning": Compress(ratio=0.4, compensation="mask-tuning"),
    "compress with branches": Compress(
        ratio=0.4, sites=("heads", "mlp", "drop-attention", "drop-mlp"), steps=2, allocator="knapsack"
    ),
}


def fresh(seed: int = 0) -> Program:
    blocks = [block for _ in range(2) for block in (Attention(4, 2), Mlp(8, bias=False))]
    return program_of(stack(*blocks, seed=seed))


def saved(folder: Path, plan: dict[str, Any]) -> str:
    path = folder / "plan.json"
    path.write_text(json.dumps(plan), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("preset", PRESETS)
def test_applying_gives_what_choosing_gave(preset: str, tmp_path: Path) -> None:
    settings, batches = PRESETS[preset], data()
    chosen, stats = run(fresh(), settings, batches)
    assert any(site["removed"] or site["level"] for site in stats.plan["sites"])
    again = ApplyPlan(path=saved(tmp_path, stats.plan), sequential=settings.name != "flap")
    applied, found = run(fresh(), again, batches)
    assert applied.to_text().partition("\n")[2] == chosen.to_text().partition("\n")[2]
    assert applied.used_weights() == chosen.used_weights()
    for name in chosen.used_weights():
        assert torch.equal(applied.weights[name].tensor(), chosen.weights[name].tensor())
    assert applied.fingerprint() == chosen.fingerprint()
    assert found.hits == sum(bool(site["removed"] or site["level"]) for site in stats.plan["sites"])


@pytest.mark.parametrize("preset", ["evopress sparsity with maps", "evopress bits with maps"])
def test_a_plan_with_maps_says_so_level_by_level(preset: str, tmp_path: Path) -> None:
    """Its rank is that of maps in the place of what is dropped, of which there are none."""
    _, stats = run(fresh(), PRESETS[preset], data())
    assert stats.plan["rank"] == 0
    assert all("correction=1" in site["level"] for site in stats.plan["sites"] if site["level"])
    _, found = run(fresh(), ApplyPlan(path=saved(tmp_path, stats.plan)), data())
    assert not any("nothing to do" in note for note in [*stats.notes, *found.notes])
    assert any("two maps of rank 1 beside them" in note for note in found.notes)


@pytest.mark.parametrize("preset", ["shortgpt", "evopress depth", "shrp", "compress none"])
def test_without_compensation_no_data_is_needed(preset: str, tmp_path: Path) -> None:
    chosen, stats = run(fresh(), PRESETS[preset], data())
    applied, _ = run(fresh(), ApplyPlan(path=saved(tmp_path, stats.plan)), None)
    assert applied.fingerprint() == chosen.fingerprint()


@pytest.mark.parametrize("preset", ["flap", "tyr", "evopress sparsity", "compress mask-tuning"])
def test_with_compensation_data_is_needed(preset: str, tmp_path: Path) -> None:
    plan = run(fresh(), PRESETS[preset], data())[1].plan
    refused(fresh(), ApplyPlan(path=saved(tmp_path, plan)), None, "needs calibration data")


def test_a_plan_that_is_a_part_of_what_was_done_is_refused_until_it_says_that_this_is_all(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"heads": 1, "router_steps": 0, "steps": 0}
    plan = run(fresh(), Shrp(stage="expand", **settings), data())[1].plan
    part = ApplyPlan(path=saved(tmp_path, plan))
    error = refused(fresh(), part, data(), r"only what 'shrp\{stage=expand .*' removed")
    assert error.remedy is not None and "run that pass itself" in error.remedy
    heads, _ = run(fresh(), ApplyPlan(path=saved(tmp_path, plan | {"compensation": "none"})), None)
    assert heads.fingerprint() == run(fresh(), Shrp(**settings), data())[0].fingerprint()


def test_an_edited_plan_is_a_plan(tmp_path: Path) -> None:
    """By hand: what is removed is what the file says, and ``kept`` is not looked at."""
    plan = run(fresh(), Compress(ratio=0.4, sites=("mlp",), compensation="none"), data())[1].plan
    edits = [[0, 5], [7]]
    for site, removed in zip(plan["sites"], edits, strict=True):
        site["removed"] = removed
    after, stats = run(fresh(), ApplyPlan(path=saved(tmp_path, plan)), None)
    assert [site["removed"] for site in stats.plan["sites"]] == edits
    assert [site["kept"] for site in stats.plan["sites"]] == [[1, 2, 3, 4, 6, 7], [0, 1, 2, 3, 4, 5, 6]]
    for number, removed in ((1, edits[0]), (3, edits[1])):
        kept = [c for c in range(8) if c not in removed]
        old, new = (p.weights[f"blocks.{number}.down.weight"].tensor() for p in (fresh(), after))
        assert torch.equal(new, old[:, kept])


def test_a_plan_with_another_compensation_is_fitted_with_it(tmp_path: Path) -> None:
    plan = run(fresh(), Compress(ratio=0.4, compensation="none"), data())[1].plan
    bare, _ = run(fresh(), ApplyPlan(path=saved(tmp_path, plan)), data())
    fitted, _ = run(fresh(), ApplyPlan(path=saved(tmp_path, plan | {"compensation": "least-squares"})), data())

    def error(program: Program) -> float:
        return sum(float((program.run(b)["output"] - fresh().run(b)["output"]).square().sum()) for b in data())

    assert error(fitted) < error(bare)


def test_plans_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    plan = run(fresh(), Compress(ratio=0.4), data())[1].plan

    def changed(**values: Any) -> str:
        sites = [{**plan["sites"][0], **values}, *plan["sites"][1:]]
        return saved(tmp_path, plan | {"sites": sites})

    other = program_of(stack(Attention(4, 4), Mlp(9), Attention(4, 4), Mlp(9)))
    refused(other, ApplyPlan(path=saved(tmp_path, plan)), data(), "does not fit")
    refused(program_of(stack(Mlp(8))), ApplyPlan(path=saved(tmp_path, plan)), data(), "does not fit")
    refused(fresh(), ApplyPlan(path=changed(index=99, removed=[0])), data(), "does not fit")
    everything = list(range(plan["sites"][0]["units"]))
    refused(fresh(), ApplyPlan(path=changed(removed=everything)), data(), "leaves nothing")
    refused(fresh(), ApplyPlan(path=saved(tmp_path, plan | {"compensation": "magic"})), data(), "compensation 'magic'")
    units = {"kind": "drop-mlp", "index": 7, "units": 1, "removed": [0], "label": "", "block": None}
    refused(fresh(), ApplyPlan(path=saved(tmp_path, plan | {"sites": [units]})), data(), "no mlp 7|does not fit")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "cannot read the plan"),
        ("[1, 2]", "is no plan"),
        ('{"format": "graphlathe-plan", "version": 99, "sites": []}', "has version 99"),
        ('{"format": "graphlathe-plan", "version": 1}', "no list of sites"),
        (
            '{"format": "graphlathe-plan", "version": 1, "sites": [{"kind": "mlp", "index": 0, "units": 4, '
            '"removed": [4]}]}',
            "4 is no unit",
        ),
    ],
)
def test_files_that_are_no_plan_are_refused(content: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content, encoding="utf-8")
    program = fresh()
    before = program.fingerprint()
    with pytest.raises(InputError, match=match) as caught:
        PassManager(ApplyPlan(path=str(path))).run(program)
    assert "plan.json" in str(caught.value)
    assert program.fingerprint() == before
    with pytest.raises(InputError, match="cannot read the plan"):
        PassManager(ApplyPlan(path=str(tmp_path / "missing.json"))).run(program)


def test_a_unit_that_cannot_go_is_refused(tmp_path: Path) -> None:
    """A hand-written plan that drops a block of which nothing can be dropped."""

    class Narrows(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = stack(*(Mlp(8) for _ in range(3)))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.inner(x), x

    sites = [{"kind": "heads", "index": 0, "units": 2, "removed": [0]}]
    plan = {"format": "graphlathe-plan", "version": 1, "sites": sites}
    refused(program_of(Narrows()), ApplyPlan(path=saved(tmp_path, plan)), None, "does not fit")


def test_golden(golden: Callable[[str, str], None], tmp_path: Path) -> None:
    """Two channels and a branch go, by a plan that a person could have written."""
    case = constant_channels_case(ApplyPlan())
    sites = [
        {"kind": "mlp", "index": _mlp_index(case.program), "units": 16, "removed": list(range(1, 16))},
        {"kind": "drop-mlp", "index": 1, "units": 1, "removed": [0]},
    ]
    plan = {"format": "graphlathe-plan", "version": 1, "compensation": "bias", "sites": sites}
    after, stats = run(case.program, ApplyPlan(path=saved(tmp_path, plan)), case.calibration)
    assert stats.hits == 2
    verify(after, 2)
    golden("passes/apply-plan", golden_text(case.program, after))


def _mlp_index(program: Program) -> int:
    """The number of the first MLP among all sites."""
    from graphlathe.ir.structure import structure
    from graphlathe.passes.search.sites import channel_sites

    return channel_sites(program, structure(program), ("mlp",))[0][0].index


def test_nothing_given_changes_nothing() -> None:
    after, stats = run(fresh(), ApplyPlan(), None)
    assert after.fingerprint() == fresh().fingerprint()
    assert stats.hits == 0


def test_a_plan_for_channels_that_the_interface_holds_is_refused(tmp_path: Path) -> None:
    """The stream of this model goes out: a plan that cuts it was made for another one."""

    class Open(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = stack(Mlp(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner.blocks[0](self.inner.first(x))

    sites = [{"kind": "stream", "index": 0, "units": 6, "removed": [1]}]
    plan = {"format": "graphlathe-plan", "version": 1, "sites": sites}
    with pytest.raises(PreconditionError, match="does not fit") as caught:
        PassManager(ApplyPlan(path=saved(tmp_path, plan))).run(program_of(Open()))
    assert caught.value.expected == "6 units"
