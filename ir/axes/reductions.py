"""Reductions, pooling and resizing."""

from __future__ import annotations

from itertools import pairwise

from torch import fx

from .relate import Relate, rule
from .space import tensor_shape

_COUNTED = {
    "mean": "takes the mean over it", "var": "takes the variance over it", "std": "takes the deviation over it",
    "var_mean": "takes the variance over it", "amax": "takes the largest, and a zero may be it",
    "amin": "takes the smallest, and a zero may be it", "max": "takes the largest, and a zero may be it",
    "min": "takes the smallest, and a zero may be it", "prod": "multiplies along it, and a zero counts",
    "logsumexp": "adds exponentials along it, and a zero counts", "all": "asks whether all are true",
}  # fmt: skip
_PICKS = {"argmax", "argmin"}


@rule("sum", "any", "linalg_vector_norm", "norm", *_COUNTED, *_PICKS)
def _reduce(r: Relate) -> None:
    x: fx.Node = r.args["self"]
    if len(r.tensors()) > 1:
        return  # the elementwise maximum of two tensors
    given = r.args.get("dim")
    if given is None or (isinstance(given, (list, tuple)) and not given):
        given = list(range(r.rank(x)))
    over = {r.dim(x, d) for d in (given if isinstance(given, (list, tuple)) else [given])}
    keep = bool(r.args.get("keepdim"))
    order = r.args.get("ord", r.args.get("p", 2))
    for d in range(r.rank(x)):
        if d in over:
            if r.name in _PICKS or (r.name in ("max", "min") and 1 in r.results):
                r.pin((x, d), f"{r.name} says where along it")
            elif r.name in _COUNTED:
                r.count((x, d), f"{r.name} {_COUNTED[r.name]}")
            elif r.name in ("norm", "linalg_vector_norm") and not (isinstance(order, (int, float)) and order > 0):
                r.count((x, d), f"{r.name} counts zeros")
            else:
                r.sum((x, d), x)
        else:
            place = d if keep else d - sum(o < d for o in over)
            for y in r.results.values():
                r.tie((x, d), (y, place))


def _spatial(name: str) -> int:
    return next((int(c) for c, d in pairwise(name) if c.isdigit() and d == "d"), 0)


@rule(
    *(
        f"{name}{n}d"
        for name in ("avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool", "_adaptive_avg_pool",
                     "upsample_nearest", "upsample_nearest_exact", "_upsample_nearest_exact")
        for n in (1, 2, 3)
    ),
    "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d", "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa", "max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices",
)  # fmt: skip
def _pool(r: Relate) -> None:
    x = r.tensors()[0]
    slid = _spatial(r.name)
    for y in r.results.values():
        if len(tensor_shape(y) or ()) != r.rank(x) or r.rank(x) < slid:
            return
        for d in range(r.rank(x)):
            if d < r.rank(x) - slid:
                r.tie((x, d), (y, d))
            else:
                r.pin((x, d), f"{r.name} slides over it")
                r.pin((y, d), f"{r.name} slides over it")
