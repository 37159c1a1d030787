"""``comp`` against its three steps, done by brute force in float64 on the eager model."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence

import pytest
import torch

from graphlathe.ir.errors import PipelineError
from graphlathe.passes.base import Batch
from graphlathe.passes.channels.comp import Comp
from tests.passes.channels.tiny import (
    WIDTH,
    Attention,
    Mlp,
    Stack,
    best_damping,
    data,
    hidden_rows,
    program_of,
    refused,
    removed,
    run,
    stack,
)

ATOM = 2 * WIDTH + 1


def lowest_influence(model: Stack, batches: Sequence[Batch], count: int) -> list[int]:
    """The blocks whose output points most nearly where their input does."""
    turned: list[list[torch.Tensor]] = [[] for _ in model.blocks]
    with torch.no_grad():
        for batch in batches:
            x = model.first(batch["x"])
            for number, block in enumerate(model.blocks):
                y = block(x)
                cosine = (x * y).sum(-1) / (x.square().sum(-1) * y.square().sum(-1)).sqrt()
                turned[number].append((1 - cosine).flatten())
                x = y
    values = [float(torch.cat(rows).mean()) for rows in turned]
    return sorted(sorted(range(len(values)), key=values.__getitem__)[:count])


def error_without(weight: torch.Tensor, rows: torch.Tensor, column: int) -> float:
    """Squared output error per row, damping included, when a column goes and the others are fitted as well as they can:
    minimised, not computed from an inverse.
    """
    gram = rows.T @ rows / len(rows)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    root = torch.linalg.cholesky(damped).T  # rows whose Gram matrix is the damped one
    kept = [c for c in range(len(gram)) if c != column]
    wanted = root @ weight.T
    fitted = torch.linalg.lstsq(root[:, kept], wanted).solution
    return float((wanted - root[:, kept] @ fitted).square().sum())


def neurons(model: Stack, batches: Sequence[Batch], goes: int) -> list[list[int]]:
    """The neurons that go, lowest standardised error first."""
    ranked: list[tuple[float, int, int]] = []
    for number, (block, parts) in enumerate(zip(model.blocks, hidden_rows(model, batches), strict=True)):
        if not isinstance(block, Mlp):
            continue
        weight, rows = block.down.weight.detach(), torch.cat(parts)
        errors = torch.tensor([error_without(weight, rows, c) for c in range(weight.shape[1])], dtype=torch.float64)
        errors = (errors - errors.mean()) / errors.std(correction=0)
        ranked += [(float(e), number, c) for c, e in enumerate(errors)]
    gone: list[list[int]] = [[] for _ in model.blocks]
    for _, number, column in sorted(ranked)[:goes]:
        gone[number].append(column)
    return [sorted(columns) for columns in gone]


def tuned(before: Stack, model: Stack, batches: Sequence[Batch], gone: list[list[int]]) -> None:
    """Cut the neurons of ``model``, block by block: a factor for each column that stays, and a bias, such that the
    layer's output is nearest to that in ``before``.
    """
    for number, columns in enumerate(gone):
        if not columns:
            continue
        down = model.blocks[number].down
        old, size = down.weight.detach().clone(), down.weight.shape[1]
        kept = [c for c in range(size) if c not in columns]

        def rows_of(part: Sequence[Batch], number: int = number) -> tuple[torch.Tensor, torch.Tensor]:
            return tuple(torch.cat(hidden_rows(each, part)[number]) for each in (before, model))  # type: ignore[return-value]

        def solved(
            part: Sequence[Batch], damping: float, old: torch.Tensor = old, kept: list[int] = kept
        ) -> tuple[torch.Tensor, torch.Tensor]:
            x, z = rows_of(part)
            wanted, start = x @ old.T, z[:, kept] @ old[:, kept].T
            products = torch.stack([torch.outer(z[:, c], old[:, c]) for c in kept], -1)  # [rows, out, kept]
            inner = products - products.mean(0)
            left = (wanted - start) - (wanted - start).mean(0)
            design, right = inner.flatten(0, 1), left.flatten()
            # Damped: rows that pull each factor towards one.
            strength = damping * design.square().sum(0).mean()
            pull = strength.sqrt() * torch.eye(len(kept), dtype=torch.float64)
            design, right = torch.cat([design, pull]), torch.cat([right, right.new_zeros(len(kept))])
            factors = 1 + torch.linalg.lstsq(design, right[:, None]).solution[:, 0]
            if float(factors.abs().max()) > 10:
                factors = torch.ones_like(factors)
            new = torch.zeros_like(old)
            new[:, kept] = old[:, kept] * factors
            return new, (wanted - z @ new.T).mean(0)

        def fit(
            part: Sequence[Batch],
            damping: float,
            old: torch.Tensor = old,
            solved: Callable[..., tuple[torch.Tensor, torch.Tensor]] = solved,
        ) -> Callable[[Sequence[Batch]], float]:
            new, shift = solved(part, damping)

            def error(other: Sequence[Batch]) -> float:
                x, z = rows_of(other)
                return float((z @ new.T + shift - x @ old.T).square().sum(1).mean())

            return error

        new, shift = solved(batches, best_damping(batches, fit))
        with torch.no_grad():
            down.weight.copy_(new)
            down.bias.add_(shift)


@pytest.mark.parametrize(("goes", "seed"), [(3, 0), (7, 1), (10, 2)])
def test_neurons_and_mask_are_those_of_brute_force(goes: int, seed: int) -> None:
    model = stack(Mlp(8), Attention(2, 2), Mlp(7), seed=seed)
    batches, program = data(), program_of(model)
    gone = neurons(model, batches, goes)
    after, stats = run(program, Comp(target=program.parameter_count - goes * ATOM), batches)
    assert removed(stats, "mlp") == [gone[0], gone[2]]
    assert all(site["kind"] == "mlp" for site in stats.plan["sites"])
    expected = copy.deepcopy(model)
    tuned(model, expected, batches, gone)
    for batch in batches:
        with torch.no_grad():
            torch.testing.assert_close(after.run(batch)["output"], expected(batch["x"]), rtol=0, atol=1e-9)


def test_blocks_go_first_and_neurons_are_scored_without_them() -> None:
    model = stack(*(Mlp(8) for _ in range(5)), seed=3)
    batches, program = data(), program_of(model)
    blocks = lowest_influence(model, batches, 2)
    shorter = copy.deepcopy(model)
    shorter.blocks = torch.nn.ModuleList(b for n, b in enumerate(model.blocks) if n not in blocks)
    spared = sum(p.numel() for n in blocks for p in model.blocks[n].parameters())
    after, stats = run(program, Comp(depth=0.4, target=program.parameter_count - spared - 5 * ATOM), batches)
    dropped = [s["index"] for s in stats.plan["sites"] if s["kind"] == "drop-block" and s["removed"]]
    assert dropped == blocks
    gone = neurons(shorter, batches, 5)
    left = [n for n in range(5) if n not in blocks]
    found = {s["block"]: s["removed"] for s in stats.plan["sites"] if s["kind"] == "mlp" and s["removed"]}
    assert found == {left[n]: columns for n, columns in enumerate(gone) if columns}
    assert after.parameter_count == program.parameter_count - spared - 5 * ATOM


def test_the_other_score_is_the_share_that_other_channels_do_not_predict() -> None:
    model = stack(Mlp(8), Mlp(7), seed=4)
    batches, program = data(), program_of(model)
    _, stats = run(program, Comp(score="condition", target=program.parameter_count - 5 * ATOM), batches)
    ranked = []
    for number, parts in enumerate(hidden_rows(model, batches)):
        rows = torch.cat(parts)
        gram = rows.T @ rows / len(rows)
        damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        root = torch.linalg.cholesky(damped).T
        shares = []
        for column in range(len(gram)):
            others = [c for c in range(len(gram)) if c != column]
            best = torch.linalg.lstsq(root[:, others], root[:, [column]]).solution
            unpredicted = (root[:, [column]] - root[:, others] @ best).square().sum() / root[:, column].square().sum()
            shares.append(float(unpredicted) if float(gram[column, column]) > 0 else 0.0)
        values = torch.tensor(shares, dtype=torch.float64)
        values = (values - values.mean()) / values.std(correction=0)
        ranked += [(float(v), number, c) for c, v in enumerate(values)]
    gone = [sorted(c for _, n, c in sorted(ranked)[:5] if n == number) for number in range(2)]
    assert removed(stats) == gone


def test_a_mask_is_better_than_none_and_no_factor_is_wild() -> None:
    model = stack(Mlp(8), Mlp(8), seed=5)
    batches, program = data(), program_of(model)
    after, stats = run(program, Comp(ratio=0.4), batches)
    bare = copy.deepcopy(model)
    with torch.no_grad():
        for block, columns in zip(bare.blocks, removed(stats), strict=True):
            block.down.weight[:, columns] = 0  # type: ignore[union-attr,index]
        errors = [
            [float((net(batch) - model(batch["x"])).square().sum()) for batch in batches]
            for net in (lambda b: after.run(b)["output"], lambda b: bare(b["x"]))
        ]
    assert sum(errors[0]) < sum(errors[1])
    for number, columns in enumerate(removed(stats)):
        kept = [c for c in range(8) if c not in columns]
        old = program.weights[f"blocks.{number}.down.weight"].tensor()[:, kept]
        new = after.weights[f"blocks.{number}.down.weight"].tensor()
        factors = new / old
        torch.testing.assert_close(factors, factors[:1].expand_as(factors), rtol=1e-9, atol=0)
        assert float(factors.abs().max()) <= 10


def test_bad_input_is_refused() -> None:
    program = program_of(stack(Mlp(8), Mlp(8)))
    refused(program, Comp(ratio=0.5), None, "calibration data")
    refused(program, Comp(ratio=0.5, depth=0.5), [], "calibration data")
    bad = data()
    bad[0]["x"][1, 1, 1] = torch.inf
    refused(program, Comp(ratio=0.5), bad, "NaN|not a number|not finite|infinity")
    least = program.parameter_count - 14 * ATOM
    assert f"{least:,}" in str(refused(program, Comp(target=least - 1), data(), "out of reach"))
    refused(program_of(stack(Attention(2, 2))), Comp(ratio=0.5), data(), "nothing of the kinds mlp")
    with pytest.raises(PipelineError, match="one way to say how much"):
        Comp(depth=0.5)


def test_the_order_of_batches_does_not_matter() -> None:
    model = stack(Mlp(8), Mlp(7))
    program = program_of(model)
    plans = [
        removed(run(program, Comp(ratio=0.3), list(each))[1])
        for each in itertools.islice(itertools.permutations(data(3)), 3)
    ]
    assert plans[0] == plans[1] == plans[2]
