"""Every operator of ours; importing this module defines them all."""

from .attention import attention
from .define import OPERATORS, Operator

__all__ = ["OPERATORS", "Operator", "attention"]
