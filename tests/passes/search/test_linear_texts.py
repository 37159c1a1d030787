"""Texts of levels: read back as written, and refused where they make no sense."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphlathe.ir.errors import InputError
from graphlathe.passes.search.linear_texts import (
    BITS_METHODS,
    SPARSE_METHODS,
    Bits,
    LinearLevel,
    LowRank,
    Sparse,
    for_plan,
    needs_data,
    parse,
)

LEVELS = st.one_of(
    st.builds(Sparse, st.integers(0, 96 * 32), st.sampled_from(SPARSE_METHODS), st.integers(0, 32)),
    st.builds(
        Bits, st.integers(2, 8), st.none() | st.integers(1, 200), st.sampled_from(BITS_METHODS), st.integers(0, 32)
    ),
    st.integers(1, 32).flatmap(lambda r: st.builds(LowRank, st.just(r), st.none() | st.integers(1, r))),
)


@given(LEVELS)
def test_what_is_written_is_read_back(level: LinearLevel) -> None:
    assert parse(str(level), 96, 32) == level
    assert parse(for_plan(level, 96, 32, 16), 96, 32) == level


def test_methods_have_defaults() -> None:
    assert parse("nonzeros=5", 2, 4) == Sparse(5, "sparsegpt")
    assert parse("bits=4", 2, 4) == Bits(4, None, "gptq")


def test_texts_of_old_plans_say_what_they_said() -> None:
    assert str(Sparse(5)) == "nonzeros=5 method=sparsegpt"
    assert parse("nonzeros=5 method=sparsegpt shape=2x4", 2, 4) == Sparse(5)
    assert str(Bits(4, 2)) == "bits=4 group=2 method=gptq"
    assert parse("bits=4 group=2 method=gptq shape=2x4 was=32", 2, 4) == Bits(4, 2)
    assert parse("bits=4 correction=2", 2, 4) == Bits(4, correction=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "none of the known forms"),
        ("quarter", "not a new key=value"),
        ("bits=4 bits=3", "not a new key=value"),
        ("bits=4 rank=2", "none of the known forms"),
        ("bits=-4", "bits is '-4'"),
        ("bits=9", "bits is 9"),
        ("bits=4 group=0", "group is 0"),
        ("bits=4 method=wanda", "method is 'wanda'"),
        ("nonzeros=9", "nonzeros is 9"),
        ("nonzeros=4 group=2", "'group' has no meaning"),
        ("rank=3", "rank is 3"),
        ("rank=0", "rank is 0"),
        ("rank=1 nonzeros=2", "nonzeros is 2"),
        ("rank=1 method=gptq", "'method' has no meaning"),
        ("rank=1 correction=1", "'correction' has no meaning"),
        ("nonzeros=4 correction=3", "correction is 3"),
        ("bits=4 correction=x", "correction is 'x'"),
        ("bits=4 was=0", "no weight takes 0 bits"),
        ("nonzeros=4 was=32", "'was' has no meaning"),
        ("bits=4 shape=4x2", "the layer has 2 outputs and 4 inputs"),
    ],
)
def test_what_makes_no_sense_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(text, 2, 4)


def test_what_needs_data() -> None:
    assert [needs_data(level) for level in (Sparse(1), Sparse(1, "wanda"), Bits(4), LowRank(1))] == [True] * 4
    assert not needs_data(Sparse(1, "magnitude"))
    assert not needs_data(Bits(4, None, "round-to-nearest"))
    assert needs_data(Sparse(1, "magnitude", 1))
    assert needs_data(Bits(4, None, "round-to-nearest", 1))
