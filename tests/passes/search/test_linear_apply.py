"""Decisions about weights carried out: sparse, packed codes, two factors; in PyTorch, in ONNX Runtime, and refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from graphlathe import kernels
from graphlathe.ir.errors import PreconditionError
from graphlathe.ir.from_onnx import from_onnx
from graphlathe.ir.program import Program
from graphlathe.ir.structure import structure
from graphlathe.ir.to_onnx import export_onnx
from graphlathe.ir.verify import verify
from graphlathe.passes.base import Context
from graphlathe.passes.search.consumers import with_weight_matrix
from graphlathe.passes.search.linear_apply import apply_linear
from graphlathe.passes.search.linear_codes import pack
from graphlathe.passes.search.linear_levels import LinearSettings, linear_places
from graphlathe.passes.search.linear_sites import linear_sites
from graphlathe.passes.search.linear_solve import solve
from graphlathe.passes.search.linear_texts import parse
from graphlathe.passes.search.plan import Decision
from graphlathe.tools import zoo
from tests.onnx_nodes import run_file
from tests.passes.search.linear_models import HIDDEN, WIDTH, batches, data, mlps, program_of
from tests.zoo_programs import traced


def decided(program: Program, text: str, only: int | None = None) -> list[Decision]:
    sites, _ = linear_sites(program, structure(program))
    return [Decision("linear", s.index, s.label, s.block, 1, level=text) for s in sites if only in (None, s.index)]


def applied(
    program: Program, text: str, only: int | None = None, ctx: Context | None = None
) -> tuple[Program, list[str]]:
    after = program.clone()
    notes = apply_linear(after, decided(program, text, only), ctx or data(), "test")
    verify(after, 2)
    return after, notes


def close(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    for x, y in zip(a.values(), b.values(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance * float(y.abs().max()))


def effective(program: Program, mode: str, settings: LinearSettings, label: str) -> Program:
    """A clone whose weights are those that a search tries at the level with this label, in every place."""
    places, _ = linear_places(program, data(), mode, settings)
    after = program.clone()
    for place in places:
        (level,) = (level for level in place.levels if label in level.label)
        after.weights |= level.replaced
    return after


@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 20), st.randoms(use_true_random=False))
def test_packing_is_undone_by_unpacking(width: int, columns: int, random: Any) -> None:
    codes = torch.tensor([[random.randrange(2**width) for _ in range(columns)] for _ in range(3)])
    packed = pack(codes, width)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, -(-columns * width // 8))
    assert torch.equal(kernels.unpack_bits(packed, bits=width)[:, :columns].long(), codes)


def test_pruned_weights_keep_their_shape_and_are_what_was_tried() -> None:
    program = mlps()
    after, notes = applied(program, "nonzeros=120")
    expected = effective(program, "sparsity", LinearSettings(step=120), "nonzeros=120")
    close(after.run(batches()[0]), expected.run(batches()[0]), 0.0)
    for site in linear_sites(after, structure(after))[0]:
        assert int((after.weights[site.weight].tensor() != 0).sum()) == 120
    assert after.weight_nbytes == program.weight_nbytes
    assert "keep 480 of 960 weights" in notes[0]
    assert "stored and run dense" in notes[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_are_packed_and_stand_for_what_was_tried(bits: int, dtype: torch.dtype) -> None:
    program = mlps(dtype, blocks=1)
    ctx = data(dtype)
    after = program.clone()
    (note,) = apply_linear(after, decided(program, f"bits={bits} group=5"), ctx, "test")
    places, _ = linear_places(program, ctx, "bits", LinearSettings(bits=(bits,), group=5))
    expected = program.clone()
    saved = 0.0
    for place in places:
        expected.weights |= place.levels[1].replaced
        saved += place.levels[0].cost - place.levels[1].cost
    close(after.run(batches(dtype)[0]), expected.run(batches(dtype)[0]), 0.0)
    assert program.weight_nbytes - after.weight_nbytes == saved
    assert "stored as packed codes" in note


@pytest.mark.parametrize("text", ["bits=4 group=6 method=round-to-nearest", "nonzeros=30 method=magnitude"])
def test_some_methods_need_no_data(text: str) -> None:
    program = mlps()
    after, _ = applied(program, text, ctx=Context())
    close(after.run(batches()[0]), applied(program, text)[0].run(batches()[0]), 0.0)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_onnx_files_hold_packed_codes(bits: int, tmp_path: Path) -> None:
    """ONNX Runtime computes the same, and the file that is read back is as small."""
    program = mlps(blocks=1)
    after, _ = applied(program, f"bits={bits} group=5", only=2)
    path = export_onnx(after, tmp_path / "model.onnx")
    batch = batches(seed=8)[0]
    expected = after.run(batch)["output"]
    (actual,) = run_file(path, {"x": batch["x"].numpy()})
    np.testing.assert_allclose(actual, expected.numpy(), rtol=0, atol=1e-5 * float(expected.abs().max()))
    again = from_onnx(path)
    close(again.run(batch), after.run(batch))
    dense = from_onnx(export_onnx(program, tmp_path / "dense.onnx"))
    assert dense.weight_nbytes - again.weight_nbytes >= (program.weight_nbytes - after.weight_nbytes) - 64


INNERS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "linear": (lambda m, x, i: m.layer(x), {"layer": nn.Linear(WIDTH, WIDTH)}),
    "matmul": (lambda m, x, i: x @ m.weight, {"weight": nn.Parameter(torch.zeros(WIDTH, WIDTH))}),
    "mm": (
        lambda m, x, i: torch.mm(x.flatten(0, 1), m.weight).unflatten(0, x.shape[:2]),
        {"weight": nn.Parameter(torch.zeros(WIDTH, WIDTH))},
    ),
    "addmm": (
        lambda m, x, i: torch.addmm(m.bias, x.flatten(0, 1), m.weight, alpha=2, beta=3).unflatten(0, x.shape[:2]),
        {"weight": nn.Parameter(torch.zeros(WIDTH, WIDTH)), "bias": nn.Parameter(torch.zeros(WIDTH))},
    ),
    "turned": (
        lambda m, x, i: torch.nn.functional.linear(x, m.weight.T),
        {"weight": nn.Parameter(torch.zeros(WIDTH, WIDTH))},
    ),
    "conv1d": (lambda m, x, i: m.layer(x.mT).mT, {"layer": nn.Conv1d(WIDTH, WIDTH, 1)}),
    "conv2d": (
        lambda m, x, i: m.layer(x.mT.unsqueeze(2).repeat(1, 1, 2, 1))[:, :, 1].mT,
        {"layer": nn.Conv2d(WIDTH, WIDTH, 1, padding=(1, 0), stride=(2, 1))},
    ),
    "convolution": (
        lambda m, x, i: torch.convolution(x.mT, m.weight, m.bias, [1], [0], [1], False, [0], 1).mT,
        {"weight": nn.Parameter(torch.zeros(WIDTH, WIDTH, 1)), "bias": nn.Parameter(torch.zeros(WIDTH))},
    ),
}


@pytest.mark.parametrize("form", list(INNERS))
@pytest.mark.parametrize(
    "text",
    [
        "rank=12",
        "bits=8 group=1",
        "nonzeros=144",
        "nonzeros=30 correction=12",
        "bits=2 method=round-to-nearest correction=12",
    ],
)
def test_levels_that_lose_nothing_change_nothing(form: str, text: str) -> None:
    """In every form of a product, one weight read in two blocks: a full rank, a grid for each weight, all nonzeros."""
    inner, layers = INNERS[form]
    program = program_of(inner, **layers)
    after, _ = applied(program, text)
    assert len(linear_sites(program, structure(program))[0]) == 1
    for batch in (*batches(), *batches(seed=6)):
        close(after.run(batch), program.run(batch), 1e-4)
    if text.startswith("rank"):
        # Two factors of 144 numbers, shared by both blocks.
        assert after.parameter_count == program.parameter_count + WIDTH * WIDTH
    if text.startswith("nonzeros=30"):
        assert after.parameter_count == program.parameter_count + 2 * WIDTH * WIDTH


@pytest.mark.parametrize(("name", "from_file"), [("llama", False), ("gpt2", True)])
def test_models_of_the_zoo(name: str, from_file: bool, tmp_path: Path) -> None:
    """All kinds in one block; the same numbers as with the solved weights put in by hand, twice the same program."""
    program, feeds = traced(name), traced(name).feeds(**zoo.get(name).example())
    if from_file:
        program = from_onnx(export_onnx(program, tmp_path / "model.onnx"))
    ctx = Context(calibration=[feeds])
    sites = [site for site in linear_sites(program, structure(program))[0] if site.block == 1]
    texts = {site.index: ["nonzeros=400", "bits=4 group=8", "rank=6"][site.index % 3] for site in sites}
    decisions = [Decision("linear", s.index, s.label, s.block, 1, level=texts[s.index]) for s in sites]
    after, repeated, hand = program.clone(), program.clone(), program.clone()
    apply_linear(after, decisions, ctx, "test")
    verify(after, 2)
    wanted = {site.index: [parse(texts[site.index], site.outputs, site.inputs)] for site in sites}
    for solved in solve(program, sites, wanted, ctx):
        consumer = solved.site.consumers[0]
        hand.weights[solved.site.weight] = with_weight_matrix(program, consumer, solved.matrix())
    close(after.run(feeds), hand.run(feeds))
    with pytest.raises(AssertionError):
        close(after.run(feeds), program.run(feeds))
    apply_linear(repeated, decisions, Context(calibration=[feeds]), "test")
    assert repeated.fingerprint() == after.fingerprint()


def test_two_layers_are_the_best_of_their_rank_and_keep_the_bias() -> None:
    program = mlps(torch.float64, blocks=1)
    after, (note,) = applied(program, "rank=5", only=1, ctx=data(torch.float64))
    assert after.parameter_count == program.parameter_count - WIDTH * HIDDEN + 5 * (WIDTH + HIDDEN)
    expected = program.clone()
    (level,) = (
        level
        for place in linear_places(program, data(torch.float64), "rank", LinearSettings(share=0.25))[0]
        for level in place.levels
        if place.index == 1 and "rank=5 " in level.label
    )
    expected.weights |= level.replaced
    close(after.run(batches(torch.float64)[0]), expected.run(batches(torch.float64)[0]), 1e-12)
    assert "160 multiply-adds per row instead of 240;" in note
    assert "MORE" not in note


def test_sparse_factors_that_run_slower_are_reported() -> None:
    _, (note,) = applied(mlps(), "rank=10 nonzeros=3")
    # Four layers: 10 * 32 multiply-adds each, more than 240.
    assert "1,280 multiply-adds per row instead of 960 (MORE than before" in note
    # What a file needs: 120 numbers of the dense factor, three for each output, and positions.
    numbers = 2 * (10 * (WIDTH + HIDDEN) + 3 * (WIDTH + HIDDEN)) * 4
    stored = int(note.partition("; ")[2].split(" bytes")[0].replace(",", ""))
    assert numbers < stored < 3840


def test_nothing_to_do_changes_nothing() -> None:
    program = mlps()
    after = program.clone()
    assert apply_linear(after, decided(program, ""), Context(), "test") == []
    assert after.mutations == 0


@pytest.mark.parametrize(
    ("index", "text", "message"),
    [
        (9, "bits=4", "there is no linear layer 9"),
        (1, "bits=11", "bits is 11"),
        (1, "rank=13", "rank is 13"),
        (1, "nonzeros=9 correction=13", "correction is 13"),
        (1, "bits=4 shape=12x12", "has 20 outputs and 12 inputs"),
        (1, "magic=1", "none of the known forms"),
    ],
)
def test_plans_for_other_models_are_refused(index: int, text: str, message: str) -> None:
    program = mlps()
    before = program.fingerprint()
    with pytest.raises(PreconditionError, match=message) as caught:
        apply_linear(program, [Decision("linear", index, "x", None, 1, level=text)], data(), "test")
    assert caught.value.pass_name == "test"
    assert program.fingerprint() == before


def test_data_is_asked_for_where_it_is_needed() -> None:
    with pytest.raises(PreconditionError, match="needs calibration data"):
        applied(mlps(), "rank=3", ctx=Context())
    with pytest.raises(PreconditionError, match="correction=1' needs calibration data"):
        applied(mlps(), "nonzeros=30 method=magnitude correction=1", ctx=Context())
