"""The rows that consumers read, from one run of the program on each batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.axes.relate import same_size
from ...ir.errors import PreconditionError
from ...ir.flow import op_name, tensor_of
from ...ir.program import Program
from ..base import Batch
from ..fidelity import position_mask, seeded
from .consumers import Consumer, input_rows, rows_key

_PIECE = 1 << 22
"""Elements of the operand that are made into rows at a time (a convolution's rows are larger by its kernel)."""

_BY_ROWS = {"linear", "addmm", "mm", "matmul"}
_KEEPS_ROWS = {"view", "reshape", "_unsafe_view", "_to_copy", "clone", "contiguous"}


class RowReader:
    """Hands on the rows that consumers read, batch by batch; consumers of the same rows are read once.

    Positions that an ``attention_mask`` hides are left out, for operands of shape [batch, tokens, width] and for such
    operands flattened to rows. For others (convolutions, experts) every place counts.

    Args:
        program: the consumers' program.
        consumers: what to read.
    """

    def __init__(self, program: Program, consumers: Sequence[Consumer]) -> None:
        self.program = program
        self.keys = {consumer: rows_key(consumer) for consumer in consumers}
        self.by_key = {key: consumer for consumer, key in reversed(self.keys.items())}
        self._by_operand: dict[fx.Node, list[str]] = {}
        for key, consumer in self.by_key.items():
            self._by_operand.setdefault(consumer.operand, []).append(key)
        self._flattened = {c.operand: source for c in self.by_key.values() if (source := unflattened(c)) is not None}
        self._sources = set(self._flattened.values())
        self._batches = 0

    def read(self, batch: Batch, visit: Callable[[str, Tensor], None]) -> None:
        """Run the program on one batch, as far as the last consumer.

        Args:
            batch: named inputs.
            visit: called with a key (`rows_key`) and some of its rows [n, columns]; several times for large operands.

        Raises:
            PreconditionError: a consumer reads NaN or infinity.
        """
        waiting = set(self._by_operand)
        shapes: dict[fx.Node, torch.Size] = {}

        def observe(node: fx.Node, value: Any) -> None:
            if node in self._sources and isinstance(value, Tensor):
                shapes[node] = value.shape
            if node not in waiting:
                return
            source = self._flattened.get(node)
            shape = value.shape if source is None else shapes[source]
            mask = position_mask(batch, shape[:2], inside=True) if len(shape) == 3 else None
            for key in self._by_operand[node]:
                for rows in _pieces(self.by_key[key], value, mask):
                    self._check(self.by_key[key], rows)
                    visit(key, rows)
            waiting.discard(node)
            if not waiting:
                raise _Done

        feeds = self.program.feeds(**batch)
        if waiting:
            with contextlib.suppress(_Done):
                seeded(lambda: self.program.run(feeds, observe=observe))
        self._batches += 1

    def _check(self, consumer: Consumer, rows: Tensor) -> None:
        if not bool(rows.isfinite().all()):
            raise PreconditionError(
                f"values that weight '{consumer.weight}' multiplies are NaN or infinite on batch {self._batches} of "
                "this pass over the calibration data",
                node=consumer.node.name,
                origin=consumer.origin,
                remedy="look for NaN in that batch (they count from 0); in half precision, run the model in float32",
            )


class _Done(Exception):
    """All consumers of a run were seen: what comes after them need not run."""


def _pieces(consumer: Consumer, value: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
    """The rows that count, a part at a time."""
    if op_name(consumer.node) not in _BY_ROWS:  # a convolution's rows take its kernel's size times the memory
        for part in value.split(max(1, _PIECE * len(value) // max(value.numel(), 1))):
            yield input_rows(consumer, part)
        return
    rows = input_rows(consumer, value)
    if mask is not None and consumer.channel_dim == value.dim() - 1:
        rows = rows[mask.reshape(-1) != 0]
    yield from rows.split(max(1, _PIECE // max(rows.shape[1], 1)))


def unflattened(consumer: Consumer) -> fx.Node | None:
    """The value [batch, tokens, width] that an operand of a matrix product is the rows of."""
    node = consumer.operand
    value = tensor_of(node)
    if value is None or value.dim() != 2 or op_name(consumer.node) not in _BY_ROWS or consumer.channel_dim != 1:
        return None
    while op_name(node) in _KEEPS_ROWS and isinstance(source := node.args[0], fx.Node):
        node, shape = source, source.meta["val"].shape
        if len(shape) == 3:
            return node if same_size(shape[-1], value.shape[-1]) else None
    return None


def counted_positions(batch: Batch, stream: Tensor) -> Tensor:
    """The positions of a stream [.., positions, channels] that no mask hides: [rows, channels]."""
    mask = position_mask(batch, stream.shape[:-1], inside=True) if stream.dim() == 3 else None
    rows = stream.reshape(-1, stream.shape[-1])
    return rows if mask is None else rows[mask.reshape(-1) != 0]
