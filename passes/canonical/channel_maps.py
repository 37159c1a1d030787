"""Convolutions and linear layers as maps between channels, and the one that a channel-wise operator stands next to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...ir.rewrite import is_op
from ...ir.views import permutation
from .arguments import argument
from .refusal import Refused
from .sizes import same_size

aten = torch.ops.aten

_CONVOLUTIONS = (aten.conv1d, aten.conv2d, aten.conv3d)
_TRANSPOSED = (aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d)
_VIEWS = (aten.reshape, aten.view)


@dataclass(frozen=True)
class ChannelMap:
    """A convolution or linear layer.

    Attributes:
        node: the operator; its arguments 1 and 2 are the weight and the bias.
        weight: the weight.
        bias: the bias.
        groups: into how many groups the channels are divided.
        transposed: whether it is a transposed convolution, whose weight has the input channels first.
    """

    node: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    groups: int
    transposed: bool

    def scaled_out(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The weight with every output channel times its factor."""
        if not self.transposed:
            return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
        parts = weight.unflatten(0, (self.groups, -1))
        return (parts * scale.reshape(self.groups, 1, -1, *[1] * (weight.dim() - 2))).reshape(weight.shape)

    def scaled_in(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The weight with every input channel times its factor; not of transposed convolutions."""
        parts = weight.unflatten(0, (self.groups, -1))
        return (parts * scale.reshape(self.groups, 1, -1, *[1] * (weight.dim() - 2))).reshape(weight.shape)


def channel_map(node: Any) -> tuple[ChannelMap, int] | None:
    """A node as a map between channels, and which axis the channels are; None for other operators."""
    convolves, transposed = is_op(node, *_CONVOLUTIONS), is_op(node, *_TRANSPOSED)
    if not convolves and not transposed and not is_op(node, aten.linear):
        return None
    weight: Any = node.args[1]
    rank = node.meta["val"].dim()
    spatial = weight.meta["val"].dim() - 2
    if not convolves and not transposed:
        return (ChannelMap(node, weight, argument(node, "bias"), 1, False), rank - 1) if spatial == 0 else None
    return ChannelMap(node, weight, argument(node, "bias"), argument(node, "groups"), transposed), rank - spatial - 1


def map_before(node: fx.Node) -> ChannelMap | None:
    """The layer whose output channels are axis 1 of a node's input, through views that keep them.

    Raises:
        Refused: something else reads the layer's result.
    """
    value: Any = node.args[0]
    axis: int | None = 1
    shared = False
    while axis is not None and isinstance(value, fx.Node):
        shared = shared or len(value.users) > 1
        found = channel_map(value)
        if found is not None:
            if found[1] != axis:
                return None
            if shared:
                raise Refused("the layer's result is read elsewhere too", node)
            return found[0]
        axis = _axis_below(value, axis)
        value = value.args[0] if axis is not None else None
    return None


def map_after(node: fx.Node) -> ChannelMap | None:
    """The layer whose input channels are axis 1 of a node's value, if it alone reads that, through views.

    Raises:
        Refused: it is a convolution at whose border the input is extended, or a transposed one.
    """
    axis: int | None = 1
    while axis is not None and len(node.users) == 1:
        user = next(iter(node.users))
        found = channel_map(user)
        if found is not None and user.args[0] is node:
            layer, out_axis = found
            if axis != out_axis:
                return None
            if layer.transposed or (not is_op(user, aten.linear) and _pads(user)):
                raise Refused("the convolution after it extends its input at the border", node)
            return layer
        axis, node = _axis_above(user, axis), user
    return None


def _pads(convolution: fx.Node) -> bool:
    padding: Any = argument(convolution, "padding")
    return padding != "valid" if isinstance(padding, str) else any(padding if isinstance(padding, list) else [padding])


def _axis_below(view: fx.Node, axis: int) -> int | None:
    """Which axis of a view's input its axis ``axis`` is."""
    order = permutation(view)
    if order is not None:
        return order[axis]
    if not is_op(view, *_VIEWS):
        return None
    source: Any = view.args[0]
    return _same_axis(view.meta["val"].shape, source.meta["val"].shape, axis)


def _axis_above(view: fx.Node, axis: int) -> int | None:
    """Which axis of a view's result the axis ``axis`` of its input is."""
    order = permutation(view)
    if order is not None:
        return order.index(axis)
    if not is_op(view, *_VIEWS):
        return None
    source: Any = view.args[0]
    return _same_axis(source.meta["val"].shape, view.meta["val"].shape, axis)


def _same_axis(before: torch.Size, after: torch.Size, axis: int) -> int | None:
    """Where an axis is after a reshape that leaves all axes before it, or all behind it, as they are."""
    first, last = [*before[: axis + 1]], [*before[axis:]]
    if len(after) >= len(first) and all(same_size(a, b) for a, b in zip(first, after, strict=False)):
        return axis
    at = len(after) - len(last)
    return at if at >= 0 and all(same_size(a, b) for a, b in zip(last, after[at:], strict=True)) else None
