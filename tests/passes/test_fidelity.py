"""Drift: the measures against closed forms, streaming, and what counts as logits."""

from __future__ import annotations

import math

import pytest
import torch

from graphlathe.ir.from_torch import trace
from graphlathe.passes import fidelity
from graphlathe.passes.fidelity import DriftMeter, logits_outputs, measure_drift, output_distance, position_mask


def meter(
    *pairs: tuple[torch.Tensor, torch.Tensor], name: str = "logits", mask: torch.Tensor | None = None
) -> DriftMeter:
    made = DriftMeter()
    for changed, reference in pairs:
        made.add({name: changed}, {name: reference}, {} if mask is None else {"attention_mask": mask})
    return made


def test_kl_of_two_coins() -> None:
    p, q = torch.tensor([[0.5, 0.5]], dtype=torch.float64), torch.tensor([[0.9, 0.1]], dtype=torch.float64)
    drift = meter((q.log(), p.log())).result()
    assert drift.kl == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1), rel=1e-12)
    # The other way round it is another number: the reference comes first.
    assert meter((p.log(), q.log())).result().kl != pytest.approx(drift.kl, rel=1e-3)


def test_logits_may_be_shifted_and_scaled_temperature_matters() -> None:
    z = torch.randn(3, 7, 11).double()
    assert meter((z + 5, z)).result().kl == pytest.approx(0, abs=1e-12)
    assert meter((z * 2, z)).result().kl > 0.01


def test_batches_are_weighted_by_positions_and_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(5, 12, 9).double(), torch.randn(5, 12, 9).double()
    whole = meter((a, b)).result()
    parts = meter((a[:1], b[:1]), (a[1:], b[1:])).result()
    monkeypatch.setattr(fidelity, "_AT_A_TIME", 20)
    chunked = meter((a, b)).result()
    for other in (parts, chunked):
        assert other.kl == pytest.approx(whole.kl, rel=1e-12)
        assert other.top1 == pytest.approx(whole.top1)
        assert other.relative == pytest.approx(whole.relative, rel=1e-12)
    assert whole.relative == pytest.approx(float((a - b).norm() / b.norm()), rel=1e-12)
    assert parts.batches == 2


def test_top1_counts_positions() -> None:
    reference = torch.eye(4)[None] * 9
    changed = reference.clone()
    changed[0, 0] = changed[0, 1]
    assert meter((changed, reference)).result().top1 == 0.75


def test_hidden_positions_do_not_count() -> None:
    reference, changed = torch.zeros(1, 3, 5), torch.zeros(1, 3, 5)
    changed[0, 2, 1] = 100.0
    mask = torch.tensor([[1, 1, 0]])
    assert meter((changed, reference), mask=mask).result().kl == 0
    assert meter((changed, reference)).result().kl > 10
    # A mask of another shape (an encoder's) is not this output's.
    assert meter((changed, reference), mask=mask[:, :2]).result().kl > 10


def test_impossible_entries_and_infinities() -> None:
    reference = torch.tensor([[0.0, 1.0, -math.inf]])
    assert meter((reference, reference)).result().kl == 0
    assert meter((reference, reference)).result().relative == 0
    assert meter((torch.tensor([[0.0, -math.inf, 1.0]]), reference)).result().kl == math.inf


def test_a_broken_output_is_no_small_drift() -> None:
    want = torch.ones(2, 3)
    assert meter((torch.full((2, 3), math.nan), want), name="y").result().relative != 0
    assert not meter((torch.full((2, 3), math.nan), want), name="y").result().relative <= 1e9
    assert meter((torch.ones(2, 4), want), name="y").result().relative == math.inf
    assert meter((want, torch.zeros(2, 3)), name="y").result().relative == math.inf


@pytest.mark.parametrize(
    ("outputs", "found"),
    [
        ({"logits": torch.zeros(1, 2)}, ["logits"]),
        ({"decoder.logits": torch.zeros(1, 2, 3), "hidden": torch.zeros(1, 2, 99)}, ["decoder.logits"]),
        ({"prediction_logits": torch.zeros(1, 2, 30)}, ["prediction_logits"]),
        ({"logits": torch.zeros(1, 1)}, []),  # a regression
        ({"logits": torch.zeros(1, 19, 8, 8)}, []),  # a segmentation: classes are not last
        ({"output": torch.zeros(1, 10)}, ["output"]),
        ({"output": torch.zeros(1, 7)}, []),
        ({"output": torch.zeros(1, 10, dtype=torch.int64)}, []),
        ({"output": torch.zeros(3, 16, 16, 16)}, []),
        ({"last_hidden_state": torch.zeros(1, 4, 64)}, []),
    ],
)
def test_what_looks_like_logits(outputs: dict[str, torch.Tensor], found: list[str]) -> None:
    assert logits_outputs(outputs) == found


def test_distance_for_ranking() -> None:
    a, b = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    assert output_distance({"y": a}, {"y": b}) == pytest.approx(
        float((a - b).square().sum() / b.square().sum()), rel=1e-5
    )
    z = torch.randn(1, 3, 8)
    assert output_distance({"logits": z * 2}, {"logits": z}) == pytest.approx(meter((z * 2, z)).result().kl)


def test_text() -> None:
    assert str(meter((torch.zeros(1, 4), torch.zeros(1, 4))).result()) == "KL 0, top-1 100.0%"
    assert str(meter((torch.ones(1), torch.ones(1)), name="y").result()) == "rel 0"


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_nan_in_any_output_is_not_lost(order: str) -> None:
    reference = {name: torch.ones(3) for name in order}
    changed = {"a": torch.full((3,), 1.1), "b": torch.full((3,), math.nan)}
    made = DriftMeter()
    made.add({name: changed[name] for name in order}, reference)
    assert math.isnan(made.result().relative)


def test_equal_nans_differ_by_nothing() -> None:
    value = torch.tensor([1.0, math.nan, math.inf])
    assert meter((value, value), name="y").result().relative == 0


def test_a_decoder_has_a_mask_of_its_own() -> None:
    ours, theirs = torch.tensor([[1, 0, 0]]), torch.tensor([[1, 1, 0]])
    batch = {"attention_mask": ours, "decoder_input_ids": torch.zeros(1, 3), "decoder_attention_mask": theirs}
    assert position_mask(batch, (1, 3)) is theirs
    assert position_mask(batch, (1, 3), inside=True) is None
    assert position_mask({"attention_mask": ours}, (1, 3), inside=True) is ours
    assert position_mask({"attention_mask": ours}, (1, 4)) is None


def test_random_models_draw_alike_and_the_callers_numbers_stay() -> None:
    class Noisy(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand_like(x)

    program = trace(Noisy(), (torch.zeros(4, 9),))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    drift = measure_drift(program.clone().run, program, [{"x": torch.zeros(4, 9)}] * 2)
    assert (drift.relative, drift.kl) == (0, 0)
    assert torch.equal(torch.get_rng_state(), state)
