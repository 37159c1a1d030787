"""Questions about what a pass left, and its answers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphlathe
from graphlathe.ir.errors import InputError, PipelineError
from graphlathe.ir.program import Program
from graphlathe.passes.base import Effect
from graphlathe.passes.optimize import Optimized
from graphlathe.passes.pipeline import parse_pipeline
from graphlathe.passes.report import Report, Row
from graphlathe.tools.why_not import PLACES, Question, answer, parse_question


class Attention(nn.Module):
    def __init__(self, watched: bool) -> None:
        super().__init__()
        self.watched = watched

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        mixed = weights @ v
        return mixed + weights.sum(-1, keepdim=True) if self.watched else mixed


class Two(nn.Module):
    """One attention that can be raised, and one whose weights somebody looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.watched, self.plain = Attention(True), Attention(False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.plain(self.watched(q, k, v), k, v)


def run(passes: str) -> tuple[Program, Optimized]:
    before = graphlathe.trace(Two(), tuple(torch.randn(1, 2, 5, 4) for _ in range(3)))
    return before, graphlathe.optimize(before, passes=passes, progress=False)


def ask(text: str, passes: str = "canonicalize,raise-attention") -> list[str]:
    before, after = run(passes)
    return answer(parse_question(text, parse_pipeline(passes)), after.report, before, after)


def test_all_places_of_a_pass_with_counts() -> None:
    head, reason, place = ask("raise-attention")
    assert head == "raise-attention: 1 of 2 places rewritten"
    assert reason.startswith("  1 x its weights have 2 users")
    assert place == "      %softmax (aten.softmax.int, from watched)"


def test_of_many_places_the_first_are_listed() -> None:
    names = [f"place_{i}" for i in range(PLACES + 2)]
    row = Row(1, "raise-attention", Effect.EXACT, missed=dict.fromkeys(names, "no"), misses={"no": len(names)})
    before, _ = run("raise-attention")
    lines = answer(Question("raise-attention"), Report("raise-attention", [row]), before, before)
    assert lines[1:] == ["  10 x no", *(f"      %{name}" for name in names[:PLACES]), "      and 2 more"]


@pytest.mark.parametrize("passes", ["canonicalize,raise-attention", "raise"], ids=["the pass", "a part of a pass"])
@pytest.mark.parametrize("place", ["softmax", "%softmax", "watched"])
def test_a_place_by_name_or_origin(place: str, passes: str) -> None:
    (line,) = ask(f"raise-attention:{place}", passes)
    assert line.startswith("raise-attention left %softmax (aten.softmax.int, from watched): its weights have 2 users")


def test_a_place_by_its_number_in_the_text() -> None:
    before, _ = run("raise")
    (number,) = [i for i, line in enumerate(operators(before)) if "softmax" in line][:1]
    (line,) = ask(f"raise-attention:%{number}")
    assert "left %softmax" in line


def operators(program: Program) -> list[str]:
    lines = [line.strip() for line in program.to_text().splitlines()]
    return [line for line in lines if line.startswith("%") and line[1].isdecimal()]


def test_a_place_that_was_rewritten_says_what_took_it() -> None:
    (line,) = ask("raise-attention:plain")
    assert "rewritten or removed; raise-attention wrote %" in line
    assert "scaled_dot_product_attention" in line


def test_a_place_that_the_pass_does_not_look_at() -> None:
    (line,) = ask("raise-attention:add")
    assert line == "%add (aten.add.Tensor, from watched): nothing that raise-attention considers"


def test_unknown_places_and_passes_are_errors() -> None:
    with pytest.raises(InputError, match=r"no node 'softmaxx' \(did you mean 'softmax'\?\)"):
        ask("raise-attention:softmaxx")
    with pytest.raises(PipelineError, match="'raise-atention', which is not in the pipeline"):
        parse_question("raise-atention", parse_pipeline("raise-attention"))
