"""Resizing and sampling images.

What `torch.nn.functional.interpolate` computes stays one call. Every other rule for coordinates and rounding is spelled
out, axis by axis: a few neighbours of each place, weighted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..errors import ImportModelError
from .registry import operator
from .values import Host

_TORCH = {"linear": {1: "linear", 2: "bilinear", 3: "trilinear"}, "cubic": {2: "bicubic"}}


@dataclass(frozen=True)
class Rules:
    """How places are found and neighbours weighted; the attributes of `Resize`."""

    mode: str
    coordinates: str
    nearest: str = "round_prefer_floor"
    cubic_a: float = -0.75
    antialias: bool = False
    exclude_outside: bool = False
    extrapolation: float = 0.0


@dataclass(frozen=True)
class Axis:
    """One axis: its lengths, the factor between them, and the part of it that is taken (of ``tf_crop_and_resize``)."""

    axis: int
    old: Any
    new: Any
    scale: Any
    start: float = 0.0
    end: float = 1.0


@operator("Resize", since=11, host=("roi", "scales", "sizes"))
def resize(
    x: Tensor,
    roi: Host | None = None,
    scales: Host | None = None,
    sizes: Host | None = None,
    *,
    antialias: int = 0,
    axes: Sequence[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    which = [a % x.dim() for a in axes] if axes is not None else list(range(x.dim()))
    given = sizes if sizes is not None and sizes.items else scales
    if given is None or not given.items:
        raise ImportModelError("Resize without sizes and scales", expected="one of them")
    rules = Rules(
        mode,
        coordinate_transformation_mode,
        nearest_mode,
        cubic_coeff_a,
        bool(antialias),
        bool(exclude_outside),
        extrapolation_value,
    )
    box = roi.items if roi is not None and roi.items else [0.0] * len(which) + [1.0] * len(which)
    lengths = _lengths(x, which, given is sizes, given.items, keep_aspect_ratio_policy)
    changed = [
        Axis(axis, x.shape[axis], new, scale, box[i], box[i + len(which)])
        for i, (axis, (new, scale)) in enumerate(zip(which, lengths, strict=True))
        if not _is_unchanged(x.shape[axis], new, scale, rules, box[i], box[i + len(which)])
    ]
    if not changed:
        return x
    stretched = given is scales or keep_aspect_ratio_policy == "stretch"
    method = _torch_method(x, changed, rules) if stretched else None
    if method is not None:
        by_axis = {each.axis: each for each in changed}
        spatial = range(2, x.dim())
        options: dict[str, Any] = (
            {} if rules.mode == "nearest" else {"align_corners": rules.coordinates == "align_corners"}
        )
        if given is sizes:
            options["size"] = [by_axis[a].new if a in by_axis else x.shape[a] for a in spatial]
        else:
            options["scale_factor"] = [by_axis[a].scale if a in by_axis else 1.0 for a in spatial]
        return F.interpolate(x, mode=method, **options)
    wide = x if x.is_floating_point() or rules.mode == "nearest" else x.float()
    outside: Tensor | None = None
    for each in changed:
        wide, beyond = _resized(wide, each, rules)
        if beyond is not None:
            beyond = beyond.reshape([-1 if a == each.axis else 1 for a in range(x.dim())])
            outside = beyond if outside is None else outside | beyond
    if outside is not None:
        wide = torch.where(outside, rules.extrapolation, wide)
    if x.is_floating_point():
        return wide.to(x.dtype)
    return wide if wide.dtype == x.dtype else torch.round(wide).to(x.dtype)


def _lengths(
    x: Tensor, which: Sequence[int], by_size: bool, given: Sequence[Any], policy: str
) -> list[tuple[Any, Any]]:
    """New length and factor of each axis."""
    old = [x.shape[a] for a in which]
    if not by_size:
        return [(_floor(n * s), s) for n, s in zip(old, given, strict=True)]
    factors = [1.0 if statically_known_true(new == n) else new / n for new, n in zip(given, old, strict=True)]
    if policy == "stretch":
        return list(zip(given, factors, strict=True))
    if not all(isinstance(f, float) for f in factors):
        raise ImportModelError(
            f"Resize with the policy '{policy}' of a dynamic size is not supported", expected="'stretch'"
        )
    factor = min(factors) if policy == "not_larger" else max(factors)
    return [(math.floor(n * factor + 0.5), factor) for n in old]


def _floor(length: Any) -> Any:
    if isinstance(length, torch.SymFloat):
        return math.floor(length)
    # The factor is a float32 number: 0.6 times 5 is 3, not a little more or less.
    near = round(length)
    return near if abs(length - near) < 1e-5 * max(near, 1) else math.floor(length)


def _is_unchanged(old: Any, new: Any, scale: Any, rules: Rules, start: float, end: float) -> bool:
    if rules.coordinates == "tf_crop_and_resize" and (start, end) != (0.0, 1.0):
        return False
    return isinstance(scale, (int, float)) and scale == 1 and (not isinstance(new, int) or new == old)


def _torch_method(x: Tensor, changed: Sequence[Axis], rules: Rules) -> str | None:
    """The mode in which torch computes the same, if there is one."""
    if any(each.axis < 2 for each in changed) or rules.antialias or rules.exclude_outside or x.dim() > 5 or x.dim() < 3:
        return None
    whole = all(
        not isinstance(each.old, int) or abs(each.old * each.scale - each.new) < 1e-5 * each.new for each in changed
    )
    short = any(isinstance(each.new, int) and each.new < 2 for each in changed)
    if rules.mode == "nearest":
        if (rules.coordinates, rules.nearest) == ("asymmetric", "floor") and whole:
            return "nearest"
        return "nearest-exact" if (rules.coordinates, rules.nearest) == ("half_pixel", "round_prefer_ceil") else None
    if not x.is_floating_point() or (rules.mode == "cubic" and rules.cubic_a != -0.75):
        return None
    known = ["half_pixel", *([] if short else ["pytorch_half_pixel"]), *(["align_corners"] if whole else [])]
    return _TORCH.get(rules.mode, {}).get(x.dim() - 2) if rules.coordinates in known else None


def _places(each: Axis, rules: Rules) -> Tensor:
    """Where each new element lies on the old axis; in float64, since rounding at a tie must not depend on it."""
    new = torch.arange(each.new, dtype=torch.float64)
    width = each.scale * each.old
    match rules.coordinates:
        case "align_corners":
            return new * ((each.old - 1) / torch.sym_max(width - 1, 1))  # one new element: the first
        case "asymmetric":
            return new / each.scale
        case "tf_crop_and_resize":
            if each.new == 1:
                return new + 0.5 * (each.start + each.end) * (each.old - 1)
            step = (each.end - each.start) * (each.old - 1) / (each.new - 1)
            return new * step + each.start * (each.old - 1)
        case "pytorch_half_pixel" if width == 1:
            return new * 0
        case "half_pixel" | "pytorch_half_pixel":
            return (new + 0.5) / each.scale - 0.5
        case "half_pixel_symmetric":
            return each.old / 2 * (1 - each.new / width) + (new + 0.5) / each.scale - 0.5
        case other:
            raise ImportModelError(f"Resize with the coordinates '{other}' is not supported")


def _resized(x: Tensor, each: Axis, rules: Rules) -> tuple[Tensor, Tensor | None]:
    """The tensor with one axis resized, and which elements lie outside the old one (None: none can)."""
    places = _places(each, rules)
    beyond = (places < 0) | (places > each.old - 1) if rules.coordinates == "tf_crop_and_resize" else None
    last = each.old - 1
    if rules.mode == "nearest":
        match rules.nearest:
            case "round_prefer_floor":
                near = torch.ceil(places - 0.5)
            case "round_prefer_ceil":
                near = torch.floor(places + 0.5)
            case "floor":
                near = torch.floor(places)
            case _:
                near = torch.ceil(places)
        return torch.index_select(x, each.axis, near.clamp(0, last).to(torch.int64)), beyond
    # Neighbours reach as far as the filter is wide; an antialiasing one widens with the factor.
    width = {"linear": 1, "cubic": 2}[rules.mode]
    shrink = 1.0
    if rules.antialias:
        if not isinstance(each.scale, (int, float)):
            raise ImportModelError("Resize with antialiasing by a dynamic factor is not supported")
        shrink = min(float(each.scale), 1.0)
    reach = math.ceil(width / shrink)
    left = torch.ceil(places) - 1  # so that a place on an element has it on its right, with the weight one
    taps: list[tuple[Tensor, Tensor]] = []
    for offset in range(1 - reach, reach + 1):
        near = left + offset
        weight = _weight((near - places) * shrink, rules)
        if rules.exclude_outside:
            weight = torch.where((near >= 0) & (near <= last), weight, 0.0)
        taps.append((near.clamp(0, last).to(torch.int64), weight))
    if rules.antialias or rules.exclude_outside:
        total = sum(weight for _, weight in taps)
        taps = [(near, weight / total) for near, weight in taps]
    shape = [-1 if a == each.axis else 1 for a in range(x.dim())]
    parts = [torch.index_select(x, each.axis, near) * weight.to(x.dtype).reshape(shape) for near, weight in taps]
    result = parts[0]
    for part in parts[1:]:
        result = result + part
    return result, beyond


def _weight(distance: Tensor, rules: Rules) -> Tensor:
    """Of a neighbour at a distance: the triangle, or Keys' cubic convolution (1981)."""
    d = distance.abs()
    if rules.mode == "linear":
        return (1 - d).clamp(min=0)
    a = rules.cubic_a
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return torch.where(d <= 1, near, torch.where(d < 2, far, 0.0))


@operator("Resize", since=10, host=("scales",))
def resize_10(x: Tensor, scales: Host, *, mode: str = "nearest") -> Tensor:
    """Before opset 11 there is one rule: a place times the factor, rounded down."""
    return resize(x, None, scales, coordinate_transformation_mode="asymmetric", mode=mode, nearest_mode="floor")


@operator("Upsample", since=9, host=("scales",))
def upsample(x: Tensor, scales: Host, *, mode: str = "nearest") -> Tensor:
    return resize_10(x, scales, mode="linear" if mode == "bilinear" else mode)


@operator("Upsample", since=7)
def upsample_7(x: Tensor, *, scales: Sequence[float], mode: str = "nearest") -> Tensor:
    return upsample(x, Host(tuple(scales), torch.float32), mode=mode)


@operator("GridSample")
def grid_sample(
    x: Tensor, grid: Tensor, *, align_corners: int = 0, mode: str = "linear", padding_mode: str = "zeros"
) -> Tensor:
    """The modes are called bilinear and bicubic before opset 20."""
    method = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    return F.grid_sample(x, grid.to(x.dtype), mode=method, padding_mode=padding_mode, align_corners=bool(align_corners))


@operator("AffineGrid", host=("size",))
def affine_grid(theta: Tensor, size: Host, *, align_corners: int = 0) -> Tensor:
    return F.affine_grid(theta, list(size.items), align_corners=bool(align_corners))
