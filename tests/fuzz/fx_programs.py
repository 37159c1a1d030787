"""Random FX programs with their inputs: calls of PyTorch's functions on values that are computed on the way."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, fx

EXAMPLE = 3
_LARGEST = 1e3
_NUMEL = 3000
_GRID = 256
_SMOOTH = (torch.sigmoid, torch.tanh, F.gelu, F.silu, F.softplus, torch.erf, torch.cos, F.mish, torch.atan, F.elu)
_EXACT = (torch.relu, torch.neg, torch.abs, F.hardtanh, torch.square)
_STEPS = (
    "unary", "unary", "binary", "binary", "number", "clamp", "where", "masked", "logic", "convert", "reduce", "arg",
    "sort", "cumsum", "softmax", "norm", "linear", "matmul", "conv", "pool", "attention", "embedding", "einsum",
    "permute", "reshape", "expand", "unsqueeze", "squeeze", "cat", "stack", "split", "slice", "select", "index",
    "gather", "pad", "triangle", "flip", "repeat", "range", "full", "inplace", "one_hot",
)  # fmt: skip


@dataclass
class FxCase:
    """A module, what to feed it, and how large its values get.

    Attributes:
        module: the module; its parameters may be used several times.
        feeds: the example's inputs, by name.
        magnitude: the largest finite number on the way.
        symbolic: the inputs with a symbolic first axis.
    """

    module: fx.GraphModule
    feeds: dict[str, np.ndarray]
    magnitude: float
    symbolic: tuple[str, ...]

    def resized(self, size: int, seed: int) -> dict[str, np.ndarray]:
        """Other inputs, with another size of the symbolic axis."""
        generator = torch.Generator().manual_seed(seed)
        return {
            name: _numbers(
                generator, (size, *a.shape[1:]) if name in self.symbolic else a.shape, torch.from_numpy(a).dtype
            ).numpy()
            for name, a in self.feeds.items()
        }

    def run(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """What the module gives; its inputs stay as they are."""
        with torch.no_grad():
            outputs = self.module(*(torch.from_numpy(np.array(array)) for array in feeds.values()))
        return [value.numpy().copy() for value in outputs]

    def __repr__(self) -> str:
        inputs = {name: f"{a.dtype}{list(a.shape)}" for name, a in self.feeds.items()}
        return f"FxCase({inputs}, symbolic={self.symbolic}):\n{self.module.graph.python_code('self').src}"


def _numbers(generator: torch.Generator, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    if dtype == torch.bool:
        return torch.randint(0, 2, tuple(shape), generator=generator).bool()
    if dtype == torch.int64:
        return torch.randint(0, 4, tuple(shape), generator=generator)
    return (torch.randint(-8, 9, tuple(shape), generator=generator) / 4).to(dtype)


@st.composite
def fx_cases(draw: st.DrawFn, *, most: int = 12) -> FxCase:
    """A random program of up to ``most`` steps (a step may take several calls)."""
    builder = _Builder(draw)
    for _ in range(draw(st.integers(2, most))):
        builder.keep(getattr(builder, f"_{draw(st.sampled_from(_STEPS))}")() or [])
    return builder.finish()


@dataclass(frozen=True)
class _Value:
    node: fx.Node
    tensor: Tensor
    exact: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def rank(self) -> int:
        return self.tensor.dim()


class _Builder:
    def __init__(self, draw: Callable[[Any], Any]) -> None:
        self.draw = draw
        self.graph = fx.Graph()
        self.root = torch.nn.Module()
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
        self.dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64]))
        self.values: list[_Value] = []
        self.feeds: dict[str, Tensor] = {}
        self.symbolic: list[str] = []
        self.magnitude = 2.0
        for _ in range(draw(st.integers(1, 3))):
            self._input()

    def chance(self, one_in: int) -> bool:
        return self.draw(st.integers(0, one_in - 1)) == one_in - 1

    def size(self) -> int:
        return self.draw(st.sampled_from([2, 3, 4, 3, 2, 1, 0] if self.chance(4) else [2, 3, 4, 1]))

    def _input(self) -> None:
        name = f"x{len(self.feeds)}"
        shape = [self.size() for _ in range(self.draw(st.integers(0, 4)))]
        if shape and self.draw(st.booleans()):
            shape[0] = EXAMPLE
            self.symbolic.append(name)
        kind = self.draw(st.sampled_from([self.dtype, self.dtype, self.dtype, torch.int64, torch.bool]))
        self.feeds[name] = _numbers(self.generator, shape, kind)
        self.values.append(_Value(self.graph.placeholder(name), self.feeds[name].clone(), True))

    def call(self, target: Any, *args: Any, **kwargs: Any) -> list[_Value]:
        """A call; its tensors. Values among the arguments, also in lists, become nodes."""

        def of(argument: Any, pick: Callable[[_Value], Any]) -> Any:
            if isinstance(argument, _Value):
                return pick(argument)
            if isinstance(argument, (list, tuple)):
                return type(argument)(of(item, pick) for item in argument)
            return argument

        with torch.no_grad():
            result = target(*of(args, lambda v: v.tensor), **kwargs)
        if isinstance(result, Tensor) and result.numel() > _NUMEL:
            return []
        node = self.graph.call_function(target, of(args, lambda v: v.node), kwargs)
        exact = all(v.exact for v in self._inside(args))
        if isinstance(result, Tensor):
            return [_Value(node, result, exact and self._on_grid(result))]
        parts: list[_Value] = []
        for i, part in enumerate(result):
            parts.append(
                _Value(self.graph.call_function(operator.getitem, (node, i)), part, exact and self._on_grid(part))
            )
        return parts

    def _inside(self, argument: Any) -> list[_Value]:
        if isinstance(argument, (list, tuple)):
            return [value for item in argument for value in self._inside(item)]
        return [argument] if isinstance(argument, _Value) else []

    def _on_grid(self, value: Tensor) -> bool:
        if not value.is_floating_point():
            return True
        if not value.isfinite().all() or (value.numel() and value.abs().max() > _LARGEST):
            return False
        return bool((value * _GRID == (value * _GRID).round()).all())

    def keep(self, made: Sequence[_Value]) -> None:
        """Take results as values for further steps, bounded where they have become large."""
        for value in made:
            if value.tensor.is_floating_point() and value.tensor.numel():
                if not value.tensor.isfinite().all() or value.tensor.abs().max() > _LARGEST:
                    self.values += self.call(torch.tanh, self.call(torch.nan_to_num, value)[0])
                    continue
                self.magnitude = max(self.magnitude, float(value.tensor.abs().max()))
            self.values.append(value)

    def parameter(self, *shape: int) -> _Value:
        """A parameter; often one that is there already."""
        same = [name for name, p in self.root.named_parameters() if tuple(p.shape) == shape]
        if same and self.draw(st.booleans()):
            name = same[-1]
        else:
            name = f"p{len(list(self.root.parameters()))}"
            self.root.register_parameter(name, torch.nn.Parameter(_numbers(self.generator, shape, self.dtype)))
        return _Value(self.graph.get_attr(name), getattr(self.root, name).detach(), True)

    def pick(self, fits: Callable[[_Value], bool] = lambda value: True) -> _Value | None:
        known = [value for value in self.values if fits(value)]
        return known[self.draw(st.integers(0, len(known) - 1))] if known else None

    def floating(self, least: int = 0, most: int = 6, *, filled: bool = False) -> _Value | None:
        return self.pick(
            lambda v: v.tensor.dtype == self.dtype and least <= v.rank <= most and not (filled and 0 in v.shape)
        )

    def axis(self, value: _Value) -> int:
        return self.draw(st.integers(-value.rank, value.rank - 1))

    def _unary(self) -> list[_Value]:
        x = self.floating()
        return self.call(self.draw(st.sampled_from(_SMOOTH + _EXACT)), x) if x is not None else []

    def _partner(self, x: _Value) -> _Value:
        def fits(v: _Value) -> bool:
            try:
                return v.tensor.dtype == x.tensor.dtype and torch.broadcast_shapes(v.shape, x.shape) is not None
            except RuntimeError:
                return False

        if x.tensor.dtype == self.dtype and self.chance(4):
            shape = [n if self.draw(st.booleans()) else 1 for n in x.shape]
            return self.parameter(*shape[self.draw(st.integers(0, len(shape))) :])
        found = self.pick(fits)
        assert found is not None
        return found

    def _binary(self) -> list[_Value]:
        x = self.floating()
        if x is None:
            return []
        y = self._partner(x)
        op = self.draw(st.sampled_from([torch.add, torch.sub, torch.mul, torch.maximum, torch.minimum, torch.div]))
        if op is torch.div:
            return self.call(op, x, self.call(torch.add, self.call(torch.abs, y)[0], 1)[0])
        if op is torch.add and self.chance(3):
            return self.call(op, x, y, alpha=2)
        return self.call(op, x, y) if self.draw(st.booleans()) else self.call(op, y, x)

    def _number(self) -> list[_Value]:
        x = self.floating()
        op = self.draw(st.sampled_from([torch.add, torch.mul, torch.sub, torch.div, torch.rsub]))
        return self.call(op, x, self.draw(st.sampled_from([2, 0.5, -1, 4.0]))) if x is not None else []

    def _clamp(self) -> list[_Value]:
        x = self.floating()
        bounds = self.draw(st.sampled_from([{"min": -1}, {"max": 0.5}, {"min": 0.0, "max": 1.0}]))
        return self.call(torch.clamp, x, **bounds) if x is not None else []

    def _compared(self) -> _Value | None:
        x = self.pick(lambda v: v.exact and v.tensor.dtype != torch.bool)
        if x is None:
            return None
        op = self.draw(st.sampled_from([torch.gt, torch.le, torch.eq, torch.ne]))
        return self.call(op, x, self.draw(st.sampled_from([0, 1, 0.5])))[0]

    def _where(self) -> list[_Value]:
        condition, x = self._compared(), self.floating()
        if condition is None or x is None:
            return []
        try:
            torch.broadcast_shapes(condition.shape, x.shape)
        except RuntimeError:
            return [condition]
        return self.call(torch.where, condition, x, self.call(torch.neg, x)[0])

    def _masked(self) -> list[_Value]:
        x = self.pick(lambda v: v.tensor.dtype == self.dtype and v.exact)
        if x is None:
            return []
        return self.call(torch.masked_fill, x, self.call(torch.gt, x, 0)[0], self.draw(st.sampled_from([0, -1.5])))

    def _logic(self) -> list[_Value]:
        x = self.pick(lambda v: v.tensor.dtype == torch.bool)
        if x is None:
            return []
        op = self.draw(st.sampled_from([torch.logical_not, torch.logical_and, torch.logical_or, torch.logical_xor]))
        return self.call(op, x) if op is torch.logical_not else self.call(op, x, self._partner(x))

    def _convert(self) -> list[_Value]:
        x = self.pick(lambda v: v.exact)
        kind = self.draw(st.sampled_from([self.dtype, torch.int64, torch.bool]))
        return self.call(Tensor.to, x, kind) if x is not None else []

    def _reduce(self) -> list[_Value]:
        x = self.floating(filled=True)
        if x is None:
            return []
        op = self.draw(
            st.sampled_from([torch.sum, torch.mean, torch.amax, torch.amin, torch.prod, torch.var, torch.norm])
        )
        if op in (torch.prod, torch.norm, torch.var) or not x.rank:
            return self.call(op, x, unbiased=False) if op is torch.var else self.call(op, x)
        axes = sorted({self.axis(x) % x.rank for _ in range(self.draw(st.integers(1, 2)))})
        return self.call(op, x, axes, keepdim=self.draw(st.booleans()))

    def _arg(self) -> list[_Value]:
        x = self.pick(lambda v: v.tensor.dtype == self.dtype and v.exact and v.rank > 0 and 0 not in v.shape)
        op = self.draw(st.sampled_from([torch.argmax, torch.argmin]))
        return self.call(op, x, self.axis(x)) if x is not None else []

    def _sort(self) -> list[_Value]:
        x = self.pick(lambda v: v.tensor.dtype == self.dtype and v.exact and v.rank > 0 and 0 not in v.shape)
        if x is None:
            return []
        # Indices of equal values are no matter of the operator: values only.
        return self.call(torch.sort, x, -1)[:1] if self.draw(st.booleans()) else self.call(torch.topk, x, 1)[:1]

    def _cumsum(self) -> list[_Value]:
        x = self.floating(1)
        return self.call(torch.cumsum, x, self.axis(x)) if x is not None else []

    def _softmax(self) -> list[_Value]:
        x = self.floating(1)
        op = self.draw(st.sampled_from([torch.softmax, torch.log_softmax]))
        return self.call(op, x, self.axis(x)) if x is not None else []

    def _norm(self) -> list[_Value]:
        x = self.floating(1, filled=True)
        if x is None or x.shape[-1] < 2:
            return []
        width = x.shape[-1]
        if self.draw(st.booleans()):
            return self.call(F.rms_norm, x, [width], self.parameter(width), 0.125)
        return self.call(F.layer_norm, x, [width], self.parameter(width), self.parameter(width), 0.125)

    def _linear(self) -> list[_Value]:
        x = self.floating(1)
        if x is None:
            return []
        out = self.draw(st.integers(1, 4))
        bias = self.parameter(out) if self.draw(st.booleans()) else None
        return self.call(F.linear, x, self.parameter(out, x.shape[-1]), bias)

    def _matmul(self) -> list[_Value]:
        x = self.floating(2)
        if x is None:
            return []
        return self.call(torch.matmul, x, self.call(torch.transpose, x, -1, -2)[0])

    def _conv(self) -> list[_Value]:
        x = self.floating(3, 4, filled=True)
        if x is None or min(x.shape[2:]) < 2:
            return []
        groups = x.shape[1] if self.chance(3) else 1
        kernel = self.draw(st.integers(1, 2))
        weight = self.parameter(2 * groups, x.shape[1] // groups, *[kernel] * (x.rank - 2))
        bias = self.parameter(2 * groups) if self.draw(st.booleans()) else None
        op = F.conv1d if x.rank == 3 else F.conv2d
        return self.call(op, x, weight, bias, self.draw(st.integers(1, 2)), self.draw(st.integers(0, 1)), 1, groups)

    def _pool(self) -> list[_Value]:
        x = self.floating(4, 4, filled=True)
        if x is None or min(x.shape[2:]) < 2:
            return []
        if self.chance(3):
            return self.call(F.adaptive_avg_pool2d, x, 1)
        return self.call(self.draw(st.sampled_from([F.max_pool2d, F.avg_pool2d])), x, 2)

    def _attention(self) -> list[_Value]:
        x = self.floating(3, 4, filled=True)
        flag = self.draw(st.booleans())
        return self.call(F.scaled_dot_product_attention, x, x, x, is_causal=flag) if x is not None else []

    def _embedding(self) -> list[_Value]:
        x = self.pick(lambda v: v.tensor.dtype == torch.int64 and v.rank < 4)
        if x is None:
            return []
        return self.call(F.embedding, self.call(torch.clamp, x, min=0, max=3)[0], self.parameter(4, 3))

    def _one_hot(self) -> list[_Value]:
        x = self.pick(lambda v: v.tensor.dtype == torch.int64 and v.rank < 4)
        return self.call(F.one_hot, self.call(torch.clamp, x, min=0, max=3)[0], 4) if x is not None else []

    def _einsum(self) -> list[_Value]:
        x = self.floating(2, 2)
        equation = self.draw(st.sampled_from(["ij->ji", "ij,ij->i", "ij,kj->ik", "ij->"]))
        return self.call(torch.einsum, equation, *[x] * (1 + equation.count(","))) if x is not None else []

    def _permute(self) -> list[_Value]:
        x = self.pick(lambda v: v.rank > 0)
        return self.call(torch.permute, x, self.draw(st.permutations(range(x.rank)))) if x is not None else []

    def _reshape(self) -> list[_Value]:
        x = self.pick(lambda v: v.rank > 0 and 0 not in v.shape)
        if x is None:
            return []
        if self.draw(st.booleans()):
            return self.call(torch.flatten, x, self.draw(st.integers(0, x.rank - 1)))
        return self.call(torch.reshape, x, [-1, *x.shape[2:]] if x.rank > 1 else [1, -1])

    def _expand(self) -> list[_Value]:
        x = self.pick(lambda v: v.rank < 4)
        return self.call(Tensor.expand, x, 2, *[-1] * x.rank) if x is not None else []

    def _unsqueeze(self) -> list[_Value]:
        x = self.pick(lambda v: v.rank < 5)
        return self.call(torch.unsqueeze, x, self.draw(st.integers(-x.rank - 1, x.rank))) if x is not None else []

    def _squeeze(self) -> list[_Value]:
        x = self.pick(lambda v: 1 in v.shape[1:])
        return self.call(torch.squeeze, x, x.shape[1:].index(1) + 1) if x is not None else []

    def _like(self, x: _Value, axis: int | None) -> _Value:
        def shape_of(value: _Value) -> list[int]:
            return [n for i, n in enumerate(value.shape) if axis is None or i != axis % x.rank]

        found = self.pick(
            lambda v: v.tensor.dtype == x.tensor.dtype and v.rank == x.rank and shape_of(v) == shape_of(x)
        )
        assert found is not None
        return found

    def _cat(self) -> list[_Value]:
        x = self.pick(lambda v: v.rank > 0)
        if x is None:
            return []
        axis = self.axis(x)
        return self.call(torch.cat, [x, self._like(x, axis)], axis)

    def _stack(self) -> list[_Value]:
        x = self.pick(lambda v: v.rank < 4)
        if x is None:
            return []
        return self.call(torch.stack, [x, self._like(x, None), x], self.draw(st.integers(-x.rank - 1, x.rank)))

    def _split(self) -> list[_Value]:
        x = self.pick(lambda v: v.rank > 0 and v.shape[-1] > 1)
        if x is None:
            return []
        if self.draw(st.booleans()):
            return self.call(torch.chunk, x, 2, -1)
        return self.call(torch.split, x, [1, x.shape[-1] - 1], -1) if x.shape[-1] != EXAMPLE else []

    def _slice(self) -> list[_Value]:
        x = self.pick(lambda v: v.rank > 0)
        if x is None:
            return []
        start = self.draw(st.sampled_from([None, 0, 1, 2, -1, -3]))
        stop = self.draw(st.sampled_from([None, -1] if start in (-1, -3) else [None, 1, 2, 5, -1]))
        step = self.draw(st.sampled_from([None, 1, 2]))
        return self.call(operator.getitem, x, (Ellipsis, slice(start, stop, step)))

    def _select(self) -> list[_Value]:
        x = self.pick(lambda v: v.rank > 0 and v.shape[0] > 0)
        return self.call(operator.getitem, x, self.draw(st.sampled_from([0, -1]))) if x is not None else []

    def _index(self) -> list[_Value]:
        x = self.pick(lambda v: v.rank > 0 and v.shape[0] > 1)
        i = self.pick(lambda v: v.tensor.dtype == torch.int64 and v.rank < 3)
        if x is None or i is None:
            return []
        return self.call(operator.getitem, x, self.call(torch.clamp, i, min=-1, max=0)[0])

    def _gather(self) -> list[_Value]:
        x = self.pick(lambda v: v.rank > 0 and 0 not in v.shape)
        if x is None:
            return []
        axis = self.axis(x)
        index = self.call(torch.zeros_like, x, dtype=torch.int64)[0]
        return self.call(torch.gather, x, axis, index)

    def _pad(self) -> list[_Value]:
        x = self.floating(1)
        if x is None:
            return []
        pads = [self.draw(st.integers(0, 2)) for _ in range(2 * min(x.rank, 2))]
        return self.call(F.pad, x, pads, "constant", self.draw(st.sampled_from([0.0, 0.5])))

    def _triangle(self) -> list[_Value]:
        x = self.floating(2)
        op = self.draw(st.sampled_from([torch.tril, torch.triu]))
        return self.call(op, x, self.draw(st.integers(-1, 1))) if x is not None else []

    def _flip(self) -> list[_Value]:
        x = self.pick(lambda v: v.rank > 0)
        if x is None:
            return []
        if self.draw(st.booleans()):
            return self.call(torch.flip, x, [self.axis(x)])
        return self.call(torch.roll, x, 1, self.axis(x))

    def _repeat(self) -> list[_Value]:
        x = self.pick(lambda v: 0 < v.rank < 4)
        if x is None:
            return []
        if self.draw(st.booleans()):
            return self.call(torch.repeat_interleave, x, 2, dim=self.axis(x))
        return self.call(Tensor.repeat, x, *[self.draw(st.integers(1, 2)) for _ in range(x.rank)])

    def _range(self) -> list[_Value]:
        x = self.floating(1)
        if x is None:
            return []
        size = self.graph.call_function(torch.ops.aten.sym_size.int, (x.node, 0))
        node = self.graph.call_function(torch.arange, (size,))
        return [_Value(node, torch.arange(x.shape[0]), True)]

    def _full(self) -> list[_Value]:
        x = self.floating()
        op = self.draw(st.sampled_from([torch.zeros_like, torch.ones_like]))
        return self.call(op, x) if x is not None else []

    def _inplace(self) -> list[_Value]:
        """A change in place of a fresh value, and of a part of it."""
        x = self.floating(1)
        if x is None:
            return []
        fresh = self.call(torch.clone, x)[0]
        part = self.call(operator.getitem, fresh, (Ellipsis, slice(0, 1)))[0]
        self.call(Tensor.mul_, part, 2)
        return self.call(Tensor.add_, fresh, 1)

    def finish(self) -> FxCase:
        """Outputs: some results, perhaps an input, perhaps one of them twice."""
        chosen = self.values[-2:]
        if self.chance(4):
            chosen = [*chosen, self.draw(st.sampled_from(self.values))]
        self.graph.output(tuple(value.node for value in chosen))
        self.graph.lint()
        module = fx.GraphModule(self.root, self.graph)
        feeds = {name: tensor.numpy() for name, tensor in self.feeds.items()}
        return FxCase(module, feeds, self.magnitude, tuple(self.symbolic))
