"""Norms: whose statistics depend on how many channels there are, and whose do not."""

from __future__ import annotations

from torch import fx

from .relate import Relate, rule


def _same(r: Relate, x: fx.Node, y: fx.Node) -> None:
    r.ties(x, y, ((d, d) for d in range(r.rank(x))))


@rule("batch_norm", "_native_batch_norm_legit_no_training", "instance_norm")
def _batch_norm(r: Relate) -> None:
    x, y = r.args["input"], r.results.get(0)
    if y is None:
        return
    _same(r, x, y)
    for name in ("weight", "bias", "running_mean", "running_var"):
        vector = r.args.get(name)
        if vector is not None:
            r.tie((vector, 0), (x, 1))
    computed = bool(r.args.get("training")) or r.name == "instance_norm"
    for dim in range(r.rank(x)):
        if dim != 1 and computed:
            r.count((x, dim), f"{r.name} takes the mean over it")


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def _layer_norm(r: Relate) -> None:
    x, y = r.args["input"], r.results.get(0)
    if y is None:
        return
    _same(r, x, y)
    normalized = len(r.args["normalized_shape"])
    first = r.rank(x) - normalized
    for dim in range(first, r.rank(x)):
        r.count((x, dim), f"{r.name} takes the mean over it")
        for name in ("weight", "bias"):
            vector = r.args.get(name)
            if vector is not None:
                r.tie((vector, dim - first), (x, dim))
    for place, statistic in r.results.items():
        if place:
            r.ties(x, statistic, ((d, d) for d in range(first)))


@rule("group_norm", "native_group_norm")
def _group_norm(r: Relate) -> None:
    x, y = r.args["input"], r.results.get(0)
    if y is None:
        return
    _same(r, x, y)
    groups = int(r.args["num_groups"] if r.name == "group_norm" else r.args["group"])
    channels = int(r.shape(x)[1])
    for name in ("weight", "bias"):
        vector = r.args.get(name)
        if vector is not None:
            r.tie((vector, 0), (x, 1))
    for dim in range(2, r.rank(x)):
        r.count((x, dim), f"{r.name} takes the mean over it")
    within = r.space.inner(channels // groups) if channels > groups else None
    group = r.space.inner(groups) if groups > 1 else None
    if within is not None:
        r.count_of(within, f"{r.name} takes the mean over the channels of a group")
    if group is not None:
        r.role_of(group, "normalization group")
    r.junction((x, 1), [a for a in (group, within) if a is not None])
    for place, statistic in r.results.items():
        if place:
            r.tie((statistic, 0), (x, 0))


@rule("_weight_norm")
def _weight_norm(r: Relate) -> None:
    v, g, y, dim = r.args["v"], r.args["g"], r.results[0], r.dim(r.args["v"], r.args["dim"])
    _same(r, v, y)
    r.tie((g, dim), (v, dim))
    for other in range(r.rank(v)):
        if other != dim:
            r.sum((v, other), v)
