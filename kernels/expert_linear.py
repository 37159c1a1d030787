"""Linear maps of a mixture of experts: each token's rows go through the matrices of the experts chosen for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .define import operator

if TYPE_CHECKING:
    import onnx_ir
    from torch import fx

    from ..ir.to_onnx.translate import Translator


def _macs(node: fx.Node) -> Any:
    """A vector times a matrix for each token and each of its experts."""
    from ..ir.cost_rules import product, sizes

    indices, weight = sizes(node.args[2]), sizes(node.args[1])
    return product(indices) * weight[-1] * weight[-2]


def _to_onnx(
    t: Translator,
    node: fx.Node,
    x: onnx_ir.Value,
    weight: onnx_ir.Value,
    indices: onnx_ir.Value,
    bias: onnx_ir.Value | None = None,
) -> Any:
    """A function that the file carries: for each expert, pick its rows, multiply, put the results back."""
    from ..ir.to_onnx import local_functions

    assert x.dtype is not None
    if bias is None:
        return local_functions.call(t.recorder, "ExpertLinear", x, weight, indices, dtype=x.dtype)
    return local_functions.call(t.recorder, "BiasedExpertLinear", x, weight, indices, bias, dtype=x.dtype)


@operator(
    "expert_linear(Tensor x, Tensor weight, Tensor indices, Tensor? bias=None) -> Tensor", macs=_macs, to_onnx=_to_onnx
)
def expert_linear(
    x: torch.Tensor, weight: torch.Tensor, indices: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``out[t, j] = x[t, j] @ weight[indices[t, j]] + bias[indices[t, j]]``.

    Args:
        x: [tokens, top_k, in_features], or [tokens, 1, in_features] for a row that all of a token's experts read.
        weight: [experts, in_features, out_features].
        indices: [tokens, top_k]: each token's experts.
        bias: [experts, out_features].

    Returns:
        [tokens, top_k, out_features].
    """
    rows = x.expand(*indices.shape, x.shape[-1])
    result = rows.new_zeros(*indices.shape, weight.shape[-1])
    eager = type(x) in (torch.Tensor, torch.nn.Parameter) and _get_current_dispatch_mode() is None
    for expert in range(weight.shape[0]):
        chosen = indices == expert
        if eager:
            # Only the rows of this expert: how many depends on the data, which a traced graph could not say.
            product = rows[chosen] @ weight[expert]
            result = result.masked_scatter(chosen.unsqueeze(-1), product)
        else:
            result = torch.where(chosen.unsqueeze(-1), rows @ weight[expert], result)
    return result if bias is None else result + bias[indices]
