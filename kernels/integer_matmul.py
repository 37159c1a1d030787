"""Products of matrices of 8-bit integers, summed without loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .define import operator
from .quantization import shifted

if TYPE_CHECKING:
    import onnx_ir
    from torch import fx

    from ..ir.to_onnx.translate import Translator


def _macs(node: fx.Node) -> Any:
    from ..ir.cost_rules import product, sizes

    return product(sizes(node)) * sizes(node.args[0])[-1]


def _to_onnx(t: Translator, node: fx.Node, *inputs: onnx_ir.Value | None) -> Any:
    return t.recorder.op("MatMulInteger", *inputs)


def of_rows(zero_point: torch.Tensor | None) -> torch.Tensor | None:
    """A zero point for each row of the left matrix, as a column."""
    return zero_point.unsqueeze(-1) if zero_point is not None and zero_point.dim() == 1 else zero_point


@operator(
    "integer_matmul(Tensor a, Tensor b, Tensor? a_zero_point=None, Tensor? b_zero_point=None) -> Tensor",
    macs=_macs,
    to_onnx=_to_onnx,
)
def integer_matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    a_zero_point: torch.Tensor | None = None,
    b_zero_point: torch.Tensor | None = None,
) -> torch.Tensor:
    """``(a - a_zero_point) @ (b - b_zero_point)`` in int32.

    Args:
        a: [..., M, K], int8 or uint8.
        b: [..., K, N], int8 or uint8.
        a_zero_point: one element, [M], or [..., M, 1]; None: 0.
        b_zero_point: one element, [N], or [..., 1, N]; None: 0.

    Returns:
        [..., M, N].
    """
    return (shifted(a, of_rows(a_zero_point)) @ shifted(b, b_zero_point)).to(torch.int32)
