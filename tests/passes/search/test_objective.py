"""The objective of searches against the drift that reports measure, which is computed in another way."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphlathe.passes.fidelity import output_distance
from graphlathe.passes.search.objective import distance, keep


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(seed=st.integers(0, 1000), width=st.sampled_from([2, 7, 300]), masked=st.booleans(), close=st.booleans())
def test_small_vocabularies_are_exact(seed: int, width: int, masked: bool, close: bool) -> None:
    want = {"logits": logits(2, 5, width, seed=seed)}
    got = {"logits": logits(2, 5, width, seed=seed + 1)}
    if close:
        got = {"logits": want["logits"] + 1e-3 * got["logits"]}
    batch = {"attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])} if masked else {}
    assert distance(got, keep(want, batch)) == pytest.approx(output_distance(got, want, batch), rel=1e-6, abs=1e-12)


def test_masked_rows_do_not_count() -> None:
    want, batch = {"logits": logits(1, 3, 9)}, {"attention_mask": torch.tensor([[1, 0, 1]])}
    got = {"logits": want["logits"].clone()}
    got["logits"][0, 1] = math.nan
    assert distance(got, keep(want, batch)) == 0
    got["logits"][0, 2, 4] += 1
    assert distance(got, keep(want, batch)) > 0


@pytest.mark.parametrize("top", [1, 16, 512])
def test_the_most_probable_entries_give_a_lower_bound(top: int) -> None:
    want, got = {"logits": logits(2, 3, 5000)}, {"logits": logits(2, 3, 5000, seed=1)}
    whole = output_distance(got, want, {})
    bound = distance(got, keep(want, {}, top=top))
    assert 0 < bound <= whole * (1 + 1e-6)
    assert distance(want, keep(want, {}, top=top)) == pytest.approx(0, abs=1e-6)
    # By hand: the distribution over the kept entries, and all others as one.
    p, q = (torch.softmax(v["logits"].double().reshape(-1, 5000), -1) for v in (want, got))
    kept = p.topk(top, -1).indices
    p, q = (torch.cat([v.gather(1, kept), 1 - v.gather(1, kept).sum(1, keepdim=True)], 1) for v in (p, q))
    assert bound == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-4)


def test_more_entries_than_the_vocabulary_has_are_all_of_them() -> None:
    want, got = {"logits": logits(2, 3, 5000)}, {"logits": logits(2, 3, 5000, seed=1)}
    whole = output_distance(got, want, {})
    assert distance(got, keep(want, {}, top=6000)) == pytest.approx(whole, rel=1e-6)


def test_a_peaked_distribution_is_close_to_its_bound() -> None:
    want, got = {"logits": logits(4, 5000, scale=6)}, {"logits": logits(4, 5000, scale=6)}
    got["logits"] = got["logits"] + 0.1 * logits(4, 5000, seed=2)
    whole, bound = output_distance(got, want, {}), distance(got, keep(want, {}))
    assert 0.5 * whole < bound <= whole


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_other_outputs_are_compared_by_relative_error(kind: torch.dtype) -> None:
    want: dict[str, Any] = {"hidden": logits(2, 4).to(kind), "pooled": logits(3, seed=2).to(kind), "count": 3}
    got = {"hidden": want["hidden"] * 1.25, "pooled": want["pooled"] * 0.5, "count": 3}
    assert distance(got, keep(want, {})) == pytest.approx(output_distance(got, want, {}), rel=1e-6)
    assert distance(got, keep(want, {})) == pytest.approx(0.25, rel=1e-2)
    assert distance(want, keep(want, {})) == 0


@pytest.mark.parametrize("name", ["hidden", "pooled"])
def test_nan_anywhere_is_infinite(name: str) -> None:
    want = {"hidden": logits(2, 4), "pooled": logits(3, seed=2)}
    got = {**want, "hidden": want["hidden"] + 1}
    got[name] = torch.full_like(want[name], math.nan)
    assert distance(got, keep(want, {})) == math.inf
    assert distance({"logits": torch.full((2, 9), math.nan)}, keep({"logits": logits(2, 9)}, {})) == math.inf
    wide = {"logits": logits(2, 5000)}
    assert distance({"logits": wide["logits"] * math.nan}, keep(wide, {})) == math.inf


def test_where_no_position_counts_the_numbers_themselves_are_compared() -> None:
    batch = {"attention_mask": torch.zeros(1, 3, dtype=torch.int64)}
    want, got = {"logits": logits(1, 3, 9)}, {"logits": 2 * logits(1, 3, 9)}
    assert distance(got, keep(want, batch)) == pytest.approx(output_distance(got, want, batch)) == pytest.approx(1.0)


def test_impossible_entries_contribute_nothing() -> None:
    want = {"logits": logits(2, 9)}
    want["logits"][:, 3] = -math.inf
    got = {"logits": want["logits"] + 0.5 * logits(2, 9, seed=1)}
    assert distance(got, keep(want, {})) == pytest.approx(output_distance(got, want, {}), rel=1e-6)
    got["logits"][0, 4] = -math.inf
    assert distance(got, keep(want, {})) == math.inf
