"""What each operator that multiplies and adds up sums over: of which operand, along which dimension, times what."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx

EXPERTS = "graphlathe.expert_linear"
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution")


@dataclass(frozen=True, eq=False)
class Sum:
    """One operand of a product, and what it is multiplied with; dimensions may be negative.

    ``odd`` says why the product is read in no known form; then the rest is not used.
    """

    operand: Any
    dim: int
    other: Any = None
    other_dim: int = 0
    bias: Any = None
    odd: str = ""


def _linear(args: dict[str, Any]) -> Iterable[Sum]:
    yield Sum(args["input"], -1, args["weight"], -1, args["bias"])


def _product(args: dict[str, Any]) -> Iterable[Sum]:
    a, b = args["self"], args.get("mat2") or args["other"]
    flat = len(b.meta["val"].shape) == 1
    yield Sum(a, -1, b, -1 if flat else -2)
    yield Sum(b, -1 if flat else -2, a, -1)


def _added_product(args: dict[str, Any]) -> Iterable[Sum]:
    a, b = (args[k] for k in (("mat1", "mat2") if "mat1" in args else ("batch1", "batch2")))
    odd = "" if args["alpha"] == 1 and args["beta"] == 1 else "it scales its product or what it adds"
    yield Sum(a, -1, b, -2, args["self"], odd)
    # What is added has the output channels in its last dimension: it is no bias of a weight on the left.
    yield Sum(b, -2, a, -1, None, odd)


def _convolution(args: dict[str, Any]) -> Iterable[Sum]:
    if args.get("transposed"):
        yield from _transposed_convolution(args)
        return
    groups = int(args["groups"])
    odd = "" if groups == 1 else f"it convolves {groups} groups of channels, each with its own kernels"
    yield Sum(args["input"], 1, args["weight"], 1, args["bias"], odd)


def _transposed_convolution(args: dict[str, Any]) -> Iterable[Sum]:
    yield Sum(args["input"], 1, args["weight"], 0, None, "it is a transposed convolution")


def _experts(args: dict[str, Any]) -> Iterable[Sum]:
    yield Sum(args["x"], -1, args["weight"], 1)


def _grouped_product(args: dict[str, Any]) -> Iterable[Sum]:
    x, weight = [a for a in args.values() if isinstance(a, fx.Node)][:2]
    rank = len(weight.meta["val"].shape)
    yield Sum(x, -1, weight, rank - 2, odd="it multiplies runs of rows; `raise-experts` makes experts of it")


def _attention(args: dict[str, Any]) -> Iterable[Sum]:
    yield Sum(args["query"], -1, args["key"], -1)


def _einsum(args: dict[str, Any]) -> Iterable[Sum]:
    terms, arrow, result = str(args["equation"]).replace(" ", "").partition("->")
    if not arrow or "." in terms:
        return
    for operand, term in zip(args["tensors"], terms.split(","), strict=True):
        for dim, letter in enumerate(term):
            if letter not in result:
                yield Sum(operand, dim, odd="it is an einsum; `canonicalize` writes those of one weight as products")


SUMS: dict[str, Callable[[dict[str, Any]], Iterable[Sum]]] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm"), _product),
    **dict.fromkeys(("addmm", "baddbmm"), _added_product),
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed_convolution),
    EXPERTS: _experts,
    **dict.fromkeys(("scaled_dot_product_attention", "graphlathe.attention"), _attention),
    **dict.fromkeys(("_grouped_mm", "transformers.grouped_mm_fallback", "transformers.grouped_mm"), _grouped_product),
    "einsum": _einsum,
}
"""By the operator's name: its sums, given its arguments by name."""
