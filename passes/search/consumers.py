"""Consumers: the linear maps and convolutions that sum over a group's channels.

Statistics are taken where channels are summed over, and what a cut removes can be made up for there. A consumer is
read as one matrix product: ``rows @ matrix.T``, with a row for each place at which the operator is applied and a column
for each channel (for each channel and position of the kernel, in a convolution):

    linear, mm, addmm, matmul    operand [..., c, ...]    rows [places, c]         matrix [o, c]
    convolution (one group)      operand [b, c, ...]      rows [b * places, c*k]   matrix [o, c*k]
    graphlathe.expert_linear     operand [t, j, c]        rows [t * j, c]          matrix [experts * o, c]

The experts' rows are pooled: each expert multiplies only the rows of the tokens that chose it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from ...ir.axes import ChannelGroup
from ...ir.axes.relate import bind
from ...ir.axes.space import Index
from ...ir.errors import InputError, PreconditionError
from ...ir.flow import op_name, tensor_of
from ...ir.program import ORIGIN, Program
from ...ir.weights import Weight
from .sums import CONVOLUTIONS, EXPERTS, SUMS, Sum

_SAME_NUMBERS = {"_to_copy", "to", "clone", "contiguous", "alias", "detach"}


@dataclass(frozen=True, eq=False)
class Consumer:
    """A linear map or convolution that sums over a group's channels.

    Attributes:
        node: the operator.
        operand: the activation that it reads.
        channel_dim: the dimension of the operand with the channels.
        weight: its weight's name.
        weight_dim: the dimension of the weight that is summed over.
        labels: int64 [channels]: the atom of each input channel, -1 where it stays.
        bias: the name of its bias weight, None where it has none.
    """

    node: fx.Node
    operand: fx.Node
    channel_dim: int
    weight: str
    weight_dim: int
    labels: Index
    bias: str | None = None

    @property
    def origin(self) -> str | None:
        """Where the operator came from."""
        return self.node.meta.get(ORIGIN)


def consumers_of(program: Program, group: ChannelGroup) -> tuple[Consumer, ...]:
    """The consumers of a group that can be read, in execution order; see `read_consumers`."""
    return read_consumers(program, group)[0]


def read_consumers(program: Program, group: ChannelGroup) -> tuple[tuple[Consumer, ...], tuple[str, ...]]:
    """The consumers of a group, and why other operators that sum over its channels are none.

    A weight that several operators read has a consumer for each of them, see `other_readers`.

    Args:
        program: the program in which the group was found, or a clone of it.
        group: one of its groups.

    Returns:
        The consumers in execution order, and a reason for each operator (or weight) that is not read.

    Raises:
        PreconditionError: the group was found in another program.
    """
    graph = _graph(program, group)
    found: list[Consumer] = []
    reasons: dict[str, str] = {}
    explained: set[str] = set()
    placed = {name for name, _ in group.places}
    for node in graph.nodes:
        sums = SUMS.get(op_name(node))
        if sums is None or not any(operand.name in placed for operand in node.all_input_nodes):
            continue
        for entry in sums(bind(node)):
            operand = tensor_of(entry.operand) if isinstance(entry.operand, fx.Node) else None
            if operand is None or _source(entry.operand) is not None:
                continue
            channel_dim = entry.dim % operand.dim()
            labels = group.places.get((entry.operand.name, channel_dim))
            if labels is None or not _shrinks(group, entry):
                continue
            explained |= _weights_of(node)
            read = _consumer(program, node, entry, channel_dim, labels)
            if isinstance(read, Consumer):
                found.append(read)
            else:
                reasons.setdefault(node.name, f"%{node.name} ({op_name(node)}) is not read: {read}")
    for member in group.consumers:
        if member.weight not in explained:
            readers = [u for n in graph.find_nodes(op="get_attr") if n.target == member.weight for u in _users(n)]
            names = ", ".join(f"%{u.name} ({op_name(u)})" for u in readers)
            reasons[member.weight] = f"weight '{member.weight}' is not read: {names} sums over it in a form of its own"
    return tuple(found), tuple(reasons.values())


def columns_labels(consumer: Consumer) -> Index:
    """int64 [in * kernel]: the atom of each column of the consumer's matrix, -1 where it stays."""
    return np.repeat(consumer.labels, _kernel_size(consumer))


def input_columns(consumer: Consumer) -> int:
    """How many columns its matrix has."""
    return len(consumer.labels) * _kernel_size(consumer)


def rows_key(consumer: Consumer) -> str:
    """What its rows are made of: consumers with equal keys have equal rows."""
    key = f"{consumer.operand.name}:{consumer.channel_dim}"
    return key if op_name(consumer.node) not in CONVOLUTIONS else f"{key}:{_geometry(consumer.node)}"


def other_readers(program: Program, consumer: Consumer) -> tuple[fx.Node, ...]:
    """What else reads the consumer's weight, in all graphs: it changes with the weight."""
    nodes = [n for g in program.graphs.values() for n in g.find_nodes(op="get_attr") if n.target == consumer.weight]
    return tuple(user for node in nodes for user in _users(node) if user is not consumer.node)


def weight_matrix(program: Program, consumer: Consumer) -> torch.Tensor:
    """The consumer's weight as one matrix.

    Returns:
        [out, in * kernel] in float64 where the weight is, else float32; columns in the order of `columns_labels`.
    """
    return _matrix(program, consumer, program.weights[consumer.weight].tensor()).contiguous()


def _matrix(program: Program, consumer: Consumer, value: torch.Tensor) -> torch.Tensor:
    value = value if value.dtype == torch.float64 else value.float()
    name = op_name(consumer.node)
    if name in CONVOLUTIONS:
        return value.reshape(value.shape[0], -1)
    if name == EXPERTS:
        return value.transpose(1, 2).reshape(-1, value.shape[1])
    return value if consumer.weight_dim == 1 else value.T


def with_weight_matrix(program: Program, consumer: Consumer, matrix: torch.Tensor) -> Weight:
    """The inverse of `weight_matrix`: a weight of the original's dtype, shape and layout.

    Args:
        program: the consumer's program.
        consumer: the consumer.
        matrix: [out, in * kernel].

    Raises:
        InputError: the matrix has another shape than the weight's own.
    """
    weight = program.weights[consumer.weight]
    shape = weight.shape
    own = _matrix(program, consumer, torch.empty(shape, device="meta")).shape
    if matrix.shape != own:
        raise InputError(
            f"the matrix for weight '{consumer.weight}' has shape {list(matrix.shape)}", expected=str(list(own))
        )
    name = op_name(consumer.node)
    if name in CONVOLUTIONS:
        value = matrix.reshape(shape)
    elif name == EXPERTS:
        value = matrix.reshape(shape[0], shape[2], shape[1]).transpose(1, 2)
    else:
        value = matrix if consumer.weight_dim == 1 else matrix.T
    # A copy: a weight must not change with the caller's matrix.
    return Weight.from_tensor(value.detach().to(weight.dtype).clone(memory_format=torch.contiguous_format))


def input_rows(consumer: Consumer, operand_value: torch.Tensor) -> torch.Tensor:
    """The operand as the product sees it: one row for each place, in the order of the output's places.

    Args:
        consumer: the consumer.
        operand_value: the value of `Consumer.operand`.

    Returns:
        [rows, in * kernel], in the value's dtype.
    """
    if op_name(consumer.node) in CONVOLUTIONS:
        return _patches(consumer.node, operand_value)
    return operand_value.movedim(consumer.channel_dim, -1).reshape(-1, operand_value.shape[consumer.channel_dim])


def output_rows(consumer: Consumer, node_value: torch.Tensor) -> torch.Tensor:
    """The consumer's own value as [rows, out], the rows in the order of `input_rows`; not for experts.

    Raises:
        PreconditionError: the consumer is a mixture of experts, whose output has one expert's channels.
    """
    name = op_name(consumer.node)
    if name == EXPERTS:
        raise PreconditionError(
            "each row of a mixture of experts goes through one expert's matrix",
            node=consumer.node.name,
            origin=consumer.origin,
            expected="a consumer with one matrix",
        )
    # A weight on the left leaves its output channels where the operand had its own.
    dim = 1 if name in CONVOLUTIONS else consumer.channel_dim
    return node_value.movedim(dim, -1).reshape(-1, node_value.shape[dim])


def _patches(node: fx.Node, value: torch.Tensor) -> torch.Tensor:
    """The window of every place: [b * places, channels * kernel]."""
    kernel, stride, padding, dilation = _geometry(node)
    # `pad` wants the last dimension first.
    value = torch.nn.functional.pad(value, [p for pair in reversed(padding) for p in pair])
    count = len(kernel)
    for dim in range(count):
        span = (kernel[dim] - 1) * dilation[dim] + 1
        value = value.unfold(2 + dim, span, stride[dim])[..., :: dilation[dim]]
    # [b, c, places..., kernel...] -> [b, places..., c, kernel...]
    order = [0, *range(2, 2 + count), 1, *range(2 + count, 2 + 2 * count)]
    channels = value.shape[1]
    return value.permute(order).reshape(-1, channels * int(np.prod(kernel)))


def _geometry(node: fx.Node) -> tuple[list[int], list[int], list[tuple[int, int]], list[int]]:
    """Kernel sizes, strides, paddings before and after, dilations, for each spatial dimension."""
    args = bind(node)
    kernel = [int(s) for s in args["weight"].meta["val"].shape[2:]]
    stride, dilation = (_each(args[name], len(kernel)) for name in ("stride", "dilation"))
    if args["padding"] == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return kernel, stride, [(t // 2, t - t // 2) for t in total], dilation
    padding = [0] * len(kernel) if args["padding"] == "valid" else _each(args["padding"], len(kernel))
    return kernel, stride, [(p, p) for p in padding], dilation


def _each(value: Any, count: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return [int(v) for v in (values * count if len(values) == 1 else values)]


def _kernel_size(consumer: Consumer) -> int:
    if op_name(consumer.node) not in CONVOLUTIONS:
        return 1
    return int(np.prod(bind(consumer.node)["weight"].meta["val"].shape[2:], dtype=np.int64))


def _graph(program: Program, group: ChannelGroup) -> fx.Graph:
    entry = program.entries.get(group.entry)
    names = {node.name for node in entry.graph.nodes} if entry is not None else set[str]()
    if entry is None or any(name not in names for name, _ in group.places):
        raise PreconditionError(
            "the group was found in another program", remedy="find the groups again after every change"
        )
    return entry.graph


def _shrinks(group: ChannelGroup, entry: Sum) -> bool:
    """Whether the sum has fewer terms after a cut: of a convolution by groups, whole groups may go instead."""
    source = _source(entry.other)
    return source is None or (source[0].name, source[1][entry.other_dim]) in group.places


def _consumer(program: Program, node: fx.Node, entry: Sum, channel_dim: int, labels: Index) -> Consumer | str:
    """The consumer, or why it cannot be read."""
    if entry.odd:
        return entry.odd
    source = _source(entry.other)
    if source is None:
        computed = isinstance(entry.other, fx.Node)
        return f"the channels are multiplied by a computed value, %{entry.other.name}" if computed else "no weight"
    attribute, order = source
    name = str(attribute.target)
    if name not in program.weights:
        return f"%{attribute.name} is no weight"
    rank = len(order)
    expected = {EXPERTS: 3}.get(op_name(node), 2)
    if op_name(node) not in CONVOLUTIONS and rank != expected:
        return f"its weight '{name}' has {rank} dimensions instead of {expected}"
    if op_name(node) in (*CONVOLUTIONS, EXPERTS) and order != tuple(range(rank)):
        return f"its weight '{name}' is stored in another order of dimensions"
    if not program.weights[name].dtype.is_floating_point:
        return f"its weight '{name}' holds {program.weights[name].dtype}"
    return Consumer(
        node, entry.operand, channel_dim, name, order[entry.other_dim % rank], labels, _bias(program, node, entry)
    )


def _bias(program: Program, node: fx.Node, entry: Sum) -> str | None:
    """The weight that is added to each output channel."""
    bias = entry.bias
    if not isinstance(bias, fx.Node) or bias.op != "get_attr" or str(bias.target) not in program.weights:
        return None
    outputs = node.meta["val"].shape[1 if op_name(node) in CONVOLUTIONS else -1]
    return str(bias.target) if program.weights[str(bias.target)].shape == (outputs,) else None


def _source(node: Any) -> tuple[fx.Node, tuple[int, ...]] | None:
    """The weight that a value is up to casts and the order of dimensions, and which of its dimensions each one is."""
    if not isinstance(node, fx.Node) or tensor_of(node) is None:
        return None
    order = list(range(len(node.meta["val"].shape)))
    while node.op == "call_function":
        name, args = op_name(node), bind(node)
        rank = len(order)
        if name in ("t", "mT", "numpy_T", "transpose", "permute"):
            before = list(range(rank))
            if name == "permute":
                before = [d % rank for d in args["dims"]]
            elif name == "numpy_T" or (name == "t" and rank == 2):
                before.reverse()
            elif rank >= 2:
                a, b = (args["dim0"] % rank, args["dim1"] % rank) if name == "transpose" else (rank - 2, rank - 1)
                before[a], before[b] = before[b], before[a]
            order = [before[d] for d in order]
        elif name not in _SAME_NUMBERS:
            return None
        node = node.args[0]
        if not isinstance(node, fx.Node):
            return None
    return (node, tuple(order)) if node.op == "get_attr" else None


def _weights_of(node: fx.Node) -> set[str]:
    return {str(source[0].target) for operand in node.all_input_nodes if (source := _source(operand)) is not None}


def _users(node: fx.Node) -> list[fx.Node]:
    """The operators that read a weight, through casts and transpositions."""
    found: list[fx.Node] = []
    stack = [node]
    while stack:
        for user in stack.pop().users:
            if user.op == "call_function" and _source(user) is not None:
                stack.append(user)
            else:
                found.append(user)
    return found
