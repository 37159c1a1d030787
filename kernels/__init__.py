"""Operators of ours, ``graphlathe::*``, for what ATen has no word for. One operator per file."""

from typing import TYPE_CHECKING

# transformers imports any `kernels` on the path, to ask its version; in a checkout that is this folder under another
# name, where defining the operators once more would be an error.
if TYPE_CHECKING or __name__ == "graphlathe.kernels":
    from .attention import attention
    from .define import NAMESPACE, OPERATORS, Operator, operator
    from .dequantize import dequantize
    from .dynamic_quantize import dynamic_quantize
    from .expert_linear import expert_linear
    from .gated_activation import gated_activation
    from .integer_conv import integer_conv
    from .integer_matmul import integer_matmul
    from .quantize import quantize
    from .quantized_conv import quantized_conv
    from .quantized_matmul import quantized_matmul
    from .rotary_embedding import rotary_embedding
    from .unpack_bits import unpack_bits

    __all__ = [
        "NAMESPACE",
        "OPERATORS",
        "Operator",
        "attention",
        "dequantize",
        "dynamic_quantize",
        "expert_linear",
        "gated_activation",
        "integer_conv",
        "integer_matmul",
        "operator",
        "quantize",
        "quantized_conv",
        "quantized_matmul",
        "rotary_embedding",
        "unpack_bits",
    ]
