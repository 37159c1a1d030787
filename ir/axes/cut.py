"""Cut atoms of a group out of a program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from ..errors import PreconditionError, VerifyError
from ..program import ORIGIN, Program
from ..rewrite import Rewriter
from ..types import expr_of
from .groups import ChannelGroup
from .resize import Mask, Resize
from .space import static_size, tensor_shape


def cut(program: Program, group: ChannelGroup, keep: Sequence[int], *, made_by: str = "cut") -> None:
    """Keep only some atoms of a group: slice its weights, and rewrite the sizes that the graph spells out.

    The program is changed in place. The groups that were found before do not fit it any more: find them again.

    Args:
        program: the program in which the group was found, or a clone of it.
        group: a group that can be cut.
        keep: the atoms that stay, in any order; they keep their order in the weights.
        made_by: the pass's name, stamped on new nodes.

    Raises:
        PreconditionError: the group cannot be cut, does not belong to this program, or ``keep`` is not a choice of its
            atoms that leaves something everywhere. The program is as it was.
        VerifyError: an operator refuses its smaller operands. The program is unusable.
    """
    cut_all(program, [(group, keep)], made_by=made_by)


def cut_all(program: Program, choices: Sequence[tuple[ChannelGroup, Sequence[int]]], *, made_by: str = "cut") -> None:
    """Cut several groups at once, in one walk over the graph.

    The groups must have been found together, and no two of them may cut the same dimension of a value: heads and
    channels inside heads, say, are cut one after the other.

    Args:
        program: the program in which the groups were found, or a clone of it; changed in place.
        choices: groups with the atoms that stay; a group all of whose atoms stay is left out.
        made_by: the pass's name, stamped on new nodes.

    Raises:
        PreconditionError: as `cut`, or two groups cut one dimension. The program is as it was.
        VerifyError: as `cut`.
    """
    by_entry: dict[str, dict[tuple[fx.Node, int], Mask]] = {}
    for group, keep in choices:
        masks = by_entry.setdefault(group.entry, {})
        for place, mask in _masks(program, group, _checked(group, keep), made_by).items():
            if place in masks:
                raise PreconditionError(
                    f"two groups cut dimension {place[1]} of %{place[0].name}",
                    pass_name=made_by,
                    node=place[0].name,
                    origin=place[0].meta.get(ORIGIN),
                    remedy="cut one, find the groups again, then cut the other",
                )
            masks[place] = mask
    for entry, masks in by_entry.items():
        _apply(Rewriter(program, made_by, entry), masks)


def _apply(rewriter: Rewriter, masks: dict[tuple[fx.Node, int], Mask]) -> None:
    """Slice the weights, and give every operator on the way its new arguments."""
    shapes = {n: shape for n in rewriter.graph.nodes if (shape := tensor_shape(n)) is not None}
    change = Resize(rewriter, masks, shapes)
    changed = {node for node, _ in masks}
    for node in list(rewriter.graph.nodes):
        if node.op == "get_attr":
            _slice(rewriter, change, node)
        elif node.op == "call_function" and (node in changed or not changed.isdisjoint(node.all_input_nodes)):
            before = _layout(node)
            _resize(rewriter, change, node)
            if _layout(node) != before:
                changed.add(node)  # its strides, if nothing else: a view of it may have to become a reshape


def _checked(group: ChannelGroup, keep: Sequence[int]) -> set[int]:
    if not group.prunable:
        raise PreconditionError(f"the group cannot be cut: {group.reason}", expected="a group that is prunable")
    chosen = [int(atom) for atom in keep]
    wrong = [atom for atom in chosen if not 0 <= atom < group.size]
    if not chosen or wrong or len(set(chosen)) < len(chosen):
        what = f"{wrong[0]} is no unit" if wrong else "a unit is named twice" if chosen else "nothing would be left"
        raise PreconditionError(
            f"cannot keep {chosen} of {group.size} units: {what}",
            expected=f"at least one of 0 to {group.size - 1}, each once",
        )
    return set(chosen)


def _masks(program: Program, group: ChannelGroup, keep: set[int], made_by: str) -> dict[tuple[fx.Node, int], Mask]:
    """Which elements stay in each dimension that is cut."""
    if group.entry not in program.entries:
        raise PreconditionError(f"no entry '{group.entry}'", pass_name=made_by)
    nodes = {node.name: node for node in program.entries[group.entry].graph.nodes}
    stays = np.array([atom in keep for atom in range(group.size)] + [True])  # the last one is label -1
    masks: dict[tuple[fx.Node, int], Mask] = {}
    for (name, dim), label in group.places.items():
        node = nodes.get(name)
        shape = tensor_shape(node) if node is not None else None
        if node is None or shape is None or dim >= len(shape) or static_size(shape[dim]) != len(label):
            raise PreconditionError(
                f"the group was found in another graph: dimension {dim} of %{name} is not of size {len(label)} here",
                pass_name=made_by,
                remedy="find the groups again after every change",
            )
        mask = stays[label]
        if not mask.any():
            raise PreconditionError(
                f"keeping {sorted(keep)} leaves nothing of dimension {dim}",
                pass_name=made_by,
                node=name,
                origin=node.meta.get(ORIGIN),
                remedy="keep more units",
            )
        if not mask.all():
            masks[node, dim] = mask
    return masks


def _slice(rewriter: Rewriter, change: Resize, node: fx.Node) -> None:
    name = str(node.target)
    weight = rewriter.program.weights.get(name)
    if weight is None:
        return
    whole = weight
    for dim in range(len(weight.shape)):
        mask = change.mask(node, dim)
        if mask is not None:
            weight = weight.select(dim, np.flatnonzero(mask).tolist())
    if weight is not whole:
        rewriter.weight(name, weight)


def _layout(node: fx.Node) -> Any:
    """What operators that read a value see of it: shapes and strides."""
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else (value,)
    return [
        (tuple(map(expr_of, v.shape)), tuple(map(expr_of, v.stride())) if v.layout is torch.strided else ())
        for v in values
        if isinstance(v, torch.Tensor)
    ]


def _resize(rewriter: Rewriter, change: Resize, node: fx.Node) -> None:
    """Give one operator its new arguments, and check that its result has the size that the analysis said."""
    target, args, kwargs = change.call(node)
    rewriter.set_args(node, args, kwargs, target=target)
    after = tensor_shape(node)
    if after is None:
        return
    expected = change.expected(node)
    sizes: tuple[Any, ...] = tuple(map(expr_of, after))
    if len(sizes) != len(expected) or any(isinstance(b, int) and a != b for a, b in zip(sizes, expected, strict=True)):
        raise VerifyError(
            f"cutting left a value of shape {list(sizes)}",
            pass_name=rewriter.made_by,
            node=node.name,
            origin=node.meta.get(ORIGIN),
            expected=str(list(expected)),
            remedy="report this: a relation between axes is missing",
        )
