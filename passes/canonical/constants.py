"""Small constants, whether they are written as numbers or as weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...ir.program import Program
from ...ir.rewrite import is_op

aten = torch.ops.aten


def scalar_of(program: Program, value: Any) -> float | None:
    """The one number that a value is everywhere: a number, a weight of one element, or a ``full`` of a number."""
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, fx.Node):
        return None
    if value.op == "get_attr":
        weight = program.weights.get(str(value.target))
        if weight is None or weight.dtype.is_complex or weight.is_meta or torch.Size(weight.shape).numel() != 1:
            return None
        return float(weight.tensor().reshape(()).item())
    if is_op(value, aten.full) and isinstance(value.args[1], (int, float)):
        return float(value.args[1])
    if is_op(value, aten.expand, aten.reshape, aten.unsqueeze, aten._to_copy):
        return scalar_of(program, value.args[0])
    return None
