"""Statistics of consumers' inputs against loops in float64, their laws, masks, memory limits, and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphlathe.ir.axes import find_groups
from graphlathe.ir.errors import ImportModelError, PreconditionError
from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.passes.base import Context
from graphlathe.passes.search import rows, statistics
from graphlathe.passes.search.consumers import Consumer, consumers_of, input_rows
from graphlathe.passes.search.statistics import Collector, Gram, Moments, collect, collect_in_chunks
from graphlathe.tools import zoo
from tests.zoo_programs import traced


def exact(rows: Tensor) -> Moments:
    """What the moments are, straight from the definitions."""
    found, rows = Moments(rows.shape[1]), rows.double()
    found.count, found.mean, found.absolute = len(rows), rows.mean(0), rows.abs().sum(0)
    found.deviation = (rows - rows.mean(0)).square().sum(0)
    return found


def same(a: Moments, b: Moments, tolerance: float = 1e-12) -> None:
    assert a.count == b.count
    for name in ("mean", "deviation", "absolute", "squares", "variance", "absolute_mean"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=tolerance, atol=tolerance, msg=name)


@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_parts_add_up(lengths: list[int], seed: int) -> None:
    """However the rows are divided, and in whatever order parts are merged."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(sum(lengths), 3, generator=random, dtype=torch.float64) * 10 + 100
    parts, one_by_one = [Moments(3) for _ in lengths], Moments(3)
    grams = [Gram(3) for _ in lengths]
    for moments, gram, part in zip(parts, grams, rows.split(lengths), strict=True):
        moments.add(part)
        gram.add(part)
        one_by_one.add(part)
    whole, gram = Moments(3), Gram(3)
    for index in torch.randperm(len(parts), generator=random).tolist():
        whole.merge(parts[index])
        gram.merge(grams[index])
    if len(rows):
        same(whole, exact(rows), 1e-9)
        same(one_by_one, exact(rows), 1e-9)
        torch.testing.assert_close(gram.matrix, rows.T @ rows, rtol=1e-12, atol=0)
        torch.testing.assert_close(gram.mean, rows.mean(0), rtol=1e-12, atol=0)
        covariance = torch.from_numpy(np.cov(rows.numpy().T, bias=True))
        torch.testing.assert_close(gram.covariance, covariance, rtol=1e-8, atol=1e-8)


def test_merging_is_exact_on_whole_numbers() -> None:
    """Sums of small integers have no rounding: workers' Grams add up to the last bit."""
    rows = torch.randint(-8, 8, (1500, 5)).float()
    whole, left, right = Gram(5), Gram(5), Gram(5)
    whole.add(rows)
    left.add(rows[:700])
    right.add(rows[700:])
    left.merge(right)
    assert torch.equal(whole.matrix, left.matrix) and torch.equal(whole.total, left.total) and left.count == 1500


def test_a_constant_column_has_no_variance() -> None:
    moments = Moments(2)
    for _ in range(5):
        moments.add(torch.tensor([[0.1, 1e8]], dtype=torch.float64).expand(7, 2))
    assert moments.variance.tolist() == [0.0, 0.0] and moments.mean.tolist() == [0.1, 1e8]


def test_small_spread_around_a_large_mean_is_kept() -> None:
    rows = torch.randn(1000, 1, dtype=torch.float64) * 1e-3 + 1e6
    moments = Moments(1)
    for part in rows.split(10):
        moments.add(part)
    same(moments, exact(rows), 1e-6)


def consumers(program: Program) -> list[Consumer]:
    return [c for group in find_groups(program) if group.prunable for c in consumers_of(program, group)]


def batches(name: str, count: int = 3) -> list[dict[str, Any]]:
    model = zoo.get(name)
    found: list[dict[str, Any]] = []
    for seed in range(count):
        torch.manual_seed(seed)
        example = model.example()
        found.append(
            {
                k: torch.randint_like(v, 2, 90) if v.dtype == torch.int64 and k == "input_ids" else v
                if not v.is_floating_point() else torch.randn_like(v)
                for k, v in example.items()
            }
        )  # fmt: skip
    return found


def rows_of(program: Program, consumer: Consumer, data: list[dict[str, Any]]) -> Tensor:
    found: list[Tensor] = []
    for batch in data:
        values: dict[str, Tensor] = {}
        program.run(program.feeds(**batch), observe=lambda n, v, values=values: values.__setitem__(n.name, v))
        found.append(input_rows(consumer, values[consumer.operand.name]))
    return torch.cat(found)


@pytest.mark.parametrize("name", ["llama", "plain_resnet"])
def test_collected_values_are_those_of_the_rows(name: str) -> None:
    program, data = traced(name), [{k: v for k, v in b.items() if k != "attention_mask"} for b in batches(name)]
    chosen = consumers(program)
    found = collect(program, chosen, Context(calibration=data), gram=True)
    for consumer in chosen:
        rows = rows_of(program, consumer, data)
        same(found[consumer].moments, exact(rows), 1e-9)
        gram = found[consumer].gram
        assert gram is not None
        wanted = rows.double().T @ rows.double()
        torch.testing.assert_close(gram.matrix, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_one_value_is_measured_once() -> None:
    program = traced("llama")
    found = collect(program, consumers(program), Context(calibration=batches("llama", 1)))
    by_weight = {c.weight: s for c, s in found.items() if c.operand.meta["val"].shape[-1] == 32}
    q, k, v, o = (by_weight[f"model.layers.0.self_attn.{p}_proj.weight"] for p in "qkvo")
    assert q is k is v and q is not o


def test_convolutions_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    program, data = traced("plain_resnet"), batches("plain_resnet", 1)
    chosen = consumers(program)
    whole = collect(program, chosen, Context(calibration=data))
    monkeypatch.setattr(rows, "_PIECE", 64)
    for consumer, found in collect(program, chosen, Context(calibration=data)).items():
        same(found.moments, whole[consumer].moments, 1e-9)


class Tokens(nn.Module):
    """Two linear layers over tokens; ``flat`` multiplies rows as GPT-2's layers do."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.flat, self.up, self.down = flat, nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        """The mask only goes through, so that positions stay independent."""
        h = torch.relu(self.up(x))
        if self.flat:
            y = torch.addmm(self.down.bias, h.view(-1, 6), self.down.weight.t()).view(x.shape)
        else:
            y = self.down(h)
        return y * attention_mask[..., None]


@pytest.mark.parametrize("flat", [False, True])
def test_hidden_positions_do_not_count(flat: bool) -> None:
    model, x = Tokens(flat).double(), torch.randn(3, 5, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    program = trace(model, (x, mask))
    (consumer,) = [c for c in consumers(program) if c.weight == "down.weight"]
    assert consumer.operand.meta["val"].dim() == (2 if flat else 3)
    batch = {"x": x, "attention_mask": mask}
    found = collect(program, [consumer], Context(calibration=[batch]), gram=True)[consumer]
    rows = torch.relu(model.up(x))[mask != 0].detach()
    same(found.moments, exact(rows))
    assert found.gram is not None and found.gram.count == 9
    torch.testing.assert_close(found.gram.matrix, rows.T @ rows, rtol=1e-12, atol=1e-12)
    hidden = {"x": x, "attention_mask": torch.zeros_like(mask)}
    with pytest.raises(PreconditionError, match="no position of the calibration data counts"):
        collect(program, [consumer], Context(calibration=[hidden]))


def test_chunks_hold_what_they_may() -> None:
    program, ctx = traced("llama"), Context(calibration=batches("llama", 2))
    chosen = consumers(program)
    whole = collect(program, chosen, ctx, gram=True)
    limit = 40_000  # one Gram of 64 columns takes 33 kB, one of 32 takes 9 kB
    chunks = list(collect_in_chunks(program, chosen, ctx, limit_bytes=limit))
    assert len(chunks) > 3 and [c for chunk in chunks for c in chunk] == chosen
    for chunk in chunks:
        distinct = {id(s): s for s in chunk.values()}.values()
        size = sum(s.gram.matrix.nbytes + 4 * s.gram.total.nbytes for s in distinct if s.gram)
        assert size <= limit or len(distinct) == 1
        for consumer, found in chunk.items():
            same(found.moments, whole[consumer].moments, 0.0)
            assert found.gram is not None and torch.equal(found.gram.matrix, whole[consumer].gram.matrix)  # type: ignore[union-attr]


def test_a_run_ends_at_the_last_consumer() -> None:
    program = traced("llama")
    first = next(c for c in consumers(program) if c.weight.endswith("layers.0.self_attn.q_proj.weight"))
    seen: list[str] = []
    run = program.run
    clone = program.clone()

    def counting(feeds: Any, observe: Any) -> Any:
        def both(node: Any, value: Any) -> None:
            seen.append(node.name)
            observe(node, value)

        return run(feeds, observe=both)

    clone.run = counting  # type: ignore[method-assign]
    Collector(clone, [first]).add(batches("llama", 1)[0])
    assert seen[-1] == first.operand.name


def test_nan_is_refused_with_its_place() -> None:
    program = trace(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), (torch.randn(3, 4),))
    (consumer,) = consumers(program)
    good, bad = torch.randn(3, 4), torch.randn(3, 4)
    bad[1, 2] = float("nan")
    with pytest.raises(PreconditionError, match=r"'2\.weight' .* on batch 1") as error:
        collect(program, [consumer], Context(calibration=[{"input": good}, {"input": bad}]))
    assert error.value.remedy and "batch" in error.value.remedy


def test_calibration_data_is_needed() -> None:
    with pytest.raises(PreconditionError, match="no calibration data"):
        collect(traced("llama"), [], Context())


def test_a_stopped_collection_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, data = traced("llama"), batches("llama", 4)
    chosen, path = consumers(program)[-6:], tmp_path / "state.safetensors"
    whole = collect(program, chosen, Context(calibration=data), gram=True)
    monkeypatch.setattr(statistics, "_SAVE_EVERY", -1.0)

    class Stopped(Exception):
        pass

    def stop_after_two(items: Any, total: Any, label: str) -> Any:
        for index, item in enumerate(items):
            if index == 2:
                raise Stopped
            yield item

    with pytest.raises(Stopped):
        collect(program, chosen, Context(calibration=data, progress=stop_after_two), gram=True, saved=path)
    done: list[int] = []

    def count(items: Any, total: Any, label: str) -> Any:
        done.append(total)
        return items

    found = collect(program, chosen, Context(calibration=data, progress=count), gram=True, saved=path)
    assert done == [2]
    for consumer in chosen:
        same(found[consumer].moments, whole[consumer].moments, 0.0)
        assert torch.equal(found[consumer].gram.matrix, whole[consumer].gram.matrix)  # type: ignore[union-attr]
    again = collect(program, chosen, Context(calibration=data, progress=count), gram=True, saved=path)
    assert done == [2, 0] and again.keys() == whole.keys()
    for change, reason in (
        ({"gram": False}, "another kind"),
        ({"data": data[::-1]}, "another calibration data"),
        ({"chosen": chosen[:1]}, "another consumers"),
        ({"program": "gpt2"}, "another program"),
    ):
        other = traced(str(change.get("program", "llama")))
        wanted = consumers(other) if other is not program else change.get("chosen", chosen)
        ctx = Context(calibration=change.get("data", data))  # type: ignore[arg-type]
        with pytest.raises(PreconditionError, match=reason):
            collect(other, wanted, ctx, gram=change.get("gram", True), saved=path)  # type: ignore[arg-type]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ImportModelError, match="cannot read the statistics"):
        collect(program, chosen, Context(calibration=data), gram=True, saved=path)


def test_collectors_of_two_workers_merge() -> None:
    program, data = traced("plain_resnet"), batches("plain_resnet", 4)
    chosen = consumers(program)
    whole, left, right = (Collector(program, chosen, gram=True) for _ in range(3))
    for index, batch in enumerate(data):
        whole.add(batch)
        (left if index % 2 else right).add(batch)
    left.merge(right)
    assert left.batches == 4
    for consumer, found in left.result().items():
        same(found.moments, whole.result()[consumer].moments, 1e-9)
