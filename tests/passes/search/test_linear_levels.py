"""Places of linear layers: steps, costs, and the database in memory and in files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graphlathe.ir.errors import ImportModelError, InputError
from graphlathe.ir.program import Program
from graphlathe.ir.structure import structure
from graphlathe.ir.weights import FileSource
from graphlathe.passes.base import Context
from graphlathe.passes.search import linear_levels
from graphlathe.passes.search.candidates import Candidates
from graphlathe.passes.search.levels import Place
from graphlathe.passes.search.linear_levels import MODES, LinearSettings, linear_places
from graphlathe.passes.search.linear_solve import solve
from tests.passes.search.linear_models import HIDDEN, WIDTH, batches, data, mlps

SETTINGS = LinearSettings(steps=3, bits=(4, 8, 4), group=6, share=0.25, most=0.75)


def costs(places: list[Place]) -> list[list[float]]:
    return [[level.cost for level in place.levels] for place in places]


def test_sparsity_goes_in_one_step_for_all_layers() -> None:
    places, blocked = linear_places(mlps(), data(), "sparsity", LinearSettings(steps=3, floor=0.25))
    assert blocked == {"a map to an output": 1, "outside of the blocks of a residual stream": 1}
    assert [(place.kind, place.index, place.block) for place in places] == [
        ("linear", 1, 0),
        ("linear", 2, 0),
        ("linear", 3, 1),
        ("linear", 4, 1),
    ]
    assert costs(places) == [[240, 180, 120, 60]] * 4
    assert places[0].levels[2].label == "nonzeros=120 method=sparsegpt shape=20x12"
    for place in places:
        for level in place.levels[1:]:
            (weight,) = level.replaced.values()
            assert int((weight.tensor() != 0).sum()) == level.cost


def test_a_step_may_be_given() -> None:
    places, _ = linear_places(mlps(), data(), "sparsity", LinearSettings(step=100, floor=0.0, method="magnitude"))
    assert costs(places) == [[240, 140, 40]] * 4


def test_one_level_more_saves_the_equal_share_of_a_goal() -> None:
    places, _ = linear_places(mlps(), data(), "sparsity", LinearSettings(steps=3, floor=0.25, goal=400))
    assert costs(places) == [[240, 180, 140, 120, 60]] * 4
    # A share that is a level already is no second one, and beyond the floor there is none.
    places, _ = linear_places(mlps(), data(), "sparsity", LinearSettings(steps=3, floor=0.25, goal=4 * 120))
    assert costs(places) == [[240, 180, 120, 60]] * 4
    places, _ = linear_places(mlps(), data(), "sparsity", LinearSettings(steps=1, floor=0.25, goal=4 * 200))
    assert costs(places) == [[240, 60]] * 4


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("correction", [0, 2])
def test_where_nothing_is_to_go_nothing_is_solved(mode: str, correction: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_levels, "solve", lambda *given: pytest.fail("solved") if any(given[2].values()) else [])
    places, _ = linear_places(mlps(), Context(), mode, LinearSettings(goal=0, correction=correction))
    assert costs(places) == [[240 if mode != "bits" else 960]] * 4


def test_bits_cost_the_bytes_that_they_take() -> None:
    places, _ = linear_places(mlps(), data(), "bits", SETTINGS)
    # 20 rows of 12 codes with 2 groups, 12 rows of 20 codes with 4 groups: scale and zero take 5 bytes a group.
    assert costs(places) == [[960, 20 * (12 + 10), 20 * (6 + 10)], [960, 12 * (20 + 20), 12 * (10 + 20)]] * 2
    assert [level.label for level in places[0].levels[1:]] == [
        "bits=8 group=6 method=gptq shape=20x12 was=32",
        "bits=4 group=6 method=gptq shape=20x12 was=32",
    ]
    wide, _ = linear_places(mlps(), data(), "bits", LinearSettings(bits=(4,)))
    assert wide[0].levels[1].label == "bits=4 method=gptq shape=20x12 was=32"


def test_ranks_cost_their_numbers() -> None:
    places, _ = linear_places(mlps(), data(), "rank", SETTINGS)
    # 240 numbers; a rank takes 32: 180, 120, 60 hold ranks of 5, 3, 1.
    assert costs(places) == [[240, 160, 96, 32]] * 4
    sparse, _ = linear_places(mlps(), data(), "rank", LinearSettings(kappa=2.0, share=0.25, most=0.5))
    for place in sparse:
        for level in place.levels[1:]:
            assert level.cost <= 240 * 0.75
            assert "nonzeros=" in level.label


@pytest.mark.parametrize("mode", MODES)
def test_harsher_levels_harm_more_and_are_what_a_trial_runs(mode: str) -> None:
    program = mlps()
    places, _ = linear_places(program, data(), mode, SETTINGS)
    for place in places:
        errors = [level.error for level in place.levels]
        assert errors == sorted(errors, key=lambda error: error or 0.0)
        assert errors[0] == 0.0 < (errors[1] or 0.0)
    evaluate = Candidates(program, places, structure(program), batches(seed=9))
    mild, harsh = ((1, 1, 1, 1), tuple(len(place.levels) - 1 for place in places))
    assert 0.0 == evaluate((0, 0, 0, 0), 0) < evaluate(mild, 0) < evaluate(harsh, 0)
    # By hand: the replaced weights put into a clone.
    again = program.clone()
    for place, level in zip(places, harsh, strict=True):
        again.weights |= place.levels[level].replaced
    expected = again.run(batches(seed=9)[0])["output"]
    assert torch.equal(evaluate.outputs(harsh, 0)["output"], expected)


def test_weights_may_be_left_out() -> None:
    places, _ = linear_places(mlps(), data(), "rank", SETTINGS, weights=False)
    assert all(not level.replaced for place in places for level in place.levels)
    assert all(level.error for place in places for level in place.levels[1:])


def test_unknown_modes_and_methods_are_refused() -> None:
    with pytest.raises(InputError, match="no mode 'width'"):
        linear_places(mlps(), data(), "width")
    with pytest.raises(InputError, match="no method 'gptq' for sparsity"):
        linear_places(mlps(), data(), "sparsity", LinearSettings(method="gptq"))


def same(a: list[Place], b: list[Place]) -> bool:
    return costs(a) == costs(b) and all(
        x.error == y.error and all(torch.equal(x.replaced[n].tensor(), y.replaced[n].tensor()) for n in x.replaced)
        for p, q in zip(a, b, strict=True)
        for x, y in zip(p.levels, q.levels, strict=True)
    )


class Solver:
    """Counts what is solved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.solved: list[int] = []
        monkeypatch.setattr(linear_levels, "solve", self)

    def __call__(self, program: Program, sites: object, wanted: object, ctx: Context) -> object:
        for solved in solve(program, sites, wanted, ctx):  # type: ignore[arg-type]
            self.solved.append(solved.site.index)
            yield solved


def test_files_hold_what_memory_holds_and_are_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, folder = mlps(), tmp_path / "levels"
    expected, _ = linear_places(program, data(), "bits", SETTINGS)
    solver = Solver(monkeypatch)
    first, _ = linear_places(program, data(), "bits", SETTINGS, folder=folder)
    assert same(first, expected)
    assert solver.solved == [1, 1, 2, 2, 3, 3, 4, 4]
    assert all(isinstance(w.source, FileSource) for p in first for lv in p.levels for w in lv.replaced.values())
    # A database of which one layer is missing goes on with that one.
    (folder / "linear-3.safetensors").unlink()
    solver.solved.clear()
    second, _ = linear_places(program, data(), "bits", SETTINGS, folder=folder)
    assert same(second, expected)
    assert solver.solved == [3, 3]
    # Other levels or other data are no use.
    solver.solved.clear()
    linear_places(program, data(), "bits", LinearSettings(bits=(4,), group=6), folder=folder)
    assert len(solver.solved) == 4
    solver.solved.clear()
    linear_places(
        program, Context(calibration=batches(seed=4)), "bits", LinearSettings(bits=(4,), group=6), folder=folder
    )
    assert len(solver.solved) == 4


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    linear_places(mlps(), data(), "bits", SETTINGS, folder=tmp_path)
    path = tmp_path / "linear-2.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ImportModelError, match=r"linear-2\.safetensors"):
        linear_places(mlps(), data(), "bits", SETTINGS, folder=tmp_path)


def test_layers_too_small_for_a_rank_keep_the_level_as_they_are() -> None:
    assert WIDTH * HIDDEN == 240
    places, _ = linear_places(mlps(), data(), "rank", LinearSettings(share=0.9, most=0.9))
    assert costs(places) == [[240]] * 4
