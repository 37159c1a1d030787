"""What a residual branch is: attention, mlp, conv, mixer or other, and why.

Read off the operators between the stream value and the branch's output, in this order:

- **attention**: an attention operator, or a product of two activations, a softmax on it, and a product of that with an
  activation (an exponential counts as a decomposed softmax). `cross` if its keys come from outside the stream.
- **mixer**: a scan, a loop, a recurrent cell, a convolution over a sequence together with a recurrence (products of
  activations, a cumulative sum, or a loop over positions that tracing has unrolled).
- **mlp**: linear maps and elementwise operators only (1x1 convolutions are linear maps): position-wise; experts chosen
  by top-k routing; depthwise 2-D convolutions between two linear maps, and shifts by one position, are still called so.
- **conv**: convolutions that are none of these.
- **mixer** again: positions mixed by anything else (linear attention, Fourier transform, pooling, a linear map along
  positions).
- **other**: no weight, or operators that say nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import fx

from .flow import Flow, op_name, tensor_of

PRODUCTS = {"matmul": (0, 1), "bmm": (0, 1), "mm": (0, 1), "baddbmm": (1, 2), "addmm": (1, 2), "addbmm": (1, 2)}
_LINEAR = {"linear", "addmm", "mm", "matmul", "bmm", "baddbmm", "einsum", "_grouped_mm", "addbmm"}
_LOOPS = {"scan", "while_loop", "associative_scan", "map", "lstm", "gru", "rnn_tanh", "rnn_relu"}
_ROUTING = {"topk", "one_hot", "histc", "bincount"}
_MANY_STEPS = 4


@dataclass(frozen=True)
class Verdict:
    """What a branch is.

    Attributes:
        kind: attention, mlp, conv, mixer or other.
        why: the operators that decided it.
        cross: whether it is attention whose keys come from another stack.
    """

    kind: str
    why: str
    cross: bool = False


def classify(flow: Flow, start: fx.Node, nodes: Sequence[fx.Node], channel: int = -1) -> Verdict:
    """Say what a branch is.

    Args:
        flow: the graph's data flow.
        start: the stream value that the branch reads.
        nodes: the branch's values in graph order.
        channel: the stream's channel axis if known (-1: the last one).
    """
    names = [op_name(node) for node in nodes]
    attention = _attention(flow, start, nodes)
    if attention is not None:
        return attention
    present = set(names)
    loops = present & _LOOPS
    if loops:
        return Verdict("mixer", ", ".join(sorted(loops)))
    convolutions = [node for node in nodes if op_name(node).startswith("conv")]
    spatial = [node for node in convolutions if not _is_pointwise_kernel(node)]
    unrolled = _unrolled_steps(nodes)
    products = sum(_is_product(flow, node) for node in nodes)
    if unrolled:
        return Verdict("mixer", f"a loop over positions, unrolled {unrolled} times")
    routed = bool(present & _ROUTING) or any("grouped_mm" in n or "moe" in n or "expert" in n for n in present)
    if routed and not spatial:
        return Verdict("mlp", "experts chosen by top-k routing")
    if any(_rank(node) == 1 for node in spatial) and (products or "cumsum" in present):
        return Verdict("mixer", "a convolution over the sequence and a recurrence")
    linear = [n for n in nodes if op_name(n) in _LINEAR] + [n for n in convolutions if _is_pointwise_kernel(n)]
    if spatial:
        if _is_mix_ffn(flow, nodes, spatial):
            return Verdict("mlp", f"{len(linear)} linear maps with a depthwise convolution between")
        return Verdict("conv", f"{len(convolutions)} convolutions")
    mixing = _mixing(flow, nodes, products)
    if mixing:
        return Verdict("mixer", mixing)
    if not linear:
        return Verdict("other", "no linear map, convolution or attention")
    if _along_positions(flow, nodes):
        return Verdict("mixer", "a linear map along positions")
    gated = ", gated" if _is_gated(flow, nodes) else ""
    return Verdict("mlp", f"{len(linear)} linear maps and elementwise operators{gated}")


def _attention(flow: Flow, start: fx.Node, nodes: Sequence[fx.Node]) -> Verdict | None:
    """Follow products of two activations through a softmax into another such product."""
    inside = set(nodes)
    scores: dict[fx.Node, fx.Node] = {}  # value -> the product that its scores come from
    weights: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        name = op_name(node)
        if "attention" in name or "flash_attn" in name:
            tensors = [a for a in node.args if isinstance(a, fx.Node)]
            foreign = len(tensors) > 1 and _is_foreign(flow, start, tensors[1])
            return Verdict("attention", name, foreign)
        operands = [a for a in node.all_input_nodes if a in inside]
        if _is_product(flow, node):
            source = next((weights[a] for a in operands if a in weights), None)
            if source is not None:
                foreign = any(_is_foreign(flow, start, a) for a in _factors(node))
                return Verdict("attention", f"{op_name(source)}, softmax, {name}", foreign)
            scores[node] = node
            continue
        if name in ("linear", "embedding") or name.startswith("conv"):
            continue
        weighted = next((weights[a] for a in operands if a in weights), None)
        if weighted is not None:
            weights[node] = weighted
            continue
        scored = next((scores[a] for a in operands if a in scores), None)
        if scored is not None:
            target = weights if "softmax" in name or name == "exp" else scores
            target[node] = scored
    return None


def _factors(node: fx.Node) -> list[fx.Node]:
    name = op_name(node)
    if name in PRODUCTS:
        return [node.args[i] for i in PRODUCTS[name] if i < len(node.args) and isinstance(node.args[i], fx.Node)]  # type: ignore[misc]
    if name == "einsum":
        return list(node.all_input_nodes)
    return []


def _is_product(flow: Flow, node: fx.Node) -> bool:
    """Whether a node multiplies two activations as matrices (and not an activation by a weight)."""
    factors = _factors(node)
    return len(factors) > 1 and sum(flow.is_float(a) for a in factors) > 1


def _is_foreign(flow: Flow, start: fx.Node, node: fx.Node) -> bool:
    return flow.is_float(node) and not flow.depends(node, start)


def _rank(node: fx.Node) -> int:
    """Number of spatial dimensions of a convolution."""
    value = tensor_of(node)
    name = op_name(node)
    return int(name[-2]) if name[-2:] in ("1d", "2d", "3d") else (value.dim() - 2 if value is not None else 2)


def kernel_shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of a convolution's weight."""
    weight = node.args[1]
    value = tensor_of(weight) if isinstance(weight, fx.Node) else None
    return tuple(int(s) for s in value.shape) if value is not None else ()


def _is_pointwise_kernel(node: fx.Node) -> bool:
    shape = kernel_shape(node)
    return bool(shape) and all(s == 1 for s in shape[2:])


def is_depthwise(node: fx.Node) -> bool:
    """Whether a convolution filters each channel by itself."""
    shape = kernel_shape(node)
    return len(shape) > 2 and shape[1] == 1 and shape[0] > 1


def _is_mix_ffn(flow: Flow, nodes: Sequence[fx.Node], spatial: Collection[fx.Node]) -> bool:
    """Linear maps with 2-D depthwise convolutions strictly between them (SegFormer's feed-forward part)."""

    def linear(node: fx.Node) -> bool:
        return op_name(node) in ("linear", *PRODUCTS) and not _is_product(flow, node)

    order = [node for node in nodes if node in spatial or linear(node)]
    ends_linear = linear(order[0]) and linear(order[-1])
    return ends_linear and all(is_depthwise(node) and _rank(node) == 2 for node in spatial)


def _unrolled_steps(nodes: Sequence[fx.Node]) -> int:
    """How many positions a traced loop went through, when each step reads what the one before computed.

    Steps meet in one stack (or each writes its place in the result). That alone says nothing: windows and heads are
    stacked too. So the last step must depend on something that only steps before it compute.
    """
    inside = set(nodes)
    for node in nodes:
        if op_name(node) in ("stack", "cat"):
            pieces = [a for a in node.all_input_nodes if a in inside]
            if len(pieces) >= _MANY_STEPS and _is_recurrent(pieces, inside):
                return len(pieces)
    writes = [n for n in nodes if op_name(n) in ("select_scatter", "slice_scatter", "index_put", "copy")]
    writes = [n for n in writes if op_name(n) == "select_scatter"] or writes
    pieces = [n.args[1] for n in writes if len(n.args) > 1 and n.args[1] in inside]
    return len(pieces) if len(pieces) >= _MANY_STEPS and _is_recurrent(pieces, inside) else 0


def _is_recurrent(pieces: Sequence[fx.Node], inside: Collection[fx.Node]) -> bool:
    """Whether ever more is needed for later pieces, beyond what they share: the work grows with the step."""
    sizes = [len(_ancestors(piece, inside)) for piece in (pieces[1], pieces[2], pieces[-1])]
    return sizes[0] < sizes[1] < sizes[2]


def _ancestors(node: fx.Node, inside: Collection[fx.Node]) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(a for a in node.all_input_nodes if a in inside)
    return seen


def _mixing(flow: Flow, nodes: Sequence[fx.Node], products: int) -> str:
    for node in nodes:
        name = op_name(node)
        if "fft" in name:
            return "Fourier transform"
        if "pool" in name and "adaptive" not in name:
            return "pooling"
        if name == "cumsum" and flow.is_float(node):
            return "a cumulative sum over positions"
    return f"{products} products of activations without softmax" if products else ""


def _along_positions(flow: Flow, nodes: Sequence[fx.Node]) -> bool:
    """Whether a linear map works on an axis that was swapped into the last place from the positions.

    Only a stream with its channels last can tell: its first norm or linear map then works on the last axis.
    """
    moved: dict[fx.Node, bool] = {}
    for node in nodes:
        name = op_name(node)
        source = next((a for a in node.all_input_nodes if a in moved), None)
        swapped = moved.get(source, False) if source is not None else False
        if name in ("transpose", "permute", "t", "mT", "swapaxes") and _moves_last(node):
            swapped = not swapped
        if name == "linear" and swapped and not _has_conv(nodes):
            return True
        moved[node] = swapped
    return False


def _has_conv(nodes: Sequence[fx.Node]) -> bool:
    return any(op_name(node).startswith(("conv", "batch_norm")) for node in nodes)


def _moves_last(node: fx.Node) -> bool:
    value = tensor_of(node)
    rank = value.dim() if value is not None else 0
    if op_name(node) == "permute":
        order = [int(i) % rank for i in node.args[1]]  # type: ignore[union-attr,arg-type]
        return order[-1] != rank - 1
    if len(node.args) < 3:
        return True
    return rank - 1 in (int(node.args[1]) % rank, int(node.args[2]) % rank)  # type: ignore[call-overload]


def _is_gated(flow: Flow, nodes: Sequence[fx.Node]) -> bool:
    """Whether two linear maps (or two halves of one) meet in a product of full size."""
    inside = set(nodes)
    for node in nodes:
        if op_name(node) != "mul":
            continue
        pair = [a for a in node.all_input_nodes if a in inside and flow.shape(a) == flow.shape(node)]
        if len(pair) != 2:
            continue
        roots = [_nearest_map(a, inside) for a in pair]
        if roots[0] is not None and roots[1] is not None and roots[0] is not roots[1]:
            return True
    return False


def _nearest_map(node: fx.Node, inside: Collection[fx.Node]) -> fx.Node | None:
    """The linear map, or the piece of a split one, that a value comes from through elementwise operators."""
    for _ in range(12):
        name = op_name(node)
        if name in _LINEAR or name in ("getitem", "slice", "narrow"):
            return node
        below = [a for a in node.all_input_nodes if a in inside]
        if not below:
            return None
        node = below[0]
    return None
