"""Copies of a weight become one weight: from the older exporter's files, and from files made by hand."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx.helper as oh
import pytest
import torch
from torch import Tensor, nn

from graphlathe.ir.axes import cut, find_groups
from graphlathe.ir.from_onnx import from_onnx
from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.ir.retie import retie
from graphlathe.ir.structure import structure
from graphlathe.ir.verify import verify
from graphlathe.passes.base import Context
from graphlathe.passes.canonical.raise_all import RaiseAll
from tests.onnx_models import I, import_model, model_of

TABLE = 80 * 16


class Tied(nn.Module):
    """One residual block between an embedding and a head with the same matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(80, 16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 80, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Scores of 80 tokens."""
        h = self.embed(ids)
        return self.head(h + self.down(torch.relu(self.up(h))))


def exported(folder: Path) -> tuple[Program, nn.Module]:
    """As PyTorch's older exporter writes it: the head is the table, transposed, under a name of its own."""
    torch.manual_seed(0)
    module = Tied().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = {"ids": {0: "B", 1: "S"}}
        ids = torch.tensor([[1, 2, 3]])
        torch.onnx.export(module, (ids,), str(folder / "m.onnx"), dynamo=False, input_names=["ids"], dynamic_axes=axes)
    return from_onnx(folder / "m.onnx"), module


@pytest.mark.parametrize("form", ["as read", "raised"])
def test_the_older_exporters_file(tmp_path: Path, form: str) -> None:
    program, module = exported(tmp_path)
    if form == "raised":
        RaiseAll().run(program, Context())
    ids = torch.tensor([[5, 79, 0, 33]])
    before, count = program(ids=ids), program.parameter_count
    gone = retie(program)
    verify(program, 2)
    assert list(gone.values()) == ["embed.weight"]
    assert program.parameter_count == count - TABLE == sum(p.numel() for p in module.parameters())
    torch.testing.assert_close(program(ids=ids), before, rtol=0, atol=1e-6)
    assert program.tied == ({} if form == "as read" else gone)
    assert retie(program) == {}


def test_a_tied_file_can_be_raised_and_cut(tmp_path: Path) -> None:
    """Tied again, the head is found as tied, and one slice of one table cuts embedding and head."""
    program, _ = exported(tmp_path)
    retie(program)
    RaiseAll().run(program, Context())
    (head,) = structure(program).heads
    assert head.tied is not None
    table = program.tied.get("embed.weight", "embed.weight")
    group = next(g for g in find_groups(program) if g.size == 16)
    assert [m.weight for m in group.members].count(table) == 1
    cut(program, group, range(10))
    assert program.weights[table].shape == (80, 10)
    assert program.parameter_count == 80 * 10 + 2 * 24 * 10 + 24 + 10


def by_hand(folder: Path, tables: dict[str, np.ndarray]) -> Program:
    """Rows of three tables, added."""
    nodes = [oh.make_node("Gather", [name, "ids"], [f"rows_{name}"]) for name in tables]
    nodes += [
        oh.make_node("Add", ["rows_a", "rows_b"], ["ab"]),
        oh.make_node("Add", ["ab", "rows_c"], ["y"]),
    ]
    return import_model(model_of(nodes, [("ids", I, ["N"])], ["y"], tables), folder)


def test_equal_bytes_and_nothing_less(tmp_path: Path) -> None:
    """The second table is a copy; the third differs in the sign of a zero."""
    table = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    table[3, 4] = 0
    nearly = table.copy()
    nearly[3, 4] = -0.0
    program = by_hand(tmp_path, {"a": table, "b": table.copy(), "c": nearly})
    ids = torch.tensor([3, 60])
    before = program(ids=ids)
    assert retie(program) == {"b": "a"}
    assert program.tied == {"b": "a"} and set(program.weights) == {"a", "c"}
    assert torch.equal(program(ids=ids)["y"], before["y"])


def test_small_weights_and_small_copies_stay(tmp_path: Path) -> None:
    table = np.ones((8, 4), np.float32)
    program = by_hand(tmp_path, {"a": table, "b": table, "c": table})
    text = program.to_text()
    assert retie(program) == {} and program.to_text() == text
    assert set(retie(program, min_bytes=1)) == {"b", "c"}


def test_vectors_and_weights_without_numbers_stay() -> None:
    """Fresh norms are all ones, whatever their size; and nothing is known of what is on the meta device."""
    norms = nn.Sequential(nn.LayerNorm(2048), nn.LayerNorm(2048))
    assert retie(trace(norms.eval(), torch.randn(2, 2048))) == {}
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        program = trace(module.eval(), torch.empty(2, 64, device="meta"))
    assert retie(program) == {}


def test_the_first_reader_names_the_weight_and_aliases_follow() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40)).eval()
    with torch.no_grad():
        module[1].weight.copy_(module[0].weight)
    program = trace(module, torch.randn(2, 40))
    program.tied["other"] = "1.weight"
    assert retie(program) == {"1.weight": "0.weight"}
    assert program.tied == {"1.weight": "0.weight", "other": "0.weight"}
