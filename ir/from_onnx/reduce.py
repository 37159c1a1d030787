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


def _extreme(function: Reduction, x: Tensor, axes: list[int], keep: bool, *, largest: bool) -> Tensor:
    """The largest or smallest element; of none, what every other is above or below."""
    if not any(isinstance(x.shape[a], int) and x.shape[a] == 0 for a in axes):
        return function(x, axes, keep)
    if x.dtype == torch.bool:
        bound: float | int | bool = not largest
    elif x.is_floating_point():
        bound = float("-inf") if largest else float("inf")
    else:
        bound = torch.iinfo(x.dtype).min if largest else torch.iinfo(x.dtype).max
    one = [1 if i in axes else n for i, n in enumerate(x.shape)]
    result = torch.full(one, bound, dtype=x.dtype)
    return result if keep else result.squeeze(tuple(axes))


_REDUCTIONS: dict[str, Reduction] = {
    "ReduceMean": torch.mean,
    "ReduceSum": lambda x, axes, keep: torch.sum(x, axes, keep, dtype=x.dtype),
    "ReduceMax": lambda x, axes, keep: _extreme(torch.amax, x, axes, keep, largest=True),
    "ReduceMin": lambda x, axes, keep: _extreme(torch.amin, x, axes, keep, largest=False),
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


def _running(function: Callable[[Tensor, int], Tensor], neutral: int) -> Callable[..., Tensor]:
    def call(x: Tensor, axis: Host, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
        where = axis.items[0]
        x = x.flip(where) if reverse else x
        result = function(x, where)
        if exclusive:  # not by subtraction or division, which rounding and infinities would spoil
            first = torch.full_like(torch.ops.aten.slice.Tensor(x, where, 0, 1), neutral)
            result = torch.cat([first, torch.ops.aten.slice.Tensor(result, where, 0, -1)], where)
        return result.flip(where) if reverse else result

    return call


def _running_sum(x: Tensor, axis: int) -> Tensor:
    return torch.cumsum(x, axis, dtype=x.dtype)


operator("CumSum", host=("axis",))(_running(_running_sum, 0))


def _hardmax(x: Tensor, axis: int) -> Tensor:
    """One at the first of the largest elements."""
    classes = torch.arange(x.shape[axis]).reshape([-1 if i == axis % x.dim() else 1 for i in range(x.dim())])
    return (torch.argmax(x, axis, keepdim=True) == classes).to(x.dtype)


def _over_axis(function: Callable[[Tensor, int], Tensor]) -> Callable[..., Tensor]:
    def call(x: Tensor, *, axis: int = -1) -> Tensor:
        return function(x, axis)

    return call


def _over_rest(function: Callable[[Tensor, int], Tensor]) -> Callable[..., Tensor]:
    """Before opset 13: over all dimensions from the axis on, taken as one."""

    def call(x: Tensor, *, axis: int = 1) -> Tensor:
        if axis % x.dim() == x.dim() - 1:
            return function(x, -1)
        return function(x.flatten(axis), -1).reshape(x.shape)

    return call


for _name, _function_2 in {"Softmax": torch.softmax, "LogSoftmax": torch.log_softmax, "Hardmax": _hardmax}.items():
    operator(_name, since=13)(_over_axis(_function_2))
    operator(_name)(_over_rest(_function_2))


def _running_product(x: Tensor, axis: int) -> Tensor:
    return torch.cumprod(x, axis, dtype=x.dtype)


operator("CumProd", host=("axis",))(_running(_running_product, 1))
