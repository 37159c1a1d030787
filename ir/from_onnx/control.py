"""Control flow and sequences, resolved during the walk: conditions and trip counts must be known to the host."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import DataDependentError, ImportModelError
from .limits import check_turns
from .registry import operator
from .values import Host, Items, Value

if TYPE_CHECKING:
    from .walk import Body, Walk


@operator("If", host=("cond",))
def if_(cond: Host, *, then_branch: Body, else_branch: Body) -> list[Value]:
    """The branch that it takes."""
    return then_branch() if bool(cond.item) else else_branch()


@operator("Loop", host=("trips", "condition"), raw=("state",))
def loop(trips: Host | None, condition: Host | None, *state: Value, body: Body, walk: Walk) -> list[Value]:
    """Unrolled. The body takes the turn's number, the condition and the state, and returns the condition, the state
    and one element of each collected output.
    """
    most = check_turns(trips.item, "the trip count of a Loop") if trips is not None else None
    alive: Any = True if condition is None else condition.item
    carried, rows = list(state), list[list[Value]]()
    turn = 0
    while alive and (most is None or turn < most):
        check_turns(turn, "the trip count of a Loop")
        result = body.repeated(
            Host((turn,), torch.int64, is_scalar=True), Host((bool(alive),), torch.bool, is_scalar=True), *carried
        )
        again, carried, row = result[0], result[1 : 1 + len(state)], result[1 + len(state) :]
        rows.append(row)
        turn += 1
        if most is None or turn < most:
            if not isinstance(again, Host):
                raise DataDependentError(
                    "the condition of a Loop is computed from data", expected="a trip count that is known"
                )
            alive = again.item
    collected = [torch.stack([walk.tensor(row[i]) for row in rows]) for i in range(len(rows[0]) if rows else 0)]
    outputs = len(body.graph.output) - 1 - len(state)
    if outputs and not rows:
        raise ImportModelError("a Loop without turns collects nothing: its outputs have no shape")
    return [*carried, *collected]


@operator("Scan", since=9)
def scan(
    *values: Tensor,
    body: Body,
    num_scan_inputs: int,
    scan_input_axes: Sequence[int] | None = None,
    scan_input_directions: Sequence[int] | None = None,
    scan_output_axes: Sequence[int] | None = None,
    scan_output_directions: Sequence[int] | None = None,
    walk: Walk,
) -> list[Value]:
    """Unrolled along the scanned axis."""
    states = len(values) - num_scan_inputs
    carried: list[Value] = list(values[:states])
    scanned = values[states:]
    axes = list(scan_input_axes or [0] * num_scan_inputs)
    backward = list(scan_input_directions or [0] * num_scan_inputs)
    length = check_turns(scanned[0].shape[axes[0]], "the length of a Scan")
    rows: list[list[Value]] = []
    for turn in range(length):
        slices = [
            torch.select(x, axis, length - 1 - turn if flip else turn)
            for x, axis, flip in zip(scanned, axes, backward, strict=True)
        ]
        result = body.repeated(*carried, *slices)
        carried, row = result[:states], result[states:]
        rows.append(row)
    collected: list[Value] = []
    for i in range(len(body.graph.output) - states):
        column = [walk.tensor(row[i]) for row in rows]
        if scan_output_directions and scan_output_directions[i]:
            column.reverse()
        collected.append(torch.stack(column, scan_output_axes[i] if scan_output_axes else 0))
    return [*carried, *collected]


@operator("Scan", since=8)
def scan_8(
    lengths: Tensor | None,
    *values: Tensor,
    body: Body,
    num_scan_inputs: int,
    directions: Sequence[int] | None = None,
    walk: Walk,
) -> list[Value]:
    """Opset 8: with a batch in front of everything, one element of which is scanned after the other."""
    if lengths is not None:
        raise ImportModelError("a Scan over sequences of different lengths is not supported", expected="equal lengths")
    batch = check_turns(values[0].shape[0], "the batch of a Scan")
    results = [
        scan(
            *(torch.select(value, 0, i) for value in values),
            body=body,
            num_scan_inputs=num_scan_inputs,
            scan_input_directions=directions,
            walk=walk,
        )
        for i in range(batch)
    ]
    return [torch.stack([walk.tensor(each) for each in column]) for column in zip(*results, strict=True)]


@operator("SequenceConstruct", raw=("values",))
def sequence_construct(*values: Value) -> Items:
    return Items(values)


@operator("SequenceEmpty")
def sequence_empty(*, dtype: torch.dtype | None = None) -> Items:
    return Items(())


@operator("SequenceInsert", host=("position",), raw=("value",))
def sequence_insert(sequence: Items, value: Value, position: Host | None = None) -> Items:
    at = len(sequence.values) if position is None else _place(sequence, position, 1)
    return Items((*sequence.values[:at], value, *sequence.values[at:]))


@operator("SequenceErase", host=("position",))
def sequence_erase(sequence: Items, position: Host | None = None) -> Items:
    at = len(sequence.values) - 1 if position is None else _place(sequence, position, 0)
    return Items((*sequence.values[:at], *sequence.values[at + 1 :]))


@operator("SequenceAt", host=("position",))
def sequence_at(sequence: Items, position: Host) -> Value:
    return sequence.values[_place(sequence, position, 0)]


def _place(sequence: Items, position: Host, extra: int) -> int:
    """A position from the front; a negative one counts from the end."""
    at, length = int(position.item), len(sequence.values)
    at = at + length if at < 0 else at
    if not 0 <= at < length + extra:
        raise ImportModelError(f"position {position.item} of a sequence of {length}")
    return at


@operator("SequenceLength")
def sequence_length(sequence: Items) -> Host:
    return Host((len(sequence.values),), torch.int64, is_scalar=True)


@operator("ConcatFromSequence")
def concat_from_sequence(sequence: Items, *, axis: int, new_axis: int = 0, walk: Walk) -> Tensor:
    tensors = [walk.tensor(value) for value in sequence.values]
    return torch.stack(tensors, axis) if new_axis else torch.cat(tensors, axis)


@operator("SplitToSequence", host=("lengths",))
def split_to_sequence(x: Tensor, lengths: Host | None = None, *, axis: int = 0, keepdims: int = 1) -> Items:
    size = x.shape[axis]
    if lengths is None:
        check_turns(size, "the number of parts that a SplitToSequence makes")
        parts = torch.split(x, 1, axis) if keepdims else torch.unbind(x, axis)
    elif lengths.is_scalar:
        if isinstance(size, int) and lengths.item > 0:
            check_turns(size // lengths.item, "the number of parts that a SplitToSequence makes")
        parts = torch.split(x, lengths.item, axis)
    else:
        # Not torch.split, which would fix a dynamic size at the sum of the lengths.
        ends = list(accumulate(lengths.items))
        starts = [0, *ends[:-1]]
        parts = [torch.ops.aten.slice.Tensor(x, axis, start, end) for start, end in zip(starts, ends, strict=True)]
    return Items(tuple(parts))


@operator("OptionalHasElement", raw=("value",))
def optional_has_element(value: Value = None) -> Host:
    return Host((value is not None,), torch.bool, is_scalar=True)


@operator("OptionalGetElement", raw=("value",))
def optional_get_element(value: Value) -> Value:
    return value
