"""Maps in the place of dropped blocks, against regressions written out, and where the block was such a map."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from graphlathe.ir.errors import PreconditionError
from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.ir.rewrite import Rewriter
from graphlathe.ir.structure import structure
from graphlathe.ir.verify import verify
from graphlathe.passes.base import Context
from graphlathe.passes.fidelity import output_distance
from graphlathe.passes.manager import PassManager
from graphlathe.passes.search import correct as correct_module
from graphlathe.passes.search.apply import apply_plan
from graphlathe.passes.search.correct import correct, correction_size, runs_of
from graphlathe.passes.search.plan import Decision, Plan
from graphlathe.passes.search.units import removable_units
from graphlathe.tools import zoo
from tests.zoo_programs import traced

WIDTH, CLASSES = 12, 9


class Block(nn.Module):
    """A residual block; a linear one adds a map of rank 2 of the normalised stream."""

    def __init__(self, linear: bool) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(WIDTH, 2 if linear else 20, bias=not linear)
        self.up = nn.Linear(2 if linear else 20, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.down(torch.nn.functional.rms_norm(x, (WIDTH,), eps=1e-6))
        return x + self.up(h if self.linear else torch.tanh(h))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))  # of the norm that the last block reads
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(linear=number == 1) for number in range(4))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(torch.nn.functional.rms_norm(x, (WIDTH,), self.scale, 1e-6))


def stack() -> tuple[Program, list[dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(4)
    model = Stack().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4)
    batches = [{"x": torch.randn(4, 30, WIDTH, generator=generator, dtype=torch.float64)} for _ in range(3)]
    return trace(model, batches[0], dynamic={"x": {0: "B", 1: "S"}}), batches


def dropped(program: Program, batches: list[dict[str, torch.Tensor]], blocks: list[int], rank: int) -> Program:
    after = program.clone()
    decisions = tuple(Decision("drop-block", b, "", b, 1, (0,)) for b in blocks)
    apply_plan(after, Plan(decisions, rank=rank), Context(calibration=batches), "test")
    verify(after, 2)
    return after


def distance(after: Program, program: Program, batches: list[dict[str, torch.Tensor]]) -> float:
    return sum(output_distance(after.run(b), program.run(b), b) for b in batches)


def test_a_block_that_is_such_a_map_is_found_again() -> None:
    program, batches = stack()
    plain = distance(dropped(program, batches, [1], 0), program, batches)
    assert distance(dropped(program, batches, [1], 2), program, batches) < 1e-3 * plain
    assert distance(dropped(program, batches, [1], 1), program, batches) > 1e-3 * plain  # one dimension is not enough


def test_the_map_is_the_reduced_rank_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of inputs of variance one, with errors that count as in the norm that reads the stream (here with weights)."""
    monkeypatch.setattr(correct_module, "DAMPINGS", (0.01,))
    program, batches = stack()
    after = dropped(program, batches, [3], 3)
    unit = removable_units(structure(program), "block")[3]
    rows: list[tuple[torch.Tensor, torch.Tensor]] = []
    for batch in batches:
        seen: dict[str, torch.Tensor] = {}
        program.run(batch, observe=lambda node, value, seen=seen: seen.__setitem__(node.name, value))
        rows.append((seen[unit.by.name].flatten(0, 1), seen[unit.replaced.name].flatten(0, 1)))
    x, y = (torch.cat([pair[i] for pair in rows]).numpy() for i in (0, 1))
    scale = np.abs(next(w for name, w in program.weights.items() if "scale" in name).tensor().numpy())
    counts = 1 / ((y**2).mean(1) + 1e-6)
    x, wanted = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-6), (y - x) * scale
    mean_x, mean_y = np.average(x, 0, counts), np.average(wanted, 0, counts)
    variance = np.average((x - mean_x) ** 2, 0, counts)
    # Weighted rows, standardised columns, and 12 more rows for the ridge.
    root = np.sqrt(counts / counts.sum())[:, None]
    left = np.concatenate([root * (x - mean_x) / np.sqrt(variance), np.sqrt(0.01) * np.eye(WIDTH)])
    right = np.concatenate([root * (wanted - mean_y), np.zeros((WIDTH, WIDTH))])
    full = np.linalg.lstsq(left, right, rcond=None)[0]
    v = np.linalg.svd(left @ full)[2][:3]  # the best predictions of rank 3 lie in these directions
    best = (full @ v.T @ v / np.sqrt(variance)[:, None]).T / scale[:, None]
    new = {
        name.rpartition("in_place.")[2]: w.tensor().numpy() for name, w in after.weights.items() if "in_place" in name
    }
    assert new["up.weight"].shape == (WIDTH, 3)
    np.testing.assert_allclose(new["up.weight"] @ new["down.weight"], best, atol=1e-9)
    np.testing.assert_allclose(new["up.bias"], mean_y / scale - best @ mean_x, atol=1e-9)


def test_neighbours_get_one_map_and_others_their_own() -> None:
    program, batches = stack()
    units = removable_units(structure(program), "block")
    assert [(r.by, r.replaced) for r in runs_of(program, [units[2], units[1]])] == [(units[1].by, units[2].replaced)]
    joined, apart = dropped(program, batches, [1, 2], 3), dropped(program, batches, [0, 2], 3)
    assert sum(name.endswith("down.weight") and "in_place" in name for name in joined.weights) == 1
    assert sum(name.endswith("down.weight") and "in_place" in name for name in apart.weights) == 2
    for after, blocks in ((joined, [1, 2]), (apart, [0, 2])):
        assert distance(after, program, batches) < 0.7 * distance(
            dropped(program, batches, blocks, 0), program, batches
        )


def test_later_maps_correct_what_earlier_ones_left_over() -> None:
    program, batches = stack()
    plain, mapped = (dropped(program, batches, [0, 2], rank) for rank in (0, 3))
    # Each alone is fitted to the unchanged stream; together they see each other's errors.
    after = program.clone()
    context = Context(calibration=batches)
    for block in (2, 0):
        units = removable_units(structure(after), "block")
        correct(after, [units[block]], 3, context, Rewriter(after, "test"))
    assert distance(mapped, program, batches) <= distance(after, program, batches) < distance(plain, program, batches)


def test_what_maps_cost_is_counted() -> None:
    program, batches = stack()
    units = removable_units(structure(program), "block")
    bare, mapped = dropped(program, batches, [3], 0), dropped(program, batches, [3], 5)
    assert mapped.parameter_count - bare.parameter_count == correction_size(units[3], 5) == 2 * 5 * WIDTH + WIDTH
    assert correction_size(units[3], 0) == 0
    assert correction_size(units[3], 500) == 2 * WIDTH * WIDTH + WIDTH  # no more than the width
    empty = program.clone()
    correct(empty, [removable_units(structure(empty), "block")[3]], 5, Context(), Rewriter(empty, "test"), fit=False)
    assert empty.parameter_count == mapped.parameter_count
    assert distance(empty, bare, batches) == 0.0


def test_streams_of_images_get_no_map_and_say_so() -> None:
    program = traced("plain_resnet").clone()
    unit = next(u for u in removable_units(structure(program), "block") if not u.blocked)
    batch = program.feeds(**zoo.get("plain_resnet").example())
    made, notes = correct(program, [unit], 4, Context(calibration=[batch]), Rewriter(program, "test"))
    assert made == 0
    assert "no map in its place" in notes[0]
    verify(program, 2)


def test_bad_data_is_refused() -> None:
    program, batches = stack()
    with pytest.raises(PreconditionError, match="fitted on calibration data"):
        dropped(program, [], [1], 2)
    batches[1]["x"][0, 0, 0] = torch.nan
    with pytest.raises(PreconditionError, match="NaN"):
        dropped(program, batches, [1], 2)


def test_the_file_runs(tmp_path: Path) -> None:
    model = zoo.get("llama")
    program = traced("llama")
    example = program.feeds(**model.example())
    data = [program.feeds(**model.inputs(sizes)) for sizes in model.unseen_sizes]
    after, report = PassManager("shortgpt{blocks=1 rank=4}", feeds=example, calibration=data, verify=2).run(program)
    assert "1 maps of rank 4" in report.rows[-1].notes[-1]
    path = after.export_onnx(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    (actual, *_) = session.run(None, {name: example[name].numpy() for name in names})
    wanted = next(iter(after.run(example).values()))
    assert float((torch.from_numpy(actual) - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())
