"""Hypothesis strategies: random well-formed programs, small enough to run hundreds of them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import fx

from graphlathe.ir.program import Program
from graphlathe.ir.rewrite import Rewriter
from graphlathe.ir.text import parse_program
from graphlathe.ir.weights import RandomSource, Weight

aten = torch.ops.aten

_UNARY = (aten.relu.default, aten.sigmoid.default, aten.tanh.default, aten.neg.default)
_STEPS = ("unary", "binary", "scalar", "conv", "linear", "cat", "flatten", "swap", "split")
_BINARY = (aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor)


def feeds_of(program: Program, size: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of a random program, with ``size`` for every symbolic dimension."""
    generator = torch.Generator().manual_seed(seed)
    feeds: dict[str, torch.Tensor] = {}
    for spec in program.inputs:
        assert spec.dtype is not None
        shape = [s if isinstance(s, int) else size for s in spec.shape]
        feeds[spec.name] = torch.randn(shape, generator=generator, dtype=torch.float64).to(spec.dtype)
    return feeds


@st.composite
def programs(draw: st.DrawFn, *, max_operators: int = 8, symbolic: bool | None = None) -> Program:
    """A random program of convolutions, linear maps, elementwise operators, views, splits and concatenations.

    Args:
        draw: given by Hypothesis.
        max_operators: how many building steps at most (a step may take several nodes).
        symbolic: whether the batch dimension is symbolic; None draws it.
    """
    dynamic = draw(st.booleans()) if symbolic is None else symbolic
    dtype = draw(st.sampled_from(["f32", "f64"]))
    batch, dim = ("B", "  dim B = 3 in [1, inf]\n") if dynamic else ("3", "")
    kind = f"{dtype}[{batch}, 4, 6, 6]"
    program = parse_program(f"program @main(%x: {kind}, %y: {kind}) -> (%out) {{\n{dim}  return (%x,)\n}}\n")
    builder = _Builder(program, draw)
    for _ in range(draw(st.integers(1, max_operators))):
        builder.step()
    builder.finish()
    return program


class _Builder:
    def __init__(self, program: Program, draw: Callable[[Any], Any]) -> None:
        self.program = program
        self.draw = draw
        self.rewriter = Rewriter(program, "strategy")
        self.output = program.main.output_node
        self.values: list[fx.Node] = list(program.main.placeholders)
        self.dtype = self.values[0].meta["val"].dtype

    def call(self, target: Any, *args: Any) -> fx.Node:
        with self.rewriter.before(self.output):
            return self.rewriter.call(target, *args)

    def pick(self, fits: Callable[[torch.Tensor], bool] = lambda value: True) -> fx.Node | None:
        known = [v for v in self.values if fits(v.meta["val"])]
        return known[self.draw(st.integers(0, len(known) - 1))] if known else None

    def weight(self, *shape: int) -> fx.Node:
        """A weight of a shape: a new one, or one that is used already."""
        same = [n for n, w in self.program.weights.items() if w.shape == shape]
        if same and self.draw(st.booleans()):
            return self.rewriter.weight(same[0])
        name = f"layer{len(self.program.weights)}.weight"
        return self.rewriter.weight(name, Weight(RandomSource(name, shape, self.dtype)))

    def step(self) -> None:
        name = self.draw(
            st.sampled_from(["unary", "binary", "scalar", "conv", "linear", "cat", "flatten", "swap", "split"])
        )
        made = getattr(self, f"_{name}")()
        self.values.extend(node for node in made if node is not None)

    def _unary(self) -> list[fx.Node]:
        return [self.call(self.draw(st.sampled_from(_UNARY)), self.pick())]

    def _scalar(self) -> list[fx.Node]:
        number = self.draw(st.sampled_from([2, 0.5, -1, float("inf")]))
        if number == float("inf"):
            return [self.call(aten.clamp.default, self.pick(), -1.5, number)]
        return [self.call(aten.mul.Scalar, self.pick(), number)]

    def _binary(self) -> list[fx.Node]:
        a = self.pick()
        assert a is not None
        b = self.pick(lambda v: tuple(map(str, v.shape)) == tuple(map(str, a.meta["val"].shape)))
        return [self.call(self.draw(st.sampled_from(_BINARY)), a, b)]

    def _conv(self) -> list[fx.Node]:
        x = self.pick(lambda v: v.dim() == 4)
        assert x is not None
        channels = int(x.meta["val"].shape[1])
        out, kernel = self.draw(st.sampled_from([2, 4])), self.draw(st.sampled_from([1, 3]))
        weight = self.weight(out, channels, kernel, kernel)
        return [self.call(aten.conv2d.default, x, weight, None, [1, 1], [kernel // 2, kernel // 2])]

    def _linear(self) -> list[fx.Node]:
        x = self.pick()
        assert x is not None
        features = int(x.meta["val"].shape[-1])
        out = self.draw(st.sampled_from([4, 6]))
        bias = self.weight(out) if self.draw(st.booleans()) else None
        return [self.call(aten.linear.default, x, self.weight(out, features), bias)]

    def _cat(self) -> list[fx.Node]:
        a = self.pick(lambda v: v.dim() == 4)
        assert a is not None
        shape = a.meta["val"].shape
        b = self.pick(lambda v: v.dim() == 4 and tuple(v.shape[2:]) == tuple(shape[2:]))
        return [self.call(aten.cat.default, [a, b], 1)]

    def _flatten(self) -> list[fx.Node]:
        x = self.pick(lambda v: v.dim() == 4)
        size = self.call(aten.sym_size.int, x, 0)
        return [self.call(aten.reshape.default, x, [size, -1])]

    def _swap(self) -> list[fx.Node]:
        return [self.call(aten.transpose.int, self.pick(lambda v: v.dim() == 4), 2, 3)]

    def _split(self) -> list[fx.Node]:
        x = self.pick(lambda v: v.dim() == 4 and int(v.shape[1]) > 1)
        if x is None:
            return []
        half = int(x.meta["val"].shape[1]) // 2
        parts = self.call(aten.split.Tensor, x, half, 1)
        return [self.call(operator.getitem, parts, 0), self.call(operator.getitem, parts, 1)]

    def finish(self) -> None:
        """Return the last value, and perhaps an earlier one; then nothing is left that no output needs."""
        chosen = [self.values[-1]]
        extra = self.pick()
        if extra is not None and extra is not chosen[0] and self.draw(st.booleans()):
            chosen.append(extra)
        self.output.args = (tuple(chosen),)
        self.program.main.outputs = tuple(f"out{i}" for i in range(len(chosen)))
        self.rewriter.erase_dead()
