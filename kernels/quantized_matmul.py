"""A product of quantised matrices whose result is quantised again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .define import operator
from .integer_matmul import of_rows
from .quantization import requantized, shifted, standard

if TYPE_CHECKING:
    import onnx_ir
    from torch import fx

    from ..ir.to_onnx.translate import Translator


def _macs(node: fx.Node) -> Any:
    from ..ir.cost_rules import product, sizes

    return product(sizes(node)) * sizes(node.args[0])[-1]


def _to_onnx(t: Translator, node: fx.Node, *inputs: onnx_ir.Value, **options: Any) -> Any:
    real = node.args[1].meta["val"].dtype  # type: ignore[union-attr]
    if not standard(node) or (real != torch.float32 and t.opset < 21):
        return NotImplemented
    return t.node("QLinearMatMul", list(inputs), {}, 10 if real == torch.float32 else 21)[0]


@operator(
    "quantized_matmul(Tensor a, Tensor a_scale, Tensor a_zero_point, Tensor b, Tensor b_scale, Tensor b_zero_point,"
    ' Tensor scale, Tensor zero_point, *, str rounding="half-even") -> Tensor',
    macs=_macs,
    to_onnx=_to_onnx,
)
def quantized_matmul(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    a_zero_point: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    b_zero_point: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    *,
    rounding: str = "half-even",
) -> torch.Tensor:
    """The product of what ``a`` and ``b`` stand for, quantised with ``scale`` and ``zero_point``.

    Args:
        a: [..., M, K], int8 or uint8; its scale and zero point have one element, [M], or [..., M, 1].
        a_scale: of a.
        a_zero_point: of a.
        b: [..., K, N], int8 or uint8; its scale and zero point have one element, [N], or [..., 1, N].
        b_scale: of b.
        b_zero_point: of b.
        scale: of the result.
        zero_point: of the result, in the result's type.
        rounding: one of `quantization.ROUNDINGS`.

    Returns:
        [..., M, N].
    """
    total = shifted(a, of_rows(a_zero_point)) @ shifted(b, b_zero_point)
    columns = of_rows(a_scale)
    assert columns is not None
    return requantized(total, columns.double() * b_scale.double() / scale.double(), zero_point, rounding)
