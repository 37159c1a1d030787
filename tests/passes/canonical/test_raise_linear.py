"""``raise-linear``: products by a weight in many spellings, the bias, reshapes around, and what is no linear layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphlathe.ir.program import Program
from graphlathe.passes.base import Context
from graphlathe.passes.canonical.canonicalize import Canonicalize
from graphlathe.passes.canonical.raise_linear import RaiseLinear
from tests.passes.canonical.spelled import raised
from tests.passes.rewriting import operators, rewritten

IN, OUT = 4, 6


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def tidied(program: Program) -> list[str]:
    """The operators when views are in their canonical form, without sizes."""
    program = program.clone()
    Canonicalize().run(program, Context())
    return [name.replace("transpose.int", "permute") for name in operators(program) if name != "sym_size.int"]


Function = Callable[..., Any]

# Each computes ``x @ w + b`` for x [3, 5, IN], w [IN, OUT], b [OUT].
SPELLINGS: dict[str, Function] = {
    "matmul": lambda x, w, b: x @ w + b,
    "bias first": lambda x, w, b: b + torch.matmul(x, w),
    "bias with leading axes": lambda x, w, b: x @ w + b.reshape(1, 1, OUT),
    "addmm of a matrix": lambda x, w, b: torch.addmm(b, x.reshape(-1, IN), w).reshape(-1, 5, OUT),
    "bias as a row": lambda x, w, b: torch.addmm(b.reshape(1, OUT), x.reshape(-1, IN), w).reshape(-1, 5, OUT),
    "bias inside reshapes": lambda x, w, b: (torch.mm(x.reshape(-1, IN), w) + b).reshape(x.shape[0], 5, OUT),
    "bias outside reshapes": lambda x, w, b: torch.mm(x.reshape(-1, IN), w).reshape(x.shape[0], 5, OUT) + b,
    "einsum": lambda x, w, b: torch.einsum("bsi,io->bso", x, w) + b,
    "einsum, weight first": lambda x, w, b: b + torch.einsum("io,bsi->bso", w, x),
    "einsum with an ellipsis": lambda x, w, b: torch.einsum("...i,io->...o", x, w) + b,
    "linear and a sum": lambda x, w, b: F.linear(x, w.T) + b,
    "weight with a leading axis": lambda x, w, b: torch.matmul(x, w[None]) + b,
    "turned twice": lambda x, w, b: x @ w.T.contiguous().T + b,
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_of_a_linear_layer(name: str) -> None:
    x, w, b = random(3, 5, IN), random(IN, OUT), random(OUT)
    _, after, stats = raised(RaiseLinear(), SPELLINGS[name], x, w=w, b=b)
    assert tidied(after) == ["linear"]
    assert (stats.hits, stats.attempts, stats.misses) == (1, 1, {})
    torch.testing.assert_close(after(x), x @ w + b, rtol=1e-12, atol=1e-12)


def test_a_vector_a_matrix_and_more_axes_are_mapped() -> None:
    w = random(IN, OUT)
    for shape in [(IN,), (3, IN), (3, 2, 5, IN)]:
        x = random(*shape)
        _, after, _ = raised(RaiseLinear(), lambda x, w: x @ w, x, w=w)
        assert operators(after) == ["linear"]
        torch.testing.assert_close(after(x), x @ w)


EINSUMS: dict[str, tuple[tuple[int, ...], tuple[int, ...], list[str]]] = {
    "ibh,hnd->ibnd": ((3, 5, 8), (8, 2, 4), ["linear", "reshape"]),
    "ibnd,hnd->ibh": ((3, 5, 2, 4), (8, 2, 4), ["reshape", "linear"]),
    "ibnd,dnh->ibh": ((3, 5, 2, 4), (4, 2, 8), ["reshape", "linear"]),
    "bcs,co->bos": ((3, 8, 5), (8, 6), ["permute", "linear", "permute"]),
    "bsh,hnd->bnsd": ((3, 5, 8), (8, 2, 4), ["linear", "reshape", "permute"]),
    "hnd,bsh->nbsd": ((8, 2, 4), (3, 5, 8), ["linear", "reshape", "permute"]),
}


@pytest.mark.parametrize("equation", EINSUMS)
def test_einsum_by_a_weight_of_any_layout(equation: str) -> None:
    left, right, expected = EINSUMS[equation]
    flipped = equation.startswith("hnd")
    x, w = (random(*right), random(*left)) if flipped else (random(*left), random(*right))

    def function(x: Tensor, w: Tensor) -> Tensor:
        return torch.einsum(equation, w, x) if flipped else torch.einsum(equation, x, w)

    _, after, stats = raised(RaiseLinear(), function, x, w=w)
    assert tidied(after) == expected
    assert (stats.hits, stats.misses) == (1, {})
    torch.testing.assert_close(after(x), function(x, w))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_einsum_of_random_labels(data: st.DataObject) -> None:
    """Any labels of both operands and any order of the result: equal outputs, and linear unless it says why not."""
    sizes = {"b": "B", "s": "S", "d": "4", "e": "3", "f": "1"}
    left = data.draw(st.lists(st.sampled_from("bsdef"), min_size=1, max_size=4, unique=True))
    right = data.draw(st.lists(st.sampled_from("def"), min_size=1, max_size=3, unique=True))
    out = data.draw(st.lists(st.sampled_from(sorted({*left, *right})), max_size=4, unique=True))
    x, w, y = (f"f32[{', '.join(sizes[c] for c in term)}]" for term in (left, right, out))
    equation = f"{''.join(left)},{''.join(right)}->{''.join(out)}"
    _, _, stats = rewritten(
        RaiseLinear(),
        f"program @main(%x: {x}) -> (%out) {{\n  dim B = 2 in [1, inf]\n  dim S = 5 in [1, inf]\n"
        f'  %w0 = weight "w" : {w} #00000000\n  %0 = aten.einsum("{equation}", [%x, %w0]) : {y}\n  return (%0,)\n}}\n',
    )
    shared = set(left) & set(right)
    is_linear = not shared & set(out) and shared and set(right) - shared and shared == {*left, *right} - set(out)
    assert stats.hits == bool(is_linear)
    assert stats.hits + sum(stats.misses.values()) == 1


def test_a_factor_on_the_left_of_what_is_transposed() -> None:
    x, w = random(3, 5, IN), random(OUT, IN)
    before, after, _ = raised(RaiseLinear(), lambda x, w: w @ x.transpose(1, 2), x, w=w)
    assert tidied(after) == ["linear", "permute"]
    assert after.used_weights() == before.used_weights()


def test_a_shared_weight_is_turned_once_and_shares_its_numbers() -> None:
    x, w, b = random(3, IN), random(IN, IN), random(IN)
    before, after, stats = raised(RaiseLinear(), lambda x, w, b: torch.tanh(x @ w) @ w + b + w[0].sum(), x, w=w, b=b)
    assert operators(after).count("linear") == stats.hits == 2
    (turned,) = [name for name in after.used_weights() if name.endswith("_transposed")]
    assert after.weights[turned].shares_storage(before.weights[next(n for n in before.weights if n.endswith("w"))])


def test_a_tied_embedding_that_was_turned_is_the_embedding_again() -> None:
    ids, w = torch.tensor([[0, 2, 1]]), random(OUT, IN)
    _, after, _ = raised(RaiseLinear(), lambda ids, w: torch.matmul(F.embedding(ids, w), w.t()), ids, w=w)
    Canonicalize().run(after, Context())
    assert operators(after) == ["embedding", "linear"]
    assert len(after.used_weights()) == 1


def test_a_bias_that_is_read_before_the_sum_stays_outside() -> None:
    x, w, b = random(3, IN), random(IN, OUT), random(OUT)
    _, after, _ = raised(RaiseLinear(), lambda x, w, b: (x @ w + b, x @ w), x, w=w, b=b)
    assert operators(after) == ["linear", "add.Tensor"]


KEPT_SUMS: dict[str, tuple[Function, list[str]]] = {
    "scaled": (lambda x, w, b: torch.add(x @ w, b, alpha=2), ["linear", "add.Tensor"]),
    "not constant": (lambda x, w, b: x @ w + x[0, 0, 0], ["linear"]),
    "along another axis": (lambda x, w, b: x @ w + b[:5, None], ["linear", "add.Tensor"]),
    "more axes": (lambda x, w, b: x @ w + b.reshape(1, 1, 1, OUT), ["linear", "add.Tensor"]),
    "another type": (lambda x, w, b: x.float() @ w.float() + b, ["_to_copy", "linear", "add.Tensor"]),
}


@pytest.mark.parametrize("name", KEPT_SUMS)
def test_what_is_no_bias_stays_a_sum(name: str) -> None:
    function, expected = KEPT_SUMS[name]
    x, w, b = random(3, 5, IN), random(IN, OUT), random(OUT)
    _, after, stats = raised(RaiseLinear(), function, x, w=w, b=b)
    assert [o for o in operators(after) if o in ("linear", "_to_copy", "add.Tensor")][: len(expected)] == expected
    assert "add.Tensor" in operators(after)
    assert stats.hits == 1


def test_reshapes_stay_where_their_results_differ() -> None:
    x, w = random(3, 4, IN), random(IN, OUT)
    _, after, _ = raised(RaiseLinear(), lambda x, w: (x.reshape(-1, IN) @ w).reshape(-1, 2, OUT), x, w=w)
    assert operators(after) == ["reshape", "linear", "reshape"]
    _, after, _ = raised(RaiseLinear(), lambda x, w: (x.reshape(-1, 8) @ w).reshape(-1, 2, OUT), x, w=random(8, OUT))
    assert operators(after) == ["reshape", "linear", "reshape"]


NEAR_MISSES: dict[str, tuple[Function, tuple[int, ...], str]] = {
    "left": (lambda x, w: w @ x, (6, 5), "the constant is the left operand"),
    "batch": (lambda x, w: x[:, None] @ w, (2, IN, OUT), "the constant has batch axes"),
    "more axes than x": (lambda x, w: x @ w[None], (1, IN, OUT), "the constant has batch axes"),
    "vector": (lambda x, w: x @ w, (IN,), "the constant is a vector"),
    "scaled": (
        lambda x, w: torch.addmm(w[0], x[0], w, alpha=2),
        (IN, OUT),
        "the product or what is added is scaled",
    ),
    "no bias": (lambda x, w: torch.addmm(x[0] @ w, x[1], w), (IN, OUT), "what is added is no bias"),
    "grouped einsum": (lambda x, w: torch.einsum("bgi,gio->bgo", x, w), (5, IN, OUT), "the constant has batch axes"),
    "summed alone": (
        lambda x, w: torch.einsum("bsi,io->bo", x, w),
        (IN, OUT),
        "a label of one operand alone is summed over",
    ),
    "outer product": (lambda x, w: torch.einsum("bsi,o->bsio", x, w), (OUT,), "the constant is a vector"),
    "broadcast": (
        lambda x, w: torch.einsum("bsi,io->bso", x[..., :1], w),
        (IN, OUT),
        "one operand is broadcast along what is summed over",
    ),
    "diagonal": (
        lambda x, w: torch.einsum("bsi,ii->bsi", x, w),
        (IN, IN),
        "the einsum repeats a label, or says no result",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_say_why(name: str) -> None:
    function, shape, reason = NEAR_MISSES[name]
    _, after, stats = raised(RaiseLinear(), function, random(3, 5, IN), w=random(*shape))
    assert stats.misses == {reason: 1}
    assert stats.hits == operators(after).count("linear")


def test_products_of_two_values_are_not_looked_at() -> None:
    x = random(3, 5, IN)
    before, after, stats = raised(RaiseLinear(), lambda x: x @ x.transpose(1, 2), x)
    assert after.to_text() == before.to_text()
    assert (stats.hits, stats.attempts) == (0, 0)


TEXT = """\
program @main(%x: f32[B, S, 8]) -> (%out) {
  dim B = 2 in [1, inf]
  dim S = 5 in [1, inf]
  %w0 = weight "c_fc.weight" : f32[8, 16] #00000000
  %w1 = weight "c_fc.bias" : f32[16] #00000000
  %w2 = weight "o.weight" : f32[8, 2, 8] #00000000
  %0 = aten.sym_size.int(%x, 1) : int(S)
  %1 = aten.reshape(%x, [-1, 8]) : f32[B*S, 8]
  %2 = aten.addmm(%w1, %1, %w0) : f32[B*S, 16]
  %3 = aten.reshape(%2, [-1, %0, 16]) : f32[B, S, 16]
  %4 = aten.reshape(%3, [-1, %0, 2, 8]) : f32[B, S, 2, 8]
  %5 = aten.einsum("bsnd,hnd->bsh", [%4, %w2]) : f32[B, S, 8]
  return (%5,)
}
"""


def test_before_and_after(golden: Callable[[str, str], None]) -> None:
    before, after, stats = rewritten(RaiseLinear(), TEXT)
    assert stats.hits == 2
    golden("passes/raise-linear", f"{before.to_text()}\n{after.to_text()}")
