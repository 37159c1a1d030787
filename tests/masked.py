"""What cutting channels should compute: the uncut graph, with the cut channels' weights zeroed.

Zero means 'not there' almost everywhere, but not to an operator that counts channels (a norm, a mean): those see only
the channels that stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from graphlathe.ir.axes import ChannelGroup, cut
from graphlathe.ir.program import Program
from graphlathe.ir.verify import relative_error, verify
from graphlathe.ir.weights import Weight

aten = torch.ops.aten

COUNTING = {aten.mean.dim, aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default}
COUNTED = ("takes the mean over it", "takes the mean over the channels")


def zeroed(program: Program, group: ChannelGroup, keep: Sequence[int]) -> Program:
    """A program with the weights of all other atoms set to zero."""
    new = program.clone()
    gone = [atom for atom in range(group.size) if atom not in keep]
    for member in group.members:
        value = new.weights[member.weight].tensor().clone()
        value.index_fill_(member.dim, torch.from_numpy(member.index[gone].reshape(-1)), 0)
        new.weights[member.weight] = Weight.from_tensor(value)
    return new


def run_masked(program: Program, group: ChannelGroup, keep: Sequence[int], feeds: Mapping[str, Any]) -> dict[str, Any]:
    """Run the zeroed program; operators that count see the channels that stay, and give zero elsewhere."""
    masked = zeroed(program, group, keep)
    stays = {
        place: torch.tensor([label < 0 or label in set(keep) for label in labels.tolist()])
        for place, labels in group.places.items()
    }
    entry = masked.main
    values = dict(zip(entry.placeholders, (feeds[name] for name in entry.inputs), strict=True))
    env: dict[fx.Node, Any] = dict(values)
    with torch.no_grad():
        for node in entry.graph.nodes:
            if node.op == "get_attr":
                env[node] = masked.weights[str(node.target)].tensor()
            elif node.op == "call_function":
                args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
                run = counting if node.target in COUNTING else None
                env[node] = run(node, args, kwargs, stays) if run else node.target(*args, **kwargs)
    return {name: env[value] for name, value in zip(entry.outputs, entry.output_values, strict=True)}


def counting(node: fx.Node, args: Any, kwargs: Any, stays: Mapping[tuple[str, int], torch.Tensor]) -> Any:
    """An operator on the channels that stay, its result spread over all channels again."""

    def kept(operand: Any, value: Any) -> Any:
        if isinstance(operand, fx.Node):
            for dim in range(value.dim()):
                if (operand.name, dim) in stays:
                    value = value.index_select(dim, stays[operand.name, dim].nonzero()[:, 0])
        return value

    small = [kept(a, v) for a, v in zip(node.args, args, strict=True)]
    if node.target in (aten.layer_norm.default, aten.rms_norm.default):
        small[1] = list(small[0].shape[-len(args[1]) :])
    elif node.target is aten.group_norm.default and (mask := stays.get((node.args[0].name, 1))) is not None:
        groups = mask.view(args[1], -1)
        if (groups.all(1) | ~groups.any(1)).all():  # whole groups were cut, not channels of every group
            small[1] = int(groups.all(1).sum())
    result = node.target(*small, **kwargs)
    for dim in range(result.dim()):
        mask = stays.get((node.name, dim))
        if mask is not None:
            spread = result.new_zeros([*result.shape[:dim], len(mask), *result.shape[dim + 1 :]])
            result = spread.index_copy(dim, mask.nonzero()[:, 0], result)
    return result


def half(group: ChannelGroup) -> list[int]:
    """Every other atom."""
    return list(range(0, group.size, 2))


def check_cut(
    program: Program,
    group: ChannelGroup,
    feeds: Mapping[str, Any],
    keep: Sequence[int],
    tolerance: float = 1e-4,
    level: int = 2,
) -> bool:
    """Cut, verify, run; compare with the masked graph where the group's algebra allows.

    Args:
        program: stays as it is.
        group: one of its groups that can be cut.
        feeds: inputs by name.
        keep: the atoms that stay.
        tolerance: of `relative_error`.
        level: how much of the cut program is verified, see `verify`.

    Returns:
        Whether there was a masked graph to compare with.
    """
    smaller = program.clone()
    cut(smaller, group, keep)
    verify(smaller, level)
    assert smaller.parameter_count < program.parameter_count
    actual = smaller.run(smaller.feeds(**feeds))
    if group.zeroable:
        masked = zeroed(program, group, keep)
        expected = masked.run(masked.feeds(**feeds))
    elif any(reason in group.zero_reason for reason in COUNTED):
        expected = run_masked(program, group, keep, program.feeds(**feeds))
    else:
        return False
    assert relative_error(actual, expected) < tolerance, (str(group), list(keep), group.why, program.to_text())
    return True
