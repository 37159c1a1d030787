"""Signal processing: Fourier transforms, windows, filter banks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .registry import operator
from .values import Host


@operator("DFT", since=20, host=("length", "axis"))
def dft(
    x: Tensor, length: Host | None = None, axis: Host | None = None, *, inverse: int = 0, onesided: int = 0
) -> Tensor:
    """Real and imaginary parts in the last dimension (one number: real)."""
    return _transform(x, None if length is None else length.item, -2 if axis is None else axis.item, inverse, onesided)


@operator("DFT", since=17, host=("length",))
def dft_17(x: Tensor, length: Host | None = None, *, axis: int = 1, inverse: int = 0, onesided: int = 0) -> Tensor:
    return _transform(x, None if length is None else length.item, axis, inverse, onesided)


def _transform(x: Tensor, length: Any, axis: int, inverse: int, onesided: int) -> Tensor:
    axis, dtype = axis % x.dim(), x.dtype
    # Rounding in a transform is relative to its largest result; what ought to be zero would not be in single precision.
    x = x.double()
    two = isinstance(x.shape[-1], int) and x.shape[-1] == 2
    back = bool(onesided and inverse)
    old = x.shape[axis]
    count = length if length is not None else 2 * (old - 1) if back else old
    x = _fitted(x, axis, count // 2 + 1 if back else count)
    value = torch.view_as_complex(x.contiguous()) if two else x[..., 0]
    if back:
        return torch.fft.irfft(value, count, axis).unsqueeze(-1).to(dtype)
    if onesided and not two:
        value = torch.fft.rfft(value, None, axis)
    else:
        value = torch.fft.ifft(value, None, axis) if inverse else torch.fft.fft(value, None, axis)
    if onesided and two:
        value = torch.ops.aten.slice.Tensor(value, axis, 0, count // 2 + 1)
    return torch.view_as_real(value).to(dtype)


def _fitted(x: Tensor, axis: int, count: Any) -> Tensor:
    """Cut off, or filled up with zeros."""
    old = x.shape[axis]
    if isinstance(old, int) and isinstance(count, int) and old == count:
        return x
    pads = [0] * (2 * (x.dim() - 1 - axis)) + [0, count - old]
    return torch.nn.functional.pad(x, pads)


@operator("STFT", host=("step", "length"))
def stft(
    signal: Tensor, step: Host, window: Tensor | None = None, length: Host | None = None, *, onesided: int = 1
) -> Tensor:
    """[batch, frames, frequencies, 2]: transforms of windows of the signal, one every ``step`` samples."""
    width: Any = window.shape[0] if length is None and window is not None else length.item if length else None
    flat = signal[..., 0] if signal.dim() == 3 else signal
    stride = step.item

    def frames(x: Tensor) -> Tensor:
        parts = x.unfold(-1, width, stride)
        return parts if window is None else parts * window

    parts = [frames(flat).unsqueeze(-1)]
    if signal.dim() == 3 and isinstance(signal.shape[-1], int) and signal.shape[-1] == 2:
        parts.append(frames(signal[..., 1]).unsqueeze(-1))
    return _transform(torch.cat(parts, -1), None, -2, 0, onesided)


def _window(*coefficients: float) -> Callable[..., Tensor]:
    """A sum of cosines with alternating signs over the window."""

    def make(size: Host, *, output_datatype: int | None = None, periodic: int = 1) -> Tensor:
        from .model_file import DTYPES

        dtype = DTYPES[output_datatype] if output_datatype else torch.float32
        count = size.item
        turn = torch.arange(count, dtype=torch.float64) * (2 * math.pi / (count if periodic else count - 1))
        result = torch.full([count], coefficients[0], dtype=torch.float64)
        for order, each in enumerate(coefficients[1:], 1):
            result = result + (-1) ** order * each * torch.cos(order * turn)
        return result.to(dtype)

    return make


operator("HannWindow", host=("size",))(_window(0.5, 0.5))
operator("HammingWindow", host=("size",))(_window(25 / 46, 21 / 46))
operator("BlackmanWindow", host=("size",))(_window(0.42, 0.5, 0.08))


@operator("MelWeightMatrix", host=("bins", "length", "rate", "lower", "upper"))
def mel_weight_matrix(
    bins: Host, length: Host, rate: Host, lower: Host, upper: Host, *, output_datatype: int | None = None
) -> Tensor:
    """[spectrum bins, mel bins]: triangles whose corners are evenly spaced on the mel scale."""
    from .model_file import DTYPES

    def mel(hertz: float) -> float:
        return 2595 * math.log10(1 + hertz / 700)

    count, size = int(bins.item), int(length.item)
    low, high = mel(lower.item), mel(upper.item)
    corners = [700 * (10 ** ((low + i * (high - low) / (count + 2)) / 2595) - 1) for i in range(count + 2)]
    places = [math.floor((size + 1) * hertz / rate.item) for hertz in corners]
    table = [[0.0] * count for _ in range(size // 2 + 1)]
    for i in range(count):
        left, centre, right = places[i : i + 3]
        if left == centre:
            table[centre][i] = 1.0
        for row in range(left, centre + 1) if left != centre else ():
            table[row][i] = (row - left) / (centre - left)
        for row in range(centre, right) if right != centre else ():
            table[row][i] = (right - row) / (right - centre)
    return torch.tensor(table, dtype=DTYPES[output_datatype] if output_datatype else torch.float32)
