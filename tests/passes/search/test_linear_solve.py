"""Solved levels against the layers' real inputs, and their costs against what is really stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphlathe.ir.errors import PreconditionError
from graphlathe.ir.program import Program
from graphlathe.ir.structure import structure
from graphlathe.passes.base import Context
from graphlathe.passes.search import linear_solve
from graphlathe.passes.search.consumers import weight_matrix
from graphlathe.passes.search.linear_sites import LinearSite, linear_sites
from graphlathe.passes.search.linear_solve import (
    counted_bytes,
    counted_params,
    executed_macs,
    parts_of,
    solve,
)
from graphlathe.passes.search.linear_texts import Bits, LinearLevel, LowRank, Sparse, correction_of
from graphlathe.passes.search.local.factorize import Factors
from graphlathe.passes.search.local.round_to_nearest import Quantized
from tests.passes.search.linear_models import HIDDEN, WIDTH, batches, data, mlps, program_of

LEVELS: list[LinearLevel] = [
    Sparse(100),
    Sparse(100, "wanda"),
    Sparse(100, "magnitude"),
    Bits(3, 5),
    Bits(4, None, "round-to-nearest"),
    LowRank(4),
    LowRank(6, 2),
    Sparse(100, correction=3),
    Bits(3, 5, correction=2),
]


def sites_of(program: Program) -> list[LinearSite]:
    return linear_sites(program, structure(program))[0]


def inputs_of(program: Program, site: LinearSite) -> Tensor:
    """What a site's operators read on the calibration data: [rows, inputs]."""
    rows: list[Tensor] = []
    operands = [consumer.operand for consumer in site.consumers]

    def observe(node: Any, value: Any) -> None:
        rows.extend(value.reshape(-1, site.inputs) for operand in operands if operand is node)

    for batch in batches(torch.float64):
        program.run(batch, observe=observe)
    return torch.cat(rows)


@pytest.mark.parametrize("limit", [1, 1 << 30])
def test_errors_are_those_of_the_outputs(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every kind of level, whatever number of layers is measured at a time."""
    monkeypatch.setattr(linear_solve, "GRAM_BYTES", limit)
    program = mlps(torch.float64)
    sites = sites_of(program)
    results = list(solve(program, sites, {site.index: LEVELS for site in sites}, data(torch.float64)))
    assert [(s.site.index, s.level) for s in results] == [(i.index, level) for i in sites for level in LEVELS]
    for solved in results:
        x = inputs_of(program, solved.site)
        weight = weight_matrix(program, solved.site.consumers[0])
        expected = ((x @ (solved.matrix() - weight).T).square().sum() / (x @ weight.T).square().sum()).item()
        assert solved.error == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert expected > 1e-6


def test_a_weight_of_several_operators_is_solved_on_what_all_of_them_read() -> None:
    program = program_of(lambda m, x, i: m.layer(x), dtype=torch.float64, layer=nn.Linear(WIDTH, WIDTH))
    (site,) = sites_of(program)
    (solved,) = solve(program, [site], {site.index: [Sparse(50)]}, data(torch.float64))
    x, weight = inputs_of(program, site), weight_matrix(program, site.consumers[0])
    assert len(x) == 2 * 2 * 45
    expected = ((x @ (solved.matrix() - weight).T).square().sum() / (x @ weight.T).square().sum()).item()
    assert solved.error == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_results_have_the_type_of_the_weight(dtype: torch.dtype) -> None:
    program = mlps(dtype, blocks=1)
    site = sites_of(program)[0]
    for solved in solve(program, [site], {site.index: LEVELS}, data(dtype)):
        assert solved.matrix().dtype == dtype
        if isinstance(solved.stored, Quantized):
            assert solved.stored.scale.dtype == dtype


def test_without_data_only_what_needs_none_is_solved() -> None:
    program = mlps()
    sites = sites_of(program)
    blind = [Sparse(7, "magnitude"), Bits(4, 6, "round-to-nearest")]
    results = list(solve(program, sites[:1], {sites[0].index: blind}, Context()))
    assert [solved.error for solved in results] == [None, None]
    assert int((results[0].matrix() != 0).sum()) == 7
    with_data = list(solve(program, sites[:1], {sites[0].index: blind}, data()))
    for a, b in zip(results, with_data, strict=True):
        assert torch.equal(a.matrix(), b.matrix())
    with pytest.raises(PreconditionError, match="'bits=4 method=gptq' needs calibration data"):
        list(solve(program, sites, {sites[1].index: [Bits(4)]}, Context()))


def test_the_program_stays_as_it_was() -> None:
    program = mlps()
    before = program.fingerprint()
    sites = sites_of(program)
    list(solve(program, sites, {site.index: LEVELS for site in sites}, data()))
    assert program.fingerprint() == before


def test_costs_are_those_of_what_is_stored() -> None:
    program = mlps()
    site = sites_of(program)[0]
    for solved in solve(program, [site], {site.index: [*LEVELS, Bits(4, 4), Bits(8, 6)]}, data()):
        level, stored, beside = solved.level, solved.stored, 0
        if solved.correction is not None:
            beside = solved.correction.left.numel() + solved.correction.right.numel()
            assert beside == correction_of(level) * (WIDTH + HIDDEN)
        nbytes = counted_bytes(level, site, torch.float32) - 4 * beside
        if isinstance(stored, Factors):
            used = stored.right.numel() + int((stored.left != 0).sum())
            assert counted_params(level, site) == used
            assert nbytes == stored.nbytes
            assert executed_macs(level, site) == stored.macs
        elif isinstance(stored, Quantized):
            assert counted_params(level, site) == executed_macs(level, site) == WIDTH * HIDDEN + beside
            # Zero points take a byte each here; rows of codes are filled up to bytes in each part.
            assert stored.zero is not None
            assert stored.nbytes <= nbytes <= stored.nbytes + stored.zero.numel() + HIDDEN
        else:
            assert counted_params(level, site) - beside == int((stored != 0).sum()) == 100
            assert executed_macs(level, site) == WIDTH * HIDDEN + beside
            assert 100 * 4 < nbytes < WIDTH * HIDDEN * 4


def test_parts_of_codes_fit_into_bytes() -> None:
    for bits in range(1, 9):
        parts = parts_of(bits)
        assert sum(parts) == bits
        assert all(8 % part == 0 for part in parts)
    assert parts_of(7) == [4, 2, 1]
