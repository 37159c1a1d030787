"""Type promotion: which operands of an operator must be cast before ONNX, which promotes nothing, can take them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

Cast = Callable[[Any, torch.dtype], Any]


@cache
def _rules() -> Any:
    from torch.onnx._internal.fx.passes.type_promotion import TypePromotionTable

    return TypePromotionTable()


def widened(node: fx.Node) -> dict[int | str, torch.dtype]:
    """The operands of a bfloat16 elementwise operator, all to be float32; empty for any other operator.

    PyTorch computes these in float32 and rounds the result, and ONNX Runtime's CPU provider has none in bfloat16.
    """
    target, result = node.target, node.meta.get("val")
    if not isinstance(target, torch._ops.OpOverload) or not isinstance(result, torch.Tensor):
        return {}
    rule = _rules().get_rule(target.overloadpacket)
    if result.dtype != torch.bfloat16 or rule is None:
        return {}
    positions = getattr(rule, "promote_args_positions", None) or (0,)
    return {i: torch.float32 for i in positions if i < len(node.args)}


def promoted(node: fx.Node) -> dict[int | str, torch.dtype]:
    """The element type that each positional (by index) or keyword (by name) operand must have; empty when all fit."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return {}
    leaves = [_value(leaf) for leaf in pytree.tree_leaves((node.args, dict(node.kwargs)))]
    dtypes = {leaf.dtype for leaf in leaves if isinstance(leaf, torch.Tensor)}
    result = node.meta.get("val")
    symbolic = any(isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool)) for leaf in leaves)
    if len(dtypes) == 1 and not symbolic and isinstance(result, torch.Tensor) and result.dtype in dtypes:
        return {}
    rule = _rules().get_rule(target.overloadpacket)
    if rule is None or not dtypes:
        return {}
    args = pytree.tree_map(_value, node.args)
    kwargs = pytree.tree_map(_value, dict(node.kwargs))
    try:
        snapshot = rule.preview_type_promotion(args, kwargs)
    except (AssertionError, ValueError):
        return {}  # a rule for another overload of the operator (a reduction over everything, say)
    half = (torch.float16, torch.bfloat16)
    wanted = {
        key: snapshot.out_dtype if snapshot.out_dtype in half and dtype == torch.float32 else dtype
        for key, dtype in {**snapshot.args_dtypes, **snapshot.kwargs_dtypes}.items()
    }
    given = {**dict(enumerate(args)), **kwargs}
    return {
        key: dtype
        for key, dtype in wanted.items()
        if dtype is not None and any(_differs(leaf, dtype) for leaf in pytree.tree_leaves(given.get(key)))
    }


def number_as(value: Any, dtype: torch.dtype) -> Any:
    """A Python number as one of the kind that ``dtype`` holds."""
    if dtype == torch.bool:
        return bool(value)
    return float(value) if dtype.is_floating_point else int(value) if not dtype.is_complex else value


def _value(leaf: Any) -> Any:
    return leaf.meta.get("val") if isinstance(leaf, fx.Node) else leaf


def _differs(leaf: Any, dtype: torch.dtype) -> bool:
    if isinstance(leaf, torch.Tensor):
        return leaf.dtype != dtype
    return isinstance(leaf, (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))
