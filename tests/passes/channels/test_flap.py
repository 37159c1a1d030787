"""``flap`` against the paper's algorithm, written out in float64 on the eager model."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from graphlathe.ir.errors import PipelineError
from graphlathe.ir.from_torch import trace
from graphlathe.passes.base import Batch
from graphlathe.passes.channels.flap import Flap
from graphlathe.passes.pipeline import parse_pipeline
from tests.passes.channels.tiny import (
    WIDTH,
    Attention,
    Mlp,
    Stack,
    data,
    hidden_rows,
    program_of,
    refused,
    removed,
    run,
    stack,
)


def moments(batches: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """FLAP's accumulator: baseline and fluctuation, updated batch by batch, the first batch's fluctuation included."""
    count = 0
    baseline = torch.zeros(batches[0].shape[1], dtype=torch.float64)
    fluctuation = torch.zeros_like(baseline)
    for rows in batches:
        for row in rows:
            count += 1
            before = baseline
            baseline = before + (row - before) / count
            fluctuation = fluctuation * (count - 1) / count + (row - baseline) * (row - before) / count
    return baseline, fluctuation


def last_map(block: nn.Module) -> nn.Linear:
    return block.o if isinstance(block, Attention) else block.down  # type: ignore[return-value]


def atom_size(block: nn.Module) -> tuple[int, int]:
    """Columns of the last map that an atom has, and parameters that go with it."""
    if isinstance(block, Attention):
        each = block.heads // block.groups
        columns = each * block.dim
        # Rows and biases of q, k and v; columns of o.
        return columns, (columns + 2 * block.dim) * (WIDTH + 1) + columns * WIDTH
    return 1, WIDTH + 1 + WIDTH


def flap(model: Stack, batches: Sequence[Batch], goes: float) -> tuple[list[list[int]], list[torch.Tensor]]:
    """The atoms that go from each block, lowest standardised fluctuation first until ``goes`` parameters are gone, and
    what the biases become.
    """
    ranked: list[tuple[float, int, int]] = []
    found = [moments(rows) for rows in hidden_rows(model, batches)]
    for number, (block, (_, fluctuation)) in enumerate(zip(model.blocks, found, strict=True)):
        columns, _ = atom_size(block)
        score = fluctuation * last_map(block).weight.detach().square().sum(0)
        score = score.square() if isinstance(block, Attention) else score
        score = (score - score.mean()) / (score - score.mean()).square().mean().sqrt()
        score = score.unflatten(0, (-1, columns)).mean(1)
        ranked += [(float(value), number, atom) for atom, value in enumerate(score)]
    gone: list[list[int]] = [[] for _ in model.blocks]
    saved = 0
    for _, number, atom in sorted(ranked):
        if saved >= goes:
            break
        if len(gone[number]) + 1 < sum(n == number for _, n, _ in ranked):  # one stays
            gone[number].append(atom)
            saved += atom_size(model.blocks[number])[1]
    biases = []
    for block, atoms, (baseline, _) in zip(model.blocks, gone, found, strict=True):
        columns, _ = atom_size(block)
        index = [a * columns + c for a in sorted(atoms) for c in range(columns)]
        linear = last_map(block)
        biases.append((linear.bias + linear.weight[:, index] @ baseline[index]).detach())
    return [sorted(atoms) for atoms in gone], biases


@pytest.mark.parametrize("ratio", [0.25, 0.6])
@pytest.mark.parametrize(
    "blocks",
    [
        pytest.param((("mlp", 7), ("mlp", 9)), id="mlps"),
        pytest.param((("heads", 4), ("heads", 3)), id="heads"),
        pytest.param((("groups", 6), ("heads", 4), ("mlp", 8)), id="grouped heads and an mlp"),
    ],
)
def test_masks_and_biases_are_those_of_the_paper(blocks: tuple[tuple[str, int], ...], ratio: float) -> None:
    made = {"mlp": Mlp, "heads": lambda n: Attention(n, n), "groups": lambda n: Attention(n, n // 2)}
    model = stack(*(made[kind](size) for kind, size in blocks))
    batches, program = data(), program_of(model)
    cost = sum(atom_size(b)[1] * last_map(b).weight.shape[1] // atom_size(b)[0] for b in model.blocks)
    gone, biases = flap(model, batches, ratio * cost)
    after, stats = run(program, Flap(ratio=ratio), batches)
    assert removed(stats) == gone
    assert sum(map(len, gone)) > 0
    for number, (bias, atoms) in enumerate(zip(biases, gone, strict=True)):
        block = model.blocks[number]
        columns, _ = atom_size(block)
        name = f"blocks.{number}.{'o' if isinstance(block, Attention) else 'down'}"
        kept = [c for c in range(last_map(block).weight.shape[1]) if c // columns not in atoms]
        assert torch.equal(after.weights[f"{name}.weight"].tensor(), last_map(block).weight[:, kept])
        torch.testing.assert_close(after.weights[f"{name}.bias"].tensor(), bias, rtol=0, atol=1e-12)
    assert after.parameter_count <= program.parameter_count - ratio * cost


def test_outputs_are_those_of_the_masked_model_with_the_paper_s_biases() -> None:
    model = stack(Attention(4, 2), Mlp(8))
    batches, program = data(), program_of(model)
    after, stats = run(program, Flap(ratio=0.4), batches)
    means = [torch.cat(rows).mean(0) for rows in hidden_rows(model, batches)]
    with torch.no_grad():
        for block, atoms, mean in zip(model.blocks, removed(stats), means, strict=True):
            columns, _ = atom_size(block)
            index = [a * columns + c for a in atoms for c in range(columns)]
            last_map(block).bias += last_map(block).weight[:, index] @ mean[index]
            last_map(block).weight[:, index] = 0
        for batch in data(2, seed=9):
            torch.testing.assert_close(after.run(batch)["output"], model(batch["x"]), rtol=0, atol=1e-12)


def test_a_layer_without_a_bias_gets_one() -> None:
    model = stack(Mlp(8, bias=False), Mlp(8, bias=False))
    batches, program = data(), program_of(model)
    after, stats = run(program, Flap(ratio=0.5), batches)
    mean = torch.cat(hidden_rows(model, batches)[0]).mean(0)
    index = removed(stats)[0]
    assert index
    new = after.weights.keys() - program.weights.keys()
    values = [after.weights[name].tensor() for name in new]
    wanted = model.blocks[0].down.weight[:, index] @ mean[index]  # type: ignore[union-attr,index]
    assert any(torch.allclose(value, wanted.detach(), rtol=0, atol=1e-12) for value in values)
    # What the new biases cost is paid for: the budget holds with them.
    sites = sum(2 * WIDTH * 8 + 8 for _ in range(2))
    assert after.parameter_count <= program.parameter_count - 0.5 * sites


def test_channels_that_never_change_go_without_a_trace() -> None:
    model = stack(Mlp(8), Mlp(6))
    constant = [(1, 4, 5), (0, 2)]
    with torch.no_grad():
        for block, index in zip(model.blocks, constant, strict=True):
            block.up.weight[list(index)] = 0  # type: ignore[union-attr,operator]
            block.up.bias[list(index)] = torch.linspace(0.5, 2, len(index), dtype=torch.float64)  # type: ignore[union-attr,operator]
    program = program_of(model)
    atom = 2 * WIDTH + 1
    after, stats = run(program, Flap(target=program.parameter_count - 2 * atom), data())
    assert all(set(gone) <= set(known) for gone, known in zip(removed(stats), constant, strict=True))
    assert sum(map(len, removed(stats))) == 2
    for batch in data(2, seed=5):
        torch.testing.assert_close(after.run(batch)["output"], program.run(batch)["output"], rtol=0, atol=1e-12)


def test_positions_that_a_mask_hides_do_not_count() -> None:
    class Masked(nn.Module):
        def __init__(self, inner: Stack) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * attention_mask[:, :, None]

    model = stack(Mlp(8), Mlp(8))
    plain = data()
    hidden = []
    for batch in plain:
        mask = torch.ones(batch["x"].shape[:2], dtype=torch.int64)
        mask[:, 5:] = 0
        hidden.append({"x": batch["x"].clone(), "attention_mask": mask})
        hidden[-1]["x"][:, 5:] = 100.0
    hidden[1] = {name: value[:2] for name, value in hidden[1].items()}  # sizes may differ
    plain[1] = {"x": plain[1]["x"][:2]}
    program = trace(Masked(model), hidden[0], dynamic={n: {0: "B", 1: "S"} for n in ("x", "attention_mask")})
    after, stats = run(program, Flap(ratio=0.5), hidden)
    seen = [{"x": batch["x"][:, :5]} for batch in plain]
    cost = (2 * WIDTH + 1) * 16
    gone, biases = flap(model, seen, 0.5 * cost)
    assert removed(stats) == gone
    for number, bias in enumerate(biases):
        got = after.weights[f"inner.blocks.{number}.down.bias"].tensor()
        torch.testing.assert_close(got, bias, rtol=0, atol=1e-12)


def test_what_stays_is_a_multiple_and_no_less_than_the_floor() -> None:
    program = program_of(stack(Mlp(16), Mlp(16)))
    _, stats = run(program, Flap(ratio=0.4, multiple=4, floor=0.5), data())
    for gone in removed(stats):
        assert (16 - len(gone)) % 4 == 0 and len(gone) <= 8
    assert sum(map(len, removed(stats))) >= 0.4 * 32


def test_bad_input_is_refused() -> None:
    program = program_of(stack(Mlp(8), Mlp(8)))
    advice = refused(program, Flap(ratio=0.5), None, "need calibration data|needs calibration data").remedy or ""
    advised = next(parse_pipeline(advice.rpartition("use ")[2]).passes())
    assert removed(run(program, advised, None)[1])
    refused(program, Flap(ratio=0.5), [], "need calibration data|needs calibration data")
    bad = data()
    bad[1]["x"][0, 0, 0] = torch.nan
    refused(program, Flap(ratio=0.5), bad, "NaN|not a number|not finite")
    atom = 2 * WIDTH + 1
    least = program.parameter_count - 14 * atom  # one channel of each stays
    error = refused(program, Flap(target=least - 1), data(), "out of reach")
    assert f"{least:,}" in str(error)
    run(program, Flap(target=least), data())
    with pytest.raises(PipelineError, match="one way to say how much"):
        Flap()
    with pytest.raises(PipelineError, match="one way to say how much"):
        Flap(ratio=0.5, target=5)
