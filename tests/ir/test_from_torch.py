"""The PyTorch front end: names, dynamic dimensions, guards, state, and what it refuses."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from graphlathe.ir.errors import ImportModelError, InputError
from graphlathe.ir.from_torch import trace
from graphlathe.ir.functionalize import is_mutation
from graphlathe.ir.program import Outputs, Program
from graphlathe.ir.verify import verify
from graphlathe.passes.optimize import optimize


class _Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).relu()


def test_bare_output_positional_and_keyword_calls() -> None:
    """A module that returns one tensor gives a program that returns one tensor, however it is called."""
    model = _Linear()
    x = torch.randn(2, 4)
    program = trace(model, (x,))
    assert isinstance(program(x), torch.Tensor)
    assert torch.equal(program(x), model(x))
    assert torch.equal(program(x=x), model(x))
    assert program.main.inputs == ("x",)
    assert program.main.outputs == ("output",)


def test_origins_and_weights() -> None:
    """Operators know their module; weights keep their names and share the module's storage."""
    model = _Linear()
    program = trace(model, (torch.randn(2, 4),))
    origins = {
        str(n.target): n.meta["origin"]
        for n in program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    }
    assert set(origins.values()) == {"inner"}
    assert set(program.weights) == {"inner.weight", "inner.bias"}
    assert program.weights["inner.weight"].tensor().data_ptr() == model.inner.weight.data_ptr()


@dataclasses.dataclass
class _Result:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, dict[str, torch.Tensor]]


@dataclasses.dataclass
class _Registered(_Result):
    """One that PyTorch knows as a container, as those of transformers are."""


torch.export.register_dataclass(_Registered, serialized_type_name="graphlathe.tests._Registered")


class _Nested(nn.Module):
    def __init__(self, kind: type[_Result]) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, pair: tuple[torch.Tensor, torch.Tensor], extra: dict[str, torch.Tensor]) -> _Result:
        total = pair[0] + pair[1] + extra["a"]
        return self.kind(total * 2, (total, {"deep": total + 1}))


@pytest.mark.parametrize("kind", [_Result, _Registered])
def test_nested_inputs_and_outputs_have_stable_names(kind: type[_Result]) -> None:
    """Dataclass fields, dictionary keys and tuple positions become dotted names; calls take structure or flat names."""
    a, b, c = (torch.randn(3) for _ in range(3))
    program = trace(_Nested(kind), {"pair": (a, b), "extra": {"a": c}})
    assert program.main.inputs == ("pair.0", "pair.1", "extra.a")
    assert program.main.outputs == ("logits", "hidden.0", "hidden.1.deep")
    outputs = program(pair=(a, b), extra={"a": c})
    assert isinstance(outputs, Outputs)
    assert torch.equal(outputs.logits, (a + b + c) * 2)
    flat = program.run({"pair.0": a, "pair.1": b, "extra.a": c})
    assert torch.equal(flat["hidden.1.deep"], outputs[2])


class _Switch(nn.Module):
    def forward(self, x: torch.Tensor, double: bool = False) -> torch.Tensor:
        return x * 2 if double else x


def test_fixed_arguments_may_be_repeated_but_not_changed() -> None:
    """A flag is fixed by tracing: the same value is fine, another one is an error, never ignored."""
    program = trace(_Switch(), {"x": torch.ones(2), "double": True})
    assert torch.equal(program(torch.ones(2), double=True), torch.full((2,), 2.0))
    with pytest.raises(InputError, match="fixed to True"):
        program(torch.ones(2), double=False)


class _Two(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a.sum(1) + b.sum(1)


def test_dimensions_by_name_are_shared_and_checked() -> None:
    """Inputs that share a name share the size; an example of size one does not fix a dimension."""
    program = trace(
        _Two(), (torch.randn(1, 3), torch.randn(1, 5)), dynamic={"a": {0: "B", 1: "S"}, "b": {0: "B", 1: "T"}}
    )
    assert list(program.main.dims.by_name) == ["B", "S", "T"]
    for batch, s, t in ((1, 1, 9), (4, 7, 2)):
        a, b = torch.randn(batch, s), torch.randn(batch, t)
        assert torch.allclose(program(a, b), a.sum(1) + b.sum(1))
    with pytest.raises(InputError, match="size 3 in dimension 0"):
        program(torch.randn(2, 3), torch.randn(3, 3))


def test_ranges_come_from_torch_dims() -> None:
    """A `torch.export.Dim` gives a name and a range, which calls are checked against."""
    program = trace(_Linear(), (torch.randn(3, 4),), dynamic={"x": {0: torch.export.Dim("N", min=2, max=8)}})
    assert (program.main.dims.by_name["N"].min, program.main.dims.by_name["N"].max) == (2, 8)
    with pytest.raises(InputError, match="dimension N is 9"):
        program(torch.randn(9, 4))


def test_auto_finds_what_can_be_dynamic() -> None:
    """``dynamic="auto"`` leaves the batch free and fixes the width that a weight needs."""
    program = trace(_Linear(), (torch.randn(3, 4),), dynamic="auto")
    assert list(program.main.dims.by_name) == ["x_0"]
    x = torch.randn(7, 4)
    assert program(x).shape == (7, 3)


class _Inplace(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y += 1
        y.mul_(y)
        return y


class _InplaceView(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y[:, 1:] = 0
        return y


class _InplaceSeenThroughView(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        row = y[0]
        y.add_(1)
        return row


@pytest.mark.parametrize("model", [_Inplace(), _InplaceView(), _InplaceSeenThroughView()])
def test_in_place_operators_become_functional(model: nn.Module) -> None:
    """Also where the memory is seen through a view: the plain rewrite would be wrong there."""
    x = torch.randn(3, 4)
    program = trace(model, (x,))
    assert not any(is_mutation(n) for n in program.graph.nodes)
    assert torch.equal(program(x), model(x))


class _Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return x + self.count


def test_mutated_buffers_become_state() -> None:
    """A buffer that the model updates is an input with an initial value, and an output that feeds it."""
    program = trace(_Counter(), (torch.zeros(1),))
    (pair,) = program.main.state
    assert (pair.input, pair.output, pair.initial) == ("count", "count.next", "count")
    first = program(torch.zeros(1))
    second = program(torch.zeros(1), count=first["count.next"])
    assert (float(first[0]), float(second[0])) == (1.0, 2.0)
    assert float(program(torch.zeros(1))[0]) == 1.0  # a program is pure: nothing was kept


def test_tied_weights_are_stored_once() -> None:
    """The head that shares the embedding's storage is another name of the same weight."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids))

    program = trace(Tied(), (torch.tensor([[1, 2]]),))
    assert len(program.weights) == 1
    assert program.parameter_count == 28


def test_training_mode_is_restored_and_not_traced() -> None:
    """Dropout does not end up in the graph because somebody forgot ``eval()``, and the module is left as it was."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    x = torch.randn(2, 4)
    program = trace(model, (x,))
    assert model.training and model[1].training
    assert torch.equal(program(x), model.eval()(x))


def test_pt2_round_trip(tmp_path: Path) -> None:
    """A saved exported program is read back; a truncated one is refused with a remedy."""
    model = _Linear()
    x = torch.randn(2, 4)
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(model, (x,)), str(path))
    assert torch.equal(trace(path)(x), model(x))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ImportModelError, match="export it again"):
        trace(path)
    with pytest.raises(ImportModelError, match="no file"):
        trace(tmp_path / "absent.pt2")


class _DataDependent(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


class _Fixed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, 3)


def _refusals() -> list[Any]:
    x = torch.randn(2, 3)
    return [
        pytest.param(lambda: trace(_DataDependent(), (x,)), "cannot trace _DataDependent", id="data-dependent"),
        pytest.param(
            lambda: trace(_Fixed(), (x,), dynamic={"x": {0: "B"}}),
            "fixes a named dimension.*can only be 2",
            id="specialized",
        ),
        pytest.param(lambda: trace(_Linear(), (x, x)), "do not fit", id="too-many"),
        pytest.param(lambda: trace(_Linear()), "needs example_inputs", id="none"),
        pytest.param(lambda: trace("m", (x,)), "no file", id="path"),
        pytest.param(lambda: trace(3, (x,)), "cannot trace a int", id="type"),  # type: ignore[arg-type]
        pytest.param(lambda: trace(_Fixed(), (x,), dynamic={"y": {0: "B"}}), "no input 'y'", id="unknown-input"),
        pytest.param(lambda: trace(_Fixed(), (x,), dynamic={"x": {5: "B"}}), "axis 5", id="axis"),
        pytest.param(lambda: trace(_Fixed(), (x,), dynamic="all"), "unknown", id="word"),
        pytest.param(lambda: trace(_Fixed(), (x,), dynamic=({0: "B"},)), "unknown", id="tuple"),  # type: ignore[arg-type]
    ]


@pytest.mark.parametrize(("attempt", "message"), _refusals())
def test_refusals(attempt: Any, message: str) -> None:
    """Every wrong request gets our error, with what is wrong."""
    with pytest.raises(ImportModelError, match=message):
        attempt()


def test_call_time_checks() -> None:
    """Wrong dtype, rank, size, and missing or unknown inputs are refused before anything runs."""
    program = trace(_Linear(), (torch.randn(2, 4),))
    for arguments, message in (
        ({"x": torch.randn(2, 4).double()}, "dtype"),
        ({"x": torch.randn(2)}, "rank 2"),
        ({"x": torch.randn(3, 4)}, "size 3"),
        ({}, "missing input 'x'"),
        ({"y": torch.randn(2, 4)}, "unknown input 'y'"),
        ({"x": [1.0]}, "is a float"),
    ):
        with pytest.raises(InputError, match=message):
            program(**arguments)


def test_arrays_are_examples_too() -> None:
    program = trace(nn.Linear(3, 2), (np.ones((4, 3), dtype=np.float32),))
    assert program.inputs[0].shape == (4, 3)


class _Minus(nn.Module):
    def forward(self, a: Any, b: Any) -> torch.Tensor:
        a, b = (v["v"] if isinstance(v, dict) else v for v in (a, b))
        return a - 2 * b


def test_one_tensor_given_twice_is_two_inputs() -> None:
    x = torch.randn(3)
    program = trace(_Minus(), (x, x))
    a, b = torch.randn(3), torch.randn(3)
    assert torch.equal(program(a, b), a - 2 * b)


def test_arguments_have_the_callables_order_whatever_the_examples() -> None:
    a, b = torch.randn(3), torch.randn(3)
    program = trace(_Minus(), {"b": b, "a": a})
    assert torch.equal(program(a, b), a - 2 * b)


def test_leaves_go_where_their_paths_say() -> None:
    class Pair(nn.Module):
        def forward(self, pair: dict[str, torch.Tensor]) -> torch.Tensor:
            return pair["a"] - 2 * pair["b"]

    a, b = torch.randn(3), torch.randn(3)
    program = trace(Pair(), {"pair": {"b": b, "a": a}})
    for pair in ({"a": a, "b": b}, {"b": b, "a": a}):
        assert torch.equal(program(pair=pair), a - 2 * b)
    with pytest.raises(InputError, match=r"'pair' holds pair\.zzz, pair\.a"):
        program(pair={"zzz": b, "a": a})


def test_names_that_look_alike_stay_apart() -> None:
    class Alike(nn.Module):
        def forward(self, a: dict[str, torch.Tensor], a_b: torch.Tensor) -> torch.Tensor:
            return a["b"] - a_b

    x, y = torch.randn(3, 2), torch.randn(3, 2)
    program = trace(Alike(), {"a": {"b": x}, "a_b": y}, dynamic="auto")
    for each in (program, Program.load(program.save(Path(tempfile.mkdtemp()) / "saved"))):
        assert torch.equal(each(a={"b": x}, a_b=y), x - y)


@pytest.mark.parametrize("views", [1, 2])
def test_views_between_in_place_operators_see_them(views: int) -> None:
    class Chain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * 1
            first = y[0]
            y.add_(1)
            second = y[1]
            y.mul_(2)
            return second * 1 if views == 1 else first * second

    x = torch.randn(3, 4)
    assert torch.allclose(trace(Chain(), (x,))(x), Chain()(x), rtol=1e-6)


def test_in_place_operators_with_other_names_and_types() -> None:
    class Power(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y = x * 1
            y **= 2
            half = (x * 2).half()
            half.add_(x)
            count = (x > 0).long()
            count.mul_(3)
            return y, half, count

    x = torch.randn(3, 4)
    for got, want in zip(trace(Power(), (x,))(x).values(), Power()(x), strict=True):
        assert got.dtype == want.dtype
        assert torch.allclose(got, want, rtol=1e-3 if got.dtype is torch.float16 else 1e-6)


class _Branching(nn.Module):
    """What it does at one token is something else (0), the same (1), or refused (2)."""

    def __init__(self, kind: int) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == 2:
            torch._check(x.shape[1] >= 2)
        if x.shape[1] == 1 and self.kind == 0:
            return x * 100
        return x * 2 if x.shape[1] > 1 else x + x


@pytest.mark.parametrize(("kind", "least"), [(0, 2), (1, 1), (2, 2)])
def test_size_one_is_refused_where_the_model_does_something_else(kind: int, least: int) -> None:
    program = trace(_Branching(kind), (torch.randn(3, 5),), dynamic={"x": ["B", "S"]})
    assert {dim.name: dim.min for dim in program.main.dims.by_name.values()} == {"B": 1, "S": least}
    if least == 2:
        with pytest.raises(InputError, match="dimension S is 1"):
            program(torch.ones(3, 1))
    assert trace(_Branching(kind).to("meta"), (torch.randn(3, 5, device="meta"),), dynamic={"x": {1: "S"}})


def test_the_modules_own_state_and_the_programs_go_their_own_ways() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count.add_(x.sum(0) if x.shape[0] > 1 else x[0])
            return self.count * 1

    model = Counter()
    program = trace(model, (torch.ones(2, 3),), dynamic={"x": {0: "B"}})
    assert bool((model.count == 0).all()), "tracing leaves it alone"
    first = program(torch.ones(2, 3))
    model(torch.ones(2, 3))
    assert torch.equal(program(torch.ones(2, 3))[0], first[0])


@pytest.mark.parametrize(
    "module", [nn.Upsample(scale_factor=0.5, mode="bilinear"), nn.Upsample(scale_factor=1.5)], ids=["half", "more"]
)
def test_sizes_through_floating_point(module: nn.Module, tmp_path: Path) -> None:
    program = trace(module, (torch.randn(1, 2, 8, 8),), dynamic={"input": {2: "H", 3: "W"}})
    verify(program, 2)
    x = torch.randn(1, 2, 12, 10)
    again = Program.load(program.save(tmp_path / "saved"))
    for each in (program, again):
        assert torch.allclose(each(x), module(x), rtol=1e-5)


def test_memory_formats(tmp_path: Path) -> None:
    class Last(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.to(memory_format=torch.channels_last)
            return x.permute(0, 2, 3, 1).view(x.shape[0], -1, x.shape[1])

    class View(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(x.shape[0], -1) + 1

    x = torch.randn(2, 3, 4, 5)
    for model, example in ((Last(), x), (View(), x.contiguous(memory_format=torch.channels_last))):
        program = trace(model, (example,))
        again = Program.load(program.save(tmp_path / type(model).__name__))
        for each in (program, again, optimize(program, (x,), passes="canonicalize")):
            for given in (x, x.contiguous(memory_format=torch.channels_last)):
                assert torch.equal(each(given), model(x))


@pytest.mark.parametrize(
    "dim", ["seq len", "lambda", "inf", "größe", "float", torch.export.Dim.DYNAMIC, 2 * torch.export.Dim("B"), 7]
)
def test_dimensions_that_cannot_be_called_so(dim: Any) -> None:
    with pytest.raises(ImportModelError, match=r"dynamic\['input'\]\[0\] is"):
        trace(nn.ReLU(), (torch.ones(4, 3),), dynamic={"input": {0: dim}})


def test_a_dimension_that_the_model_fixes_is_told() -> None:
    class Add(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    with pytest.raises(ImportModelError, match="fixes a named dimension"):
        trace(Add(), (torch.ones(2, 3), torch.ones(1, 3)), dynamic={"y": {0: "B"}})

    class Keywords(nn.Module):
        def forward(self, x: torch.Tensor, **others: torch.Tensor) -> torch.Tensor:
            return x + others["y"]

    example = {"x": torch.ones(4, 3), "y": torch.ones(4, 3)}
    assert torch.equal(trace(Keywords(), example)(**example), torch.full((4, 3), 2.0))
    with pytest.raises(ImportModelError, match=r"forward takes as \*\*others"):
        trace(Keywords(), example, dynamic={"x": {0: "B"}, "y": {0: "B"}})


def test_a_dict_of_one_output_stays_a_dict() -> None:
    class One(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"output": x + 1}

    assert isinstance(trace(One(), (torch.ones(2),))(torch.ones(2)), Outputs)


def test_conditions_that_make_no_sense_at_size_one() -> None:
    class Quarters(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            parts = x.shape[0] // 4
            return x + 1 if x.shape[0] // parts == 4 else x

    program = trace(Quarters(), (torch.ones(8),), dynamic={"x": {0: "S"}})
    for size in (1, 3):
        with pytest.raises(InputError):
            program(torch.ones(size))
    assert torch.equal(program(torch.ones(12)), torch.full((12,), 2.0))
