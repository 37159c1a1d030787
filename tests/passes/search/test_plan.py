"""Plans as data: what is written comes back, what makes no sense is refused with the site that it is about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphlathe.ir.errors import ExportError, InputError
from graphlathe.passes.search.plan import Decision, Plan

TEXT = st.text(max_size=8)


@st.composite
def decisions(draw: st.DrawFn, index: int) -> Decision:
    units = draw(st.integers(1, 9))
    scores = st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=units, max_size=units).map(tuple)
    kind = draw(st.sampled_from(["mlp", "heads", "drop-block", "linear"]))
    removed = st.just(set[int]()) if kind == "linear" else st.sets(st.integers(0, units - 1))
    return Decision(
        kind=kind,
        index=index,
        label=draw(TEXT),
        block=draw(st.none() | st.integers(0, 9)),
        units=units,
        removed=tuple(sorted(draw(removed))),
        level=draw(TEXT) if kind == "linear" else "",
        reason=draw(TEXT),
        scores=draw(st.none() | scores),
    )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    return Plan(
        decisions=tuple(draw(decisions(index)) for index in range(draw(st.integers(0, 4)))),
        made_by=draw(TEXT),
        compensation=draw(TEXT),
        program=draw(TEXT),
        budget=draw(st.dictionaries(TEXT, st.integers() | TEXT, max_size=3)),
        search=draw(st.none() | st.fixed_dictionaries({"history": st.lists(st.integers())})),
        blocked=draw(st.dictionaries(TEXT, st.integers(1, 9), max_size=3)),
    )


@given(plan=plans())
def test_json_round_trip(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(json.loads(json.dumps(plan.to_json(), allow_nan=False))) == plan


@given(plan=plans())
def test_kept_is_what_is_not_removed(plan: Plan) -> None:
    for decision, site in zip(plan.decisions, plan.to_json()["sites"], strict=True):
        assert sorted([*site["kept"], *site["removed"]]) == list(range(decision.units))
    assert plan.changes == [d for d in plan.decisions if d.removed or d.level]


def test_files(tmp_path: Path) -> None:
    plan = Plan((Decision("mlp", 0, "mlp of block 0", 0, 4, (1, 3)),), made_by="é")
    path = tmp_path / "plan.json"
    plan.save(path)
    assert Plan.load(path) == plan and list(tmp_path.iterdir()) == [path]
    # Edited by hand: the order is free, and 'kept' is not looked at.
    data = json.loads(path.read_text())
    data["sites"][0]["removed"], data["sites"][0]["kept"] = [2, 0], "nonsense"
    path.write_text(json.dumps(data))
    assert Plan.load(path).decisions[0].removed == (0, 2)


def test_a_file_appears_complete_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    old = Plan((), made_by="old")
    old.save(path)

    def full(self: Path, text: str, **unused: Any) -> int:
        self.write_bytes(text.encode()[:7])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ExportError, match=r"cannot write '.*plan\.json'.*No space"):
        Plan((), made_by="new").save(path)
    assert Plan.load(path) == old and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("where", ["missing/plan.json", "file/plan.json"])
def test_places_that_cannot_be_written(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"cannot write '.*plan\.json'"):
        Plan(()).save(tmp_path / where)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b"null", b"{}"])
def test_files_that_hold_no_plan(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"plan\.json"):
        Plan.load(path)
    with pytest.raises(InputError, match="cannot read the plan"):
        Plan.load(tmp_path / "none.json")


GOOD: dict[str, Any] = {"kind": "mlp", "index": 0, "units": 4, "removed": [1]}
WRONG_SITES: dict[str, tuple[Any, str]] = {
    "no object": ([1], "is a list"),
    "no kind": ({**GOOD, "kind": None}, "'kind' is None"),
    "an index that is text": ({**GOOD, "index": "0"}, "'index' is '0'"),
    "an index that is a truth": ({**GOOD, "index": True}, "'index' is True"),
    "a negative index": ({**GOOD, "index": -1}, "'index' is -1"),
    "no units": ({**GOOD, "units": 0, "removed": []}, "'units' is 0"),
    "removed is no list": ({**GOOD, "removed": 1}, "'removed' is 1"),
    "a unit that there is not": ({**GOOD, "removed": [4]}, "4 is no unit"),
    "a negative unit": ({**GOOD, "removed": [-1]}, "-1 is no unit"),
    "half a unit": ({**GOOD, "removed": [0.5]}, "0.5 is no unit"),
    "a unit that is a truth": ({**GOOD, "removed": [True]}, "True is no unit"),
    "a unit that is a list": ({**GOOD, "removed": [[0]]}, "is no unit"),
    "a unit twice": ({**GOOD, "removed": [1, 1]}, "named twice"),
    "a block that is text": ({**GOOD, "block": "1"}, "'block' is '1'"),
    "scores that are text": ({**GOOD, "scores": ["a"]}, "'scores' is"),
    "scores that are no list": ({**GOOD, "scores": 3}, "'scores' is 3"),
    "scores that are no numbers": ({**GOOD, "scores": [float("nan")]}, "'scores' is"),
    "a key that there is not": ({**GOOD, "remove": [2]}, "unknown key 'remove' (did you mean 'removed'?)"),
    "a level of neurons": ({**GOOD, "level": "bits=4"}, "the kind 'mlp' has no levels"),
    "units of a weight": ({**GOOD, "kind": "linear"}, "the kind 'linear' has no units"),
    "the place of another": (GOOD, "is mlp 0, as is site 0"),
}


@pytest.mark.parametrize("case", WRONG_SITES)
def test_sites_that_make_no_sense(case: str) -> None:
    site, message = WRONG_SITES[case]
    data = {**Plan(()).to_json(), "sites": [GOOD, site]}
    if isinstance(site, dict) and site is not GOOD and site.get("index") == 0:
        data["sites"][0] = {**GOOD, "index": 7}
    with pytest.raises(InputError) as raised:
        Plan.from_json(data, "'my.json'")
    assert message in str(raised.value) and "site 1 of 'my.json'" in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "is no plan"),
        ({"version": 2}, "has version 2"),
        ({"sites": {}}, "no list of sites"),
        ({"budget": [1]}, "'budget' is"),
        ({"search": "x"}, "'search' is"),
        ({"blocked": 3}, "'blocked' is 3"),
    ],
)
def test_plans_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Plan.from_json({**Plan(()).to_json(), **changes})


def test_a_budget_takes_more_figures() -> None:
    plan = Plan((), budget={"unit": "params"}).with_budget(limit=3)
    assert plan.budget == {"unit": "params", "limit": 3}
