"""Workers that read a folder give the same distances as this process."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from graphlathe.ir.errors import GraphlatheError
from graphlathe.ir.weights import Weight
from graphlathe.passes.search import workspace
from graphlathe.passes.search.candidates import Candidates, State
from graphlathe.passes.search.levels import Place
from graphlathe.passes.search.workspace import write_workspace
from tests.passes.search.small_models import MODELS, batch, found, unit_places, width_places
from tests.zoo_programs import traced, zoo_parameters


def every_kind(name: str) -> list[Place]:
    """Widths (zeroed and really cut), dropped units, replaced weights."""
    places = width_places(name, ("stream", "heads", "value-channels", "qk-channels", "mlp", "channels"), steps=2)
    fitted = next(n for n, p in enumerate(places) if p.kind in ("mlp", "channels"))
    place = places[fitted]
    level = place.levels[1]
    weights = {n: Weight.from_tensor(1.1 * w.tensor()) for n, w in level.weights(traced(name)).items()}
    places[fitted] = replace(place, levels=(place.levels[0], replace(level, replaced=weights), *place.levels[2:]))
    return places + unit_places(name, "block")


def states_of(places: list[Place]) -> list[State]:
    untouched = (0,) * len(places)
    single = [(*untouched[:i], 1, *untouched[i + 1 :]) for i in range(len(places))]
    return [*single, tuple(1 for _ in places), untouched]


@pytest.mark.parametrize("name", zoo_parameters(MODELS))
def test_every_kind_of_level_comes_through(name: str, tmp_path: Path) -> None:
    places, batches = every_kind(name), [batch(name, 0), batch(name, 1)]
    local = Candidates(traced(name), places, found(name), batches)
    remote = write_workspace(tmp_path / "new", traced(name), places, batches)
    for number, state in enumerate(states_of(places)):
        assert remote(state, number % 2) == pytest.approx(local(state, number % 2), rel=1e-5, abs=1e-9), state
    # Evaluating leaves the places as they are: they can be written again.
    assert write_workspace(tmp_path / "again", traced(name), places, batches)((0,) * len(places), 0) == 0


def test_other_processes_and_threads(tmp_path: Path) -> None:
    places, batches = every_kind("llama"), [batch("llama")]
    local = Candidates(traced("llama"), places, found("llama"), batches)
    remote = write_workspace(tmp_path, traced("llama"), places, batches)
    states = states_of(places)[-6:]
    want = [local(state, 0) for state in states]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert [pool.submit(remote, s, 0) for s in states][-1].result(timeout=300) == 0
        got = list(pool.map(remote, states, [0] * len(states)))
    assert got == pytest.approx(want, rel=1e-5, abs=1e-9)
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(remote, states * 2, [0] * 2 * len(states))) == pytest.approx(
            want * 2, rel=1e-5, abs=1e-9
        )


def test_nodes_in_another_order_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace.Program, "load", lambda path: traced("gpt2"))
    with pytest.raises(GraphlatheError, match="another order"):
        write_workspace(tmp_path, traced("bert"), [], [batch("bert")])
