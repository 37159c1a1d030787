"""Operators of ours, ``graphlathe::*``, for what ATen has no word for. One operator per file."""

from typing import TYPE_CHECKING

# transformers imports any `kernels` on the path, to ask its version; in a checkout that is this folder under another
# name, where defining the operators once more would be an error.
if TYPE_CHECKING or __name__ == "graphlathe.kernels":
    from .attention import attention
    from .define import NAMESPACE, OPERATORS, Operator, operator
    from .expert_linear import expert_linear
    from .gated_activation import gated_activation
    from .rotary_embedding import rotary_embedding

    __all__ = [
        "NAMESPACE",
        "OPERATORS",
        "Operator",
        "attention",
        "expert_linear",
        "gated_activation",
        "operator",
        "rotary_embedding",
    ]
