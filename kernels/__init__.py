"""Operators of ours, ``graphlathe::*``, for what ATen has no word for. One operator per file."""

from .attention import attention
from .define import NAMESPACE, OPERATORS, Operator, operator

__all__ = ["NAMESPACE", "OPERATORS", "Operator", "attention", "operator"]
