"""Weights as ONNX tensors that are read only when written, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir._core import TensorBase as _TensorBase
from torch.onnx._internal.exporter import _core

from ..errors import ExportError
from ..weights import Weight


def onnx_dtype(dtype: torch.dtype) -> ir.DataType:
    """The ONNX element type of a PyTorch one.

    Raises:
        ExportError: ONNX has none.
    """
    try:
        return _core.torch_dtype_to_onnx_dtype(dtype)
    except KeyError:
        raise ExportError(f"ONNX has no element type for {dtype}", remedy="cast the value before export") from None


class WeightTensor(_TensorBase):
    """An ONNX tensor over a lazy weight; complex numbers are stored as pairs of reals.

    Attributes:
        weight: where the numbers come from.
    """

    def __init__(self, name: str, weight: Weight) -> None:
        super().__init__(name=name)
        self.weight = weight
        pairs = weight.dtype.is_complex
        self._dtype = onnx_dtype(weight.dtype.to_real() if pairs else weight.dtype)
        self._shape = ir.Shape([*weight.shape, 2] if pairs else list(weight.shape), frozen=True)

    @property
    def dtype(self) -> ir.DataType:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The element type."""
        return self._dtype

    @property
    def shape(self) -> ir.Shape:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The shape."""
        return self._shape

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers."""
        return self.weight.nbytes

    @property
    def raw(self) -> Weight:
        """The weight itself."""
        return self.weight

    def numpy(self) -> np.ndarray[Any, Any]:
        """Materialize."""
        return np.frombuffer(self.tobytes(), dtype=self.dtype.numpy()).reshape(self.shape.numpy())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return self.numpy().astype(dtype, copy=False) if dtype is not None else self.numpy()

    def tobytes(self) -> bytes:
        """The row-major little-endian bytes."""
        return b"".join(self.chunks())

    def require_numbers(self) -> None:
        """Check that the weight can be written.

        Raises:
            ExportError: it has no numbers.
        """
        if self.weight.is_meta:
            raise ExportError(
                f"the weight '{self.name}' has no numbers: the model was traced on the meta device",
                remedy="load the checkpoint itself to export it",
            )

    def chunks(self) -> Iterator[memoryview]:
        """The bytes in pieces.

        Raises:
            ExportError: the weight has no numbers.
        """
        self.require_numbers()
        return self.weight.chunks()
