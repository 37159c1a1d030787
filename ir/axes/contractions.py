"""Products: linear layers, matrix products, einsum, convolutions and mixtures of linear layers."""

from __future__ import annotations

from torch import fx

from .pointwise import broadcast
from .relate import Relate, rule, same_size

KERNEL = "it is a dimension of a convolution's kernel"
"""Why the window of a convolution is not cut: it is no channel, so nobody expects that."""


@rule("linear")
def _linear(r: Relate) -> None:
    x, weight, bias, y = r.args["input"], r.args["weight"], r.args["bias"], r.results[0]
    if r.rank(weight) != 2:
        return
    r.ties(x, y, ((d, d) for d in range(r.rank(x) - 1)))
    r.tie((x, -1), (weight, 1))
    r.sum((weight, 1), x, weight)
    r.tie((y, -1), (weight, 0))
    if bias is not None:
        r.tie((bias, 0), (weight, 0))


@rule("matmul", "mm", "bmm")
def _matmul(r: Relate) -> None:
    a, b = r.args["self"], r.args.get("mat2") or r.args["other"]
    product(r, a, b)


@rule("addmm", "baddbmm")
def _add_product(r: Relate) -> None:
    added, a, b = (
        r.args["self"],
        *(r.args[k] for k in (("mat1", "mat2") if r.name == "addmm" else ("batch1", "batch2"))),
    )
    product(r, a, b)
    broadcast(r, (added,), r.results[0])


def product(r: Relate, a: fx.Node, b: fx.Node) -> None:
    """``a @ b`` by the rules of `torch.matmul`."""
    y = r.results[0]
    rows, columns = r.rank(a) > 1, r.rank(b) > 1
    r.tie((a, -1), (b, -2 if columns else 0))
    r.sum((a, -1), a, b)
    if rows:
        r.tie((a, -2), (y, -2 if columns else -1))
    if columns:
        r.tie((b, -1), (y, -1))
    inner = int(rows) + int(columns)
    for operand in (a, b):
        for dim in range(r.rank(operand) - 2):
            place = dim - (r.rank(operand) - 2) + (r.rank(y) - inner)
            if same_size(r.shape(operand)[dim], r.shape(y)[place]):
                r.tie((operand, dim), (y, place))


@rule("einsum")
def _einsum(r: Relate) -> None:
    equation, operands = str(r.args["equation"]).replace(" ", ""), r.args["tensors"]
    if "." in equation or "->" not in equation:
        return
    terms, _, result = equation.partition("->")
    places = [(node, term) for node, term in zip(operands, terms.split(","), strict=True)]
    if any(len(set(term)) < len(term) for _, term in places):
        return
    for letter in sorted(set(terms) - {","}):
        uses = [(node, term.index(letter)) for node, term in places if letter in term]
        if letter in result:
            uses.append((r.results[0], result.index(letter)))
        else:
            r.sum(uses[0], *(node for node, _ in uses))
        large = [use for use in uses if r.space.axis(*use) is not None]
        for use in large[1:]:
            r.tie(large[0], use)


@rule(
    "conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
)  # fmt: skip
def _convolution(r: Relate) -> None:
    x, weight, bias, y = r.args["input"], r.args["weight"], r.args["bias"], r.results[0]
    if r.rank(x) != r.rank(weight):
        return
    transposed = "transpose" in r.name or bool(r.args.get("transposed"))
    groups = int(r.args["groups"])
    for dim in range(2, r.rank(x)):
        r.pin((x, dim), f"{r.name} slides over it")
        r.pin((y, dim), f"{r.name} slides over it")
        r.pin((weight, dim), KERNEL)
    r.tie((x, 0), (y, 0))
    if bias is not None:
        r.tie((bias, 0), (y, 1))
    inputs, outputs = (0, 1) if transposed else (1, 0)
    if groups == 1:
        r.tie((x, 1), (weight, inputs))
        r.sum((weight, inputs), x, weight)
        r.tie((y, 1), (weight, outputs))
        return
    group = r.space.inner(groups)
    if x.meta["val"].shape[1] != groups or weight.meta["val"].shape[0] != groups:  # else each group is a channel
        r.role_of(group, "convolution group")
    # The kernel's first dimension holds the groups, its second is inside one.
    first, second = ((x, 1), (y, 1)) if transposed else ((y, 1), (x, 1))
    r.tie((weight, 0), first)
    inside = r.axis((weight, 1))
    r.junction(second, [group] if inside is None else [group, inside])
    per_group = int(weight.meta["val"].shape[0]) // groups
    within = [] if per_group == 1 else [r.space.inner(per_group)]
    for axis in within:
        r.role_of(axis, "channel of every convolution group")
    if inside is not None:
        r.role_of(inside, "channel of every convolution group")
    r.junction((weight, 0), [group, *within])
    if transposed:
        for axis in within:
            r.sum_of(axis, x, weight)
    elif inside is not None:
        r.sum_of(inside, x, weight)


@rule("graphlathe.expert_linear")
def _expert_linear(r: Relate) -> None:
    x, weight, indices, bias, y = r.args["x"], r.args["weight"], r.args["indices"], r.args["bias"], r.results[0]
    broadcast(r, (indices,), indices)
    for dim in (0, 1):
        r.tie((indices, dim), (y, dim))
        if same_size(r.shape(x)[dim], r.shape(y)[dim]):
            r.tie((x, dim), (y, dim))
    r.tie((x, -1), (weight, 1))
    r.sum((weight, 1), x, weight)
    r.tie((y, -1), (weight, 2))
    r.pin((weight, 0), "experts are chosen by number")
    if bias is not None:
        r.tie((bias, 1), (weight, 2))
        r.tie((bias, 0), (weight, 0))


@rule("_grouped_mm", "transformers.grouped_mm_fallback", "transformers.grouped_mm")
def _grouped_product(r: Relate) -> None:
    """Rows in runs, each run times the matrix of its group."""
    x, weight, y = r.tensors()[0], r.tensors()[1], r.results[0]
    if r.rank(x) != 2 or r.rank(weight) != 3:
        return
    r.tie((x, 0), (y, 0))
    r.tie((x, 1), (weight, 1))
    r.sum((weight, 1), x, weight)
    r.tie((y, 1), (weight, 2))
    r.pin((weight, 0), "groups are chosen by number")
