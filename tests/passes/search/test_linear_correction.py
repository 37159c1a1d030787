"""Maps beside changed weights: against the best of their rank by numpy, in other forms of a product, and their cost."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graphlathe.ir.flow import op_name
from graphlathe.ir.program import MADE_BY, ORIGIN, Program
from graphlathe.ir.structure import structure
from graphlathe.ir.to_onnx import export_onnx
from graphlathe.passes.search.linear_correction import that_save
from graphlathe.passes.search.linear_levels import LinearSettings, linear_places
from graphlathe.passes.search.linear_sites import LinearSite, linear_sites
from graphlathe.passes.search.linear_solve import solve
from graphlathe.passes.search.linear_texts import Bits, LinearLevel, parse
from tests.onnx_nodes import run_file
from tests.passes.search.linear_models import HIDDEN, WIDTH, batches, data, mlps, program_of
from tests.passes.search.test_linear_apply import INNERS, applied, close

TEXTS = ("nonzeros=100", "bits=3 group=5", "bits=2 method=round-to-nearest")


def sites_of(program: Program) -> list[LinearSite]:
    return linear_sites(program, structure(program))[0]


def inputs_of(program: Program, site: LinearSite) -> np.ndarray:
    """What a site's operators read on the calibration data: float64 [rows, inputs]."""
    rows: list[Tensor] = []

    def observe(node: Any, value: Any) -> None:
        rows.extend(value.reshape(-1, site.inputs) for c in site.consumers if c.operand is node)

    for batch in batches(torch.float64):
        program.run(batch, observe=observe)
    return torch.cat(rows).numpy()


def dense(program: Program, name: str) -> np.ndarray:
    """The weight of this name, or what its packed codes stand for."""
    found: dict[str, np.ndarray] = {}
    if name in program.used_weights():
        return program.weights[name].tensor().numpy()
    (codes,) = (n for n in program.graph.nodes if op_name(n).endswith("dequantize") and reads(n, f"{name}.scale"))
    program.run(
        batches(torch.float64)[0],
        observe=lambda node, value: found.update({name: value.numpy()}) if node is codes else None,
    )
    return found[name]


def reads(node: Any, weight: str) -> bool:
    return any(n.op == "get_attr" and n.target == weight for n in node.all_input_nodes)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("rank", [1, 3, 12])
def test_maps_are_the_best_of_their_rank_on_what_the_layer_reads(text: str, rank: int) -> None:
    """The weight itself is that of the level without a correction; what X lost^T keeps of its leading directions is
    added.
    """
    program = mlps(torch.float64)
    plain, _ = applied(program, text, ctx=data(torch.float64))
    after, _ = applied(program, f"{text} correction={rank}", ctx=data(torch.float64))
    for site in sites_of(program):
        kept = dense(after, site.weight)
        assert np.array_equal(kept, dense(plain, site.weight))
        lost = program.weights[site.weight].tensor().numpy() - kept
        left, right = (after.weights[f"{site.weight}.correction.{name}"].tensor().numpy() for name in ("left", "right"))
        assert left.shape == (site.outputs, rank)
        assert right.shape == (rank, site.inputs)
        directions = np.linalg.svd(inputs_of(program, site) @ lost.T, full_matrices=False)[2][:rank]
        assert np.abs(left @ right - directions.T @ directions @ lost).max() <= 1e-9 * np.abs(lost).max()


@pytest.mark.parametrize("text", TEXTS)
def test_the_error_falls_with_the_rank_to_nothing(text: str) -> None:
    """Of each layer as it is solved, and of the whole program's outputs at both ends."""
    program = mlps(torch.float64)
    for site in sites_of(program):
        levels = [parse(f"{text} correction={rank}", site.outputs, site.inputs) for rank in range(WIDTH + 1)]
        errors = [s.error or 0.0 for s in solve(program, [site], {site.index: levels}, data(torch.float64))]
        assert all(after < 0.99 * before for before, after in itertools.pairwise(errors))
        assert errors[-1] <= 1e-20

    def drift(rank: int) -> float:
        after, _ = applied(program, f"{text} correction={rank}", ctx=data(torch.float64))
        outputs = [p.run(batches(torch.float64)[0])["output"] for p in (after, program)]
        return float((outputs[0] - outputs[1]).square().sum())

    drifts = [drift(rank) for rank in (0, 6, WIDTH)]
    assert drifts[2] <= 1e-20 < drifts[1] < drifts[0]


def test_each_operator_gets_two_more_and_a_sum() -> None:
    program = mlps()
    after, _ = applied(program, "nonzeros=100 correction=2")
    fresh = [node for node in after.graph.nodes if node.meta.get(MADE_BY) == "test" and node.op == "call_function"]
    assert [op_name(node) for node in fresh] == ["linear", "linear", "add"] * 4
    origins = [node.meta[ORIGIN] for node in program.graph.nodes if op_name(node) == "linear"][1:-1]
    assert [node.meta[ORIGIN] for node in fresh] == [origin for origin in origins for _ in range(3)]
    for site in sites_of(program):
        assert int((after.weights[site.weight].tensor() != 0).sum()) == 100
        for name in ("left", "right"):
            assert after.weights[f"{site.weight}.correction.{name}"].tensor().is_contiguous()
    assert after.parameter_count - program.parameter_count == 4 * 2 * (WIDTH + HIDDEN)


@pytest.mark.parametrize("form", ["addmm", "conv2d", "convolution"])
def test_other_forms_run_in_onnx_runtime(form: str, tmp_path: Path) -> None:
    inner, layers = INNERS[form]
    program = program_of(inner, **layers)
    after, _ = applied(program, "nonzeros=60 correction=2")
    batch = batches(seed=8)[0]
    (actual,) = run_file(export_onnx(after, tmp_path / "model.onnx"), {"x": batch["x"].numpy()})
    expected = after.run(batch)["output"]
    np.testing.assert_allclose(actual, expected.numpy(), rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("text", ["nonzeros=40 correction=12", "bits=2 correction=12"])
def test_maps_of_a_weight_that_is_cast_have_its_type(text: str) -> None:
    """Read as float64 it is corrected there; stored it counts as float32."""
    inner = lambda m, x, i: nn.functional.linear(x.double(), m.weight.double()).float()  # noqa: E731 - a model in a line
    program = program_of(inner, weight=nn.Parameter(torch.zeros(WIDTH, WIDTH)))
    after, _ = applied(program, text)
    close(after.run(batches()[0]), program.run(batches()[0]), 1e-5)
    maps = [weight for name, weight in after.weights.items() if ".correction." in name and name in after.used_weights()]
    assert [weight.dtype for weight in maps] == [torch.float32] * 2


@pytest.mark.parametrize("text", ["nonzeros=40 correction=12", "bits=2 correction=12", "rank=12"])
def test_layers_that_read_each_other_are_changed_together(text: str) -> None:
    """No operator between them, and one weight before and after the other."""
    inner = lambda m, x, i: m.a(m.b(m.a(x)))  # noqa: E731 - a model in a line
    program = program_of(inner, dtype=torch.float64, a=nn.Linear(WIDTH, WIDTH), b=nn.Linear(WIDTH, WIDTH))
    assert [len(site.consumers) for site in sites_of(program)] == [4, 2]
    after, _ = applied(program, text, ctx=data(torch.float64))
    close(after.run(batches(torch.float64)[0]), program.run(batches(torch.float64)[0]), 1e-11)


def test_sparse_levels_save_equal_steps_with_their_maps() -> None:
    """Of 240 numbers 216 may go; maps of rank 2 take 64, so that 152 can be saved, in two steps of 76."""
    program = mlps()
    places, blocked = linear_places(program, data(), "sparsity", LinearSettings(steps=2, correction=2))
    assert [[level.cost for level in place.levels] for place in places] == [[240, 164, 88]] * 4
    assert [level.label for level in places[0].levels[1:]] == [
        "nonzeros=100 method=sparsegpt correction=2 shape=20x12",
        "nonzeros=24 method=sparsegpt correction=2 shape=20x12",
    ]
    assert "maps" not in "".join(blocked)
    after, (note,) = applied(program, "nonzeros=24 correction=2")
    used = [
        after.weights[n].tensor()
        for n in after.used_weights()
        if any(n.startswith(s.weight) for s in sites_of(program))
    ]
    assert sum(int((value != 0).sum()) for value in used) == 4 * 88
    assert "keep 96 of 960 weights, and 4 of them have two maps of rank 2 beside them (256 numbers," in note
    assert f"({after.weight_nbytes - program.weight_nbytes + 3840:,} bytes;" in note


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bits_cost_the_bytes_that_they_and_their_maps_take(dtype: torch.dtype) -> None:
    program, ctx = mlps(dtype, blocks=1), data(dtype)
    places, _ = linear_places(program, ctx, "bits", LinearSettings(bits=(3,), group=None, correction=1))
    after, notes = applied(program, "bits=3 correction=1", ctx=ctx)
    assert program.weight_nbytes - after.weight_nbytes == sum(p.levels[0].cost - p.levels[1].cost for p in places) > 0
    held = sum(int(p.levels[1].cost) for p in places)
    assert f"(64 numbers, and as many more multiply-adds per row): {held:,} bytes instead of" in notes[0]


@pytest.mark.parametrize("mode", ["sparsity", "bits"])
def test_a_search_tries_what_the_program_becomes(mode: str) -> None:
    program = mlps(torch.float64)
    settings = LinearSettings(steps=2, bits=(3,), group=None, correction=2)
    places, _ = linear_places(program, data(torch.float64), mode, settings)
    tried = program.clone()
    for place in places:
        tried.weights |= place.levels[1].replaced
    after, _ = applied(program, places[0].levels[1].label.partition(" shape")[0], ctx=data(torch.float64))
    for batch in batches(torch.float64):
        close(after.run(batch), tried.run(batch), 1e-12)


@pytest.mark.parametrize("mode", ["sparsity", "bits"])
def test_layers_that_maps_would_not_leave_smaller_stay_whole_and_are_reported(mode: str) -> None:
    """Maps of rank 7 take 168 numbers beside 144, and 224 beside 240."""
    layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)])
    inner = lambda m, x, i: m.layers[0](x).tanh() if i else m.layers[2](m.layers[1](x).tanh())  # noqa: E731
    program = program_of(inner, layers=layers, dtype=torch.float64)
    settings = LinearSettings(steps=2, floor=0.0, bits=(4, 2), group=None, correction=6 if mode == "bits" else 7)
    places, blocked = linear_places(program, data(torch.float64), mode, settings)
    assert [place.index for place in places] == [1, 2]
    assert blocked[f"a layer too small for maps of rank {settings.correction} beside it"] == 1
    for place in places:
        costs = [level.cost for level in place.levels]
        assert len(costs) == 3
        assert costs == sorted(set(costs), reverse=True)


def test_levels_no_cheaper_than_milder_ones_are_not_offered() -> None:
    levels: list[LinearLevel] = [Bits(bits) for bits in (8, 7, 6, 5, 4, 3)]
    costs: dict[LinearLevel | None, int] = {None: 90, **dict(zip(levels, (95, 90, 80, 80, 85, 70), strict=True))}
    assert that_save(levels, costs.__getitem__) == [Bits(6), Bits(3)]
