"""Multiply-accumulates of each operator, from shapes alone.

A rule gets the node and returns its MACs as an expression over symbolic sizes; `macs_of` finds it by the operator's
name. Conventions: a product of matrices counts one MAC for each multiplication; biases, elementwise operators,
reductions, norms, softmax, pooling, Fourier transforms and lookups count nothing; attention counts its two products in
full, whatever the mask leaves out; a convolution counts the taps that fall on padding.

An operator that has no rule and is not known to be free is *unknown*: it is counted and named, never taken as zero
in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from ..kernels import OPERATORS
from .dims import size_expr
from .flow import is_pointwise, is_view, op_name

Rule = Callable[[fx.Node], Any]

RULES: dict[str, Rule] = {}

FREE = {
    # picking, joining, filling
    "cat", "concat", "concatenate", "stack", "hstack", "vstack", "index", "index_select", "index_put", "index_add",
    "index_copy", "index_fill", "_unsafe_index", "_unsafe_index_put", "_unsafe_masked_index",
    "_unsafe_masked_index_put_accumulate", "gather", "scatter", "scatter_add", "scatter_reduce", "select_scatter",
    "slice_scatter", "diagonal_scatter", "as_strided_scatter", "masked_scatter", "masked_select", "embedding",
    "embedding_bag", "_embedding_bag", "copy", "copy_", "fill", "repeat", "repeat_interleave", "tile", "pad",
    "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
    "replication_pad2d", "replication_pad3d", "roll", "flip", "fliplr", "flipud", "rot90", "im2col", "col2im", "unfold",
    "tril", "triu", "diag", "diag_embed", "meshgrid", "cartesian_prod", "take", "take_along_dim", "resize", "one_hot",
    "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "searchsorted", "bucketize",
    "block_diag", "broadcast_tensors", "atleast_1d", "atleast_2d", "where", "masked_fill", "__and__", "__or__",
    "__xor__", "__lshift__", "__rshift__", "nonzero", "argwhere", "item", "_local_scalar_dense", "is_nonzero",
    # making
    "arange", "linspace", "logspace", "eye", "full", "ones", "zeros", "empty", "empty_strided", "empty_permuted",
    "scalar_tensor", "new_empty", "new_full", "new_ones", "new_zeros", "new_empty_strided", "tril_indices",
    "triu_indices", "rand", "randn", "randint", "randperm", "bernoulli", "multinomial", "hann_window", "hamming_window",
    # reducing, ordering, normalizing
    "sum", "mean", "amax", "amin", "max", "min", "aminmax", "prod", "any", "all", "argmax", "argmin", "var", "std",
    "var_mean", "std_mean", "norm", "linalg_vector_norm", "logsumexp", "cumsum", "cumprod", "cummax", "cummin",
    "logcumsumexp", "diff", "sort", "argsort", "topk", "kthvalue", "median", "mode", "unique", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "histc", "count_nonzero", "softmax", "_softmax", "_safe_softmax", "log_softmax",
    "_log_softmax", "layer_norm", "native_layer_norm", "batch_norm", "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training", "native_batch_norm", "group_norm", "native_group_norm", "instance_norm",
    "rms_norm", "_fused_rms_norm", "local_response_norm", "_weight_norm", "_weight_norm_interface", "normalize",
    "cosine_similarity", "pairwise_distance", "trace", "floor_divide",
    # pooling, resampling
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices",
    "max_pool3d_with_indices", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "lp_pool2d",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d",
    "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
    "grid_sampler", "grid_sampler_2d", "grid_sampler_3d", "affine_grid_generator",
    # elementwise in several outputs or by composition
    "glu", "outer", "ger", "frexp", "native_dropout", "rrelu", "cross", "kron", "multiply", "divide", "subtract",
    "type_as", "clip", "clamp", "relu6", "selu", "celu", "hardswish", "prelu", "polar", "complex",
    # assertions and sizes
    "_assert_async", "_assert_scalar", "_assert_tensor_metadata", "sym_size", "sym_numel", "sym_stride",
    "_is_all_true", "_is_any_true", "isin", "equal",
    "sym_storage_offset", "sym_constrain_range", "sym_constrain_range_for_size", "is_same_size", "numel",
}  # fmt: skip
"""Operators that multiply no matrices (elementwise ones and views are known by other means)."""

_FREE_PREFIXES = ("fft_", "_fft", "sym_", "py.")
_FREE_SUFFIXES = ("_like",)


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators of these names."""

    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return add


def macs_of(node: fx.Node) -> Any | None:
    """The MACs of an operator, as a number or expression in the graph's own symbols; None if they are unknown."""
    own = OPERATORS.get(node.target)
    if own is not None:
        return own.macs(node)
    name = op_name(node)
    found = RULES.get(name)
    if found is not None:
        return found(node)
    if "scaled_dot_product" in name and "attention" in name:
        return attention_macs(node)
    free = name in FREE or name.startswith(_FREE_PREFIXES) or name.endswith(_FREE_SUFFIXES)
    return 0 if free or is_view(node) or is_pointwise(node) or name.partition(".")[0] == "prims" else None


def sizes(argument: Any) -> tuple[Any, ...]:
    """The shape of a tensor argument as expressions."""
    value = argument.meta["val"] if isinstance(argument, fx.Node) else argument
    if isinstance(value, (tuple, list)):
        value = value[0]
    return tuple(size_expr(s) for s in value.shape)


def product(values: Sequence[Any]) -> Any:
    """The product of sizes."""
    result: Any = sympy.Integer(1)
    for value in values:
        result = result * value
    return result


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument by position or name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


@rule("linear")
def _linear(node: fx.Node) -> Any:
    return product(sizes(node)) * sizes(node.args[1])[-1]


@rule("mm", "bmm", "matmul", "dot", "vdot", "mv", "_int_mm", "_scaled_mm", "inner", "chain_matmul", "linalg_matmul")
def _matmul(node: fx.Node) -> Any:
    return product(sizes(node)) * sizes(node.args[0])[-1]


@rule("addmm", "baddbmm", "addmv", "_addmm_activation")
def _added_matmul(node: fx.Node) -> Any:
    return product(sizes(node)) * sizes(node.args[1])[-1]


@rule("addbmm")
def _summed_matmul(node: fx.Node) -> Any:
    return product(sizes(node.args[1])) * sizes(node.args[2])[-1]


@rule("bilinear")
def _bilinear(node: fx.Node) -> Any:
    outputs, left, right = sizes(node.args[2])
    return product(sizes(node.args[0])[:-1]) * outputs * left * right


@rule("cdist", "_cdist_forward")
def _distances(node: fx.Node) -> Any:
    return product(sizes(node)) * sizes(node.args[0])[-1]


@rule("tensordot")
def _tensordot(node: fx.Node) -> Any:
    left = sizes(node.args[0])
    return product(sizes(node)) * product([left[int(i)] for i in node.args[2]])  # type: ignore[union-attr,arg-type]


@rule("einsum")
def _einsum(node: fx.Node) -> Any:
    """Contract from left to right, as PyTorch does without a path; each step costs the product of all its letters."""
    terms, result = _letters(str(node.args[0]), [sizes(a) for a in node.args[1]])  # type: ignore[union-attr]
    total: Any = 0
    current = terms[0]
    for at, term in enumerate(terms[1:], 1):
        later = {letter for other in terms[at + 1 :] for letter in other} | set(result)
        total += product(list({**current, **term}.values()))
        current = {letter: size for letter, size in {**current, **term}.items() if letter in later}
    return total


def _letters(equation: str, shapes: Sequence[Sequence[Any]]) -> tuple[list[dict[str, Any]], str]:
    """The size of each letter for each operand; an ellipsis becomes numbered axes, counted from the last."""
    left, _, right = equation.replace(" ", "").partition("->")
    terms: list[dict[str, Any]] = []
    for text, shape in zip(left.split(","), shapes, strict=True):
        before, dots, after = text.partition("...")
        hidden = len(shape) - len(before) - len(after) if dots else 0
        names = [*before, *(f"axis -{hidden - i}" for i in range(hidden)), *after]
        # A broadcast axis of size one does not hide the other operand's size.
        terms.append({name: size for name, size in zip(names, shape, strict=True) if size != 1})
    if "->" not in equation:
        counts = {c: left.count(c) for c in left if c.isalpha()}
        right = "".join(c for c, times in counts.items() if times == 1) + "..."
    return terms, right


@rule("conv1d", "conv2d", "conv3d")
def _convolution(node: fx.Node) -> Any:
    return product(sizes(node)) * product(sizes(node.args[1])[1:])


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _transposed(node: fx.Node) -> Any:
    return product(sizes(node.args[0])) * product(sizes(node.args[1])[1:])


@rule("convolution", "_convolution")
def _any_convolution(node: fx.Node) -> Any:
    return _transposed(node) if argument(node, 6, "transposed", False) else _convolution(node)


def attention_macs(node: fx.Node) -> Any:
    """Both products of an attention whose first three operands are [..., length, width]."""
    query, key, value = (sizes(a) for a in node.args[:3])
    return product(query[:-1]) * key[-2] * (query[-1] + value[-1])


@rule("flex_attention")
def _flexible_attention(node: fx.Node) -> Any:
    return attention_macs(node)


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def _recurrent(node: fx.Node) -> Any:
    """Every step multiplies by every matrix once."""
    steps = sizes(node.args[0])
    lists = [a for a in node.args if isinstance(a, (list, tuple)) and a and isinstance(a[0], fx.Node)]
    matrices = [shape for w in lists[-1] if len(shape := sizes(w)) == 2]
    return product(steps[:-1]) * sum(product(shape) for shape in matrices)


@rule("_grouped_mm", "transformers.grouped_mm_fallback", "transformers.grouped_mm", "_scaled_grouped_mm")
def _grouped(node: fx.Node) -> Any:
    """Each row is multiplied by the one matrix of its group."""
    left, right = sizes(node.args[0]), sizes(node.args[1])
    if len(left) == 2 and len(right) == 2:  # both are split along the contracted axis
        return left[0] * left[1] * right[1]
    return product(left) * right[-1]


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in a node's value."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
