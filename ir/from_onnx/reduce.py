"""Reductions, running sums, softmax. Axes are an attribute in older opsets, an input in newer ones; both are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .registry import operator
from .values import Host

Reduction = Callable[[Tensor, list[int], bool], Tensor]


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = torch.prod(x, axis, keep)
    return x


_REDUCTIONS: dict[str, Reduction] = {
    "ReduceMean": torch.mean,
    "ReduceSum": lambda x, axes, keep: torch.sum(x, axes, keep, dtype=x.dtype),
    "ReduceMax": torch.amax,
    "ReduceMin": torch.amin,
    "ReduceProd": _product,
    "ReduceL1": lambda x, axes, keep: torch.sum(torch.abs(x), axes, keep),
    "ReduceL2": lambda x, axes, keep: torch.sqrt(torch.sum(x * x, axes, keep)),
    "ReduceSumSquare": lambda x, axes, keep: torch.sum(x * x, axes, keep),
    "ReduceLogSum": lambda x, axes, keep: torch.log(torch.sum(x, axes, keep)),
    "ReduceLogSumExp": torch.logsumexp,
}


def _reduction(function: Reduction) -> Callable[..., Tensor]:
    def reduce(
        x: Tensor,
        axes_input: Host | None = None,
        *,
        axes: Sequence[int] | None = None,
        keepdims: int = 1,
        noop_with_empty_axes: int = 0,
    ) -> Tensor:
        given = axes_input.items if axes_input is not None else axes or ()
        if not given and noop_with_empty_axes:
            # Only the reduction is left out: a sum of squares still squares.
            return function(x.unsqueeze(0), [0], False).to(x.dtype)
        result = function(x, sorted(a % x.dim() for a in given) or list(range(x.dim())), bool(keepdims))
        return result if result.dtype == x.dtype else result.to(x.dtype)  # torch sums integers up in int64

    return reduce


for _name, _function in _REDUCTIONS.items():
    operator(_name, host=("axes_input",))(_reduction(_function))


def _arg(function: Callable[[Tensor, int, bool], Tensor]) -> Callable[..., Tensor]:
    def reduce(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
        if select_last_index:
            return x.shape[axis] - 1 - function(x.flip(axis), axis, bool(keepdims))
        return function(x, axis, bool(keepdims))

    return reduce


operator("ArgMax")(_arg(torch.argmax))
operator("ArgMin")(_arg(torch.argmin))


@operator("CumSum", host=("axis",))
def cumulative_sum(x: Tensor, axis: Host, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    where = axis.items[0]
    x = x.flip(where) if reverse else x
    result = torch.cumsum(x, where, dtype=x.dtype)
    if exclusive:  # not by subtraction, which rounding and infinities would spoil
        zero = torch.zeros_like(torch.ops.aten.slice.Tensor(x, where, 0, 1))
        result = torch.cat([zero, torch.ops.aten.slice.Tensor(result, where, 0, -1)], where)
    return result.flip(where) if reverse else result


@operator("Softmax")
def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return torch.softmax(x, axis)


@operator("LogSoftmax")
def log_softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return torch.log_softmax(x, axis)
