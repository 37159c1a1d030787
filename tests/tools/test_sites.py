"""Collapsing equal parts and naming where they come from."""

from __future__ import annotations

import pytest

from graphlathe.tools.sites import Part, collapse, join_origins


def parts(text: str) -> list[Part]:
    return [Part(letter, "block", signature=letter) for letter in text]


def shape(collapsed: list[Part]) -> str:
    def one(part: Part) -> str:
        inner = "".join(one(child) for child in part.children) if part.kind == "group" else part.label
        return f"{part.times}({inner})" if part.times > 1 else inner

    return " ".join(one(part) for part in collapsed)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("a", "a"),
        ("aaaa", "4(a)"),
        ("abab", "2(ab)"),
        ("aabaab", "2(aab)"),
        ("aaab", "3(a) b"),
        ("xababy", "x 2(ab) y"),
        ("abc", "a b c"),
        ("aaaaaabaaaaaab", "2(aaaaaab)"),
        ("aabb", "2(a) 2(b)"),
    ],
)
def test_collapse(text: str, expected: str) -> None:
    collapsed = collapse(parts(text))
    assert shape(collapsed) == expected
    covered = sum(part.times * (len(part.children) if part.kind == "group" else 1) for part in collapsed)
    assert covered == len(text), "nothing is lost"


def test_parts_without_a_signature_are_never_equal() -> None:
    assert shape(collapse([Part("a", "rest"), Part("a", "rest")])) == "a a"


@pytest.mark.parametrize(
    ("origins", "expected"),
    [
        (["m.layers.0", "m.layers.1", "m.layers.2"], "m.layers.0-2"),
        (["m.layers.0", "m.layers.1", "m.layers.5"], "m.layers.{0-1,5}"),
        (["m.layers.3", "m.layers.3"], "m.layers.3"),
        (["m.layers.0.attn", "m.layers.1.attn"], "m.layers.0-1.attn"),
        (["a.0.b.0", "a.1.b.1"], "a.0.b.0 ... a.1.b.1"),
        (["enc", "dec"], "enc ... dec"),
        (["/model/layers.0/Add", "/model/layers.1/Add"], "model.layers.0-1.Add"),
    ],
)
def test_join_origins(origins: list[str], expected: str) -> None:
    assert join_origins(origins) == expected
