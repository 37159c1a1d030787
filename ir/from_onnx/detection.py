"""Operators of object detection: non-maximum suppression, regions of interest, deformable convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ImportModelError
from .limits import check_turns
from .pooling import padding_of
from .registry import operator
from .values import Host


@operator("NonMaxSuppression", host=("most", "overlap", "threshold"))
def non_max_suppression(
    boxes: Tensor,
    scores: Tensor,
    most: Host | None = None,
    overlap: Host | None = None,
    threshold: Host | None = None,
    *,
    center_point_box: int = 0,
) -> Tensor:
    """[batch, class, box] of the boxes that are kept: best first, each unless a kept one of its class overlaps it more
    than ``overlap`` allows; at most ``most`` of each class, of scores above the threshold.
    """
    limit = int(most.items[0]) if most is not None and most.items else 0
    bound = float(overlap.items[0]) if overlap is not None and overlap.items else 0.0
    batch, classes, count = scores.shape
    if not isinstance(count, int):
        raise ImportModelError(
            "NonMaxSuppression of a dynamic number of boxes is not supported", remedy="fix that dimension: static=True"
        )
    if center_point_box:
        x, y, width, height = boxes.unbind(-1)
        low_y, low_x, high_y, high_x = y - height / 2, x - width / 2, y + height / 2, x + width / 2
    else:
        y1, x1, y2, x2 = boxes.unbind(-1)
        low_y, low_x = torch.minimum(y1, y2), torch.minimum(x1, x2)
        high_y, high_x = torch.maximum(y1, y2), torch.maximum(x1, x2)
    area = (high_y - low_y) * (high_x - low_x)

    def shared(low: Tensor, high: Tensor) -> Tensor:
        inner = torch.minimum(high.unsqueeze(-1), high.unsqueeze(-2)) - torch.maximum(
            low.unsqueeze(-1), low.unsqueeze(-2)
        )
        return inner.clamp(min=0)

    common = shared(low_y, high_y) * shared(low_x, high_x)
    union = area.unsqueeze(-1) + area.unsqueeze(-2) - common
    close = (common > bound * union).unsqueeze(1).expand(batch, classes, count, count)
    _, order = torch.sort(scores, stable=True, dim=-1, descending=True)
    ranked = torch.gather(scores, -1, order)
    index = order.unsqueeze(-1).expand(batch, classes, count, count)
    by_rank = torch.gather(torch.gather(close, 2, index), 3, index.transpose(-1, -2))
    alive = torch.ones_like(ranked, dtype=torch.bool)
    if threshold is not None and threshold.items:
        alive = ranked > threshold.items[0]
    later = torch.ones([count, count], dtype=torch.bool).triu(1)
    for rank in range(check_turns(count, "the number of boxes")):  # a kept box removes the later ones that it overlaps
        kept = alive[..., rank : rank + 1]
        alive = alive & ~(kept & by_rank[..., rank, :] & later[rank])
    alive = alive & (torch.cumsum(alive.to(torch.int64), -1) <= limit)
    places = torch.nonzero(alive)
    box = order[places[:, 0], places[:, 1], places[:, 2]]
    return torch.cat([places[:, :2], box.unsqueeze(-1)], -1)


@operator("RoiAlign")
def roi_align(
    x: Tensor,
    rois: Tensor,
    batch: Tensor,
    *,
    coordinate_transformation_mode: str = "half_pixel",
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
    opset_version: int,
) -> Tensor:
    """Bilinear samples in a grid over each region; the mean or the largest of each cell."""
    if not sampling_ratio:
        raise ImportModelError(
            "RoiAlign with a number of samples that depends on the region is not supported",
            expected="sampling_ratio above 0",
        )
    half = 0.5 if opset_version >= 16 and coordinate_transformation_mode == "half_pixel" else 0.0
    x1, y1, x2, y2 = (rois * spatial_scale - half).unbind(-1)
    width, height = x2 - x1, y2 - y1
    if not half:
        width, height = width.clamp(min=1.0), height.clamp(min=1.0)

    def samples(start: Tensor, extent: Tensor, cells: int) -> Tensor:
        """[regions, cells * samples]: where the samples lie."""
        steps = (torch.arange(cells * sampling_ratio, dtype=x.dtype) + 0.5) / (cells * sampling_ratio)
        return start.unsqueeze(-1) + steps * extent.unsqueeze(-1)

    ys, xs = samples(y1, height, output_height), samples(x1, width, output_width)
    (y_taps, x_taps) = (_taps(ys, x.shape[2]), _taps(xs, x.shape[3]))
    image = x[batch]
    regions = torch.arange(rois.shape[0]).reshape(-1, 1, 1)
    corners: list[Tensor] = []
    for y_place, y_weight in y_taps:
        for x_place, x_weight in x_taps:
            values = image[regions, :, y_place.unsqueeze(-1), x_place.unsqueeze(-2)]
            corners.append(values * (y_weight.unsqueeze(-1) * x_weight.unsqueeze(-2)).unsqueeze(-1))

    def cells(values: Tensor) -> Tensor:
        """[regions, channels, height, width, samples of a cell]."""
        parts = values.permute(0, 3, 1, 2).unflatten(-1, (output_width, sampling_ratio))
        parts = parts.unflatten(2, (output_height, sampling_ratio))
        return parts.permute(0, 1, 2, 4, 3, 5).flatten(4)

    if mode == "avg":
        return cells(sum(corners[1:], corners[0])).mean(-1)
    # ONNX takes the largest of the four weighted neighbours, not of their sum.
    return cells(torch.stack(corners).amax(0)).amax(-1)


def _taps(places: Tensor, length: Any) -> list[tuple[Tensor, Tensor]]:
    """The two neighbours of each place and their weights; outside by more than one, nothing counts."""
    inside = ((places >= -1) & (places <= length)).to(places.dtype)
    places = places.clamp(min=0)
    low = torch.floor(places).clamp(max=length - 1)
    high = (low + 1).clamp(max=length - 1)
    places = torch.where(low >= length - 1, low, places)
    share = places - low
    return [(low.to(torch.int64), (1 - share) * inside), (high.to(torch.int64), share * inside)]


@operator("DeformConv")
def deform_conv(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    offset_group: int = 1,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """A convolution in two dimensions whose samples lie beside the grid (arXiv:1703.06211), each weighted by a mask."""
    if x.dim() != 4:
        raise ImportModelError("DeformConv in other than two dimensions is not supported")
    strides, dilations = list(strides or [1, 1]), list(dilations or [1, 1])
    rows, columns = (int(k) for k in weight.shape[2:])
    (top, _), (left, _) = padding_of(x, [rows, columns], strides, dilations, pads, "NOTSET")
    batch, channels, height, width = x.shape
    out_h, out_w = offset.shape[2:]
    taps = rows * columns
    offset = offset.reshape(batch, offset_group, taps, 2, out_h, out_w)
    grid_y = torch.arange(out_h).reshape(-1, 1) * strides[0] - top
    grid_x = torch.arange(out_w) * strides[1] - left
    kernel_y = torch.arange(rows).repeat_interleave(columns).reshape(-1, 1, 1) * dilations[0]
    kernel_x = torch.arange(columns).repeat(rows).reshape(-1, 1, 1) * dilations[1]
    y = offset[:, :, :, 0] + (grid_y + kernel_y)
    x_places = offset[:, :, :, 1] + (grid_x + kernel_x)
    # grid_sample places pixel centres at (2 i + 1) / n - 1.
    grid = torch.stack([(2 * x_places + 1) / width - 1, (2 * y + 1) / height - 1], -1)
    grid = grid.reshape(batch * offset_group, taps * out_h, out_w, 2)
    parts = x.reshape(batch * offset_group, channels // offset_group, height, width)
    sampled = F.grid_sample(parts, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    sampled = sampled.reshape(batch, offset_group, channels // offset_group, taps, out_h, out_w)
    if mask is not None:
        sampled = sampled * mask.reshape(batch, offset_group, 1, taps, out_h, out_w)
    columns_of = sampled.reshape(batch, group, channels // group * taps, out_h * out_w)
    kernel = weight.reshape(group, weight.shape[0] // group, channels // group * taps)
    result = torch.matmul(kernel, columns_of).reshape(batch, weight.shape[0], out_h, out_w)
    return result if bias is None else result + bias.reshape(-1, 1, 1)


@operator("Col2Im", host=("image", "block"))
def col2im(
    x: Tensor,
    image: Host,
    block: Host,
    *,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Sum overlapping blocks, [batch, channels * block, blocks], back into an image."""
    sizes, kernel = list(image.items), [int(k) for k in block.items]
    rank = len(sizes)
    strides, dilations, pads = list(strides or [1] * rank), list(dilations or [1] * rank), list(pads or [0] * 2 * rank)
    padded = [sizes[i] + pads[i] + pads[rank + i] for i in range(rank)]
    counts = [(padded[i] - (kernel[i] - 1) * dilations[i] - 1) // strides[i] + 1 for i in range(rank)]
    taps = math.prod(kernel)
    batch, channels = x.shape[0], x.shape[1] // taps
    flat: Any = 0
    for i in range(rank):  # the index in the padded image of every (place in the block, block)
        shape = [-1 if j == i else 1 for j in range(rank)]
        inner = (torch.arange(kernel[i]) * dilations[i]).reshape([*shape, *[1] * rank])
        outer = (torch.arange(counts[i]) * strides[i]).reshape([*[1] * rank, *shape])
        flat = flat * padded[i] + inner + outer
    index = flat.reshape(1, 1, -1).expand(batch, channels, -1)
    result = torch.zeros([batch, channels, math.prod(padded)], dtype=x.dtype)
    result = result.scatter_add(2, index, x.reshape(batch, channels, -1)).reshape([batch, channels, *padded])
    return F.pad(result, [p for i in reversed(range(rank)) for p in (-pads[i], -pads[rank + i])])
