"""ROCKET against its own algorithm written down again in NumPy, its budget by brute force, and its plan."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphlathe.ir.errors import PipelineError, PostconditionError, PreconditionError
from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.ir.structure import structure
from graphlathe.ir.verify import verify
from graphlathe.passes.base import Context, Stats
from graphlathe.passes.search.consumers import weight_matrix
from graphlathe.passes.search.levels import Level, Place
from graphlathe.passes.search.linear_apply import apply_linear
from graphlathe.passes.search.linear_levels import LinearSettings, linear_places
from graphlathe.passes.search.linear_sites import linear_sites
from graphlathe.passes.search.plan import Plan
from graphlathe.passes.weights.rocket import Rocket, without_worst
from tests.passes.channels.tiny import refused
from tests.passes.search.linear_models import HIDDEN, WIDTH, batches, data, mlps

Array = np.ndarray[Any, Any]


def run(pass_: Rocket, program: Program, ctx: Context | None = None) -> tuple[Program, Stats]:
    after, ctx = program.clone(), ctx or data(torch.float64)
    pass_.check(after, ctx)
    stats = pass_.run(after, ctx)
    pass_.ensure(program, after, stats)
    verify(after, 2)
    return after, stats


def papers_factors(x: Array, weight: Array, rank: int, kept: int) -> tuple[Array, Array]:
    """The paper's steps, in its own orientation: X [n, in], W [in, out], W ~ (S^-1 U) V."""
    gram = x.T @ x
    gram += 0.01 * np.trace(gram) / len(gram) * np.eye(len(gram))
    s = np.linalg.cholesky(gram).T
    y = s @ weight
    values, vectors = np.linalg.eigh(y @ y.T)
    u = vectors[:, np.argsort(values)[::-1][:rank]]
    v = u.T @ y
    plain = np.linalg.solve(s, u)
    if kept == rank:
        return plain, v
    importance = np.sqrt(np.abs(v) * np.abs(v) * np.linalg.norm(plain, axis=0)[:, None])
    mask = np.zeros_like(v, dtype=bool)
    for column in range(v.shape[1]):
        mask[np.argsort(importance[:, column])[::-1][:kept], column] = True
    # The best half percent of what was dropped comes back, for the worst of what was kept.
    for _ in range(int(0.005 * mask.size)):
        best = np.unravel_index(np.where(mask, -np.inf, importance).argmax(), mask.shape)
        worst = np.unravel_index(np.where(mask, importance, np.inf).argmin(), mask.shape)
        if importance[best] > importance[worst]:
            mask[best], mask[worst] = True, False
    v = v * mask
    u = y @ v.T @ np.linalg.inv(v @ v.T)
    return np.linalg.solve(s, u), v


@pytest.mark.parametrize("kappa", [1.0, 1.5, 2.0])
def test_layers_become_what_the_paper_says(kappa: float) -> None:
    program = mlps(torch.float64, blocks=1)
    after, stats = run(Rocket(ratio=0.3, kappa=kappa), program)
    sites, _ = linear_sites(program, structure(program))
    rows: dict[int, list[Array]] = {site.index: [] for site in sites}
    for batch in batches(torch.float64):

        def observe(node: Any, value: Any) -> None:
            for site in sites:
                if node is site.consumers[0].operand:
                    rows[site.index].append(value.reshape(-1, site.inputs).numpy())

        program.run(batch, observe=observe)
    weights = {name: weight.tensor().numpy() for name, weight in after.weights.items()}
    changed = [d for d in Plan.from_json(stats.plan).decisions if d.level]
    assert changed
    for site in sites:
        (decision,) = (d for d in Plan.from_json(stats.plan).decisions if d.index == site.index)
        if not decision.level:
            continue
        parts = dict(token.split("=") for token in decision.level.split())
        rank, kept = int(parts["rank"]), int(parts.get("nonzeros", parts["rank"]))
        weight = weight_matrix(program, site.consumers[0]).numpy()
        plain, coefficients = papers_factors(np.concatenate(rows[site.index]), weight.T, rank, kept)
        right, left = weights[f"{site.weight}.right"], weights[f"{site.weight}.left"]
        np.testing.assert_allclose((left @ right).T, plain @ coefficients, rtol=0, atol=1e-8 * np.abs(weight).max())
        assert np.count_nonzero(left) == kept * site.outputs
        # r inputs + (r / kappa) outputs numbers are no more than what is left of the layer.
        assert rank * (site.inputs + site.outputs / kappa) <= site.size * 0.95 + site.outputs / kappa


def test_the_choice_is_the_best_under_the_budget() -> None:
    """Of all combinations of levels, none that fits has a lower sum of errors."""
    program = mlps(torch.float64)
    pass_ = Rocket(ratio=0.35, step=0.25, most=0.75)
    _, stats = run(pass_, program)
    places, _ = linear_places(program, data(torch.float64), "rank", LinearSettings(share=0.25, most=0.75))
    limit = 0.65 * 4 * WIDTH * HIDDEN
    fitting = [
        math.fsum(level.error or 0.0 for level in levels)
        for levels in itertools.product(*(place.levels for place in places))
        if sum(level.cost for level in levels) <= limit
    ]
    chosen = {site["index"]: site["level"] for site in stats.plan["sites"]}
    levels = [
        next(level for level in place.levels if level.label == (chosen[place.index] or "untouched")) for place in places
    ]
    assert sum(level.cost for level in levels) <= limit
    assert math.fsum(level.error or 0.0 for level in levels) == pytest.approx(min(fitting), rel=1e-12)
    assert len(fitting) < 4**4


@pytest.mark.parametrize("kappa", [1.0, 2.0])
def test_the_plan_counts_what_is_stored_and_what_runs(kappa: float) -> None:
    program = mlps(torch.float64)
    after, stats = run(Rocket(ratio=0.15, kappa=kappa, step=0.15, most=0.15), program)
    budget = stats.plan["budget"]
    assert stats.hits > 0
    assert budget["before"] == program.parameter_count
    used = sum(int((after.weights[name].tensor() != 0).sum()) for name in after.used_weights())
    assert budget["after"] == used <= budget["limit"] == program.parameter_count - 0.15 * 960
    # A batch has 3 times 15 positions; zeros are multiplied like other numbers.
    assert budget["macs_after"] - budget["macs_before"] == (after.parameter_count - program.parameter_count) * 45
    if kappa == 1:
        assert budget["disk_bytes_after"] == after.weight_nbytes < budget["disk_bytes_before"]
    else:
        # Of the numbers that run few are used; positions cost something on disk.
        assert after.parameter_count > used
        assert 8 * used < budget["disk_bytes_after"] < 8 * after.parameter_count
    assert any("multiply-adds" in note for note in stats.notes)


def test_with_many_zeros_the_program_is_larger_and_says_so() -> None:
    program = mlps(torch.float64)
    after, stats = run(Rocket(ratio=0.2, kappa=2.0, step=0.1, most=0.2), program)
    assert after.parameter_count > program.parameter_count
    assert any("MORE than before" in note for note in stats.notes)


def test_a_target_counts_the_whole_model() -> None:
    program = mlps(torch.float64)
    _, by_ratio = run(Rocket(ratio=0.25), program)
    _, by_target = run(Rocket(target=program.parameter_count - 240), program)
    assert [s["level"] for s in by_ratio.plan["sites"]] == [s["level"] for s in by_target.plan["sites"]]


def test_the_plan_can_be_carried_out_again() -> None:
    program = mlps(torch.float64)
    after, stats = run(Rocket(ratio=0.3), program)
    again = program.clone()
    apply_linear(again, Plan.from_json(stats.plan).decisions, data(torch.float64), "apply-plan")
    assert again.fingerprint() == after.fingerprint() != program.fingerprint()


def test_nothing_to_remove_needs_no_data_and_changes_nothing() -> None:
    program = mlps()
    after, stats = run(Rocket.neutral(), program, Context())
    assert after.fingerprint() == program.fingerprint()
    assert stats.hits == 0
    assert "nothing to remove" in stats.notes[-1]
    assert not Plan.from_json(stats.plan).changes
    roomy, _ = run(Rocket(target=1e9), mlps(torch.float64))
    assert roomy.fingerprint() == mlps(torch.float64).fingerprint()


def test_the_layer_of_low_rank_is_found() -> None:
    case = Rocket.planted()
    after = case.program.clone()
    stats = case.settings.run(after, Context(calibration=case.calibration))
    assert case.found(after, stats)
    # What is found depends on the numbers: the same case without them is no case.
    other = Rocket(ratio=0.17, most=0.5)
    worse = case.program.clone()
    assert not case.found(worse, other.run(worse, Context(calibration=case.calibration)))


@given(st.lists(st.lists(st.floats(0, 1), max_size=4), min_size=1, max_size=4), st.floats(0.1, 3))
@settings(max_examples=50)
def test_bad_levels_are_left_out_but_never_the_layer_as_it_is(errors: list[list[float]], alpha: float) -> None:
    places = [
        Place("linear", "x", None, (Level("untouched", 9, 0.0), *(Level("y", 1, e) for e in row)), 0, number)
        for number, row in enumerate(errors)
    ]
    kept = [[level.error for level in place.levels] for place in without_worst(places, alpha)]
    flat = [error for row in errors for error in row]
    most = alpha * math.fsum(flat) / max(len(flat), 1)
    assert kept == [[0.0, *(error for error in row if error <= most)] for row in errors]


def test_leaving_out_bad_levels_may_put_the_budget_out_of_reach() -> None:
    with pytest.raises(PreconditionError, match="out of reach") as caught:
        run(Rocket(ratio=0.6, alpha=0.1), mlps(torch.float64))
    assert caught.value.expected is not None
    assert "alpha" in (caught.value.remedy or "")


@pytest.mark.parametrize("kappa", [1.0, 2.0])
def test_an_unreachable_budget_names_the_smallest_and_what_blocks_more(kappa: float) -> None:
    program, settings = mlps(torch.float64), {"kappa": kappa, "step": 0.1, "most": 0.4}
    rows = linear_places(program, data(torch.float64), "rank", LinearSettings(kappa=kappa, share=0.1, most=0.4))[0]
    least = int(program.parameter_count - sum(p.levels[0].cost - min(level.cost for level in p.levels) for p in rows))
    error = refused(program, Rocket(target=least - 1, **settings), batches(torch.float64), "out of reach")
    assert f"budget of {least - 1:,} params" in str(error) and error.expected == f"at least {least:,}"
    assert "; blocked elsewhere by: outside of the blocks of a residual stream (1x); a map to an output" in str(error)
    assert error.remedy == "raise the budget, or most="
    _, stats = run(Rocket(target=least, **settings), program)
    assert stats.plan["budget"]["after"] == least


def test_refusals() -> None:
    for options in ({}, {"ratio": 0.2, "target": 10.0}):
        with pytest.raises(PipelineError, match="one way to say how much"):
            Rocket(**options)
    with pytest.raises(PreconditionError, match="whitening needs calibration data"):
        run(Rocket(ratio=0.2), mlps(), Context())
    with pytest.raises(PreconditionError, match="out of reach"):
        run(Rocket(ratio=0.9), mlps(torch.float64))
    plain = trace(torch.nn.Linear(3, 4), (torch.ones(2, 3),))
    with pytest.raises(
        PreconditionError, match="no linear layers that can be factorised; left out: a map to an output"
    ):
        run(Rocket(ratio=0.2), plain, data())
    bad = Context(calibration=[{"x": torch.full((1, 2, WIDTH), math.nan)}])
    with pytest.raises(PreconditionError, match="NaN or infinite"):
        run(Rocket(ratio=0.2), mlps(), bad)


def test_its_law_is_checked() -> None:
    program = mlps()
    larger, stats = run(Rocket(ratio=0.2, kappa=2.0, step=0.1, most=0.2), program, data())
    with pytest.raises(PostconditionError, match="more parameters"):
        Rocket(ratio=0.2).ensure(program, larger, stats)
    other = trace(torch.nn.Linear(3, 4), (torch.ones(2, 3),))
    with pytest.raises(PostconditionError, match="outputs changed"):
        Rocket(ratio=0.2).ensure(program, other, stats)
